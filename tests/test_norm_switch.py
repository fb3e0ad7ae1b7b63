"""The switch: every BN of MMDetection's own configs reached, and the config that says it."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import psbn_mmdet  # noqa: F401
from psbn_mmdet.checkpoints import read_content, read_weights
from psbn_mmdet.layers import (
    PostShiftedBatchNorm,
    PostShiftedSyncBatchNorm,
    find_norm_states,
    switch_norms,
)
from psbn_mmdet.norm_switch import switch_config
from psbn_mmdet.preflight import PreflightError, dicts, load_config
from psbn_mmdet.records import read_records

ROOT = Path(__file__).resolve().parents[1]
# By architecture: a config, and what of it is not by norm_cfg.
FAMILIES = {
    'faster-rcnn_r50_fpn_1x_coco': False,
    'mask-rcnn_r50_fpn_1x_coco': False,
    'cascade-rcnn_r50_fpn_1x_coco': False,
    'retinanet_r50_fpn_1x_coco': False,
    'fcos_r50-caffe_fpn_gn-head_1x_coco': False,
    'atss_r50_fpn_1x_coco': False,
    'yolox_tiny_8xb8-300e_coco': False,
    'yolov3_mobilenetv2_8xb24-320-300e_coco': True,
    'yolov3_d53_8xb8-320-273e_coco': True,
    'rtmdet_tiny_8xb32-300e_coco': False,
    'ssdlite_mobilenetv2-scratch_8xb24-600e_coco': False,
    'detr_r50_8xb2-150e_coco': False,
    'dino-4scale_r50_8xb2-12e_coco': False,
    'centernet_r18_8xb16-crop512-140e_coco': True,
    'cornernet_hourglass104_8xb6-210e-mstest_coco': True,
    'fcos_hrnetv2p-w18-gn-head_4xb4-1x_coco': True,
    'solov2-light_r18_fpn_ms-3x_coco': True,
    'yolof_r50-c5_8xb8-1x_coco': True,
    'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco': False,
    'retinanet_effb3_fpn_8xb4-crop896-1x_coco': False,
    'retinanet_regnetx-1.6GF_fpn_1x_coco': False,
    'faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco': False,
    'mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco': False,
    'faster-rcnn_res2net-101_fpn_2x_coco': False,
    'retinanet_r50_nasfpn_crop640-50e_coco': False,
    'yolact_r50_1xb8-55e_coco': False,
    'panoptic-fpn_r50_fpn_1x_coco': False,
    'deformable-detr_r50_16xb2-50e_coco': False,
    'rtmdet-ins_tiny_8xb32-300e_coco': False,
    'qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval': False,
}


def options(norm: str | None = 'psBN', scope: str | None = None, watch: bool = False):
    return dict(norm=norm, scope=scope, watch=watch)


def build(cfg: Config) -> nn.Module:
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(copy.deepcopy(cfg.model))


def only_train(cfg: Config) -> None:
    for stage in ('val', 'test'):
        for key in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{stage}_{key}'] = None


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


@pytest.mark.parametrize('name', FAMILIES)
def test_every_bn_of_a_family_is_psbn_and_computes_the_same(name):
    cfg = load_config(name)
    twin = build(cfg).eval()
    lines = switch_config(cfg, **options())
    told = sum(int(line.split()[1]) for line in lines if ' -> ' in line)
    assert told == len(norms(twin))
    assert (cfg.model.type == 'SwitchNorms') == FAMILIES[name]
    model = build(Config(dict(model=Config.fromstring(cfg.pretty_text, '.py').model))).eval()
    found = norms(model)
    assert found.keys() == norms(twin).keys()
    for key, old in norms(twin).items():
        new = found[key]
        assert isinstance(new, PostShiftedBatchNorm), key
        assert (new.eps, new.momentum, new.training) == (old.eps, old.momentum, old.training)
        assert new.beta.requires_grad == old.bias.requires_grad
        assert new.beta.any().item() is False, 'it starts at the shift'
        torch.nn.init.uniform_(old.weight)
        torch.nn.init.normal_(old.bias)
    result = model.load_state_dict(twin.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {f'{key}.shift' for key in found}
    backbone, other = (
        next(m for name, m in network.named_modules() if name.split('.')[-1] == 'backbone')
        for network in (model, twin)
    )
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone(image), other(image)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    kinds = [hook['type'] for hook in cfg.custom_hooks]
    assert kinds[-2:] == ['CollapseHook', 'RecoveryHook']
    assert kinds[:-2] == [hook['type'] for hook in load_config(name).get('custom_hooks') or []]


def test_the_switch_goes_back():
    name = 'yolov3_mobilenetv2_8xb24-320-300e_coco'
    cfg = load_config(name)
    before = build(cfg)
    switch_config(cfg, **options())
    lines = switch_config(cfg, **options('BN'))
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
    lines = switch_config(cfg, **options(scope='neck'))
    assert '  neck: 14 BN -> psBN, 14 that the classes write out' in lines
    assert '  backbone: 53 BN left (outside the scope)' in lines
    found = norms(build(cfg))
    assert {n.split('.')[0] for n, m in found.items() if isinstance(m, PostShiftedBatchNorm)} == {
        'neck'
    }


def test_watching_leaves_the_model_as_it_is():
    cfg = load_config('retinanet_r50_fpn_1x_coco')
    model = copy.deepcopy(cfg.model)
    assert switch_config(cfg, **options(None, watch=True)) == []
    assert cfg.model == model
    assert [hook['type'] for hook in cfg.custom_hooks] == ['CollapseHook']
    assert cfg.custom_imports['imports'] == ['psbn_mmdet']


def test_hooks_and_imports_that_are_there_are_kept():
    cfg = load_config('rtmdet_tiny_8xb32-300e_coco')
    kinds = [hook['type'] for hook in cfg.custom_hooks]
    assert 'EMAHook' in kinds
    cfg.custom_imports = dict(imports='mmdet.models', allow_failed_imports=True)
    cfg.custom_hooks.append(dict(type='CollapseHook', interval=7))
    switch_config(cfg, **options())
    assert [h['type'] for h in cfg.custom_hooks] == [*kinds, 'CollapseHook', 'RecoveryHook']
    assert cfg.custom_hooks[-2].interval == 7
    assert cfg.custom_imports == dict(
        imports=['mmdet.models', 'psbn_mmdet'], allow_failed_imports=True
    )


def test_hooks_may_be_objects_and_must_be_a_list():
    cfg = load_config('retinanet_r18_fpn_1x_coco')
    cfg.custom_hooks = [EMAHook()]
    switch_config(cfg, **options(None, watch=True))
    assert isinstance(cfg.custom_hooks[0], EMAHook)
    assert cfg.custom_hooks[1].type == 'CollapseHook'
    cfg = load_config('retinanet_r18_fpn_1x_coco', {'custom_hooks.0.interval': 1})
    with pytest.raises(PreflightError, match=r"custom_hooks is \{'0'.*not a list of hooks"):
        switch_config(cfg, **options(None, watch=True))


@pytest.mark.parametrize(
    ('name', 'chosen', 'words'),
    [
        ('retinanet_r50_fpn_1x_coco', options('BN'), 'there is no psBN to replace'),
        ('retinanet_swin-t-p4-w7_fpn_1x_coco', options(), 'there is no BN to replace'),
        ('retinanet_r50_fpn_1x_coco', options(scope='neck'), 'give one of backbone'),
        ('retinanet_r50_fpn_1x_coco', options(None, 'neck'), '--norm-scope is for --norm'),
    ],
)
def test_what_has_nothing_to_replace_is_told_so(name, chosen, words):
    with pytest.raises(PreflightError, match=words):
        switch_config(load_config(name), **chosen)


@pytest.mark.parametrize('wrong', [dict(type='NoDetector'), dict(extra=1), dict(backbone=3)])
def test_a_model_that_cannot_be_built_is_told_so(wrong):
    cfg = load_config('retinanet_r50_fpn_1x_coco')
    cfg.model.update(wrong)
    with pytest.raises(PreflightError, match='the model of the config cannot be built'):
        switch_config(cfg, **options())


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
    switch_config(cfg, **options(scope='backbone'))
    assert cfg.model.backbone.norm_cfg == dict(type='psSyncBN', requires_grad=True)
    assert cfg.model.neck.norm_cfg == dict(type='MMSyncBN')


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


# As a user runs it


def losses(work_dir: Path) -> list[float]:
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    lines = map(json.loads, log.read_text().splitlines())
    return [line['loss'] for line in lines if 'loss' in line]


def test_training_from_the_dump_without_the_switch_is_the_same(coco_root, tmp_path):
    """By MMDetection's own script, of a model whose norms the config does not say."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='PackDetInputs'),
    ]
    dataset = dict(
        _delete_=True,
        type='CocoDataset',
        data_root=f'{coco_root}/',
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=('disc', 'square', 'triangle', 'cross')),
        pipeline=pipeline,
    )
    (tmp_path / 'own.py').write_text(
        f"""_base_ = 'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'
model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=4))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset={dataset})
val_dataloader = None
val_evaluator = None
val_cfg = None
test_dataloader = None
test_evaluator = None
test_cfg = None
train_cfg = dict(type='IterBasedTrainLoop', _delete_=True, max_iters=5)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False))
custom_hooks = [dict(type='EMAHook')]
randomness = dict(seed=0, deterministic=True)
log_processor = dict(by_epoch=False, window_size=1)
"""
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    theirs = Path(mmdet.__file__).parent / '.mim/tools/train.py'
    told = ''
    for script, config, work_dir, *switch in (
        (ROOT / 'tools/train.py', 'own.py', 'first', '--norm', 'psBN'),
        (theirs, 'first/own.py', 'second'),
    ):
        result = subprocess.run(
            [sys.executable, script, config, '--work-dir', work_dir, *switch],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        told = told or result.stdout
    assert '  backbone: 52 BN -> psBN, 52 that the classes write out' in told
    first, second = losses(tmp_path / 'first'), losses(tmp_path / 'second')
    assert len(first) == 5 and first == second
    for work_dir in ('first', 'second'):
        assert list((tmp_path / work_dir).glob('*/snapshots/iter_5.npy')), 'CollapseHook is there'
    found = find_norm_states(read_weights(tmp_path / 'second/iter_5.pth').state_dict)
    assert set(found.values()) == {'psBN'}


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', dict(failed='', switch='norm_cfg', reached=76)),
        ('yolof/yolof_r50-c5_8xb8-1x_coco.py', dict(failed='', switch='SwitchNorms', reached=73)),
        ('gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py', dict(failed='', switch='no BN')),
        (
            'carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py',
            dict(failed='baseline', stage='training step', reached=53),
        ),
    ],
)
def test_what_make_zoo_finds(name, expected):
    """A step of training and a count of all filters, or who is to blame."""
    spec = importlib.util.spec_from_file_location('zoo', ROOT / 'benchmarks/zoo.py')
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    threads = torch.get_num_threads()
    try:
        row = zoo.of_config(name)
    finally:
        torch.set_num_threads(threads)
    assert {key: row[key] for key in expected} == expected
    if row['failed'] == '' and row['switch'] != 'no BN':
        assert row['difference'] < 1e-4 and sum(row['follows'].values()) == row['reached']
        assert row['filters'] > 1000
    assert name in zoo.report([{**row, 'configs': 1}]) or not row['failed']


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
    with pytest.raises(PreflightError, match=words):
        load_config(name)


def test_averages_checkpointing_and_wrapped_data(shrink, tmp_path):
    """A backbone that runs forward twice in a step, an EMA of the model, a data set in another."""
    cfg = load_config('retinanet_r50_fpn_1x_coco')
    cfg.custom_hooks = [dict(type='CollapseHook'), dict(type='EMAHook')]
    shrink(cfg)
    cfg.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 16,
            'model.backbone.with_cp': True,
            'model.neck.in_channels': [16, 32, 64, 128],
            'train_cfg.max_epochs': 1,
            'work_dir': str(tmp_path),
        }
    )
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset
    )
    only_train(cfg)
    switch_config(cfg, **options())
    runner = Runner.from_cfg(cfg)
    runner.train()
    kinds = [type(hook).__name__ for hook in runner.hooks]
    assert {'EMAHook', 'CollapseHook', 'RecoveryHook'} <= set(kinds)
    assert all(isinstance(m, PostShiftedBatchNorm) for m in norms(runner.model).values())
    content = read_content(tmp_path / 'epoch_1.pth')
    for key in ('state_dict', 'ema_state_dict'):
        assert set(find_norm_states(content[key]).values()) == {'psBN'}


def test_a_semi_supervised_training(coco_root, tmp_path):
    """A student that is trained, and a teacher that is its average and gets no gradient."""
    cfg = load_config('soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco')
    cfg.merge_from_dict(
        {
            'model.detector.backbone.init_cfg': None,
            'model.detector.backbone.depth': 18,
            'model.detector.backbone.base_channels': 8,
            'model.detector.backbone.frozen_stages': -1,
            'model.detector.backbone.norm_eval': False,
            'model.detector.backbone.norm_cfg': dict(type='BN', requires_grad=True),
            'model.detector.neck.in_channels': [8, 16, 32, 64],
            'model.detector.roi_head.bbox_head.num_classes': 4,
            'model.detector.roi_head.bbox_head.fc_out_channels': 64,
            'model.detector.train_cfg.rpn_proposal.max_per_img': 20,
            'model.detector.train_cfg.rcnn.sampler.num': 16,
            'model.detector.test_cfg.rpn.max_per_img': 20,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.sampler.batch_size': 2,
            'train_dataloader.sampler.source_ratio': [1, 1],
            'train_cfg': dict(type='IterBasedTrainLoop', max_iters=3),
            'default_hooks.checkpoint.interval': 3,
            'custom_hooks': [dict(type='MeanTeacherHook'), dict(type='CollapseHook', interval=1)],
            'work_dir': str(tmp_path),
        }
    )
    for dataset in cfg.train_dataloader.dataset.datasets:
        dataset.update(
            data_root=f'{coco_root}/',
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=('disc', 'square', 'triangle', 'cross')),
        )
        for _, part in dicts(dataset.pipeline, ''):
            if part.get('type') == 'RandomResize':
                part['scale'] = [(96, 64), (96, 96)]
    only_train(cfg)
    switch_config(cfg, **options())
    runner = Runner.from_cfg(cfg)
    runner.train()
    found = norms(runner.model)
    assert {name.split('.')[0] for name in found} == {'student', 'teacher'}
    assert all(isinstance(norm, PostShiftedBatchNorm) for norm in found.values())
    for name, norm in runner.model.teacher.named_modules():
        if isinstance(norm, PostShiftedBatchNorm):
            student = runner.model.student.get_submodule(name)
            assert not norm.beta.requires_grad
            assert student.beta.any(), 'it is trained'
            # The average, of which the first steps take much.
            assert norm.beta.any() and (norm.beta - student.beta).abs().max() < 0.1
    (record,) = tmp_path.glob('*/collapse.jsonl')
    layers = read_records(record).header['layers']
    assert len(layers) == 40
    content = read_content(tmp_path / 'iter_3.pth')
    assert len(find_norm_states(content['state_dict'])) == 40


def test_autocasting_changes_nothing_but_rounding():
    """As AMP does, which MMEngine offers on accelerators alone: a training step in bfloat16."""
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    twin = build(cfg)
    switch_config(cfg, **options())
    model = build(cfg)
    model.load_state_dict(twin.state_dict(), strict=False)
    data = demo_mm_inputs(2, [(3, 96, 96)] * 2, num_items=[2, 2])
    losses, gradients = [], []
    for network in (model, twin):
        network.train()
        batch = network.data_preprocessor(copy.deepcopy(data), True)
        with torch.autocast('cpu', torch.bfloat16):
            loss, _ = network.parse_losses(network(**batch, mode='loss'))
        loss.backward()
        losses.append(loss.item())
        trained = [n for n in norms(network).values() if n.weight.grad is not None]
        assert len(trained) > 20
        gradients.append(torch.stack([n.weight.grad.norm() for n in trained]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.1, atol=1e-2)


def test_a_switched_model_under_test_time_augmentation():
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    switch_config(cfg, **options())
    cfg.model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms')), module=cfg.model)
    model = build(cfg)
    assert type(model.module).__name__ == 'YOLOV3'
    assert all(isinstance(m, PostShiftedBatchNorm) for m in norms(model).values())


def test_an_optimiser_trains_what_the_switch_has_made():
    """Beta is a parameter like any other: an optimiser that is built later has it."""
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    switch_config(cfg, **options())
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    trained = {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert {id(m.beta) for m in norms(model).values()} <= trained
