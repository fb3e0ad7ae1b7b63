"""What follows a BN, found by watching a forward pass."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models import backbones as zoo
from mmdet.models.necks import FPN
from torch import nn

from psbn_mmdet.collapse import RectifierTrace, StepTrace, census_of_model, trace_rectifiers
from psbn_mmdet.layers import PostShiftedBatchNorm2d, bn_to_psbn

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class After(nn.Module):
    """A BN and something after it."""

    def __init__(self, after, norm=nn.BatchNorm2d):
        super().__init__()
        self.norm = norm(4)
        self.after = after

    def forward(self, x):
        return self.after(self.norm(x))


def halves(x, first, second):
    return torch.cat([first(x[:, :2]), second(x[:, 2:])], dim=1)


RELU = {
    'nn.ReLU': nn.ReLU(),
    'nn.ReLU in place': nn.ReLU(inplace=True),
    'F.relu': F.relu,
    'F.relu in place': lambda x: F.relu(x, inplace=True),
    'torch.relu_': torch.relu_,
    'method': lambda x: x.relu(),
    'nn.ReLU6': nn.ReLU6(),
    'nn.ReLU6 in place': nn.ReLU6(inplace=True),
    'clamp(min=0)': lambda x: x.clamp(min=0),
    'clamp_(min=0)': lambda x: x.clamp_(min=0),
    'clamp(0, 6)': lambda x: torch.clamp(x, 0, 6),
    'clamp_min': lambda x: x.clamp_min(0.0),
    'threshold': lambda x: F.threshold(x, 0.0, 0.0),
    'through a view': lambda x: x.flatten(1).relu(),
    'through a view, in place': lambda x: x.view(-1).relu_(),
    'through a copy': lambda x: x.clone().relu(),
    'through another type': lambda x: x.double().relu(),
    'through another memory format': lambda x: x.contiguous(
        memory_format=torch.channels_last
    ).relu(),
    'two rectifiers': lambda x: x.relu() + F.relu6(x),
    'slices, both rectified': lambda x: halves(x, F.relu, F.relu),
    'slices, both rectified in place': lambda x: (x[:, :2].relu_(), x[:, 2:].relu_(), x * 2)[-1],
    'shape looked at as well': lambda x: x.relu() + torch.zeros_like(x) + x.new_zeros(1),
    'then anything else': lambda x: F.silu(x.relu()) + 1,
}
LEAKY = {
    'nn.LeakyReLU': nn.LeakyReLU(0.1),
    'nn.LeakyReLU in place': nn.LeakyReLU(0.1, inplace=True),
    'F.leaky_relu': F.leaky_relu,
    'slices, one leaky': lambda x: halves(x, F.relu, F.leaky_relu),
}
OTHER = {
    'nothing': nn.Identity(),
    'SiLU': nn.SiLU(),
    'Hardswish': nn.Hardswish(),
    'GELU': nn.GELU(),
    'ELU': nn.ELU(),
    'addition before ReLU': lambda x: F.relu(x + 1),
    'addition in place before ReLU': lambda x: F.relu(x.add_(1), inplace=True),
    'second reader': lambda x: F.relu(x) + x.mean(),
    'second reader first': lambda x: x.sigmoid() * x.relu(),
    'slices, one rectified': lambda x: halves(x, F.relu, F.silu),
    'slices, one rectified in place': lambda x: (x[:, :2].relu_(), x * 2)[-1],
    'clamp(min=-1)': lambda x: x.clamp(min=-1),
    'clamp(max=0)': lambda x: x.clamp(max=0),
    'hardtanh': F.hardtanh,
    'cumsum(0)': lambda x: x.cumsum(0),
    'softmax(0)': lambda x: x.softmax(0),
    'power of 0': lambda x: x.pow(0),
    'triangle': lambda x: x.triu(0),
    'threshold at 0 with another value': lambda x: F.threshold(x, 0.0, 1.0),
    'threshold at 1': lambda x: F.threshold(x, 1.0, 0.0),
    'concatenation': lambda x: torch.cat([x, x], dim=1),
}


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
@pytest.mark.parametrize(
    ('after', 'expected'),
    [
        pytest.param(after, expected, id=name)
        for expected, cases in (('relu', RELU), ('leaky_relu', LEAKY), ('other', OTHER))
        for name, after in cases.items()
    ],
)
def test_tells_what_follows(after, expected, norm):
    model = After(after, norm)
    x = torch.randn(2, 4, 6, 6)
    with RectifierTrace(model) as trace:
        model(x)
    assert trace.structure.rectifiers == {'norm': expected}
    assert trace_rectifiers(model, x) == {'norm': expected}


def test_a_layer_that_did_not_run_is_absent():
    model = nn.ModuleDict(dict(used=After(F.relu), unused=nn.BatchNorm2d(4)))
    model.forward = lambda x: model['used'](x)
    assert trace_rectifiers(model, torch.randn(2, 4, 6, 6)) == {'used.norm': 'relu'}


def test_what_runs_after_a_layer_that_failed_is_not_taken_for_its_output():
    class Raising(nn.BatchNorm2d):
        def forward(self, x):
            raise ValueError

    model = nn.Sequential(Raising(4))

    def forward(x):
        with pytest.raises(ValueError):  # noqa: PT011
            model[0](x)
        return F.batch_norm(x, None, None, training=True).relu()

    model.forward = forward
    assert trace_rectifiers(model, torch.randn(2, 4, 6, 6)) == {}


def test_a_layer_called_twice_needs_a_rectifier_both_times():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm)
    x = torch.randn(2, 4, 6, 6)
    model.forward = lambda x: norm(x).relu() + norm(x)
    assert trace_rectifiers(model, x) == {'0': 'other'}
    model.forward = lambda x: norm(x).relu() + norm(x).relu()
    assert trace_rectifiers(model, x) == {'0': 'relu'}


def expected_of(model, rule):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {name: rule(name) for name in names}


def ends(*suffixes):
    return lambda name: 'relu' if name.endswith(suffixes) else 'other'


NETWORKS = {
    # the last BN of a block and the one of the shortcut stand before the residual addition
    'ResNet, basic': (lambda: zoo.ResNet(18, base_channels=8), ends('bn1')),
    'ResNet, bottleneck': (lambda: zoo.ResNet(50, base_channels=8), ends('bn1', 'bn2')),
    'ResNeXt': (
        lambda: zoo.ResNeXt(depth=50, base_channels=8, groups=2, base_width=4),
        ends('bn1', 'bn2'),
    ),
    'RegNet': (lambda: zoo.RegNet('regnetx_400mf'), ends('bn1', 'bn2')),
    'Res2Net': (
        lambda: zoo.Res2Net(depth=50, scales=4, base_width=4, base_channels=8),
        # bns.N are those of the slices within a block; bn1 is split after its rectifier
        lambda n: (
            'relu' if n.endswith('.bn1') or '.bns.' in n or n.startswith('stem.') else 'other'
        ),
    ),
    # the last ConvModule of an inverted residual is linear
    'MobileNetV2': (
        lambda: zoo.MobileNetV2(widen_factor=0.25),
        lambda n: 'other' if n.endswith('linear_conv.bn') else 'relu',
    ),
    'Darknet': (lambda: zoo.Darknet(53), lambda n: 'leaky_relu'),
    'CSPDarknet with SiLU': (lambda: zoo.CSPDarknet(widen_factor=0.125), lambda n: 'other'),
    'CSPDarknet with ReLU': (
        lambda: zoo.CSPDarknet(widen_factor=0.125, act_cfg=dict(type='ReLU')),
        lambda n: 'relu',
    ),
    'VGG': (None, lambda n: 'relu'),
}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('convert', [nn.Identity(), bn_to_psbn], ids=['BN', 'psBN'])
def test_networks_of_mmdetection(name, training, convert):
    build, rule = NETWORKS[name]
    if name == 'VGG':
        from mmcv.cnn import VGG

        build = lambda: VGG(11, with_bn=True, out_indices=(0, 1, 2, 3, 4))  # noqa: E731
    model = convert(build())
    model.train(training)
    assert trace_rectifiers(model, IMAGE) == expected_of(model, rule)


def test_fpn_with_norm_and_activation():
    features = [torch.randn(1, 8, size, size) for size in (16, 8, 4)]
    for act, expected in ((None, 'other'), (dict(type='ReLU'), 'relu')):
        neck = FPN([8, 8, 8], 8, 3, norm_cfg=dict(type='BN'), act_cfg=act)
        # the outermost lateral has no reader but the output convolution, the others are added up
        assert trace_rectifiers(neck, features) == expected_of(neck, lambda n: expected)  # noqa: B023


@pytest.mark.parametrize(
    ('order', 'expected'),
    [
        (('conv', 'norm', 'act'), 'relu'),
        (('norm', 'act', 'conv'), 'relu'),
        (('norm', 'conv', 'act'), 'other'),
        (('act', 'conv', 'norm'), 'other'),
        (('act', 'norm', 'conv'), 'other'),
        (('conv', 'act', 'norm'), 'other'),
    ],
)
def test_conv_module_in_every_order(order, expected):
    model = ConvModule(3, 3, 3, norm_cfg=dict(type='psBN'), order=order)
    assert trace_rectifiers(model, IMAGE) == {'bn': expected}


class Traced(nn.Module):
    """A network with all that a pass could leave traces in."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        random.random()
        np.random.rand()
        x.mul_(2)
        return self.stem(x)


@pytest.mark.parametrize('training', [True, False])
def test_the_pass_leaves_no_trace(training):
    model = Traced().train(training)
    model(IMAGE.clone()).sum().backward()
    model.stem[2].eval()

    def everything():
        return dict(
            state={k: v.clone() for k, v in model.state_dict().items()},
            grads=[p.grad.clone() for p in model.parameters()],
            random=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
            hooks=[
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for m in model.modules()
            ],
            flags=[m.training for m in model.modules()],
            grad_mode=torch.is_grad_enabled(),
        )

    image = IMAGE.clone()
    before = everything()
    assert trace_rectifiers(model, image) == {'stem.1': 'relu'}
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert torch.equal(image, IMAGE)


def test_a_failing_pass_leaves_no_trace_either():
    model = Traced()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        trace_rectifiers(model, torch.randn(2, 5, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.stem[1]._forward_hooks


def test_autocast_does_not_hide_the_rectifier():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    with torch.autocast('cpu', torch.bfloat16):
        assert trace_rectifiers(model, IMAGE) == {'1': 'relu'}


class BatchNormAct(nn.BatchNorm2d):
    """Norm and activation in one, as timm's BatchNormAct2d."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize(('act', 'expected'), [(F.relu, 'relu'), (F.silu, 'other')])
def test_an_activation_inside_the_layer_is_seen(act, expected):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4, act), nn.Conv2d(4, 4, 1))
    assert trace_rectifiers(model, IMAGE) == {'1': expected}


class Foreign(nn.BatchNorm2d):
    def forward(self, x):
        return x * self.weight[:, None, None]


# Training steps


class Stepping(nn.Module):
    """A model whose training step calls what it is told to."""

    def __init__(self, *layers, step=None):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
        self.step = step or (lambda model, x: model(x).sum().backward())
        self.calls = 0

    def forward(self, x):
        return self.net(x)

    def train_step(self, x):
        self.calls += 1
        return self.step(self, x)


def watched(model, steps=1, **kwargs):
    trace = StepTrace(model, model, **kwargs)
    for _ in range(steps):
        model.train_step(IMAGE)
    return trace


def nothing_is_left(model):
    stance = getattr(torch._dynamo.eval_frame, '_stance', None)
    return (
        not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None
        and (stance is None or stance.stance == 'default')
    )


def test_a_step_is_watched_once_if_all_layers_run_and_its_backward_is_not():
    # The backward of LeakyReLU reads the BN's output again, and so does that of clamp.
    model = Stepping(nn.BatchNorm2d(4), nn.LeakyReLU(), nn.BatchNorm2d(4))
    model.net.append(After(lambda x: x.clamp(min=0)))
    trace = watched(model)
    assert trace.structure.rectifiers == {
        'net.1': 'leaky_relu',
        'net.3': 'other',
        'net.4.norm': 'relu',
    }
    assert not trace.active and trace.unknown == {} and trace.failure is None
    assert 'train_step' not in vars(model) and nothing_is_left(model)


def test_activation_checkpointing_does_not_hide_the_rectifier():
    network = zoo.ResNet(18, base_channels=8, with_cp=True, frozen_stages=-1, norm_eval=False)
    network.train_step = lambda x: sum(y.sum() for y in network(x.requires_grad_())).backward()
    trace = StepTrace(network, network)
    network.train_step(IMAGE.clone())
    assert trace.structure.rectifiers == expected_of(network, ends('bn1'))


def test_a_step_that_does_not_go_through_forward_is_seen():
    model = Stepping(nn.BatchNorm2d(4), nn.ReLU(), step=lambda model, x: model.net(x).sum())
    assert watched(model).structure.rectifiers == {'net.1': 'relu'}


def test_a_forward_that_calls_the_model_again_is_seen_to_its_end():
    class Again(Stepping):
        def forward(self, x, again=True):
            if again:
                self(x, again=False)
            return super().forward(x)

    model = Again(nn.BatchNorm2d(4), After(F.relu))
    assert watched(model).structure.rectifiers == {'net.1': 'other', 'net.2.norm': 'relu'}


def test_a_layer_that_is_idle_at_first_is_waited_for():
    model = Stepping(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    model.step = lambda model, x: (model.net if model.calls == 3 else model.net[:3])(x).sum()
    trace = watched(model, 2)
    assert trace.active and trace.unknown == {'net.3': 'did not run in 2 iterations'}
    assert trace.structure.rectifiers == {'net.1': 'relu'}
    model.train_step(IMAGE)
    assert trace.structure.rectifiers == {'net.1': 'relu', 'net.3': 'relu'} and not trace.active


def test_layers_that_stay_unknown_are_named_with_the_reason():
    model = Stepping(nn.BatchNorm2d(4), nn.ReLU(), Foreign(4), nn.ReLU())
    model.idle = nn.BatchNorm2d(4)
    trace = watched(model, 5, bound=4)
    assert not trace.active and trace.structure.rectifiers == {'net.1': 'relu'}
    assert trace.unknown == {
        'net.3': 'Foreign runs no batch normalization of torch',
        'idle': 'did not run in 4 iterations',
    }
    assert nothing_is_left(model)


@pytest.mark.parametrize('where', ['forward', 'loss', 'backward'])
def test_a_step_that_fails_leaves_nothing_behind(where):
    def fail(*args):
        raise RuntimeError('out of memory')

    def step(model, x):
        if where == 'forward':
            model.net[2].register_forward_hook(fail)
        y = model(x).sum()
        if where == 'loss':
            fail()
        y.register_hook(fail)
        y.backward()

    model = Stepping(nn.BatchNorm2d(4), nn.ReLU(), step=step)
    trace = StepTrace(model, model)
    with pytest.raises(RuntimeError, match='out of memory'):
        model.train_step(IMAGE)
    model.net[2]._forward_hooks.clear()
    assert nothing_is_left(model)
    trace.close()
    trace.close()
    assert 'train_step' not in vars(model)


@pytest.mark.parametrize('part', ['_known_in', '_note_sum', '_note'])
def test_what_fails_in_the_watching_ends_it_and_not_the_step(monkeypatch, part):
    def fail(*args):
        raise KeyError('of ours')

    monkeypatch.setattr(RectifierTrace, part, fail)
    model = Stepping(nn.BatchNorm2d(4), nn.ReLU(), step=lambda model, x: model(x).sum().item())
    expected = model.step(model, IMAGE)
    trace = StepTrace(model, model)
    assert model.train_step(IMAGE) == expected
    assert isinstance(trace.failure, KeyError) and not trace.active and nothing_is_left(model)
    with pytest.raises(KeyError):
        trace_rectifiers(model, IMAGE)


def test_operators_of_higher_order_are_let_through():
    attention = pytest.importorskip('torch.nn.attention.flex_attention')

    def attend(x):
        tokens = x.detach().flatten(2)[:, None]
        return attention.flex_attention(tokens, tokens, tokens)

    model = Stepping(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), After(attend))
    model.step = lambda model, x: model(x).sum().item()
    expected = model.step(model, IMAGE)
    trace = StepTrace(model, model)
    assert model.train_step(IMAGE) == expected
    assert trace.failure is None
    assert trace.structure.rectifiers == {'net.1': 'relu', 'net.3': 'other', 'net.4.norm': 'other'}


@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'), reason='needs torch >= 2.6')
def test_a_compiled_step_is_watched_uncompiled():
    model = Stepping(nn.BatchNorm2d(4), nn.ReLU())
    compiled = torch.compile(model.train_step, backend='aot_eager')
    model.train_step = compiled  # as MMEngine does
    trace = watched(model)
    assert trace.structure.rectifiers == {'net.1': 'relu'}
    assert model.train_step is compiled and nothing_is_left(model)
    model.train_step(IMAGE)  # and compiles afterwards


def test_census_predicts_dead_only_before_rectifiers():
    model = nn.Sequential(After(F.relu), After(F.leaky_relu), After(F.silu), After(F.relu))
    for block in model:
        block.norm.weight.data.fill_(0.1)
        block.norm.bias.data.copy_(torch.tensor([-1.0, -0.31, -0.29, 0.0]))
    rectifiers = trace_rectifiers(model, torch.randn(2, 4, 6, 6))
    del rectifiers['3.norm']
    layers = census_of_model(model, rectifiers=rectifiers).layers
    assert [None if x.dead is None else x.dead.tolist() for x in layers] == [
        [True, True, False, False],
        [True, True, False, False],
        None,
        None,
    ]
