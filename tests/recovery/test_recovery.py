"""Recovery of closed filters: what is decayed, what is not, and what the network computes."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANG
from torch import nn
from torch.nn import functional as F

from psbn_mmdet.collapse import Structure, trace_structure
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.recovery import Recovery, decay_per_step

# gamma and beta of closed filters: dead, vanished and closed, turned around, deep, at rest.
CLOSED = {1: (0.05, -0.6), 2: (0.0, -0.3), 4: (-0.1, -0.8), 5: (0.5, -4.0), 7: (0.0, -0.11)}
DEPTH = {2: 0.3, 7: 0.11}  # where gamma is 0, what the decay has to overcome


class Still(torch.optim.SGD):
    """Has a learning rate, and changes nothing."""

    def __init__(self, params):
        super().__init__(params, lr=1.0)

    def step(self, closure=None):
        pass


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


def recovery_of(net, optimizer, steps=50, window=3, structure=None, failed=None, copies=None):
    def fail(error):
        raise error

    structure = trace_structure(net, images()) if structure is None else structure
    return Recovery(net, [optimizer], structure, steps, window, failed or fail, copies)


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
    optimizer = Still(net.parameters())
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
    assert opened.keys() == CLOSED.keys() and bits >= 3
    told = recovery.opened()
    assert torch.equal(told['bn1'].nonzero().flatten(), torch.tensor(list(CLOSED)))
    assert told.keys() == {'bn1', 'bn4'}, 'the others feed more than ReLUs'
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
    optimizer = Still(net.parameters())
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


def test_a_layer_that_does_not_run_says_neither_life_nor_death():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
    recovery = recovery_of(net, optimizer, window=4)
    start = net.bn4.bias.detach().clone()

    def skipping(x):  # the second half of the network does not run
        optimizer.zero_grad()
        F.relu(net.bn1(net.conv1(x))).square().sum().backward()
        optimizer.step()

    step(net, optimizer, x)
    for _ in range(3):
        step(net, optimizer, x)
    for _ in range(20):
        skipping(x)
    assert torch.equal(net.bn4.bias, start), 'three passes are not enough'
    assert recovery.decayed()['bn1'][5] and not recovery.decayed()['bn4'].any()
    step(net, optimizer, x)
    assert recovery.decayed()['bn4'][5]
    for _ in range(20):
        skipping(x)
    assert recovery.decayed()['bn4'][5] and not recovery.opened()['bn4'].any()


def test_what_is_open_in_any_pass_since_the_last_step_is_open():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
    recovery = recovery_of(net, optimizer, window=2)
    start = net.bn1.bias.detach().clone()
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.eval()
    with torch.no_grad():
        is_open = (net.bn1(net.conv1(60 * x)).amax((0, 2, 3)) > 0)[list(CLOSED)]
    for _ in range(12):
        step(net, optimizer, x)
        with torch.no_grad():  # whatever becomes of it
            net(60 * x)
    same = (net.bn1.bias == start)[list(CLOSED)]
    assert is_open.any() and torch.equal(same, is_open)
    assert not recovery.opened()['bn1'][list(CLOSED)][is_open].any()


def test_what_is_open_in_validation_alone_is_left_and_was_not_opened():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
    recovery = recovery_of(net, optimizer, window=2)
    opened = torch.zeros(8, dtype=torch.bool)
    for number in range(40):
        step(net, optimizer, x)
        net.eval()
        with torch.no_grad():
            net(60 * x)
            is_open = net.bn1(net.conv1(60 * x)).amax((0, 2, 3)) > 0
        net.train()
        opened |= recovery.opened()['bn1']
        if number == 0:
            never = [c for c in CLOSED if is_open[c]]
    assert never and not opened[never].any() and opened.any()


@pytest.mark.parametrize('kind', ['L1 of gamma', 'bfloat16', 'frozen later'])
def test_other_trainings(kind):
    net, x = Net(), images()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    structure = trace_structure(net, x)
    if kind == 'bfloat16':
        net, x = net.bfloat16(), x.bfloat16()
    recovery = recovery_of(net, optimizer, structure=structure, steps=100)
    opened = torch.zeros(8, dtype=torch.bool)
    for number in range(250):
        optimizer.zero_grad()
        loss = net(x).float().square().sum()
        if kind == 'L1 of gamma':
            loss = loss + net.bn1.weight.abs().sum()
        loss.backward()
        if kind == 'frozen later' and number == 20:
            net.bn1.requires_grad_(False)
            frozen = net.bn1.bias.clone()
        optimizer.step()
        opened |= recovery.opened()['bn1']
    if kind == 'frozen later':
        assert torch.equal(net.bn1.bias[list(CLOSED)], frozen[list(CLOSED)]) and not opened[5]
    else:
        assert opened[list(CLOSED)].all()


class Anchored(torch.optim.Optimizer):
    """Sets parameters from positions of its own, as D-Adaptation and Lookahead do."""

    def __init__(self, params):
        super().__init__(params, dict(lr=1e-3))

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]['params']:
            state = self.state[param]
            state.setdefault('x0', param.clone())
            param.copy_(state['x0'] - 1e-6)


def test_an_optimizer_that_sets_parameters_from_other_positions_decays_as_promised():
    net, x = Net(), images()
    optimizer = Anchored(net.parameters())
    recovery = recovery_of(net, optimizer, steps=50)
    for _ in range(30):
        step(net, optimizer, x)
    # 27 of the 30 steps decay: three passes came first.
    expected = -4.0 * decay_per_step(0.1, 50) ** (30 - 3) + 0.1
    assert net.bn1.bias[5].item() == pytest.approx(expected, abs=1e-3)
    assert recovery.decayed()['bn1'][5]
    for _ in range(150):
        step(net, optimizer, x)
    assert net.bn1.bias[5] > -0.3, 'nor does it jump back when it is open'


def test_a_filter_that_closes_late_is_decayed_from_where_it_is():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
    with torch.no_grad():
        for norm in (net.bn1, net.bn4):
            norm.weight.fill_(1.0)
            norm.bias.fill_(0.1)
    recovery = recovery_of(net, optimizer, steps=200, window=2)
    for _ in range(7):  # nothing is closed, and nothing watched
        step(net, optimizer, x)
    with torch.no_grad():
        net.bn1.weight[2], net.bn1.bias[2] = 0.01, -2.0
    for _ in range(12):
        out = step(net, optimizer, x)
    assert recovery.decayed()['bn1'][2] and -2.0 < net.bn1.bias[2] < -1.7
    assert 0 < net.bn1.weight[2] < 0.01 and out.isfinite().all()


def test_without_a_learning_rate_nothing_is_touched():
    net, x = Net(), images()
    groups = [
        dict(params=list(net.bn1.parameters()), lr=0.0),
        dict(params=list(net.bn4.parameters()), lr=0.1),
        dict(params=[net.conv1.weight], lr=0.0),
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    recovery = recovery_of(net, optimizer, window=2, copies=list)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    for number in range(20):
        # What has none for now is left for now.
        optimizer.param_groups[1]['initial_lr'] = 0.1
        optimizer.param_groups[1]['lr'] = 0.0 if number < 10 else 1e-9
        step(net, optimizer, x)
        if number == 9:
            assert all(torch.equal(p, start[n]) for n, p in net.named_parameters())
    assert recovery.layers == ['bn4']
    assert torch.equal(net.bn1.bias, start['bn1.bias'])
    assert torch.equal(net.conv1.weight, start['conv1.weight'])
    assert net.bn4.bias[5] > start['bn4.bias'][5]


def test_a_model_that_is_saved_or_copied_meanwhile_has_nothing_of_it():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
    recovery = recovery_of(net, optimizer)
    for _ in range(2):
        step(net, optimizer, x)
    assert net.bn1._forward_hooks
    net.seen = None
    copies = [copy.deepcopy(net), torch.load(save(net), weights_only=False)]
    passes = recovery._groups[0].layers[0].passes
    for one in copies:
        one(x)
    assert recovery._groups[0].layers[0].passes == passes


def test_what_is_not_seen_is_not_touched():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
    recovery_of(net, optimizer, window=2, structure=Structure())
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
def test_every_optimizer_lets_closed_filters_open_and_leaves_no_moments(name):
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
            if shape == param.shape and key not in ('ax', 'step_size', 'prev'):
                assert not value[decayed].any(), key
    for _ in range(60):
        step(net, optimizer, x)
    assert (F.relu(net.bn1(net.conv1(x))).amax((0, 2, 3)) > 0)[list(CLOSED)].all()


def test_gradients_of_several_batches_are_one_piece_of_evidence():
    net, x = Net(), images()
    optimizer = Still(net.parameters())
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
    structure = trace_structure(net, x)
    names = {'2.bn1': '2.bn1', '2.bn2': '2'} | ({'2.downsample.1': '2'} if downsample else {})
    assert structure.witnesses == names
    optimizer = Still(net.parameters())
    recovery = recovery_of(net, optimizer, structure=structure)
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
        recovery_of(one, optimizer, structure=trace_structure(Net(), images()))
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


def test_all_ranks_do_the_same(tmp_path):
    script = Path(__file__).parent / 'recovery_ranks.py'
    commands = [[sys.executable, str(script), str(rank), str(tmp_path)] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    errors = [rank.communicate(timeout=HANG)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (torch.load(tmp_path / f'rank_{r}.pth', weights_only=True) for r in (0, 1))
    for key, value in first['state'].items():
        assert torch.equal(value, second['state'][key]), key
    # One in each step, and one more where it is chosen what is watched.
    assert first['collectives'] == second['collectives']
    assert first['opened'].tolist() == second['opened'].tolist()
    assert first['opened'].tolist()[:3] == [True, True, False]
    assert (first['is_open'] | second['is_open'])[:2].all()
    for weight in (first['state']['0.weight'], first['state']['3.weight'].transpose(0, 1)):
        sizes = weight.flatten(1).norm(dim=1)
        assert (sizes[:2] > 0.3 * sizes[3:].median()).all(), 'both are restored'
    # The first rank alone would have taken filter 2 for closed.
    assert not first['is_open'][2] and second['is_open'][2]
    assert first['state']['1.bias'][2] == torch.tensor(-2.9) and first['state']['1.weight'][2] == 1
    # Then it fails on one of them, and both end with the next choice.
    assert first['ended'] == second['ended'] == [False, True]
    assert first['errors'] == ['RuntimeError: on this rank'] and second['errors'] == ['None']


def save(content):
    import io

    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


@pytest.mark.parametrize('where', ['step', 'forward'])
def test_what_fails_ends_it_and_not_the_training(where, monkeypatch):
    net, x, errors = Net(), images(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    recovery = recovery_of(net, optimizer, failed=errors.append)
    step(net, optimizer, x)

    def fails(*args):
        raise RuntimeError('here')

    owner, name = {
        'step': (recovery._groups[0], 'judge'),
        'forward': (recovery._groups[0].layers[0], '_most_of'),
    }[where]
    monkeypatch.setattr(owner, name, fails)
    start = net.head.weight.detach().clone()
    step(net, optimizer, x)
    assert [str(error) for error in errors] == ['here'] and recovery.ended
    assert not torch.equal(net.head.weight, start)
    step(net, optimizer, x)
    assert len(errors) == 1 and not net.bn1._forward_hooks
