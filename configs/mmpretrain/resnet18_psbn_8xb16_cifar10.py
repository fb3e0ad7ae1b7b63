_base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py', '../psbn/_base_/psbn.py']

model = dict(backbone=dict(norm_cfg=dict(type='psBN', requires_grad=True)))
