"""--shrink: how much gamma and beta are decayed, and whether the training is long enough."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import MultiStepLR, OptimWrapper
from torch import nn

from psbn_mmdet.configs.reading import ConfigError, load_config
from psbn_mmdet.pruning import shrink_config
from psbn_mmdet.recovery.forecast import e_foldings, read_schedule


@pytest.mark.parametrize(
    ('make', 'rate'),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), 1e-3),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), 1e-2),
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01), 1e-3),
    ],
)
def test_e_foldings_are_those_of_a_training(make, rate):
    gamma = nn.Parameter(torch.ones(1))
    optimizer = make([gamma])
    scheduler = MultiStepLR(optimizer, milestones=[400], by_epoch=False)
    wrapper = OptimWrapper(optimizer)
    schedule = read_schedule(wrapper, [scheduler], [gamma], 600, None)
    found = e_foldings(schedule)
    for _ in range(600):
        gamma.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(-math.log(float(gamma)), rel=1e-3)
    assert found == pytest.approx(400 * rate + 200 * rate / 10, rel=0.1)


@pytest.fixture(scope='module')
def loaded_cfg(shrink) -> Config:
    cfg = load_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    cfg.custom_hooks = [dict(type='DataCheckHook')]
    shrink(cfg)
    cfg.custom_hooks = [dict(type='DataCheckHook')]
    cfg.param_scheduler = []
    cfg.optim_wrapper.optimizer.lr = 0.02
    return cfg


@pytest.fixture
def cfg(loaded_cfg) -> Config:
    return deepcopy(loaded_cfg)


def test_a_short_training_is_told_of(cfg):
    lines = shrink_config(cfg, None)  # 2 iterations in each of 12 epochs
    assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == pytest.approx(1000)
    assert cfg.custom_hooks[-1]['type'] == 'CollapseHook'
    assert '15 BN are decayed by 0.1, 1,000 times as much as all else; 5 are frozen' in lines[0]
    assert 'shrinks by 0.3 e-foldings' in lines[1]
    assert 'too few for filters to vanish: 16 take' in lines[2]


def test_a_long_one_decays_no_more_than_it_needs(cfg):
    cfg.train_cfg.max_epochs = 1000
    lines = shrink_config(cfg, None)
    assert len(lines) == 2 and 'shrinks by 16.0 e-foldings' in lines[1]
    assert 100 < cfg.optim_wrapper.paramwise_cfg.norm_decay_mult < 500
    shrink_config(cfg, 0.05)
    assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == pytest.approx(500)


@pytest.mark.parametrize(
    ('options', 'decay', 'words'),
    [
        ({}, 2.0, 'the weight decay of gamma and beta is from 0 to 1'),
        ({'model.backbone.norm_cfg.type': 'psBN'}, None, 'psBN keeps them open'),
        ({'model.backbone.norm_cfg.requires_grad': False}, None, 'no BN of the model is trained'),
        ({'optim_wrapper.optimizer.weight_decay': 0}, None, 'needs a weight_decay'),
        ({'optim_wrapper.optimizer.lr': 0.0}, None, 'gamma is not decayed'),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(cfg, options, decay, words):
    cfg.merge_from_dict(options)
    with pytest.raises(ConfigError, match=words) as info:
        shrink_config(cfg, decay)
    assert '\n' not in str(info.value)
