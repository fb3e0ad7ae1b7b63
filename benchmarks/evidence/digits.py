"""Small networks on scikit-learn's digits, many of them trained side by side as one.

The networks of all seeds are one network with grouped convolutions, whose groups never meet. Every
operation and every optimiser used here works on each group by itself, so each seed's network is
trained as it would be alone, with initial weights and batches drawn from its own seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from closed import Arrivals, Reach, converted
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from psbn_mmdet.collapse import (
    RECTIFIERS,
    Census,
    GradientWatch,
    Structure,
    census_of_model,
    find_norms,
    trace_structure,
)
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import KINDS

BATCH = 32
WINDOW = 100  # last steps, in which a trapped filter gets no gradient
COLLAPSING = dict(lr=1.0, weight_decay=5e-4)  # where most filters are trapped, see when.py
SLOPE = 0.1  # of LeakyReLU, as in Darknet
OPTIMISERS = {
    'sgd': lambda params, **kwargs: torch.optim.SGD(params, momentum=0.9, **kwargs),
    'adam': torch.optim.Adam,
    'adamw': torch.optim.AdamW,
}


class Data(NamedTuple):
    """The digits: 1,297 images to train with and 500 to test with, always the same."""

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor


@cache
def load_data() -> Data:
    """The digits, read once."""
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=500, stratify=labels, random_state=0)
    return Data(*map(torch.as_tensor, split))


class Nets(nn.Module):
    """Networks of one kind, one for each seed, as one grouped network.

    'vgg' has six 3x3 convolutions with 8, 8, 16, 16, 32, 32 filters (112), 'resnet' a stem and
    three blocks of two with 8, 16 and 32 (120). Half of a ResNet's norms stand before an addition.

    Args:
        arch (str): 'vgg' or 'resnet'.
        norm (str): 'BN' or 'psBN'.
        activation (str): 'relu' or 'leaky_relu'.
        seeds (Sequence[int]): One network each.
        shift (float): The constant of psBN. Defaults to 0.1.
    """

    def __init__(
        self,
        arch: str,
        norm: str,
        activation: str,
        seeds: Sequence[int],
        shift: float = 0.1,
    ) -> None:
        super().__init__()
        self.seeds = list(seeds)
        self.arch = arch
        self.negative_slope = SLOPE if activation == 'leaky_relu' else 0.0
        self.shift = shift
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        widths = [8, 8, 16, 16, 32, 32] if arch == 'vgg' else [8, 8, 8, 16, 16, 32, 32]
        inputs = [1, *widths[:-1]]
        self.convs = nn.ModuleList(self._conv(i, o, 3, generators) for i, o in zip(inputs, widths))
        self.norms = nn.ModuleList(self._norm(norm, width) for width in widths)
        self.head = self._conv(widths[-1], 10, 1, generators)
        self.to(memory_format=torch.channels_last)

    def _conv(self, inputs: int, outputs: int, size: int, generators: list) -> nn.Conv2d:
        n = len(generators)
        conv = nn.Conv2d(n * inputs, n * outputs, size, padding=size // 2, groups=n, bias=size == 1)
        std = (2 / (inputs * size**2)) ** 0.5
        with torch.no_grad():
            for weight, generator in zip(conv.weight.chunk(n), generators):
                weight.normal_(0, std, generator=generator)
            if conv.bias is not None:
                conv.bias.zero_()
        return conv

    def _norm(self, norm: str, width: int) -> nn.Module:
        channels = width * len(self.seeds)
        if norm == 'psBN':
            return PostShiftedBatchNorm2d(channels, shift=self.shift)
        return nn.BatchNorm2d(channels)

    def _activate(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope) if self.negative_slope else F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        """From (N, seeds, 8, 8) to logits (N, seeds, 10)."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self._vgg(x) if self.arch == 'vgg' else self._resnet(x)
        x = self.head(x.mean((2, 3), keepdim=True))
        return x.view(len(x), len(self.seeds), 10)

    def _vgg(self, x: Tensor) -> Tensor:
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.max_pool2d(x, 2) if place in (2, 4) else x
            x = self._activate(norm(conv(x)))
        return x

    def _resnet(self, x: Tensor) -> Tensor:
        x = self._activate(self.norms[0](self.convs[0](x)))
        for place in (1, 3, 5):
            x = F.avg_pool2d(x, 2) if place > 1 else x
            y = self._activate(self.norms[place](self.convs[place](x)))
            y = self.norms[place + 1](self.convs[place + 1](y))
            x = self._activate(y + self._widen(x, y.shape[1]))
        return x

    def _widen(self, x: Tensor, channels: int) -> Tensor:
        """Zeros for the channels that each network's shortcut lacks."""
        if x.shape[1] == channels:
            return x
        n = len(self.seeds)
        each = x.unflatten(1, (n, x.shape[1] // n))
        return F.pad(each, (0, 0, 0, 0, 0, (channels - x.shape[1]) // n)).flatten(1, 2)


def draw_batches(seeds: Sequence[int], steps: int, first: int = 0) -> Tensor:
    """Indices of the images of each step's batch, (steps, BATCH, seeds); ``first`` is a stream."""
    count, streams = len(load_data().train), []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1_000_003 * (first + 1) + seed)
        streams.append(torch.randint(count, (steps, BATCH), generator=generator))
    return torch.stack(streams, -1)


def loss_of(nets: Nets, batch: Tensor) -> Tensor:
    """The sum of all networks' losses: each gets the gradient it would have alone."""
    data = load_data()
    logits = nets(data.train[batch].squeeze(2))
    return F.cross_entropy(logits.transpose(1, 2), data.train_labels[batch]) * len(nets.seeds)


def train(
    nets: Nets, optimizer: Optimizer, batches: Tensor, look: Callable[[int], None] | None = None
) -> None:
    """Make a step with each batch, and look after it."""
    nets.train()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss_of(nets, batch).backward()
        optimizer.step()
        if look:
            look(step)


@torch.no_grad()
def accuracy(nets: Nets) -> list[float]:
    """Of each network on the test images."""
    data = load_data()
    nets.eval()
    logits = nets(data.test.expand(-1, len(nets.seeds), -1, -1))
    right = logits.argmax(-1) == data.test_labels[:, None]
    nets.train()
    return [round(share, 4) for share in right.double().mean(0).tolist()]


def train_and_count(nets: Nets, optimizer: Optimizer, steps: int, first: int = 0) -> Census:
    """Train, and count the collapsed filters; trapped are those of the last WINDOW steps.

    In the last fifth of the steps the learning rate goes down to 0 linearly: at a constant one
    the accuracy on the test images would be noise for the most part.
    """
    watch = GradientWatch([optimizer], find_norms(nets))
    watch.active = steps <= WINDOW
    rates = LambdaLR(optimizer, lambda step: min(1, 5 * (steps - step) / steps))

    def look(step: int) -> None:
        watch.active = step + 1 >= steps - WINDOW
        rates.step()

    train(nets, optimizer, draw_batches(nets.seeds, steps, first), look)
    rectifiers = structure_of(nets).rectifiers
    found = census_of_model(nets, rectifiers=rectifiers, trapped=watch.trapped())
    watch.close()
    return found


def structure_of(nets: Nets) -> Structure:
    """What stands around each norm."""
    return trace_structure(nets, load_data().test[:2].expand(-1, len(nets.seeds), -1, -1))


def by_net(masks: Sequence[np.ndarray], nets: int) -> np.ndarray:
    """Masks over the channels of all networks, layer by layer, as one of shape (nets, C)."""
    return np.concatenate([mask.reshape(nets, -1) for mask in masks], 1)


def count_by_net(found: Census, nets: int, kind: str) -> list[int]:
    """Filters of a kind in each network."""
    masks = [getattr(layer, kind) for layer in found.layers]
    return by_net([mask for mask in masks if mask is not None], nets).sum(1).tolist()


def train_from_scratch(
    arch: str,
    norm: str,
    activation: str,
    optimiser: str,
    lr: float,
    weight_decay: float,
    steps: int,
    seeds: Sequence[int],
    shift: float = 0.1,
) -> list[dict]:
    """Train networks of one kind; a row for each seed, with the counts and the accuracy."""
    nets = Nets(arch, norm, activation, seeds, shift)
    optimizer = OPTIMISERS[optimiser](nets.parameters(), lr=lr, weight_decay=weight_decay)
    found = train_and_count(nets, optimizer, steps)
    counts = {kind: count_by_net(found, len(seeds), kind) for kind in (*KINDS, 'collapsed')}
    scores = accuracy(nets)
    return [
        {'seed': seed, **{kind: counts[kind][i] for kind in counts}, 'accuracy': scores[i]}
        for i, seed in enumerate(seeds)
    ]


@cache
def collapsed_nets(arch: str, seeds: tuple[int, ...], steps: int) -> tuple[Nets, dict, dict]:
    """Networks trained until filters are trapped: with the masks, and how far xhat reaches."""
    nets = Nets(arch, 'BN', 'relu', seeds)
    optimizer = OPTIMISERS['sgd'](nets.parameters(), **COLLAPSING)
    found = train_and_count(nets, optimizer, steps)
    probe = copy.deepcopy(nets)
    reach = Reach(probe)
    with torch.no_grad():
        for batch in draw_batches(seeds, 40, first=2):
            loss_of(probe, batch)
    return nets, {layer.name: layer.trapped for layer in found.layers}, reach.largest


def train_further(
    arch: str,
    arm: str,
    lr: float,
    weight_decay: float,
    steps: int,
    seeds: Sequence[int],
    shift: float = 0.1,
    steps_before: int = 500,
) -> list[dict]:
    """Train collapsed networks further: a row for each of their trapped filters before a ReLU."""
    start, trapped, reach = collapsed_nets(arch, tuple(seeds), steps_before)
    structure = structure_of(start)
    nets = converted(start, arm, structure, shift)
    optimizer = OPTIMISERS['sgd'](nets.parameters(), lr=lr, weight_decay=weight_decay)
    arrivals = Arrivals(optimizer, nets)
    train(nets, optimizer, draw_batches(seeds, steps, 3), arrivals.look)
    arrivals.close()
    before = accuracy(start)
    found = train_and_count(nets, optimizer, max(WINDOW, steps // 4), first=4)
    scores = accuracy(nets)
    rows = [
        {
            'seed': seeds[channel * len(seeds) // len(trapped[name])],
            **arrivals.fate(name, channel, reach, shift, lr=lr, weight_decay=weight_decay),
            'trapped_at_end': int(found[name].trapped[channel]),
            'gamma_at_end': float(found[name].gamma[channel]),
        }
        for name in trapped
        if structure.rectifiers.get(name) in RECTIFIERS
        for channel in np.flatnonzero(trapped[name])
    ]
    networks = [
        {'seed': seed, 'before': before[i], 'accuracy': scores[i]} for i, seed in enumerate(seeds)
    ]
    return [{'filters': rows, 'networks': networks}]
