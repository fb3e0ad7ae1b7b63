"""Each config differs from its baseline in what its name says, and trains."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import mmengine
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONFIG_DIR = Path(__file__).resolve().parents[1] / 'configs' / 'psbn'
CONFIGS = sorted(path.stem for path in CONFIG_DIR.glob('*.py'))
ADDED = {'custom_imports': dict(imports=['psbn_mmdet'], allow_failed_imports=False)}
COUNTING = dict(type='CollapseHook', interval=50)
RECOVERY = dict(type='RecoveryHook', steps=500)
CHANGED = {
    'bn': {'custom_hooks': [COUNTING]},
    'psbn': {
        'model.backbone.norm_cfg.type': 'psBN',
        'custom_hooks': [COUNTING, RECOVERY],
    },
    'pssyncbn': {
        'model.backbone.norm_cfg.type': 'psSyncBN',
        'model.backbone.norm_eval': False,
        'custom_hooks': [COUNTING, RECOVERY],
    },
}


def load(name: str) -> Config:
    return Config.fromfile(CONFIG_DIR / f'{name}.py')


def norm_of(name: str) -> str:
    return name.split('_')[3]


def baseline_of(name: str) -> Config:
    folder = name.split('_')[0].replace('-', '_')
    return get_config(f'mmdet::{folder}/{name.replace(f"_{norm_of(name)}_", "_")}.py')


def without_scope(value: Any) -> Any:
    """``value`` in plain types, without the ``_scope_`` that MMEngine writes into merged dicts."""
    if isinstance(value, Config):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: without_scope(child) for key, child in value.items() if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(without_scope(child) for child in value)
    return value


def norms_in(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def test_there_are_configs_for_both_detectors_depths_and_schedules():
    psbn = {
        f'{detector}_{depth}_fpn_psbn_{schedule}_coco'
        for detector in ('faster-rcnn', 'retinanet')
        for depth in ('r50', 'r101')
        for schedule in ('1x', '2x')
    }
    twins = {
        f'{detector}_r50_fpn_{norm}_1x_coco'
        for detector in ('faster-rcnn', 'retinanet')
        for norm in ('bn', 'pssyncbn')
    }
    assert set(CONFIGS) == psbn | twins


def test_metafile_and_readme_list_every_config():
    metafile = mmengine.load(CONFIG_DIR / 'metafile.yml')
    assert sorted(model['Name'] for model in metafile['Models']) == CONFIGS
    for model in metafile['Models']:
        assert (CONFIG_DIR.parents[1] / model['Config']).stem == model['Name']
        assert model['Metadata']['Epochs'] == load(model['Name']).train_cfg.max_epochs
    links = re.findall(r'\(\./(\S+)\.py\)', (CONFIG_DIR / 'README.md').read_text())
    assert sorted(links) == CONFIGS


@pytest.mark.parametrize('name', CONFIGS)
def test_config_differs_from_its_baseline_only_as_its_name_says(name):
    expected = baseline_of(name)
    expected.merge_from_dict({**ADDED, **CHANGED[norm_of(name)]})
    assert without_scope(load(name)) == without_scope(expected)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_config_trains_two_iterations(name, shrink, tmp_path):
    cfg = load(name)
    shrink(cfg)
    cfg.merge_from_dict(
        {
            'work_dir': str(tmp_path),
            'train_cfg.max_epochs': 1,
            'val_dataloader': None,
            'val_cfg': None,
            'val_evaluator': None,
            'default_hooks.checkpoint': None,
        }
    )
    runner = Runner.from_cfg(cfg)
    norms = norms_in(runner.model)
    assert {type(norm) for norm in norms} == {MODELS.get(cfg.model.backbone.norm_cfg.type)}
    trained = [norm for norm in norms if norm.weight.requires_grad]
    assert trained
    before = [norm.running_mean.clone() for norm in trained]

    runner.train()

    assert runner.iter == 2
    state = runner.optim_wrapper.optimizer.state
    for norm, running_mean in zip(trained, before):
        assert state[norm.bias]['momentum_buffer'].any()
        assert torch.equal(norm.running_mean, running_mean) == cfg.model.backbone.norm_eval
    log = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    scalars = json.loads(log[-1])
    assert math.isfinite(scalars['loss'])
    assert 'collapse/collapsed' in scalars
    assert ('collapse/recovered' in scalars) == (norm_of(name) != 'bn')


def test_pretrained_bn_weights_keep_their_function(tmp_path):
    name = 'faster-rcnn_r50_fpn_psbn_1x_coco'
    bn_cfg = baseline_of(name).model.backbone
    bn_cfg.init_cfg = None
    bn_backbone = MODELS.build(bn_cfg)
    bn_backbone.eval()
    for norm in norms_in(bn_backbone):
        nn.init.uniform_(norm.bias, -1, 1)
    torch.save(bn_backbone.state_dict(), tmp_path / 'bn.pth')

    cfg = load(name).model.backbone
    cfg.init_cfg.checkpoint = str(tmp_path / 'bn.pth')
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    backbone.eval()

    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), bn_backbone(images), rtol=1e-3, atol=1e-3)
