"""Restoring the convolutions around closed filters: what is multiplied, and what it changes."""

import pytest
import torch
from closed_chain import CLOSED, chain, images
from torch import nn
from torch.nn import functional as F

from psbn_mmdet.collapse import RectifierTrace, trace_structure
from psbn_mmdet.recovery import Recovery
from psbn_mmdet.recovery.restore import restore


@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('norm_eval', [False, True])
def test_decayed_weights_are_as_large_as_others_and_outputs_the_same_bit_for_bit(groups, norm_eval):
    net, x = chain(groups), images()
    net[1].train(not norm_eval)
    net[1].momentum = 0.0
    with torch.no_grad():
        before = net(x)
        xhat = net[1](net[0](x))[:, :2] - net[1].bias[:2].view(1, 2, 1, 1)
    kept = [p[~CLOSED].clone() for p in (net[0].weight, net[0].bias, net[1].weight)]
    restore([dict(net.named_modules())], '1', '0', ['3'], CLOSED, ~CLOSED)
    with torch.no_grad():
        assert torch.equal(net(x), before)
        now = net[1](net[0](x))[:, :2] - net[1].bias[:2].view(1, 2, 1, 1)
    for old, new in zip(kept, (net[0].weight, net[0].bias, net[1].weight)):
        assert torch.equal(new[~CLOSED], old)
    for weight in (net[0].weight, net[3].weight if groups > 1 else net[3].weight.transpose(0, 1)):
        sizes = weight.detach().flatten(1).norm(dim=1)
        assert torch.allclose(sizes[CLOSED], sizes[~CLOSED].median())
    assert (now.abs() <= xhat.abs() * 1.0001).all(), 'gamma * xhat does not grow'
    # It responds: what the batch makes of the filter is of unit variance, not lost in eps.
    response = F.batch_norm(net[0](x), None, None, training=True)[:, :2]
    assert response.var((0, 2, 3)).min() > 0.99


def test_what_has_not_decayed_is_left_alone():
    net = chain()
    with torch.no_grad():
        net[0].weight[CLOSED] *= 1e3 * 0.3
        net[3].weight[:, CLOSED] *= 1e2 * 0.3
        net[0].weight[4] = 0.0
    start = {name: value.clone() for name, value in net.state_dict().items()}
    restore([dict(net.named_modules())], '1', '0', ['3'], CLOSED, ~CLOSED)
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())


def test_a_filter_that_its_bias_alone_would_open_keeps_its_own_weights():
    net = chain()
    with torch.no_grad():
        net[1].bias[0] = 0.5
    start = net[0].weight.detach().clone()
    restore([dict(net.named_modules())], '1', '0', ['3'], CLOSED, ~CLOSED)
    assert torch.equal(net[0].weight[0], start[0]) and not torch.equal(net[0].weight[1], start[1])


@pytest.mark.parametrize('why', ['all closed', 'zero'])
def test_nothing_is_written_where_it_would_be_wrong(why):
    net = chain()
    closed, alive = CLOSED, ~CLOSED
    if why == 'all closed':
        closed, alive = torch.ones_like(CLOSED), torch.zeros_like(CLOSED)
    if why == 'zero':
        nn.init.zeros_(net[0].weight)
        nn.init.zeros_(net[3].weight)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    restore([dict(net.named_modules())], '1', '0', ['3'], closed, alive)
    for name, value in net.state_dict().items():
        assert torch.equal(value, start[name]), name
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_a_recovered_filter_responds_and_without_restoring_it_does_not():
    gammas = []
    for restores in (True, False):
        net, x = chain(), images()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

        def failed(error):
            raise error

        structure = trace_structure(net, x)
        copies = list if restores else None
        recovery = Recovery(net, [optimizer], structure, 20, 3, failed, copies)
        target = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(2))
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(net(x), target).backward()
            optimizer.step()
        assert recovery.opened()['1'].tolist() == CLOSED.tolist()
        gammas.append(net[1].weight.detach()[CLOSED].abs())
    with_it, without = gammas
    assert with_it.min() > 0.01 and without.max() < 0.003


class Places(nn.Module):
    """Convolutions before and behind norms, each used in a way of its own."""

    def __init__(self):
        super().__init__()
        convs = {
            name: nn.Conv2d(4, 4, 1) for name in ('plain', 'pooled', 'twice', 'shared', 'peeked')
        }
        self.convs = nn.ModuleDict(convs)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in (*convs, 'other')})
        self.after = nn.ModuleDict({name: nn.Conv2d(4, 4, 1) for name in convs})
        self.linear = nn.Linear(4, 2)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        def rectified(name, norm=None):
            return F.relu(self.norms[norm or name](self.convs[name](x)))

        y = self.after['plain'](rectified('plain'))
        y = y + self.after['pooled'](F.max_pool2d(rectified('pooled'), 1))
        twice = rectified('twice')
        y = y + self.after['twice'](twice) + self.last(twice)
        y = y + self.after['twice'](x)  # and so it reads something else, too
        y = y + self.after['shared'](rectified('shared') + 1)
        y = y + rectified('shared', 'other')
        seen = self.convs['peeked'](x)
        peeked = F.relu(self.norms['peeked'](seen), inplace=True)
        peeked[:, :2] += 1  # a write through a view
        y = y + self.after['peeked'](peeked) + seen
        return self.linear(y.mean((2, 3)))


def test_convolutions_around_a_layer_are_those_that_touch_nothing_else():
    net = Places()
    structure = trace_structure(net, torch.randn(2, 4, 3, 3))
    own = {name: f'convs.{name}' for name in ('plain', 'pooled', 'twice')}
    # 'twice' is read by two convolutions, one of which reads other things as well.
    expected = {'plain': ['after.plain'], 'pooled': ['after.pooled'], 'twice': ['last']}
    assert structure.consumers == {f'norms.{name}': found for name, found in expected.items()}
    assert structure.producers == {f'norms.{name}': conv for name, conv in own.items()}


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_pass_that_checkpointing_repeats_adds_nothing(reentrant):
    from torch.utils.checkpoint import checkpoint

    net = chain()
    with RectifierTrace(net) as trace:
        out = checkpoint(net, images().requires_grad_(), use_reentrant=reentrant)
        out.sum().backward()
    assert trace.structure.producers == {'1': '0'}
    assert trace.structure.consumers == {'1': ['3']}
