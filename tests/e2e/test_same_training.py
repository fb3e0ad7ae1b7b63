"""psBN trains as the paper's layer with a parameter beta does, in MMEngine's Runner."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from naive import ALPHA, NaivePSBN2d, beta_of
from small_run import Images, collate
from torch import Tensor, nn
from torch.nn import functional as F

import psbn_mmdet  # noqa: F401
from psbn_mmdet.configs.norm_switch import switch_config
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.layers.decay import unfollow

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT.parent / 'shared/data/bccd'
STATES = 50


# From scratch: initializers, averages


class Net(BaseModel):
    """MMCV's blocks, a bare norm and a head, initialized as in MMDetection."""

    def __init__(self, norm: str) -> None:
        super().__init__(
            init_cfg=[
                dict(type='Kaiming', layer='Conv2d'),
                dict(type='Constant', layer='_BatchNorm', val=1, bias=0),
            ]
        )
        cfg = dict(type=norm)
        self.stem = ConvModule(3, 8, 3, norm_cfg=cfg)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), MODELS.build(cfg | dict(num_features=8)))
        self.head = nn.Linear(8, 2)

    def forward(self, images, labels, mode='tensor'):
        x = F.relu(self.body(self.stem(torch.stack(images)))).mean((2, 3))
        return dict(loss=F.cross_entropy(self.head(x), torch.as_tensor(labels)))


@pytest.fixture(autouse=True)
def _naive():
    MODELS.register_module('NaivePSBN', module=NaivePSBN2d)
    yield
    del MODELS._module_dict['NaivePSBN']


def betas(model: nn.Module) -> Tensor:
    return torch.cat([beta_of(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)])


@pytest.mark.parametrize('hook', ['EMAHook', 'no average'])
def test_from_scratch_through_the_runner(tmp_path, hook):
    found = {}
    for norm in ('psBN', 'NaivePSBN'):
        torch.manual_seed(0)
        runner = Runner(
            model=Net(norm),
            work_dir=str(tmp_path / norm),
            train_dataloader=dict(
                batch_size=4,
                dataset=Images(),
                sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=collate,
            ),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.1),
                clip_grad=dict(max_norm=1.0),
            ),
            custom_hooks=[dict(type='EMAHook', momentum=0.1)] if hook == 'EMAHook' else [],
            randomness=dict(seed=0),
            experiment_name=f'test_{uuid.uuid4().hex}',
        )
        runner.train()
        file = torch.load(tmp_path / norm / 'epoch_3.pth', weights_only=False)
        shift = ALPHA if norm == 'psBN' else 0
        found[norm] = [betas(runner.model)]
        for key in ('state_dict', 'ema_state_dict') if hook == 'EMAHook' else ('state_dict',):
            biases = [v for k, v in file[key].items() if k.endswith(('bn.bias', 'body.1.bias'))]
            assert len(biases) == 2
            found[norm].append(torch.cat(biases) - shift)
    for ours, naive in zip(*found.values()):
        assert naive.abs().max() > 0.01
        torch.testing.assert_close(ours, naive, rtol=0, atol=1e-6)


# Whole detectors: one step from each of many states of a real training


class Before(PostShiftedBatchNorm2d):
    """The layer of before: the parameter is beta, and alpha is added in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum if self.training else 0.0
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias + ALPHA,
            self.training,
            momentum,
            self.eps,
        )


def psbn_in(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in (PostShiftedBatchNorm2d, Before)]


class OneStep(Hook):
    """From the states of a training, one step by both layers: the largest differences."""

    def __init__(self, total: int) -> None:
        self.rows: list[dict[str, float]] = []
        self.every = max(1, total // STATES)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter % self.every or len(self.rows) == STATES:
            return
        state = torch.get_rng_state()
        steps = [self.step(runner, data_batch, before) for before in (False, True)]
        torch.set_rng_state(state)
        (loss, params, moments), (loss_before, params_before, moments_before) = steps
        self.rows.append(
            dict(
                iter=runner.iter,
                loss=abs(loss - loss_before) / max(1.0, loss_before),
                params=apart(params, params_before),
                moments=apart(moments, moments_before),
            )
        )

    def step(self, runner: Runner, data_batch: Any, before: bool) -> tuple[float, list, list]:
        torch.manual_seed(runner.iter)
        # Not the wrapper: a scheduler has made its `step` that of the original.
        model, optimizer = copy.deepcopy((runner.model, runner.optim_wrapper.optimizer))
        clip_grad = runner.cfg.optim_wrapper.get('clip_grad')
        # Loaded biases that beta + alpha does not give to the last bit start both where it does.
        for layer in psbn_in(model):
            layer.bias.data.sub_(ALPHA).add_(ALPHA)
        if before:
            for layer in psbn_in(model):
                unfollow(layer)
                layer.fresh = False  # beta = 0 is what it starts with
                layer.__class__ = Before
                layer.bias.data.sub_(ALPHA)
        wrapper = OptimWrapper(optimizer, clip_grad=clip_grad)
        losses = model.train_step(copy.deepcopy(data_batch), wrapper)
        for layer in psbn_in(model) if before else ():
            layer.bias.data.add_(ALPHA)
        states = [optimizer.state[p] for p in model.parameters()]
        moments = [state['momentum_buffer'] for state in states if 'momentum_buffer' in state]
        return losses['loss'].item(), list(model.parameters()), moments


@torch.no_grad()
def apart(ours: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, relative to values above 1."""
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in zip(ours, others))


def demo(work_dir: Path) -> Config:
    data = work_dir / 'data'
    subprocess.run([sys.executable, ROOT / 'demo/make_dataset.py', data], check=True)
    cfg = Config.fromfile(ROOT / 'demo/faster-rcnn_r18_fpn_psbn_demo.py')
    return with_data(cfg, data, 'train')


def tutorial(work_dir: Path) -> Config:
    if not CELLS.is_dir():
        pytest.skip('the photographs of blood cells are not at hand')
    cfg = Config.fromfile(ROOT / 'demo/faster-rcnn_r18_fpn_cells.py')
    switch_config(cfg, 'psBN')
    if not Path(cfg.load_from).is_file() or np.__version__ < '2':  # that it was written with
        cfg.load_from = None  # the same from random weights
    return with_data(cfg, CELLS, 'images')


def with_data(cfg: Config, root: Path, images: str) -> Config:
    cfg.train_dataloader.dataset.update(data_root=f'{root}/', data_prefix=dict(img=f'{images}/'))
    cfg.merge_from_dict(dict(train_dataloader=dict(num_workers=0, persistent_workers=False)))
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[key] = None
    cfg.default_hooks.checkpoint = None
    return cfg


@pytest.mark.parametrize('config', [demo, tutorial])
def test_a_step_of_a_detector_is_that_of_the_layer_of_before(config, tmp_path, capsys):
    cfg = config(tmp_path)
    cfg.work_dir = str(tmp_path / 'run')
    cfg.randomness = dict(seed=0)
    runner = Runner.from_cfg(cfg)
    hook = OneStep(cfg.train_cfg.max_epochs * len(runner.build_dataloader(cfg.train_dataloader)))
    runner.register_hook(hook, 'LOWEST')
    runner.train()
    assert len(hook.rows) == STATES
    with capsys.disabled():
        largest = {key: max(row[key] for row in hook.rows) for key in ('loss', 'params', 'moments')}
        print(f'\n{config.__name__}: {len(hook.rows)} states, largest {json.dumps(largest)}')
    for row in hook.rows:
        assert max(row['loss'], row['params'], row['moments']) <= 1e-6, row
