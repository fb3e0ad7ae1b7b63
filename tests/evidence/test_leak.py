"""benchmarks/leak_share.py: the share of the gradient that comes through a LeakyReLU's leak."""

import numpy as np
import pytest
import torch
from leak_share import leak_share
from torch import nn

from psbn_mmdet.collapse import trace_rectifiers

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


def test_the_share_does_not_depend_on_the_size_of_the_loss():
    model = network(False).double()
    x = X.double()
    rectifiers = trace_rectifiers(model, x)
    shares = [leak_share(model, lambda: model(x).sum() * f, rectifiers)['1'] for f in (1, 1e-6)]  # noqa: B023
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)
    y = model[:2](x)[:, 1]
    closed, opened = int((y < 0).sum()), int((y > 0).sum())
    assert shares[0][1] == pytest.approx(SLOPE * closed / (SLOPE * closed + opened), rel=1e-9)
    assert shares[0][[0, 2]].tolist() == [1, 0]


def test_parameters_that_the_loss_does_not_use_do_no_harm():
    model = network(False)
    expected = leak_share(model, lambda: model(X).sum(), {'1': 'leaky_relu'})
    model.idle = nn.Linear(2, 2)
    with_idle = leak_share(model, lambda: model[:3](X).sum(), {'1': 'leaky_relu'})
    assert with_idle['1'] == pytest.approx(expected['1'])


def test_layers_before_other_rectifiers_are_not_measured():
    model = network(False, nn.ReLU)
    assert leak_share(model, lambda: model(X).sum(), trace_rectifiers(model, X)) == {}
    assert leak_share(model, lambda: model(X).sum(), {}) == {}
