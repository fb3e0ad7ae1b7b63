# The tutorial's config (docs/tutorial.md): a detector of one's own, finetuned on one's own data.
_base_ = './faster-rcnn_r18_fpn_bn_demo.py'

load_from = 'work_dirs/compare/bn/epoch_16.pth'
data_root = 'data/cells/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))

model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
    ),
)
val_dataloader = dict(
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

# The learning rate and the weight decay of MMDetection's baselines, for 4 images in a step.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.005, momentum=0.9, weight_decay=0.0001),
)
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='MultiStepLR', milestones=[4, 5], by_epoch=True),
]
default_hooks = dict(checkpoint=dict(save_best=None))
custom_hooks = []  # --norm and --watch-collapse add theirs
