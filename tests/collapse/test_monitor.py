"""CollapseMonitor in a plain training loop: what is counted, and what a resumed run needs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from psbn_mmdet.collapse import CollapseMonitor
from psbn_mmdet.layers import PostShiftedBatchNorm2d

CLOSED = [1, 4]


def network(norm: type = nn.BatchNorm2d) -> nn.Sequential:
    """Two convolutions with norms; two filters of the first are closed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4), nn.ReLU()
    )
    with torch.no_grad():
        net[1].weight[CLOSED] = 0.01
        net[1].bias[CLOSED] = -1.0
        net(torch.randn(4, 3, 8, 8))  # gives it statistics
    return net


class Loop:
    """A training of somebody's own."""

    def __init__(self, net: nn.Module, decay: float = 0.0, **kwargs):
        self.net = net
        self.optimizer = SGD(net.parameters(), lr=0.1, weight_decay=decay)
        self.monitor = CollapseMonitor(net, self.optimizer, window=4, **kwargs)
        self.generator = torch.Generator().manual_seed(0)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            images = torch.randn(4, 3, 8, 8, generator=self.generator)
            self.net(images).square().mean().backward()
            self.optimizer.step()
            self.monitor.step()


def test_closed_filters_are_dead_and_trapped():
    loop = Loop(network())
    loop.run(5)
    report = loop.monitor.report()
    assert report.iteration == report.steps == 5
    assert report.total['collapsed'] == report.total['dead'] == report.total['trapped'] == 2
    assert report.total['new'] == report.total['revived'] == report.total['vanished'] == 0
    assert np.flatnonzero(report.masks['trapped'][0]).tolist() == CLOSED
    assert report.by_stage('collapsed') == {'1': 2, '4': 0}
    assert loop.monitor.structure.rectifiers == {'1': 'relu', '4': 'relu'}


def test_the_network_computes_the_same_and_nothing_is_left_behind():
    plain, watched = network(), network()
    own = set(vars(watched))
    optimizer = SGD(plain.parameters(), lr=0.1)
    loop = Loop(watched)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        optimizer.zero_grad()
        plain(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    loop.run(6)
    loop.monitor.report()
    loop.monitor.close()
    for one, other in zip(plain.state_dict().values(), watched.state_dict().values()):
        assert torch.equal(one, other)
    assert set(vars(watched)) == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_what_opens_is_revived_once():
    loop = Loop(network(PostShiftedBatchNorm2d), decay=1.0)
    loop.run(4)
    loop.monitor.report()
    loop.run(30)
    report = loop.monitor.report()
    assert report.masks['revived'][0][CLOSED].all()
    assert loop.monitor.report().total['revived'] == 0


def test_what_was_reopened_is_in_the_next_report_alone():
    loop = Loop(network())
    loop.run(1)
    assert 'recovered' not in loop.monitor.report().total
    for channel in (1, 3):
        mask = np.zeros(8, bool)
        mask[channel] = True
        loop.monitor.note_reopened({'1': mask})
    assert loop.monitor.report().total['recovered'] == 2
    assert loop.monitor.report().total['recovered'] is None


def test_a_resumed_monitor_goes_on_as_if_it_had_never_stopped():
    whole = Loop(network(PostShiftedBatchNorm2d), decay=1.0)
    whole.run(8)
    whole.monitor.report()
    state = copy.deepcopy(whole.monitor.state_dict())
    resumed = Loop(copy.deepcopy(whole.net), decay=1.0, iteration=8)
    resumed.generator.set_state(whole.generator.get_state())
    resumed.monitor.load_state_dict(state)
    for loop in (whole, resumed):
        loop.run(30)
    one, other = whole.monitor.report(), resumed.monitor.report()
    assert one.total == other.total and one.total['revived'] > 0
    assert one.iteration == other.iteration == 38


@pytest.mark.parametrize(
    'damage',
    [
        lambda state: state.pop('unstarted'),
        lambda state: state.update(collapsed={'1': '0-99'}),
        lambda state: state.update(trapped={'gone': ''}),
        lambda state: state.update(gammas=3),
    ],
)
def test_a_damaged_state_changes_nothing(damage):
    loop = Loop(network())
    loop.run(4)
    loop.monitor.report()
    before = loop.monitor.state_dict()
    state = copy.deepcopy(before)
    damage(state)
    with pytest.raises(ValueError, match='of another network or damaged'):
        loop.monitor.load_state_dict(state)
    assert loop.monitor.state_dict() == before


def test_a_layer_that_is_gone_is_named():
    loop = Loop(network())
    loop.run(1)
    loop.net[4] = nn.Identity()
    with pytest.raises(LookupError, match='no longer has a layer 4'):
        loop.monitor.report()


def test_gradients_that_cannot_be_read_are_raised_by_the_next_step():
    loop = Loop(network())
    loop.monitor.watch.failure = RuntimeError('no memory')
    with pytest.raises(RuntimeError, match='no memory'):
        loop.monitor.step()
