"""Models of configs, and their norms."""

from __future__ import annotations

import copy

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def build(cfg: Config) -> nn.Module:
    """The model of a config of MMDetection, with the same random weights each time."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(copy.deepcopy(cfg.model))


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Its BN and psBN layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
