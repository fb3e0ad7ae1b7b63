"""A network with filters that have been closed for long."""

import torch
from torch import nn

from psbn_mmdet.layers import PostShiftedBatchNorm2d

CLOSED = torch.tensor([True, True, False, False, False, False])


def chain(groups=1):
    """A network whose first two filters have decayed: gamma, beta, and the weights around them."""
    torch.manual_seed(0)
    norm = PostShiftedBatchNorm2d(6)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 6, 3, groups=groups), nn.Conv2d(6, 2, 1)
    )
    with torch.no_grad():
        norm.weight[CLOSED], norm.bias[CLOSED] = 1e-4, -0.05
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        net[0].weight[CLOSED] *= 1e-3
        net[0].bias[CLOSED] *= 1e-3
        norm.running_mean[CLOSED] *= 1e-3
        norm.running_var[CLOSED] *= 1e-6
        reading = net[3].weight if groups > 1 else net[3].weight.transpose(0, 1)
        reading[CLOSED] *= 1e-2
    return net


def images():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
