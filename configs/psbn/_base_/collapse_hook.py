# What every config here adds to its baseline: the package, and the counting of collapsed filters.
custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)
custom_hooks = [dict(type='CollapseHook', interval=50)]
