"""psBN and the hook in MMPretrain: a classifier on images in CIFAR-10's file format."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import read_records

pytest.importorskip('mmpretrain')
CONFIG = Path(__file__).resolve().parents[2] / 'configs/mmpretrain/resnet18_psbn_8xb16_cifar10.py'


@pytest.fixture
def torchvision_or_its_names(monkeypatch) -> None:
    """MMPretrain imports torchvision, which has no CPU build for each torch; no call is made."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        names = ['torchvision', 'torchvision.ops', 'torchvision.ops.boxes']
        names += [f'torchvision.transforms{part}' for part in ('', '.functional', '.transforms')]
        for name in names:
            module = ModuleType(name)
            module.__version__ = 'none'
            module.RandomResizedCrop = module.InterpolationMode = object
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(sys.modules[parent], child, module)


@pytest.fixture
def tiny_cifar10(torchvision_or_its_names, tmp_path) -> Iterator[Path]:
    """A folder with CIFAR-10's files, of 16 random images each, and its dataset class for them."""
    from mmpretrain.datasets import CIFAR10
    from mmpretrain.registry import DATASETS

    folder = tmp_path / 'cifar10' / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        images = rng.integers(0, 256, (16, 3 * 32 * 32), np.uint8)
        entry = dict(data=images, labels=rng.integers(0, 10, 16).tolist())
        (folder / name).write_bytes(pickle.dumps(entry))

    @DATASETS.register_module(force=True)
    class TinyCIFAR10(CIFAR10):
        # Without the checksums of the real files.
        train_list = [(name, None) for name, _ in CIFAR10.train_list]
        test_list = [(name, None) for name, _ in CIFAR10.test_list]

    yield tmp_path / 'cifar10'
    DATASETS.module_dict.pop('TinyCIFAR10')


def test_the_config_is_the_baseline_with_psbn_and_the_hook():
    cfg = Config.fromfile(CONFIG)
    baseline = Config.fromstring("_base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py']", '.py')
    assert cfg.model.backbone.pop('norm_cfg') == dict(type='psBN', requires_grad=True)
    assert cfg.pop('custom_imports').imports == ['psbn_mmdet']
    assert [hook.type for hook in cfg.pop('custom_hooks')] == ['CollapseHook', 'RecoveryHook']
    assert cfg.to_dict() == baseline.to_dict()


def test_a_classifier_trains_and_its_filters_are_counted(tiny_cifar10, tmp_path):
    cfg = Config.fromfile(CONFIG)
    options: dict = {
        'work_dir': str(tmp_path / 'work'),
        'train_cfg': dict(by_epoch=True, max_epochs=1, val_interval=1),
        'custom_hooks.0.interval': 2,
        'custom_hooks.0.window': 2,
        'default_hooks.logger.interval': 1,
        'model.backbone.stem_channels': 8,
        'model.backbone.base_channels': 8,
        'model.head.in_channels': 64,
    }
    for loader in ('train', 'val', 'test'):
        options[f'{loader}_dataloader.num_workers'] = 0
        options[f'{loader}_dataloader.persistent_workers'] = False
        options[f'{loader}_dataloader.dataset.type'] = 'TinyCIFAR10'
        options[f'{loader}_dataloader.dataset.data_root'] = str(tiny_cifar10)
    cfg.merge_from_dict(options)
    runner = Runner.from_cfg(cfg)
    runner.train()
    norms = [m for m in runner.model.modules() if isinstance(m, PostShiftedBatchNorm2d)]
    assert len(norms) == 20
    (record,) = (tmp_path / 'work').glob('*/collapse.jsonl')
    records = read_records(record)
    assert [report['iter'] for report in records.reports] == [2, 4, 5]
    assert {layer['norm'] for layer in records.header['layers']} == {'psBN'}
    rectifiers = {layer['name']: layer['rectifier'] for layer in records.header['layers']}
    assert rectifiers['backbone.layer1.0.bn1'] == 'relu'
    assert rectifiers['backbone.layer1.0.bn2'] == 'other'
    (log,) = (tmp_path / 'work').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any('collapse/collapsed' in line for line in lines)
    assert any('accuracy/top1' in line for line in lines)
