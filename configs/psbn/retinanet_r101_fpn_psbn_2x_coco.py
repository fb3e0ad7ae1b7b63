_base_ = ['mmdet::retinanet/retinanet_r101_fpn_2x_coco.py', './_base_/psbn.py']

model = dict(backbone=dict(norm_cfg=dict(type='psBN')))
