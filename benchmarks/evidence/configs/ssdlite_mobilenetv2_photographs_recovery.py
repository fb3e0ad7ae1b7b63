# The same finetuning with RecoveryHook, within a sixth of its 624 steps.
_base_ = './ssdlite_mobilenetv2_photographs.py'

custom_hooks = [
    dict(type='CollapseHook', interval=25),
    dict(type='RecoveryHook', steps=100),
    dict(type='ChannelsLastHook'),
]
