"""The switch: every BN of MMDetection's own configs reached, and the config that says it."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import build_optim_wrapper
from models import build, norms
from torch import nn

import psbn_mmdet  # noqa: F401
from psbn_mmdet.configs.norm_switch import switch_config
from psbn_mmdet.configs.reading import ConfigError, load_config
from psbn_mmdet.layers import (
    PostShiftedBatchNorm,
    PostShiftedSyncBatchNorm,
    switch_norms,
)


def test_the_switch_goes_back():
    name = 'yolov3_mobilenetv2_8xb24-320-300e_coco'
    cfg = load_config(name)
    before = build(cfg)
    switch_config(cfg, 'psBN')
    lines = switch_config(cfg, 'BN')
    assert any('psBN -> BN' in line for line in lines)
    after = build(cfg)
    assert {n: type(m) for n, m in norms(before).items()} == {
        n: type(m) for n, m in norms(after).items()
    }
    assert not any(m.bias.any() for m in norms(after).values())
    assert cfg.model.type == 'YOLOV3'
    assert 'RecoveryHook' not in [hook['type'] for hook in cfg.custom_hooks]


def test_a_scope_is_kept_to():
    cfg = load_config('yolof_r50-c5_8xb8-1x_coco')
    lines = switch_config(cfg, 'psBN', 'neck')
    assert '  neck: 14 BN -> psBN' in lines
    assert '  backbone: 53 BN left (outside the scope)' in lines
    found = norms(build(cfg))
    assert {n.split('.')[0] for n, m in found.items() if isinstance(m, PostShiftedBatchNorm)} == {
        'neck'
    }


def test_watching_leaves_the_model_as_it_is():
    cfg = load_config('retinanet_r50_fpn_1x_coco')
    model = copy.deepcopy(cfg.model)
    assert switch_config(cfg, None, watch=True) == []
    assert cfg.model == model
    assert [hook['type'] for hook in cfg.custom_hooks] == ['CollapseHook']
    assert cfg.custom_imports['imports'] == ['psbn_mmdet']


def test_hooks_and_imports_that_are_there_are_kept():
    cfg = load_config('rtmdet_tiny_8xb32-300e_coco')
    kinds = [hook['type'] for hook in cfg.custom_hooks]
    assert 'EMAHook' in kinds
    cfg.custom_imports = dict(imports='mmdet.models', allow_failed_imports=True)
    cfg.custom_hooks.append(dict(type='CollapseHook', interval=7))
    switch_config(cfg, 'psBN')
    assert [h['type'] for h in cfg.custom_hooks] == [*kinds, 'CollapseHook', 'RecoveryHook']
    assert cfg.custom_hooks[-2].interval == 7
    assert cfg.custom_imports == dict(
        imports=['mmdet.models', 'psbn_mmdet'], allow_failed_imports=True
    )


def test_hooks_may_be_objects_and_must_be_a_list():
    cfg = load_config('retinanet_r18_fpn_1x_coco')
    cfg.custom_hooks = [EMAHook()]
    switch_config(cfg, None, watch=True)
    assert isinstance(cfg.custom_hooks[0], EMAHook)
    assert cfg.custom_hooks[1].type == 'CollapseHook'
    cfg = load_config('retinanet_r18_fpn_1x_coco', {'custom_hooks.0.interval': 1})
    with pytest.raises(ConfigError, match=r"custom_hooks is \{'0'.*not a list of hooks"):
        switch_config(cfg, None, watch=True)


@pytest.mark.parametrize(
    ('name', 'chosen', 'words'),
    [
        ('retinanet_r50_fpn_1x_coco', ('BN',), 'there is no psBN to replace'),
        ('retinanet_swin-t-p4-w7_fpn_1x_coco', ('psBN',), 'there is no BN to replace'),
        ('retinanet_r50_fpn_1x_coco', ('psBN', 'neck'), 'give one of backbone'),
        ('retinanet_r50_fpn_1x_coco', (None, 'neck'), '--norm-scope is for --norm'),
    ],
)
def test_what_has_nothing_to_replace_is_told_so(name, chosen, words):
    with pytest.raises(ConfigError, match=words):
        switch_config(load_config(name), *chosen)


@pytest.mark.parametrize('wrong', [dict(type='NoDetector'), dict(extra=1), dict(backbone=3)])
def test_a_model_that_cannot_be_built_is_told_so(wrong):
    cfg = load_config('retinanet_r50_fpn_1x_coco')
    cfg.model.update(wrong)
    with pytest.raises(ConfigError, match='the model of the config cannot be built'):
        switch_config(cfg, 'psBN')


def test_what_is_sync_stays_so_and_what_is_no_bn_of_torch_is_left():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        nn.SyncBatchNorm(2), Own(2), nn.BatchNorm2d(2, affine=False), nn.GroupNorm(1, 2)
    )
    left = switch_norms(model, 'psBN')
    assert type(model[0]) is PostShiftedSyncBatchNorm
    assert set(left) == {'1', '2'} and 'Own is a class of its own' in left['1']
    assert left['2'] == 'without gamma or bias'


def test_mmcvs_sync_bn_becomes_pssyncbn(tmp_path):
    from mmcv.ops import SyncBatchNorm

    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1
    )
    try:
        layer = SyncBatchNorm(4, eps=1e-3, momentum=0.2)
    finally:
        torch.distributed.destroy_process_group()
    model = nn.Sequential(layer)
    switch_norms(model, 'psBN')
    assert type(model[0]) is PostShiftedSyncBatchNorm
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.2)
    assert model[0].weight is layer.weight


def test_a_config_of_mmcvs_sync_bn_needs_no_process_group():
    cfg = load_config('retinanet_r18_fpn_1x_coco')
    cfg.model.backbone.norm_cfg = dict(type='MMSyncBN', requires_grad=True)
    cfg.model.neck.norm_cfg = dict(type='MMSyncBN')
    switch_config(cfg, 'psBN', 'backbone')
    assert cfg.model.backbone.norm_cfg == dict(type='MMSyncBN', requires_grad=True)
    assert cfg.model.switches == [dict(norm='psBN', scope='backbone')]


def test_norms_that_have_loaded_weights_keep_their_function():
    model = nn.Sequential(nn.BatchNorm2d(3))
    nn.init.normal_(model[0].bias)
    x = torch.randn(4, 3, 5, 5)
    before = model(x)
    switch_norms(model, 'psBN')
    torch.testing.assert_close(model(x), before)


def test_a_layer_that_stands_twice_is_one_layer():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(norm), norm)
    switch_norms(model, 'psBN')
    assert model[0][0] is model[1] and isinstance(model[1], PostShiftedBatchNorm)


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        'retinanet_r50_fpn_1x_coco',
        'retinanet_r50_fpn_1x_coco.py',
    ],
)
def test_configs_of_the_zoo_go_by_their_names(name):
    assert load_config(name).filename.endswith('retinanet/retinanet_r50_fpn_1x_coco.py')


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('retinanet_r50_fpn_1x_cocoo', 'did you mean retinanet_r50_fpn_1x_coco'),
        ('mmdet::retinanet/none.py', 'mmdet has none of that name'),
        ('nowhere::a.py', 'there is no package nowhere: install it'),
        ('configs/retinanet_r50_fpn_1x_coco.py', 'does not exist'),
    ],
)
def test_a_config_that_there_is_not_is_named(name, words):
    with pytest.raises(ConfigError, match=words):
        load_config(name)


def test_a_switched_model_under_test_time_augmentation():
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    switch_config(cfg, 'psBN')
    cfg.model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms')), module=cfg.model)
    model = build(cfg)
    assert type(model.module).__name__ == 'YOLOV3'
    assert all(isinstance(m, PostShiftedBatchNorm) for m in norms(model).values())


def test_an_optimizer_trains_what_the_switch_has_made():
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    switch_config(cfg, 'psBN')
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    trained = {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert {id(m.bias) for m in norms(model).values()} <= trained
