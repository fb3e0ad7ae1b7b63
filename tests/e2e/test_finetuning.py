"""Finetuning from BN weights: the first batch sees the same network, the frozen part stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from randomize import randomize
from torch import Tensor, nn

import psbn_mmdet  # noqa: F401

CONFIG_DIR = Path(__file__).resolve().parents[2] / 'configs/psbn'
STEPS = 3


class Keep(Hook):
    """Keeps what a run starts from, after weights are loaded, and the losses of its steps."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.losses: list[dict[str, float]] = []

    def before_train(self, runner: Runner) -> None:
        self.start = {key: value.clone() for key, value in runner.model.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append({name: value.item() for name, value in outputs.items()})


@pytest.fixture
def load(shrink, tmp_path) -> Callable[[str], Config]:
    def load(norm: str) -> Config:
        cfg = Config.fromfile(CONFIG_DIR / f'faster-rcnn_r50_fpn_{norm}_1x_coco.py')
        assert cfg.model.backbone.norm_eval and cfg.model.backbone.frozen_stages == 1
        shrink(cfg)
        cfg.merge_from_dict(
            {
                'work_dir': str(tmp_path / norm),
                'visualizer.name': norm,
                'train_cfg.max_epochs': 1,
                'train_dataloader.dataset.indices': 2 * STEPS,
                'val_dataloader': None,
                'val_cfg': None,
                'val_evaluator': None,
                'default_hooks.checkpoint': None,
            }
        )
        return cfg

    return load


def by_init_cfg(cfg: Config, detector: nn.Module, path: str) -> None:
    torch.save(detector.backbone.state_dict(), path)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=path)


def by_load_from(cfg: Config, detector: nn.Module, path: str) -> None:
    torch.save(dict(state_dict=detector.state_dict()), path)
    cfg.load_from = path


@pytest.mark.parametrize('pretrained', [by_init_cfg, by_load_from])
def test_bn_weights_give_the_first_losses_of_bn_and_the_frozen_part_stays(
    load, tmp_path, pretrained
):
    torch.manual_seed(0)
    detector = randomize(MODELS.build(load('bn').model))
    losses = {}
    for norm in ('bn', 'psbn'):
        cfg = load(norm)
        pretrained(cfg, detector, str(tmp_path / 'bn.pth'))
        runner = Runner.from_cfg(cfg)
        keep = Keep()
        runner.register_hook(keep)
        runner.train()
        losses[norm] = keep.losses

        assert len(keep.losses) == STEPS
        trained = {name for name, param in runner.model.named_parameters() if param.requires_grad}
        assert 'backbone.layer1.0.bn1.bias' not in trained
        assert 'backbone.layer2.0.bn1.bias' in trained
        for key, value in runner.model.state_dict().items():
            assert torch.equal(value, keep.start[key]) == (key not in trained), key
    assert losses['psbn'][0] == losses['bn'][0]
