"""Norm layers that are not at their start, where much that goes wrong cannot be seen."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all BN and psBN layers below random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                tensor.data.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return module
