"""The switch on whole models: every BN is reached, and trainings go as they should."""

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
from limits import HANG
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.runner import Runner
from models import build, norms

import psbn_mmdet  # noqa: F401
from psbn_mmdet.checkpoints import read_content, read_weights
from psbn_mmdet.configs.norm_switch import switch_config
from psbn_mmdet.configs.reading import dicts, load_config
from psbn_mmdet.layers import (
    PostShiftedBatchNorm,
    find_norm_states,
)
from psbn_mmdet.records import read_records

ROOT = Path(__file__).resolve().parents[2]
# A config of each architecture.
FAMILIES = [
    'faster-rcnn_r50_fpn_1x_coco',
    'mask-rcnn_r50_fpn_1x_coco',
    'cascade-rcnn_r50_fpn_1x_coco',
    'retinanet_r50_fpn_1x_coco',
    'fcos_r50-caffe_fpn_gn-head_1x_coco',
    'atss_r50_fpn_1x_coco',
    'yolox_tiny_8xb8-300e_coco',
    'yolov3_mobilenetv2_8xb24-320-300e_coco',
    'yolov3_d53_8xb8-320-273e_coco',
    'rtmdet_tiny_8xb32-300e_coco',
    'ssdlite_mobilenetv2-scratch_8xb24-600e_coco',
    'detr_r50_8xb2-150e_coco',
    'dino-4scale_r50_8xb2-12e_coco',
    'centernet_r18_8xb16-crop512-140e_coco',
    'cornernet_hourglass104_8xb6-210e-mstest_coco',
    'fcos_hrnetv2p-w18-gn-head_4xb4-1x_coco',
    'solov2-light_r18_fpn_ms-3x_coco',
    'yolof_r50-c5_8xb8-1x_coco',
    'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco',
    'retinanet_effb3_fpn_8xb4-crop896-1x_coco',
    'retinanet_regnetx-1.6GF_fpn_1x_coco',
    'faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco',
    'mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco',
    'faster-rcnn_res2net-101_fpn_2x_coco',
    'retinanet_r50_nasfpn_crop640-50e_coco',
    'yolact_r50_1xb8-55e_coco',
    'panoptic-fpn_r50_fpn_1x_coco',
    'deformable-detr_r50_16xb2-50e_coco',
    'rtmdet-ins_tiny_8xb32-300e_coco',
    'qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval',
]


def only_train(cfg: Config) -> None:
    for stage in ('val', 'test'):
        for key in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{stage}_{key}'] = None


@pytest.mark.parametrize('name', FAMILIES)
def test_every_bn_of_a_family_is_psbn_and_computes_the_same(name):
    cfg = load_config(name)
    twin = build(cfg).eval()
    lines = switch_config(cfg, 'psBN')
    told = sum(int(line.split()[1]) for line in lines if ' -> ' in line)
    assert told == len(norms(twin))
    assert cfg.model.type == 'SwitchNorms' and cfg.model.switches == [dict(norm='psBN')]
    model = build(Config(dict(model=Config.fromstring(cfg.pretty_text, '.py').model))).eval()
    found = norms(model)
    assert found.keys() == norms(twin).keys()
    for key, old in norms(twin).items():
        new = found[key]
        assert isinstance(new, PostShiftedBatchNorm), key
        assert (new.eps, new.momentum, new.training) == (old.eps, old.momentum, old.training)
        assert new.bias.requires_grad == old.bias.requires_grad
        assert torch.equal(new.bias, torch.full_like(new.bias, 0.1)), 'it starts at the shift'
        torch.nn.init.uniform_(old.weight)
        torch.nn.init.normal_(old.bias)
    model.load_state_dict(twin.state_dict(), strict=True)
    backbone, other = (
        next(m for name, m in network.named_modules() if name.split('.')[-1] == 'backbone')
        for network in (model, twin)
    )
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone(image), other(image)):
            assert torch.equal(ours, theirs)
    kinds = [hook['type'] for hook in cfg.custom_hooks]
    assert kinds[-2:] == ['CollapseHook', 'RecoveryHook']
    assert kinds[:-2] == [hook['type'] for hook in load_config(name).get('custom_hooks') or []]


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
            timeout=HANG,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        told = told or result.stdout
    assert '  backbone: 52 BN -> psBN' in told
    first, second = losses(tmp_path / 'first'), losses(tmp_path / 'second')
    assert len(first) == 5 and first == second
    for work_dir in ('first', 'second'):
        assert list((tmp_path / work_dir).glob('*/snapshots/iter_5.npy')), 'CollapseHook is there'
    states = read_weights(tmp_path / 'second/iter_5.pth').state_dict
    assert all((states[f'{n}.bias'] - 0.1).abs().max() < 0.02 for n in find_norm_states(states))


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', dict(failed='', switch='psBN', reached=76)),
        ('yolof/yolof_r50-c5_8xb8-1x_coco.py', dict(failed='', switch='psBN', reached=73)),
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
        assert sum(row['follows'].values()) == row['reached']
        assert row['filters'] > 1000
    assert '1 configs, 1 models' in zoo.report('3.3.0', [{**row, 'configs': 1}])


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
    switch_config(cfg, 'psBN')
    runner = Runner.from_cfg(cfg)
    runner.train()
    kinds = [type(hook).__name__ for hook in runner.hooks]
    assert {'EMAHook', 'CollapseHook', 'RecoveryHook'} <= set(kinds)
    assert all(isinstance(m, PostShiftedBatchNorm) for m in norms(runner.model).values())
    content = read_content(tmp_path / 'epoch_1.pth')
    for key in ('state_dict', 'ema_state_dict'):
        states = content[key]
        biases = [states[f'{name}.bias'] for name in find_norm_states(states)]
        assert biases and all((bias - 0.1).abs().max() < 0.02 for bias in biases)


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
    switch_config(cfg, 'psBN')
    runner = Runner.from_cfg(cfg)
    runner.train()
    found = norms(runner.model)
    assert {name.split('.')[0] for name in found} == {'student', 'teacher'}
    assert all(isinstance(norm, PostShiftedBatchNorm) for norm in found.values())
    moved = []
    for name, norm in runner.model.teacher.named_modules():
        if isinstance(norm, PostShiftedBatchNorm):
            student = runner.model.student.get_submodule(name)
            assert not norm.bias.requires_grad
            moved.append((student.bias - 0.1).any())
            assert (norm.bias - student.bias).abs().max() < 0.01, 'it is the average'
    assert any(moved), 'the student is trained'
    (record,) = tmp_path.glob('*/collapse.jsonl')
    layers = read_records(record).header['layers']
    assert len(layers) == 40
    content = read_content(tmp_path / 'iter_3.pth')
    assert len(find_norm_states(content['state_dict'])) == 40


def test_autocasting_changes_nothing_but_rounding():
    """As AMP does, which MMEngine offers on accelerators alone: a training step in bfloat16."""
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    twin = build(cfg)
    switch_config(cfg, 'psBN')
    model = build(cfg)
    model.load_state_dict(twin.state_dict())
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
