"""Optimizers see beta = b - alpha, whatever they are and whatever happens in a step."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from mmengine.registry import OPTIMIZERS
from naive import ALPHA, NaivePSBN2d, beta_of
from subprocesses import ROOT, run
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

import psbn_mmdet  # noqa: F401
from psbn_mmdet.layers import PostShiftedBatchNorm2d, bn_to_psbn, decay
from psbn_mmdet.layers.decay import PASSES

BATCHES = 8


def network(norm: type[nn.BatchNorm2d]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        norm(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        norm(6),
        nn.Flatten(),
        nn.Linear(96, 3),
    )


def norms_of(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, 8, 8, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def loss_of(net: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def train(
    norm: type[nn.BatchNorm2d], make: Callable, steps: int = 100, closure: bool = False
) -> torch.Tensor:
    """Beta of all layers after each step, shape (steps, channels)."""
    net = network(norm)
    optimizer = make(net.parameters())
    seen = batches()
    betas = []
    for step in range(steps):
        batch = seen[0] if closure else seen[step % BATCHES]

        def backward(batch=batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss

        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
        betas.append(torch.cat([beta_of(layer) for layer in norms_of(net)]))
    return torch.stack(betas)


def biases_moved(net: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
    """What a step of an optimizer does to the biases of a network."""
    before = [layer.bias.detach().clone() for layer in norms_of(net)]
    loss_of(net, batches()[0]).backward()
    optimizer.step()
    return [layer.bias.detach() - old for layer, old in zip(norms_of(net), before)]


# The naive layer


def optimizers() -> dict[str, Callable]:
    """Every optimizer that MMEngine has registered, and what torch's have in variants."""
    # Of sparse gradients, of matrices, and those with tests of their own.
    skipped = {'Optimizer', 'SparseAdam', 'Muon', 'LBFGS', 'ZeroRedundancyOptimizer'}
    made = {}
    for name, kind in OPTIMIZERS.module_dict.items():
        if name in skipped or not issubclass(kind, Optimizer):
            continue
        rate = {'Adadelta': 1.0, 'Adagrad': 0.01, 'ASGD': 0.02, 'SGD': 0.02}
        settings = {'lr': 1.0 if name.startswith('DAdapt') else rate.get(name, 1e-3)}
        if 'weight_decay' in kind.__init__.__code__.co_varnames:
            settings['weight_decay'] = 0.1
        made[name] = lambda params, kind=kind, s=settings: kind(params, **s)
    decayed = dict(lr=0.02, weight_decay=0.1)
    variants = dict(
        momentum=dict(momentum=0.9),
        nesterov=dict(momentum=0.9, nesterov=True, foreach=True),
        fused=dict(momentum=0.9, fused=True),
        loop=dict(momentum=0.9, foreach=False),
    )
    for name, settings in variants.items():
        made[f'SGD {name}'] = lambda params, s=settings: SGD(params, **decayed, **s)
    made['AdamW fused'] = lambda params: AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)
    made['AdamW amsgrad'] = lambda params: AdamW(params, lr=1e-3, weight_decay=0.1, amsgrad=True)
    return made


@pytest.mark.parametrize('name', optimizers())
def test_beta_goes_as_that_of_the_naive_layer(name):
    make = optimizers()[name]
    try:
        make([nn.Parameter(torch.ones(1))])
    except (RuntimeError, TypeError) as error:
        pytest.skip(f'this torch has no {name} on CPUs: {error}')
    ours, naive = (train(norm, make) for norm in (PostShiftedBatchNorm2d, NaivePSBN2d))
    apart = (ours - naive).abs().amax(1)
    assert naive[-1].abs().max() > 3e-5
    # A ReLU that flips ends the likeness: a run must hold the half of its steps at least.
    assert apart[:50].max() <= 1e-6
    assert apart.median() <= 1e-6


@pytest.mark.parametrize('search', [None, 'strong_wolfe'])
def test_lbfgs_which_calls_its_closure_many_times(search):
    def make(params):
        return torch.optim.LBFGS(params, lr=0.1, max_iter=4, line_search_fn=search)

    ours, naive = (
        train(norm, make, steps=2, closure=True) for norm in (PostShiftedBatchNorm2d, NaivePSBN2d)
    )
    assert naive[-1].abs().max() > 1e-3
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-5)


def test_weight_decay_alone_pulls_the_bias_to_the_shift_and_leaves_it_there():
    norm = PostShiftedBatchNorm2d(4, shift=0.3)
    norm.bias.data.copy_(torch.tensor([-1.0, 0.3, 0.0, 2.0]))
    optimizer = SGD(norm.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(1, 200):
        for param in norm.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        expected = 0.3 + 0.95**step * torch.tensor([-1.3, 0.0, -0.3, 1.7])
        torch.testing.assert_close(norm.bias.data, expected, rtol=1e-5, atol=1e-6)
        assert norm.bias[1] == torch.tensor(0.3)
    assert norm.weight.max() < 1e-4


def test_schedule_free_exchanges_averages_outside_of_its_steps():
    schedulefree = pytest.importorskip('schedulefree')
    nets = [network(norm) for norm in (PostShiftedBatchNorm2d, NaivePSBN2d)]
    made = [
        schedulefree.AdamWScheduleFree(net.parameters(), lr=0.01, weight_decay=0.1) for net in nets
    ]
    for batch in batches():
        for net, optimizer in zip(nets, made):
            optimizer.train()
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
            optimizer.eval()
        for ours, naive in zip(*map(norms_of, nets)):
            torch.testing.assert_close(beta_of(ours), beta_of(naive), rtol=0, atol=1e-6)
    assert beta_of(norms_of(nets[1])[0]).abs().max() > 0.01


# What a step leaves as it was


INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@pytest.mark.parametrize('dtype', INTEGERS)
def test_a_bias_that_is_left_alone_is_put_back_bit_for_bit(dtype):
    norm = PostShiftedBatchNorm2d(1000).to(dtype)
    norm.bias.data.normal_()
    before = norm.bias.detach().clone()
    still = PostShiftedBatchNorm2d(4).to(dtype)
    still.bias.data.copy_(torch.tensor([0.0, -0.0, torch.inf, -torch.inf]))
    was = still.bias.detach().clone()
    optimizer = SGD([*norm.parameters(), still.bias], lr=0.0, momentum=0.9, weight_decay=0.1)
    for _ in range(1000):
        for param in norm.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for layer, old in ((norm, before), (still, was)):
        bits = INTEGERS[dtype]
        assert torch.equal(layer.bias.detach().view(bits), old.view(bits))


def test_a_frozen_bias_that_the_optimizer_has_too_stays():
    net = network(PostShiftedBatchNorm2d)
    frozen, _ = norms_of(net)
    frozen.bias.data.normal_()
    frozen.bias.requires_grad_(False)
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    moved = biases_moved(net, optimizer)
    assert not moved[0].any() and moved[1].any()


@pytest.mark.parametrize('settings', [dict(capturable=True), dict(differentiable=True)])
def test_a_step_that_raises_leaves_b(settings):
    """torch refuses `capturable` on the CPU, and `differentiable` for parameters in place."""
    net = network(PostShiftedBatchNorm2d)
    norms_of(net)[0].bias.data.normal_()
    before = copy.deepcopy(net.state_dict())
    optimizer = AdamW(net.parameters(), lr=0.1, **settings)
    loss_of(net.eval(), batches()[0]).backward()
    with pytest.raises((AssertionError, RuntimeError)):
        optimizer.step()
    for key, value in net.state_dict().items():
        if key.endswith('bias') and key[0] in '14':
            assert torch.equal(value, before[key]), key


def test_a_closure_sees_b_and_may_raise():
    net = network(PostShiftedBatchNorm2d)
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    seen = []

    def closure(fails: bool = False) -> torch.Tensor:
        seen.extend(layer.bias.detach().clone() for layer in norms_of(net))
        if fails:
            raise KeyboardInterrupt
        loss = loss_of(net, batches()[0])
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(
        loss_of(network(PostShiftedBatchNorm2d), batches()[0]).item()
    )
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure=lambda: closure(fails=True))
    assert all(torch.equal(bias, torch.full((6,), ALPHA)) for bias in seen[:2])
    for bias, layer in zip(seen[2:], norms_of(net)):
        assert torch.equal(bias, layer.bias)


def test_hooks_of_others_on_the_same_step_see_b():
    net = network(PostShiftedBatchNorm2d)
    optimizer = SGD(net.parameters(), lr=1e-6)
    seen = []
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda *_: seen.append(norms_of(net)[0].bias.detach().clone()))
    biases_moved(net, optimizer)
    for bias in seen:
        torch.testing.assert_close(bias, torch.full((6,), ALPHA), rtol=0, atol=1e-4)
    assert len(seen) == 2


def test_hooks_see_b_on_an_optimizer_that_was_made_before_the_import(tmp_path):
    path = tmp_path / 'late.py'
    path.write_text("""
import torch
param = torch.nn.Parameter(torch.ones(1))
torch.optim.SGD([param], lr=0.1).step()  # torch prepares the class for hooks
from psbn_mmdet.layers import PostShiftedBatchNorm2d
norm = PostShiftedBatchNorm2d(1)
optimizer = torch.optim.SGD(norm.parameters(), lr=0.1, weight_decay=1.0)
for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
    register(lambda *_: print(f'{norm.bias.item():.3f}'))
norm.weight.grad, norm.bias.grad = torch.zeros(1), torch.ones(1)
optimizer.step()
""")
    assert run(sys.executable, path, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout.split() == [
        '0.100',
        '0.000',
    ]


# Which optimizer, which layer


class Lookahead(Optimizer):
    """Of arXiv 1907.08610: holds another optimizer, and copies of the parameters from the start."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.slow = [[p.detach().clone() for p in g['params']] for g in self.param_groups]

    def step(self) -> None:
        self.inner.step()
        for group, slow in zip(self.param_groups, self.slow):
            for param, copy_ in zip(group['params'], slow):
                copy_.lerp_(param.data, 0.5)
                param.data.copy_(copy_)


class Twice(SGD):
    """A subclass whose step is that of its base, and more."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group['params']:
                param.data.mul_(0.99)


@pytest.mark.parametrize('kind', [Lookahead, Twice])
def test_optimizers_around_others_move_once(kind):
    def make(params):
        if kind is Twice:
            return Twice(params, lr=0.05)
        return Lookahead(SGD(params, lr=0.05, weight_decay=0.1))

    ours, naive = (train(norm, make, steps=40) for norm in (PostShiftedBatchNorm2d, NaivePSBN2d))
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-6)
    assert naive[-1].abs().max() > 1e-3


def test_layers_and_parameters_that_come_later_are_decayed():
    net = network(PostShiftedBatchNorm2d)
    optimizer = SGD([net[0].weight], lr=0.1, weight_decay=1.0)
    biases_moved(net, optimizer)
    later = PostShiftedBatchNorm2d(6)
    net[1] = later
    optimizer.add_param_group(dict(params=list(later.parameters())))
    net[4].bias = nn.Parameter(torch.full((6,), 0.5))  # another object
    optimizer.add_param_group(dict(params=[net[4].bias]))
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(later.bias, torch.full((6,), ALPHA))
    torch.testing.assert_close(net[4].bias.data, torch.full((6,), 0.5 - 0.1 * 0.4))


@pytest.mark.parametrize('how', ['deepcopy', 'save', 'to', 'to_empty', 'bn_to_psbn', 'state_dict'])
def test_copies_and_moved_layers_are_decayed(how):
    net = network(PostShiftedBatchNorm2d)
    if how == 'deepcopy':
        net = copy.deepcopy(net)
    elif how == 'save':
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        net = torch.load(file, weights_only=False)
    elif how == 'to':
        net = net.to(torch.float64)
    elif how == 'to_empty':
        net = network(PostShiftedBatchNorm2d).to('meta').to_empty(device='cpu')
        net.load_state_dict(network(PostShiftedBatchNorm2d).state_dict())
    elif how == 'bn_to_psbn':
        net = network(nn.BatchNorm2d)
        optimizer = SGD(net.parameters(), lr=0.1, weight_decay=1.0)  # built before
        bn_to_psbn(net)
        for layer in norms_of(net):
            layer.bias.data.fill_(ALPHA)
    else:
        net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    if how != 'bn_to_psbn':
        optimizer = SGD(net.parameters(), lr=0.1, weight_decay=1.0)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for layer in norms_of(net):
        assert torch.equal(layer.bias.float(), torch.full((6,), ALPHA))
        assert layer.weight.max() < 0.95


def test_a_network_that_another_process_unpickles_is_decayed(tmp_path):
    """By nothing but its pickle: as those that are spawned."""
    torch.save(network(PostShiftedBatchNorm2d), tmp_path / 'net.pth')
    code = """
import torch
net = torch.load('net.pth', weights_only=False)
for param in net.parameters():
    param.grad = torch.zeros_like(param)
torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1.0).step()
print(torch.equal(net[1].bias, torch.full((6,), 0.1)), net[1].weight.max().item() < 0.95)
"""
    result = run(sys.executable, '-c', code, cwd=tmp_path)
    assert result.stdout == 'True True\n', result.stderr


def test_replicas_of_data_parallel_are_no_layers_of_their_own():
    layer = PostShiftedBatchNorm2d(4)
    before = set(decay._layers)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    replica.bias, replica.weight = layer.bias * 1, layer.weight * 1  # as torch spreads them
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(replica(x), layer(x)) and set(decay._layers) == before


def test_a_shared_bias_is_moved_once():
    first, second = PostShiftedBatchNorm2d(4), PostShiftedBatchNorm2d(4, shift=0.4)
    second.bias = first.bias
    optimizer = SGD([first.bias], lr=0.1, weight_decay=1.0)
    first.bias.grad = torch.zeros(4)
    optimizer.step()  # towards the shift of one of them
    assert first.bias[0].item() == pytest.approx(ALPHA) or first.bias[0].item() == pytest.approx(
        0.13
    )


def test_each_layer_has_its_own_shift_and_type():
    layers = [
        PostShiftedBatchNorm2d(3, shift=0.1),
        PostShiftedBatchNorm2d(5, shift=0.4),
        PostShiftedBatchNorm2d(2, shift=0.1).double(),
        PostShiftedBatchNorm2d(2, affine=False),
        nn.BatchNorm2d(4),
    ]
    params = [p for layer in layers for p in layer.parameters()]
    for param in params:
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
    SGD(params, lr=0.1, weight_decay=1.0).step()
    targets = [layer.bias.mean().item() for layer in layers if layer.bias is not None]
    assert targets == pytest.approx([0.91, 0.94, 0.91, 0.9])


def test_accumulation_and_skipped_steps_change_nothing():
    net = network(PostShiftedBatchNorm2d)
    scaler = torch.amp.GradScaler('cpu') if hasattr(torch.amp, 'GradScaler') else None
    if scaler is None:
        pytest.skip('this torch has no gradient scaler for CPUs')
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    before = [layer.bias.detach().clone() for layer in norms_of(net)]
    scaler.scale(loss_of(net, batches()[0]) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(b, layer.bias) for b, layer in zip(before, norms_of(net)))


def test_layers_and_optimizers_are_not_kept_alive():
    net = network(PostShiftedBatchNorm2d)
    optimizer = SGD(net.parameters(), lr=0.1)
    biases_moved(net, optimizer)
    references = [weakref.ref(net[1]), weakref.ref(net[1].bias), weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_optimizers_of_other_networks_are_not_slowed_by_any_move(monkeypatch):
    alive = network(PostShiftedBatchNorm2d)
    net = network(nn.BatchNorm2d)
    monkeypatch.setattr('psbn_mmdet.layers.decay._Biases', None)  # would fail if it were used
    assert biases_moved(net, SGD(net.parameters(), lr=0.1))[0].any()
    assert len(norms_of(alive)) == 2


@pytest.mark.parametrize('whole', [False, True])
def test_a_compiled_step_is_the_same(whole):
    if whole and torch.__version__.startswith('2.1.'):
        pytest.skip('this torch cannot compile a step')
    nets = [network(PostShiftedBatchNorm2d) for _ in range(2)]
    steps = []
    for net, compiled in zip(nets, (False, True)):
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

        def step(batch, net=net, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()

        if compiled and whole:
            step = torch.compile(step, backend='aot_eager')
        elif compiled:
            net.forward = torch.compile(net.forward, backend='aot_eager')
        steps.append(step)
    for batch in batches()[:4]:
        for step in steps:
            step(batch)
    for ours, eager in zip(norms_of(nets[1]), norms_of(nets[0])):
        torch.testing.assert_close(ours.bias, eager.bias, rtol=1e-5, atol=1e-6)
        assert (ours.bias - ALPHA).abs().max() > 1e-4


# What no optimizer steps


def test_an_update_by_hand_is_said():
    norm = PostShiftedBatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3)
    for _ in range(PASSES - 1):
        norm(x)
    with pytest.warns(UserWarning, match=r'no torch\.optim\.Optimizer has stepped a trained bias'):
        norm(x)


def test_nothing_is_said_of_layers_that_are_stepped_or_not_trained(recwarn):
    stepped, frozen, evaluated = (PostShiftedBatchNorm2d(4) for _ in range(3))
    frozen.requires_grad_(False)
    evaluated.eval()
    optimizer = SGD(stepped.parameters(), lr=0.1)
    x = torch.randn(2, 4, 3, 3)
    for step in range(PASSES + 1):
        for layer in (stepped, frozen, evaluated):
            layer(x)
        with torch.no_grad():
            stepped(x)
        if step == 5:
            optimizer.step()
    assert not [w for w in recwarn if 'psBN' in str(w.message)]
