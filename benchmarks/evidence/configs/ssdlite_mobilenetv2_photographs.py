# MMDetection's SSDLite on photographs of blood cells, from ImageNet weights.
_base_ = 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'

custom_imports = dict(imports=['psbn_mmdet', 'ssd_on_cpus'], allow_failed_imports=False)
custom_hooks = [dict(type='CollapseHook', interval=25), dict(type='ChannelsLastHook')]

norm_cfg = dict(type='BN', eps=0.001, momentum=0.03)
model = dict(
    backbone=dict(
        norm_cfg=norm_cfg,
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='mobilenet_v2.pth'),
    ),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg, num_classes=3),
)

data_root = '../shared/data/bccd/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        times=1,
        dataset=dict(
            data_root=data_root,
            metainfo=metainfo,
            ann_file='annotations/train.json',
            data_prefix=dict(img='images/'),
        ),
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/'),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

# The baseline's learning rate for 192 images, 0.015, scaled to 8, and its weight decay.
optim_wrapper = dict(optimizer=dict(lr=0.000625))
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', begin=0, T_max=max_epochs, end=max_epochs, eta_min=0),
]
