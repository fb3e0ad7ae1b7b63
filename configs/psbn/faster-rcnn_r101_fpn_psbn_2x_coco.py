_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py', './_base_/psbn.py']

model = dict(backbone=dict(norm_cfg=dict(type='psBN')))
