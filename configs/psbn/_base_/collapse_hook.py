# What the BN twins add to their baselines: the package, and the counting of collapsed filters.
custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)
custom_hooks = [dict(type='CollapseHook', interval=50)]
