"""Which filters get no gradient, read before the optimizer's step."""

import inspect

import pytest
import torch
from mmengine.optim import ConstantLR, OptimWrapper, OptimWrapperDict
from torch import nn
from torch.optim import SGD, AdamW

from psbn_mmdet.collapse import GradientWatch, find_norms
from psbn_mmdet.layers import PostShiftedBatchNorm2d

TRAPPED = [1, 4]


def network(norm=nn.BatchNorm2d) -> nn.Sequential:
    """Two blocks; channels 1 and 4 of the first are shut."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4), nn.ReLU()
    )
    with torch.no_grad():
        model[1].weight[TRAPPED] = 0.01
        model[1].bias[TRAPPED] = -1.0
    return model


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trapped_channels(watch: GradientWatch) -> dict:
    return {name: mask.nonzero()[0].tolist() for name, mask in watch.trapped().items()}


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
@pytest.mark.parametrize('optimizer', [SGD, AdamW])
def test_finds_the_shut_channels_and_no_others(norm, optimizer):
    model = network(norm)
    optimizer = optimizer(model.parameters(), lr=1e-3, weight_decay=0.1)
    watch = GradientWatch([optimizer], find_norms(model))
    for step in range(3):
        optimizer.zero_grad()
        model(images(step)).sum().backward()
        optimizer.step()
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}
    assert watch.steps == 3


def test_a_window_without_a_step_is_not_observed():
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-3)
    watch = GradientWatch([optimizer], find_norms(model))
    model(images()).sum().backward()
    assert watch.trapped() == {} and watch.steps == 0
    optimizer.step()
    assert watch.trapped() and watch.steps == 1
    assert watch.trapped(window=1) and not watch.idle(1, watch.now)
    watch.now = 1
    assert watch.trapped(window=1) == {} and not watch.idle(1, watch.now)
    watch.active = False
    optimizer.step()
    assert watch.trapped(window=1) == {} and watch.steps == 1
    watch.active = True
    optimizer.step()
    assert watch.trapped(window=1) and watch.steps == 2
    watch.now = 2
    model[4].zero_grad()
    optimizer.step()
    assert watch.trapped(window=1).keys() == {'1'} and watch.idle(1, watch.now) == {'4'}


def test_one_step_with_gradient_is_enough():
    model = network()
    optimizer = SGD(model.parameters(), lr=0)
    watch = GradientWatch([optimizer], find_norms(model))
    for step in range(4):
        optimizer.zero_grad()
        model(images(step)).sum().backward()
        if step != 2:  # the other steps have no positive sample, say
            for p in model.parameters():
                p.grad.zero_()
        optimizer.step()
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}


def test_a_window_forgets_what_was_before_it():
    model = network()
    optimizer = SGD(model.parameters(), lr=0)
    watch = GradientWatch([optimizer], find_norms(model))
    for watch.now in range(4):
        optimizer.zero_grad()
        model(images()).sum().backward()
        if watch.now >= 2:
            model[4].weight.grad[3] = model[4].bias.grad[3] = 0
        optimizer.step()

    def trapped(window):
        return {n: mask.nonzero()[0].tolist() for n, mask in watch.trapped(window).items()}

    assert trapped(4) == trapped(3) == {'1': TRAPPED, '4': []}
    assert trapped(2) == trapped(1) == {'1': TRAPPED, '4': [3]}
    assert trapped(5) == {}  # not full
    assert watch.reached()['4'].all() and not watch.reached()['1'][TRAPPED].any()


def test_of_several_steps_at_a_time_each_is_seen():
    """As where a model trains its parts by steps of their own."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    optimizer = SGD(model.parameters(), lr=0)
    watch = GradientWatch([optimizer], find_norms(model), 7)
    for watch.now in range(7, 27):
        for turn in (0, 1):
            for layer, here in enumerate((turn == 1, turn == 0)):
                for param in model[layer].parameters():
                    param.grad = here * torch.tensor([1.0, 1.0, 1.0 - layer, 0.0])
            optimizer.step()
    assert {name: mask.tolist() for name, mask in watch.trapped(20).items()} == {
        '0': [False, False, False, True],
        '1': [False, False, True, True],
    }
    assert watch.trapped(21) == {}


def test_a_window_without_a_step_is_no_lack_of_gradients():
    model = network()
    wrapper = OptimWrapper(SGD(model.parameters(), lr=1e-3), accumulative_counts=4)
    watch = GradientWatch([wrapper.optimizer], find_norms(model))
    wrapper.initialize_count_status(model, 0, 8)
    for watch.now in range(6):
        wrapper.update_params(model(images()).sum())
    assert (
        watch.idle(2, watch.now) == set()
        and watch.idle(3, watch.now) == set()
        and watch.trapped(2) == {}
    )


@pytest.mark.parametrize('begin', [0, 1000])
def test_steps_in_which_a_layer_gets_no_gradient_tell_nothing_of_its_filters(begin):
    """A head of SSD is trained by the images alone that have objects of its size."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0)
    watch = GradientWatch([optimizer], find_norms(model), begin)
    seen = {}
    for watch.now in range(begin, begin + 40):
        step = watch.now - begin
        model[0].weight.grad = torch.tensor([1.0, 0.0, 1.0, 1.0])
        model[0].bias.grad = torch.zeros(4)
        rare = [float(step % 10 == 3), float(step == 3), 0.0, 0.0]
        model[1].bias.grad = torch.tensor(rare)
        optimizer.step()
        seen[step] = {n: mask.nonzero()[0].tolist() for n, mask in watch.trapped(3).items()}
    assert seen[1] == {} and all(seen[step]['0'] == [1] for step in range(2, 40))
    # Its window of 3 is full with the steps 3, 13 and 23; in the last, filter 1 got none for 2.
    assert [(step, found['1']) for step, found in seen.items() if '1' in found] == [
        *((step, [2, 3]) for step in (23, 24, 25)),
        *((step, [1, 2, 3]) for step in (33, 34, 35)),
    ]
    assert watch.idle(7, watch.now) == set() and watch.idle(6, watch.now) == {'1'}
    assert {name: mask.tolist() for name, mask in watch.reached().items()} == {
        '0': [True, False, True, True],
        '1': [True, True, False, False],
    }


def test_what_fails_in_reading_ends_the_watching_and_not_the_step():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = GradientWatch([optimizer], find_norms(model))
    model(images()).sum().backward()
    before = model[0].weight.detach().clone()
    watch._groups[0].zeros = None  # as if memory had run out
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert isinstance(watch.failure, TypeError) and watch.steps == 1
    optimizer.step()
    assert watch.steps == 1


def test_parameters_on_two_devices_are_read_each_on_its_own(second_device):
    model = network()
    other = nn.BatchNorm2d(4).to(second_device)
    norms = {**find_norms(model), 'other': other}
    optimizer = SGD([*model.parameters(), *other.parameters()], lr=0, foreach=False)
    watch = GradientWatch([optimizer], norms)
    model(images()).sum().backward()
    for param in other.parameters():
        param.grad = torch.tensor([1.0, 0.0, 1.0, 0.0], device=second_device)
    optimizer.step()
    assert trapped_channels(watch) == {'1': TRAPPED, '4': [], 'other': [1, 3]}
    assert watch.failure is None and watch.steps == 1


def test_layers_outside_the_graph_are_not_observed():
    model = nn.ModuleDict(dict(used=network(), unused=nn.BatchNorm2d(4)))
    optimizer = SGD(model.parameters(), lr=1e-3)
    watch = GradientWatch([optimizer], find_norms(model))
    for step in range(2):
        optimizer.zero_grad()
        if step == 0:
            model['used'](images()).sum().backward()
        optimizer.step()
    assert trapped_channels(watch) == {'used.1': TRAPPED, 'used.4': []}
    assert watch.idle(1, watch.now) == {'unused'}


def test_frozen_layers_are_not_observed_and_partly_frozen_ones_are():
    model = network()
    model[4].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=1e-3)
    watch = GradientWatch([optimizer], find_norms(model))
    model(images()).sum().backward()
    optimizer.step()
    assert trapped_channels(watch) == {'1': TRAPPED}


def test_gradient_accumulation_is_seen_as_one_step():
    model = network()
    wrapper = OptimWrapper(SGD(model.parameters(), lr=1e-3), accumulative_counts=4)
    watch = GradientWatch([wrapper.optimizer], find_norms(model))
    wrapper.initialize_count_status(model, 0, 12)
    for step in range(3):
        watch.now = step
        wrapper.update_params(model(images(step)).sum())
    assert watch.trapped() == {}
    for watch.now in range(3, 10):
        wrapper.update_params(model(images(watch.now)).sum())
    assert watch.steps == 2
    # What was accumulated since the step is part of the window.
    assert watch.trapped(10) and not watch.trapped(11)
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}


def test_clipping_to_a_tiny_norm_traps_nothing():
    model = network()
    wrapper = OptimWrapper(SGD(model.parameters(), lr=1e-3), clip_grad=dict(max_norm=1e-6))
    watch = GradientWatch([wrapper.optimizer], find_norms(model))
    wrapper.update_params(model(images()).sum())
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}


@pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='torch scales on CPUs from version 2.3 on'
)
@pytest.mark.parametrize('fused', [False, True])
def test_loss_scaling_and_skipped_steps(fused):
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    watch = GradientWatch([optimizer], find_norms(model))

    def step(factor):  # what AmpOptimWrapper does, which needs an accelerator
        optimizer.zero_grad()
        scaler.scale(model(images()).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    before = model[0].weight.detach().clone()
    step(float('inf'))  # infinite gradients: the step is skipped
    assert torch.equal(model[0].weight, before)
    assert watch.trapped() == {} and watch.steps == 0
    step(1)
    assert not torch.equal(model[0].weight, before)
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}
    assert watch.steps == 1
    watch.now = 1
    step(float('inf'))  # what it had is no gradient that reached a filter
    assert watch.steps == 1 and not watch.trapped(1)


@pytest.mark.skipif(
    'fused' not in inspect.signature(SGD).parameters, reason='this torch has no fused SGD'
)
def test_a_step_is_skipped_by_a_scaler_on_another_device(second_device):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    watch = GradientWatch([optimizer], find_norms(model))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0, device=second_device)
    model(images()).sum().backward()
    optimizer.step()
    assert watch.failure is None and watch.steps == 0 and watch.reached() == {}
    optimizer.found_inf = torch.tensor(0.0, device=second_device)
    optimizer.step()
    assert watch.steps == 1 and trapped_channels(watch) == {'1': TRAPPED, '4': []}


def test_several_optimizers_are_watched_each_by_its_own_steps():
    model = network()
    wrappers = OptimWrapperDict(
        first=OptimWrapper(SGD(model[:3].parameters(), lr=1e-3)),
        second=OptimWrapper(AdamW(model[3:].parameters(), lr=1e-3)),
    )
    watch = GradientWatch([w.optimizer for w in wrappers.values()], find_norms(model))
    model(images()).sum().backward()
    wrappers['second'].step()
    assert trapped_channels(watch) == {'4': []}
    wrappers['first'].step()
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}


def test_gamma_and_beta_in_different_optimizers():
    model = network()
    gammas = [model[1].weight, model[4].weight]
    rest = [p for p in model.parameters() if all(p is not g for g in gammas)]
    optimizers = [SGD(gammas, lr=0.1), SGD(rest, lr=0.1)]
    watch = GradientWatch(optimizers, find_norms(model))
    model(images()).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert trapped_channels(watch) == {'1': TRAPPED, '4': []}


class Unhooked(SGD):
    """Without hooks, as torch.compile of torch 2.1 leaves all optimizers."""

    def _patch_step_function(self):
        self._zero_grad_profile_name = 'zero_grad'

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]['params']:
            param -= 1e-3 * param.grad


@pytest.mark.parametrize('counted', [False, True])
def test_a_step_that_has_lost_its_hooks_is_watched(counted):
    model = network()
    optimizer = Unhooked(model.parameters(), lr=1e-3)
    if counted:  # as MMEngine does
        ConstantLR(optimizer)
    before = model[0].weight.clone()
    watches = [GradientWatch([optimizer], find_norms(model)) for _ in range(2)]
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    for watch in watches:
        assert watch.steps == 1 and trapped_channels(watch) == {'1': TRAPPED, '4': []}


class Hooked(SGD):
    """With a step of its own, whatever has been compiled in this process before."""

    def step(self, closure=None):
        return None


def test_a_step_that_has_its_hooks_is_left_alone():
    optimizer = Hooked(network().parameters(), lr=1e-3)
    GradientWatch([optimizer], find_norms(network()))
    assert 'step' not in vars(optimizer)
    ConstantLR(optimizer)
    step = optimizer.step
    model = network()
    optimizer.add_param_group(dict(params=list(model.parameters())))
    GradientWatch([optimizer], find_norms(model))
    assert optimizer.step is step


def test_a_gradient_of_gamma_or_of_beta_is_enough():
    for optimizers in (lambda ps: [SGD(ps, lr=0)], lambda ps: [SGD([p], lr=0) for p in ps]):
        model = nn.Sequential(nn.BatchNorm2d(4))
        optimizers = optimizers(list(model.parameters()))
        watch = GradientWatch(optimizers, find_norms(model))
        model[0].weight.grad = torch.tensor([1.0, 0.0, 0.0, -1e-30])
        model[0].bias.grad = torch.tensor([0.0, 1.0, 0.0, 0.0])
        for optimizer in optimizers:
            optimizer.step()
        assert trapped_channels(watch) == {'0': [2]}


def test_close_detaches():
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-3)
    watch = GradientWatch([optimizer], find_norms(model))
    watch.close()
    model(images()).sum().backward()
    optimizer.step()
    assert watch.steps == 0 and not optimizer._optimizer_step_pre_hooks
