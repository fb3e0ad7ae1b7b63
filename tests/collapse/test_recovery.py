"""Recovery of closed filters: what is decayed, what is not, and what the network computes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANG
from torch import nn
from torch.nn import functional as F

from psbn_mmdet.collapse import Recovery, RectifierTrace, decay_per_step, trace_rectifiers
from psbn_mmdet.layers import PostShiftedBatchNorm2d

# gamma and beta of closed filters: dead, vanished and closed, turned around, deep, at rest.
CLOSED = {1: (0.05, -0.6), 2: (0.0, -0.3), 4: (-0.1, -0.8), 5: (0.5, -4.0), 7: (0.0, -0.11)}
DEPTH = {2: 0.3, 7: 0.11}  # where gamma is 0, what the decay has to overcome


class Net(nn.Module):
    """A norm before ReLU, one before an addition, one before LeakyReLU, and a head."""

    def __init__(self, act=nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 8, 3), PostShiftedBatchNorm2d(8), act()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), PostShiftedBatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), PostShiftedBatchNorm2d(8)
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 1), PostShiftedBatchNorm2d(8)
        self.head = nn.Linear(8, 2)
        self.uses_head = True
        for norm in (self.bn1, self.bn2, self.bn3, self.bn4):
            with torch.no_grad():
                for channel, (gamma, beta) in CLOSED.items():
                    norm.weight[channel], norm.bias[channel] = gamma, beta + 0.1

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.leaky_relu(self.bn3(self.conv3(x)), 0.1)
        y = F.relu(self.bn4(self.conv4(x)))
        self.seen = y
        return self.head(y.mean((2, 3))) if self.uses_head else x.mean((2, 3))


def recovery_of(net, optimizer, steps=50, window=3, witnesses=None, failed=None, around=None):
    norms = {n: m for n, m in net.named_modules() if isinstance(m, PostShiftedBatchNorm2d)}
    known = dict(net.named_modules())
    found = witnesses_of(net) if witnesses is None else witnesses

    def fail(error):
        raise error

    def witness(name):
        return known.get(found.get(name))

    around = around or (lambda name: (None, []))
    return Recovery([optimizer], norms, witness, steps, window, around, failed or fail)


def witnesses_of(net):
    return {name: name for name, kind in trace_rectifiers(net, images()).items() if kind == 'relu'}


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def step(net, optimizer, x):
    optimizer.zero_grad()
    out = net(x)
    out.square().sum().backward()
    optimizer.step()
    return out.detach()


@pytest.mark.parametrize('act', [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize('norm_eval', [False, True])
def test_outputs_are_the_same_bit_for_bit_until_a_filter_opens(act, norm_eval):
    net, x = Net(act), images()
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.train(not norm_eval)
        norm.momentum = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recovery = recovery_of(net, optimizer)
    before, opened, bits = step(net, optimizer, x), {}, 0
    for number in range(400):
        was = {n: p.detach().clone() for n, p in net.named_parameters()}
        out = step(net, optimizer, x)
        with torch.no_grad():
            now_open = F.relu(net.bn1(net.conv1(x))).amax((0, 2, 3)) > 0
        newly = [c for c in CLOSED if now_open[c] and c not in opened]
        if not opened:
            assert torch.equal(out, before)
            bits += 1
        for channel in newly:
            opened[channel] = number
        for name, value in net.named_parameters():
            moved = (value != was[name]).flatten()
            if name.partition('.')[0] in ('bn1', 'bn4'):
                assert not any(moved[c] for c in range(8) if c not in CLOSED)
            else:
                assert not moved.any(), f'{name} is not of a closed filter before a ReLU'
    assert opened.keys() == CLOSED.keys() and bits > 3
    told = recovery.opened()
    assert torch.equal(told['bn1'].nonzero().flatten(), torch.tensor(list(CLOSED)))
    assert not told['bn2'].any() and not told['bn3'].any()
    for channel, beta in DEPTH.items():
        needed = math.log(0.1 / beta) / math.log(decay_per_step(0.1, 50))
        # It is watched from the first step on, and decayed after three more.
        assert opened[channel] == pytest.approx(needed + 1, abs=2)


def test_a_filter_with_beta_of_minus_1_opens_in_as_many_steps_as_are_given():
    for shift in (0.02, 0.1, 0.5, 2.0):
        q = decay_per_step(shift, 100)
        assert 0 < q < 1 and -1 * q**100 + shift > 0
        assert shift > 0.1 or -1 * q**90 + shift < 0


def test_filters_that_are_open_without_a_gradient_are_left_alone():
    net, x = Net(), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recovery_of(net, optimizer, window=2)
    start = {n: p.detach().clone() for n, p in net.bn4.named_parameters()}

    def half(x):
        # The head has gradients, but none at what channels 0 and 6 emit.
        net.head.weight.data[:, [0, 6]] = 0
        return step(net, optimizer, x)

    for _ in range(40):
        half(x)
    assert net.seen[:, [0, 6]].amax() > 0
    kept = [c for c in range(8) if c not in CLOSED]
    for name, value in net.bn4.named_parameters():
        assert torch.equal(value[kept], start[name][kept])
        assert not torch.equal(value[list(CLOSED)], start[name][list(CLOSED)])
        assert value.grad[[0, 6]].abs().max() == 0, 'the sign is gone before the step'


def test_a_layer_without_gradients_gives_no_evidence():
    net, x = Net(), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recovery_of(net, optimizer, window=2)
    start = net.bn4.bias.detach().clone()
    for number in range(40):
        net.uses_head = number % 2 == 0  # never two steps with gradients
        step(net, optimizer, x)
    assert torch.equal(net.bn4.bias, start) and net.bn1.bias[5] > -4


def test_what_is_not_seen_is_not_touched():
    net, x = Net(), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recovery_of(net, optimizer, window=2, witnesses={})
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(20):
        step(net, optimizer, x)
    assert all(torch.equal(p, start[n]) for n, p in net.named_parameters())


OPTIMIZERS = {
    'momentum': lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    'nesterov, foreach': lambda p: torch.optim.SGD(
        p, lr=1e-3, momentum=0.9, nesterov=True, foreach=True
    ),
    'Adam': lambda p: torch.optim.Adam(p, lr=1e-4),
    'AMSGrad': lambda p: torch.optim.Adam(p, lr=1e-4, amsgrad=True),
    'AdamW, foreach': lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.05, foreach=True),
    'AdamW, fused': lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.05, fused=True),
    'RMSprop': lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True),
    'RAdam': lambda p: torch.optim.RAdam(p, lr=1e-4),
    'Adagrad': lambda p: torch.optim.Adagrad(p, lr=1e-4),
    'Adadelta': lambda p: torch.optim.Adadelta(p, lr=1e-2),
    'Rprop': lambda p: torch.optim.Rprop(p, lr=1e-4),
    'ASGD': lambda p: torch.optim.ASGD(p, lr=1e-4),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimiser_lets_closed_filters_open_and_leaves_no_moments(name):
    net, x = Net(), images()
    try:
        optimizer = OPTIMIZERS[name](net.parameters())
    except (RuntimeError, TypeError) as error:
        pytest.skip(f'this torch has no {name} on this device: {error}')
    for state in (net.bn1.weight, net.bn1.bias):
        state.grad = torch.ones_like(state)  # moments that would move the filters
    optimizer.step()
    recovery = recovery_of(net, optimizer, steps=20)
    for _ in range(10):
        step(net, optimizer, x)
    decayed = recovery.decayed()['bn1']
    assert decayed[5] and not decayed[[0, 3, 6]].any()
    for param in (net.bn1.weight, net.bn1.bias):
        for key, value in optimizer.state[param].items():
            shape = getattr(value, 'shape', None)  # some count steps in plain numbers
            if shape == param.shape and key not in ('ax', 'step_size'):
                assert not value[decayed].any(), key
    for _ in range(60):
        step(net, optimizer, x)
    assert (F.relu(net.bn1(net.conv1(x))).amax((0, 2, 3)) > 0)[list(CLOSED)].all()


def test_gradients_of_several_batches_are_one_piece_of_evidence():
    net, x = Net(), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recovery_of(net, optimizer, window=2)
    other = 40 * images()  # on which the filters 1 and 4 are closed as well, but not 3
    start = net.bn1.bias.detach().clone()
    net.bn1.eval()  # then what is open depends on the batch
    for _ in range(12):
        optimizer.zero_grad()
        for batch in (x, other, x):
            net(batch).square().sum().backward()
        optimizer.step()
    net.bn1.weight.grad = None
    with torch.no_grad():
        open_on_other = (net.bn1(net.conv1(other)).amax((0, 2, 3)) > 0).tolist()
    assert open_on_other[1] and not open_on_other[2], 'the batches are chosen so'
    assert net.bn1.bias[1] == start[1] and net.bn1.bias[2] > start[2]


class Block(nn.Module):
    """A residual block as torchvision and MMDetection have it: the sum is made in place."""

    def __init__(self, downsample):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), PostShiftedBatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), PostShiftedBatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if downsample:
            self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), PostShiftedBatchNorm2d(8))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


@pytest.mark.parametrize('downsample', [False, True])
def test_filters_closed_in_a_sum_are_recovered_and_no_others(downsample):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Block(downsample), nn.Conv2d(8, 2, 1))
    x, block = images(), net[2]
    layers = [block.bn2, *([block.downsample[1]] if downsample else [])]
    with torch.no_grad():
        if not downsample:
            net[0].weight[3], net[0].bias[3] = 0, -1.0  # what is added in channel 3 is 0
        for layer in layers:
            layer.weight[3], layer.bias[3] = 0.01, -0.9
            layer.weight[5], layer.bias[5] = 0.01, -0.4
            layer.momentum = 0.0
        net[0].bias[5] = 100.0  # in channel 5 the sum is open
        if downsample:
            layers[1].bias[5] = 5.0
    with RectifierTrace(net) as trace:
        net(x)
    names = {'2.bn1': '2.bn1', '2.bn2': '2'} | ({'2.downsample.1': '2'} if downsample else {})
    assert trace.witnesses == names
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recovery = recovery_of(net, optimizer, witnesses=trace.witnesses)
    net[3].weight.data[:, 5] = 0  # so that channel 5 has no gradient, open as it is
    before, same = step(net, optimizer, x), 0
    for _ in range(120):
        start = [layer.bias.detach().clone() for layer in layers]
        out = step(net, optimizer, x)
        is_open = net[:3](x).amax((0, 2, 3)) > 0
        for layer, bias in zip(layers, start):
            moved = (layer.bias != bias).nonzero().flatten().tolist()
            assert moved in ([], [3])
        assert is_open[5]
        if not is_open[3]:
            same += 1
            assert torch.equal(out, before)
    assert is_open[3] and same > 10
    told = recovery.opened()
    assert [told[name][3].item() for name in names if name != '2.bn1'] == [True] * len(layers)


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Twice(Net):
        def forward(self, x):
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)

    net, plain = Twice(), Net()
    for one in (net, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-3)
        recovery_of(one, optimizer, witnesses=witnesses_of(Net()))
        for _ in range(30):
            step(one, optimizer, images())
    for (name, value), other in zip(net.named_parameters(), plain.parameters()):
        assert torch.equal(value, other), name
    assert net.bn1.bias[2] > -0.3


@pytest.mark.parametrize('fused', [False, True])
def test_mixed_precision_with_a_gradient_scaler(fused):
    net, x = Net(), images()
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('torch scales on CPUs from version 2.3 on')
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**24, growth_interval=10)
    recovery = recovery_of(net, optimizer, steps=20)
    opened = torch.zeros(8, dtype=torch.bool)
    for number in range(80):
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            loss = net(x).square().sum()
        scaler.scale(loss * (float('inf') if number == 7 else 1)).backward()
        start = net.bn1.bias.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert number != 7 or torch.equal(net.bn1.bias, start), 'a step that is skipped'
        opened |= recovery.opened()['bn1']
    assert scaler.get_scale() != 2.0**24
    assert opened.tolist() == [c in CLOSED for c in range(8)]


def test_a_state_goes_on_where_it_was():
    whole, x = Net(), images()
    optimizer = torch.optim.SGD(whole.parameters(), lr=1e-3, momentum=0.9)
    recovery = recovery_of(whole, optimizer)
    for number in range(40):
        if number == 17:
            kept = (
                {k: v.clone() for k, v in whole.state_dict().items()},
                optimizer.state_dict(),
                recovery.state_dict(),
            )
            kept = torch.load(save(kept), weights_only=True)
        step(whole, optimizer, x)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    recovery = recovery_of(net, optimizer)
    net.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    recovery.load_state_dict(kept[2])
    for _ in range(17, 40):
        step(net, optimizer, x)
    for (name, value), other in zip(net.named_parameters(), whole.parameters()):
        assert torch.equal(value, other), name
    with pytest.raises(ValueError, match='other layers'):
        recovery.load_state_dict([])


def test_all_ranks_do_the_same_without_a_collective(tmp_path):
    script = Path(__file__).parent / 'recovery_ranks.py'
    commands = [[sys.executable, str(script), str(rank), str(tmp_path)] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    errors = [rank.communicate(timeout=HANG)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (torch.load(tmp_path / f'rank_{r}.pth', weights_only=True) for r in (0, 1))
    for key, value in first['state'].items():
        assert torch.equal(value, second['state'][key]), key
    assert first['collectives'] == second['collectives'] == []
    assert first['opened'].tolist() == second['opened'].tolist()
    assert first['opened'].tolist()[:3] == [True, True, False]
    assert (first['is_open'] | second['is_open'])[:2].all()
    for weight in (first['state']['0.weight'], first['state']['3.weight'].transpose(0, 1)):
        sizes = weight.flatten(1).norm(dim=1)
        assert (sizes[:2] > 0.3 * sizes[3:].median()).all(), 'both are restored'
    # The first rank alone would have taken filter 2 for closed.
    assert not first['is_open'][2] and second['is_open'][2]
    assert first['state']['1.bias'][2] == torch.tensor(-2.9) and first['state']['1.weight'][2] == 1


def save(content):
    import io

    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_what_fails_ends_it_and_not_the_step():
    net, x, errors = Net(), images(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    recovery = recovery_of(net, optimizer, failed=errors.append)
    step(net, optimizer, x)
    del net.bn1.bias.grad
    recovery._groups[0]._proof = None
    start = net.head.weight.detach().clone()
    step(net, optimizer, x)
    assert len(errors) == 1 and not torch.equal(net.head.weight, start)
    step(net, optimizer, x)
    assert len(errors) == 1 and not net.bn1._forward_hooks and not net.bn1.bias._backward_hooks
