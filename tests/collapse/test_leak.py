"""The share of the gradient that comes through the leak of a LeakyReLU."""

import numpy as np
import pytest
import torch
from torch import nn

from psbn_mmdet.collapse import leak_share, trace_rectifiers

SLOPE = 0.1
X = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def network(inplace, activation=nn.LeakyReLU):
    torch.manual_seed(0)
    act = nn.ReLU(inplace) if activation is nn.ReLU else nn.LeakyReLU(SLOPE, inplace)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act)
    model[1].bias.data = torch.tensor([-10.0, 0.0, 10.0])
    return model


@pytest.mark.parametrize('inplace', [True, False])
def test_closed_half_open_and_open_filters(inplace):
    model = network(inplace)
    shares = leak_share(model, lambda: model(X).sum(), trace_rectifiers(model, X))
    # a filter that is open half of the time gets SLOPE of its gradient in the other half
    assert np.allclose(shares['1'], [1, SLOPE / (1 + SLOPE), 0], atol=0.02)
    assert all(p.grad is None for p in model.parameters())
    assert not model[1]._forward_hooks


def test_layers_before_other_rectifiers_are_not_measured():
    model = network(False, nn.ReLU)
    assert leak_share(model, lambda: model(X).sum(), trace_rectifiers(model, X)) == {}
