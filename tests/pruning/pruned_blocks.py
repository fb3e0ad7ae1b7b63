"""Small networks, each with a way to use channels; and whether closed ones can be cut there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psbn_mmdet.collapse import find_norms
from psbn_mmdet.layers import PostShiftedBatchNorm2d

C = 8


def images(seed: int) -> Tensor:
    """Six small images."""
    return torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def close_some(net: nn.Module, seed: int) -> None:
    """Close the same third of all channels in each norm; the others are as if trained."""
    generator = torch.Generator().manual_seed(seed)
    closed = torch.randperm(C // 2, generator=generator)[: C // 3]
    for norm in find_norms(net).values():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.uniform_(-0.5, 0.5, generator=generator)
        norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        for start in range(0, norm.num_features, C):
            norm.weight[closed + start] = 0.01
            norm.bias[closed + start] = -20.0
    net.eval()


class Net(nn.Module):
    """A stem, a block, and a head."""

    def __init__(self, make: Callable, run: Callable, head: int = C, norm: type = nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), norm(C), nn.ReLU())
        for name, module in make(norm).items():
            setattr(self, name, module)
        self.run = run
        self.head = nn.Conv2d(head, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, self.stem(x))).mean((2, 3))


def block(norm: type, **kwargs) -> dict[str, nn.Module]:
    """Two convolutions with norms."""
    bias = kwargs.pop('bias', False)
    return dict(
        conv1=nn.Conv2d(C, C, 3, padding=1, bias=bias, **kwargs),
        bn1=norm(C),
        conv2=nn.Conv2d(C, C, 3, padding=1, bias=False),
        bn2=norm(C),
        relu=nn.ReLU(),
    )


def plain(n: Net, x: Tensor) -> Tensor:
    """One after the other."""
    return n.relu(n.bn2(n.conv2(n.relu(n.bn1(n.conv1(x))))))


def depthwise(norm: type) -> dict[str, nn.Module]:
    """MobileNet's inverted residual."""
    return dict(
        wide=nn.Conv2d(C, 2 * C, 1, bias=False),
        bn1=norm(2 * C),
        deep=nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C, bias=False),
        bn2=norm(2 * C),
        narrow=nn.Conv2d(2 * C, C, 1, bias=False),
        bn3=norm(C),
    )


def mobile(n: Net, x: Tensor) -> Tensor:
    """With ReLU6, and nothing behind the last norm."""
    y = F.relu6(n.bn2(n.deep(F.relu6(n.bn1(n.wide(x))))))
    return x + n.bn3(n.narrow(y))


def excited(n: Net, x: Tensor) -> Tensor:
    """Squeeze and excitation."""
    y = F.relu(n.bn1(n.conv1(x)))
    gate = n.up(F.relu(n.down(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
    return F.relu(n.bn2(n.conv2(y * gate)))


def shuffled(n: Net, x: Tensor) -> Tensor:
    """ShuffleNet's exchange between two halves."""
    one, other = x.chunk(2, 1)
    y = torch.cat([one, F.relu(n.half_bn(n.halves(other)))], 1)
    count, channels, height, width = y.shape
    y = y.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(y.shape)
    return F.relu(n.bn2(n.conv2(y)))


def make(builder: Callable = block, run: Callable = plain, **kwargs) -> Callable:
    """A network, and that something can be cut from it."""
    can_be_cut = kwargs.pop('cut', True)
    norm, head = kwargs.pop('norm', nn.BatchNorm2d), kwargs.pop('head', C)
    return lambda: (Net(lambda norm: builder(norm, **kwargs), run, head, norm), can_be_cut)


def with_more(builder: Callable, **more: Callable) -> Callable:
    """Another block, with more modules."""
    return lambda norm, **kwargs: builder(norm, **kwargs) | {k: v() for k, v in more.items()}


BLOCKS: dict[str, Callable] = {
    'plain': make(),
    'psBN': make(norm=PostShiftedBatchNorm2d),
    'bias': make(bias=True),
    'residual': make(run=lambda n, x: F.relu(n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x))))) + x)),
    'residual, in place': make(
        run=lambda n, x: n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x)), True))).add_(x).relu_()
    ),
    'downsampling': make(
        with_more(
            block, down=lambda: nn.Conv2d(C, C, 1, bias=False), bn3=lambda: nn.BatchNorm2d(C)
        ),
        lambda n, x: F.relu(n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x))))) + n.bn3(n.down(x))),
    ),
    'average pooling before it': make(
        with_more(block, down=lambda: nn.Conv2d(C, C, 1, bias=False)),
        lambda n, x: F.relu(n.bn2(n.conv2(F.relu(n.bn1(n.conv1(x))))) + n.down(F.avg_pool2d(x, 1))),
    ),
    'concatenation': make(
        run=lambda n, x: torch.cat([x, F.relu(n.bn1(n.conv1(x)))], 1), head=2 * C
    ),
    'dense': make(
        lambda norm: dict(
            conv1=nn.Conv2d(C, C, 3, padding=1),
            bn1=norm(C),
            conv2=nn.Conv2d(2 * C, C, 3, padding=1),
            bn2=norm(C),
        ),
        lambda n, x: F.relu(n.bn2(n.conv2(torch.cat([x, F.relu(n.bn1(n.conv1(x)))], 1)))),
    ),
    'split': make(
        lambda norm: dict(
            conv1=nn.Conv2d(C, 2 * C, 3, padding=1),
            bn1=norm(2 * C),
            conv2=nn.Conv2d(C, C, 1),
        ),
        lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))).split(C, 1)[1]),
    ),
    'slices added up': make(run=lambda n, x: F.relu(n.bn1(n.conv1(x)))[:, : C // 2], head=C // 2),
    'shuffle': make(
        with_more(
            block,
            halves=lambda: nn.Conv2d(C // 2, C // 2, 3, padding=1),
            half_bn=lambda: nn.BatchNorm2d(C // 2),
        ),
        shuffled,
    ),
    'depthwise': make(depthwise, mobile),
    'depthwise alone behind it': make(
        lambda norm: dict(
            conv1=nn.Conv2d(C, C, 1),
            deep=nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False),
            point=nn.Conv2d(C, C, 1, bias=False),
            deep2=nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False),
            bn1=norm(C),
        ),
        lambda n, x: F.relu(n.bn1(n.deep2(n.point((n.deep(x) + 1).relu())))),
    ),
    'a norm that is used twice': make(
        run=lambda n, x: F.relu(n.bn2(n.conv2(F.relu(n.bn2(x) + n.bn1(n.conv1(x))))))
    ),
    'a norm of the image': make(
        with_more(block, first=lambda: nn.BatchNorm2d(C)),
        lambda n, x: plain(n, n.first(torch.ones_like(x)) + n.first(x)),
    ),
    'in groups': make(groups=2),
    'transposed': make(
        lambda norm: dict(
            conv1=nn.ConvTranspose2d(C, C, 2, 2), bn1=norm(C), conv2=nn.Conv2d(C, C, 3)
        ),
        lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x)))),
    ),
    'squeeze and excitation': make(
        with_more(block, down=lambda: nn.Conv2d(C, 4, 1), up=lambda: nn.Conv2d(4, C, 1)), excited
    ),
    'spatial attention': make(
        with_more(block, mask=lambda: nn.Conv2d(C, 1, 1)),
        lambda n, x: n.relu(n.bn2(n.conv2((y := F.relu(n.bn1(n.conv1(x)))) * n.mask(y).sigmoid()))),
    ),
    'upsampled': make(
        run=lambda n, x: n.conv2(F.interpolate(F.relu(n.bn1(n.conv1(x))), scale_factor=2))
    ),
    'upsampled bilinearly': make(
        run=lambda n, x: n.conv2(
            F.interpolate(F.relu(n.bn1(n.conv1(x))), scale_factor=2, mode='bilinear')
        )
    ),
    'padded': make(run=lambda n, x: n.conv2(F.pad(F.relu(n.bn1(n.conv1(x))), (1, 1, 1, 1)))),
    'max pooling': make(run=lambda n, x: n.conv2(F.max_pool2d(F.relu(n.bn1(n.conv1(x))), 3, 2, 1))),
    'two readers': make(
        with_more(block, conv3=lambda: nn.Conv2d(C, C, 1)),
        lambda n, x: n.conv2(y := F.relu(n.bn1(n.conv1(x)))) + n.conv3(y),
    ),
    'shared convolution': make(
        run=lambda n, x: n.bn2(n.conv2(F.relu(n.bn1(n.conv1(F.relu(n.bn1(n.conv1(x)))))))).relu()
    ),
    'linear layers behind a flattening': make(
        lambda norm: dict(conv1=nn.Conv2d(C, C, 3), bn1=norm(C), fc=nn.Linear(C * 64, C)),
        lambda n, x: n.fc(F.relu(n.bn1(n.conv1(x))).flatten(1))[:, :, None, None],
    ),
    'softmax over channels': make(run=lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))).softmax(1))),
    'layer norm': make(
        with_more(block, ln=lambda: nn.GroupNorm(2, C)),
        lambda n, x: n.conv2(n.ln(F.relu(n.bn1(n.conv1(x))))),
    ),
    'attention': make(
        run=lambda n, x: n.conv2(
            (y := F.relu(n.bn1(n.conv1(x))).flatten(2))
            .matmul(y.transpose(1, 2).matmul(y).softmax(-1))
            .unflatten(2, (10, 10))
        )
    ),
    'one more': make(run=lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))) + 1)),
    'times a parameter': make(
        with_more(block, scale=lambda: nn.ParameterList([torch.ones(C, 1, 1)])),
        lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))) * n.scale[0]),
    ),
    'a weight that is read elsewhere': make(
        run=lambda n, x: (
            n.conv2(y := F.relu(n.bn1(n.conv1(x)))) + F.conv2d(y, n.conv2.weight, padding=1)
        )
    ),
    'leaky': make(run=lambda n, x: n.conv2(F.leaky_relu(n.bn1(n.conv1(x))))),
    'silu': make(run=lambda n, x: n.conv2(F.silu(n.bn1(n.conv1(x))))),
    'a running sum over channels': make(
        run=lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))).cumsum(1))
    ),
    'sorted channels': make(run=lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))).sort(1)[0])),
    'rolled channels': make(run=lambda n, x: n.conv2(F.relu(n.bn1(n.conv1(x))).roll(1, 1))),
}
