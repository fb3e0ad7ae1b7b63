# Finetuning on photographs of blood cells: the tutorial's training, counted as the pretraining is.
_base_ = '../../../demo/faster-rcnn_r18_fpn_cells.py'

custom_hooks = [dict(type='CollapseHook', interval=50)]
