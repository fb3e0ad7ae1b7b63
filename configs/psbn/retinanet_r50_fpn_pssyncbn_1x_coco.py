_base_ = './retinanet_r50_fpn_psbn_1x_coco.py'

model = dict(backbone=dict(norm_cfg=dict(type='psSyncBN'), norm_eval=False))
