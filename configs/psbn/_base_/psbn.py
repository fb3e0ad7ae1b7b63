# What every psBN config adds to its baseline: the package, the counting of collapsed filters, and
# the recovery of closed ones.
custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)
custom_hooks = [
    dict(type='CollapseHook', interval=50),
    dict(type='RecoveryHook', steps=500),
]
