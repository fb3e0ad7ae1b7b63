"""Small networks with closed filters, each with a use of them of its own.

A network has ``convs``, ``norms`` and what else its function asks for; ``closes`` names the norms
whose channels KILL are closed: gamma 0.01 and b = -1, weights around them decayed. ``n.seen(y)``
notes what shows whether one of them is open. Filters that must open in time have ``opens``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from psbn_mmdet.layers import (
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
)

KILL = [1, 2, 5]
C = 8
NETWORKS: dict[str, tuple] = {}


class Network(nn.Module):
    """What a function computes with its modules."""

    def __init__(self, forward, modules, closes=('bn',), dims=2, x=None):
        super().__init__()
        torch.manual_seed(0)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = (PostShiftedBatchNorm1d, PostShiftedBatchNorm2d, PostShiftedBatchNorm3d)[dims - 1]
        self.conv1, self.bn, self.conv2 = conv(3, C, 3, padding=1), norm(C), conv(C, C, 1)
        self.last = conv(C, 2, 1)
        self._function, self._open = forward, []
        for name, module in modules().items():
            setattr(self, name, module)
        if hasattr(self, 'tied'):
            self.tied.weight = self.conv2.weight
        self.x = torch.randn(2, 3, *(8,) * dims) if x is None else x
        with torch.no_grad():
            for name in closes:
                layer = self.get_submodule(name)
                layer.weight[KILL], layer.bias[KILL] = 0.01, -1.0
            for weight, dim in ((self.conv1._parameters.get('weight'), 0), (self.conv2.weight, 1)):
                if weight is not None and weight.shape[dim] == C:
                    weight.transpose(0, dim)[KILL] *= 1e-3
            if self.conv1._parameters.get('bias') is not None:
                self.conv1.bias[KILL] = -0.5  # much more than their deviation
        norms = [x for x in self.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
        for layer in norms:
            layer.momentum = 1.0
        with torch.no_grad():
            self(self.x)  # gives the norms statistics
        for layer in norms:
            layer.momentum = 0.0

    def forward(self, x):
        self._open = []
        return self._function(self, x)

    def filters(self, x):
        return self.seen(F.relu(self.bn(self.conv1(x))))

    def end(self, y):
        return self.last(F.relu(self.conv2(y)))

    def seen(self, y):
        with torch.no_grad():
            self._open.append(bool((y[:, KILL] > 0).any()))
        return y

    @property
    def is_open(self) -> bool:
        return any(self._open)


def network(modules=dict, opens=True, **settings):
    def add(function):
        NETWORKS[function.__name__] = (function, modules, opens, settings)
        return function

    return add


def several(name, functions, opens=True, modules=dict, **settings):
    for kind, function in functions.items():
        NETWORKS[f'{name}, {kind}'] = (function, modules, opens, settings)


def build(name: str) -> tuple[Network, bool]:
    function, modules, opens, settings = NETWORKS[name]
    return Network(function, modules, **settings), opens


def bn(channels=C):
    return PostShiftedBatchNorm2d(channels)


def conv(inputs=C, outputs=C, size=1, **settings):
    return nn.Conv2d(inputs, outputs, size, **settings)


# Rectifiers

several(
    'rectified by',
    {
        'relu': lambda n, x: n.end(n.filters(x)),
        'relu_': lambda n, x: n.end(n.seen(F.relu_(n.bn(n.conv1(x))))),
        'relu6': lambda n, x: n.end(n.seen(F.relu6(n.bn(n.conv1(x))))),
        'clamp': lambda n, x: n.end(n.seen(n.bn(n.conv1(x)).clamp(min=0))),
        'clamp_min': lambda n, x: n.end(n.seen(n.bn(n.conv1(x)).clamp_min(0))),
        'hardtanh': lambda n, x: n.end(n.seen(F.hardtanh(n.bn(n.conv1(x)), 0, 3))),
        'threshold': lambda n, x: n.end(n.seen(F.threshold(n.bn(n.conv1(x)), 0, 0))),
        'module in place': lambda n, x: n.end(n.seen(n.act(n.bn(n.conv1(x))))),
    },
    modules=lambda: dict(act=nn.ReLU(inplace=True)),
)
several(
    'not rectified by',
    {
        'leaky': lambda n, x: n.end(F.leaky_relu(n.bn(n.conv1(x)), 0.1)),
        'gelu': lambda n, x: n.end(F.gelu(n.bn(n.conv1(x)))),
        'silu': lambda n, x: n.end(F.silu(n.bn(n.conv1(x)))),
        'nothing': lambda n, x: n.end(n.bn(n.conv1(x))),
        'abs': lambda n, x: n.end(n.bn(n.conv1(x)).abs()),
        'relu and itself': lambda n, x: n.end(F.relu(y := n.bn(n.conv1(x))) + y),
        'relu of its negative': lambda n, x: n.end(F.relu(-n.bn(n.conv1(x)))),
        'relu of a sum with alpha': lambda n, x: n.end(
            F.relu(torch.add(n.bn(n.conv1(x)), n.conv1(x), alpha=2))
        ),
        'relu of a broadcast sum': lambda n, x: n.end(
            F.relu(n.bn(n.conv1(x)) + n.conv1(x).mean((2, 3), keepdim=True))
        ),
        'relu of a part': lambda n, x: n.end(
            torch.cat([F.relu(y[:, :4]), y[:, 4:]], 1) if (y := n.bn(n.conv1(x))) is not None else 0
        ),
    },
    opens=False,
)

# What reads the rectified filters

several(
    'read after',
    {
        'max_pool': lambda n, x: n.end(F.max_pool2d(n.filters(x), 2)),
        'avg_pool': lambda n, x: n.end(F.avg_pool2d(n.filters(x), 2)),
        'adaptive_avg_pool': lambda n, x: n.end(F.adaptive_avg_pool2d(n.filters(x), 2)),
        'interpolate': lambda n, x: n.end(F.interpolate(n.filters(x), scale_factor=2.0)),
        'dropout2d': lambda n, x: n.end(F.dropout2d(n.filters(x), 0.5, training=False)),
        'pad': lambda n, x: n.end(F.pad(n.filters(x), (1, 1, 1, 1))),
        'a write': lambda n, x: n.end(n.filters(x).clone().add_(1.0)),
        'a permutation': lambda n, x: n.end(n.filters(x).flip(1)),
        'a shuffle': lambda n, x: n.end(F.channel_shuffle(n.filters(x), 2)),
        'a pool over channels': lambda n, x: n.end(
            F.max_pool3d(n.filters(x), (3, 1, 1), stride=1, padding=(1, 0, 0))
        ),
        'a concatenation': lambda n, x: n.end(
            torch.cat([n.filters(x)[:, :4], n.conv1(x)[:, 4:]], 1)
        ),
        'a gate': lambda n, x: n.end((y := n.filters(x)) * y.mean((2, 3), keepdim=True).sigmoid()),
    },
)
several(
    'also read by',
    {
        'another convolution': lambda n, x: n.end(y := n.filters(x)) + n.last(n.other(y)),
        'the loss': lambda n, x: n.end(y := n.filters(x)) + y.mean(),
        'its own reader again': lambda n, x: n.end(n.filters(x)) + n.last(n.conv2(n.other3(x))),
        'a function with its weight': lambda n, x: (
            n.end(n.filters(x)) + n.last(F.conv2d(n.other3(x), n.conv2.weight))
        ),
        'a linear layer over the width': lambda n, x: n.end(n.linear(n.filters(x))),
        'a convolution with its Parameter': lambda n, x: (
            n.end(n.filters(x)) + n.last(n.tied(n.other3(x)))
        ),
    },
    modules=lambda: dict(other=conv(), other3=conv(3), linear=nn.Linear(8, 8), tied=conv()),
)


@network(modules=lambda: dict(head=nn.Linear(C, 2)))
def pooled_into_a_linear_layer(n, x):
    return n.head(n.filters(x).mean((2, 3)))


@network(modules=lambda: dict(head=nn.Linear(C * 64, 2)))
def flattened_into_a_linear_layer(n, x):
    return n.head(n.filters(x).flatten(1))


# Kinds of convolutions


def around(**settings):
    """Another convolution before and behind."""
    return lambda: dict(conv1=conv(3, C, 3, padding=1), conv2=conv(**settings))


several('depthwise', {'reader': NETWORKS['rectified by, relu'][0]}, modules=around(groups=C))
several('grouped', {'reader': NETWORKS['rectified by, relu'][0]}, modules=around(groups=2))
several(
    'transposed',
    {'reader': NETWORKS['rectified by, relu'][0]},
    modules=lambda: dict(conv2=nn.ConvTranspose2d(C, C, 2)),
)
several(
    'transposed',
    {'producer': NETWORKS['rectified by, relu'][0]},
    modules=lambda: dict(conv1=nn.ConvTranspose2d(3, C, 2)),
)
several(
    'without bias',
    {'producer': NETWORKS['rectified by, relu'][0]},
    modules=lambda: dict(conv1=conv(3, C, 3, padding=1, bias=False)),
)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=self.padding)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def normed(kind):
    def modules():
        first, second = conv(3, C, 3, padding=1), conv()
        if kind == 'spectral':
            first = nn.utils.spectral_norm(first).eval()  # which would change in each pass
            first.train = lambda mode=True: first
        if kind == 'weight':
            second = nn.utils.weight_norm(second)
        if kind == 'pruned':
            for one in (first, second):
                prune.l1_unstructured(one, 'weight', 0.3)
        if kind == 'parametrised':
            for one in (first, second):
                parametrize.register_parametrization(one, 'weight', Doubled())
        if kind == 'standardised':
            first, second = Standardised(3, C, 3, padding=1), Standardised(C, C, 1)
        if kind == 'frozen':
            for one in (first, second):
                one.requires_grad_(False)
        return dict(conv1=first, conv2=second)

    return modules


for _kind in ('spectral', 'weight', 'pruned', 'parametrised', 'standardised', 'frozen'):
    several('convolutions', {_kind: NETWORKS['rectified by, relu'][0]}, modules=normed(_kind))


@network(modules=lambda: dict(other=conv(3)))
def one_norm_twice(n, x):
    return n.end(n.filters(x)) + n.end(n.seen(F.relu(n.bn(n.other(x)))))


@network(modules=lambda: dict(bn2=bn()), closes=('bn', 'bn2'))
def one_convolution_into_two_norms(n, x):
    y = n.conv1(x)
    return n.end(n.seen(F.relu(n.bn(y)))) + n.end(n.seen(F.relu(n.bn2(y))))


# Sums


def without_kill(y):
    """With nothing in the closed channels, so that sums are closed, too."""
    mask = torch.ones(C, 1, 1)
    mask[KILL] = 0
    return y * mask


@network(modules=lambda: dict(first=conv(3), block=Residual()), closes=('block.bn2',))
def residual_block(n, x):
    return n.end(n.seen(n.block(without_kill(F.relu(n.first(x))))))


@network(modules=lambda: dict(first=conv(3), block=Residual(True)), closes=('block.bn2',))
def residual_block_in_place(n, x):
    return n.end(n.seen(n.block(without_kill(F.relu(n.first(x))))))


@network(modules=lambda: dict(first=conv(3), block=Residual(tuples=True)), closes=('block.bn2',))
def residual_block_that_returns_a_tuple_in_evaluation(n, x):
    y = n.block(without_kill(F.relu(n.first(x))))
    return n.end(n.seen(y[0] if isinstance(y, tuple) else y))


class Residual(nn.Module):
    def __init__(self, in_place=False, tuples=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), bn(), conv(), bn()
        self.in_place, self.tuples = in_place, tuples

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            y += x
        else:
            y = y + x
        y = F.relu(y)
        return (y, x) if self.tuples and not self.training else y


@network(modules=lambda: dict(bn2=bn(), other=conv(3)), closes=('bn', 'bn2'), opens=False)
def a_sum_outside_of_a_block(n, x):
    return n.end(n.seen(F.relu(n.bn(n.conv1(x)) + n.bn2(n.other(x)))))


@network(opens=False)
def two_halves_added(n, x):
    a, b = n.bn(n.conv1(x)).chunk(2, 1)
    y = F.relu(a + b)
    return n.end(torch.cat([y, y], 1))


class Tokens(nn.Module):
    """(N, L, C) outside, (N, C, L) in the norm."""

    def __init__(self, channels):
        super().__init__()
        self.linear, self.bn = nn.Linear(channels, channels), PostShiftedBatchNorm1d(channels)

    def forward(self, x):
        return F.relu(x + self.bn(self.linear(x).transpose(1, 2)).transpose(1, 2))


for _length in (4, C, 16):

    @network(
        modules=lambda: dict(first=nn.Linear(3, C), tokens=Tokens(C), head=nn.Linear(C, 2)),
        closes=('tokens.bn',),
        opens=False,
        x=torch.randn(2, _length, 3, generator=torch.Generator().manual_seed(_length)),
    )
    def tokens(n, x):
        return n.head(n.tokens(n.first(x)))

    NETWORKS[f'tokens, {_length} of {C} channels'] = NETWORKS.pop('tokens')


# Ways through the network


@network()
def checkpointed(n, x):
    return checkpoint(lambda y: n.end(n.filters(y)), x.requires_grad_(), use_reentrant=False)


@network(opens=False)
def skipped_every_other_step(n, x):
    n.steps = getattr(n, 'steps', 0) + n.training
    if n.training and n.steps % 2:
        return n.end(x.mean(1, keepdim=True).expand(-1, C, -1, -1))
    return n.end(n.filters(x))


@network(opens=False)
def read_otherwise_in_some_steps(n, x):
    n.steps = getattr(n, 'steps', 0) + n.training
    y = n.bn(n.conv1(x))
    extra = 1e-3 * y.mean() if n.steps % 3 == 2 else 0.0
    return n.end(n.seen(F.relu(y))) + extra


def in_dims(n, x):
    return n.end(n.filters(x))


several('dimensions', {'1': in_dims}, dims=1)
several('dimensions', {'3': in_dims}, dims=3)


@network(modules=lambda: dict(branch=conv(3), bn2=bn()), closes=('bn', 'bn2'))
def two_branches_into_one(n, x):
    return n.end(n.filters(x) + n.seen(F.relu(n.bn2(n.branch(x)))))


@network(modules=lambda: dict(norm2=nn.BatchNorm2d(C)))
def read_by_another_norm(n, x):
    return n.end(n.norm2(n.filters(x)))


@network(modules=lambda: dict(gn=nn.GroupNorm(2, C)))
def read_by_a_group_norm(n, x):
    return n.end(n.gn(n.filters(x)))


@network(modules=lambda: dict(attention=nn.MultiheadAttention(C, 2, batch_first=True)))
def read_by_attention(n, x):
    y = n.filters(x).flatten(2).transpose(1, 2)
    return n.attention(y, y, y)[0]


def deformable():
    from mmcv.ops import ModulatedDeformConv2dPack

    return dict(dcn=ModulatedDeformConv2dPack(C, C, 3, padding=1))


@network(modules=deformable)
def read_by_a_deformable_convolution(n, x):
    return n.end(n.dcn(n.filters(x)))


@network(modules=deformable, opens=False)
def read_by_a_deformable_convolution_before_the_relu(n, x):
    y = n.bn(n.conv1(x))
    return n.end(n.seen(F.relu(y))) + n.last(n.dcn(y))
