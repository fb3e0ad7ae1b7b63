# Pretraining on the drawn data: the demo's detector with BN, in the setting where it collapses.
_base_ = '../../../demo/faster-rcnn_r18_fpn_bn_demo.py'

optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=20))
