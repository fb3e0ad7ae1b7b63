# Pretraining on the drawn data: the demo's detector with BN, whose filters collapse.
_base_ = '../../../demo/faster-rcnn_r18_fpn_bn_demo.py'
