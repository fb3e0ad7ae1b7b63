# The plain BN twin of the psBN demo; what BN closes cannot be recovered.
_base_ = './faster-rcnn_r18_fpn_psbn_demo.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(backbone=dict(norm_cfg=norm_cfg), neck=dict(norm_cfg=norm_cfg))
custom_hooks = [dict(type='CollapseHook', interval=50)]
