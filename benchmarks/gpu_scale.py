"""The third part of gpu.py: BN and psBN in a ResNet-20 on all of CIFAR-10, at full length.

64,000 steps of 128 images, as in the ResNet paper, with crops and flips, an epoch of warm-up and a
cosine schedule. A seed has the same first weights, batches and crops with BN and with psBN. Both
are trained side by side, as many seeds as the time allows, in the way that is fastest here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from cifar10 import BATCH, REGIMES, CifarResNet, augmented, load_images, normalised
from study import contrast, mean_ci
from timing import now
from torch import Tensor, nn
from torch.nn import functional as F

from psbn_mmdet.collapse import GradientWatch, census_of_model, find_norms, trace_structure
from psbn_mmdet.layers import switch_norms

ARMS = ('BN', 'psBN')
STEPS = 64_000
WINDOW = 100  # last steps, in which a trapped filter gets no gradient
GOAL = 0.2  # points: the width of an interval of accuracy
WAYS = {
    'one network after another': dict(),
    'networks in streams': dict(streams=True),
    'seeds in groups': dict(grouped=True),
    'seeds in groups, arms in streams': dict(grouped=True, streams=True),
}


def trainings(context: Any) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Measure the ways to train, train in the fastest, sum up all that there is."""
    if not (context.cifar / 'train.zip').is_file():
        yield 'CIFAR-10', lambda: {'text': f'skipped: {context.cifar} has no train.zip'}
        return
    data = Data(context)
    steps = 30 if context.small else STEPS
    rows = [row for row in context.kept if row.get('steps') == steps]

    seconds: dict[str, float] = {}
    for way in WAYS:
        yield f'time of a step and seed, {way}', partial(time_way, way, data, seconds)
    # The least trained first, and of these the one with the most collapse.
    seeds = {
        regime: joined(row['seeds'] for row in rows if row['regime'] == regime)
        for regime in ('SGD 0.5', 'Adam 0.03', 'SGD 0.1')
    }
    for regime in sorted(seeds, key=lambda regime: len(seeds[regime])):
        if not seconds:
            break
        way = min(seconds, key=seconds.__getitem__)
        count = min(int(0.9 * context.left() / (seconds[way] * steps)), 2 if context.small else 8)
        if count < 1:
            yield f'{regime}', lambda: {'text': 'no time left'}
            continue
        first = 1 + max(seeds[regime], default=-1)
        chosen = list(range(first, first + count))

        yield (
            f'{regime}, seeds {first} to {chosen[-1]}',
            partial(train, regime, chosen, way, data, steps, rows),
        )
    for regime in seeds:
        mine = [row for row in rows if row['regime'] == regime]
        if mine:
            yield f'{regime}, all seeds', partial(sum_up, mine)


class Data:
    """CIFAR-10 on the device, as uint8, and the size of networks and batches."""

    def __init__(self, context: Any) -> None:
        self.device = context.device
        self.width, self.batch = (4, 16) if context.small else (16, BATCH)
        self.train, self.test = (
            tuple(
                part.to(self.device)
                for part in load_images(
                    context.cifar / f'{name}.zip', 13 if context.small else None
                )
            )
            for name in ('train', 'test')
        )
        self.per_epoch = len(self.train[0]) // self.batch


class SideBySide:
    """Networks of both arms and several seeds that are trained in one step.

    Args:
        regime (str): Of the optimiser.
        seeds (Sequence[int]): Of the networks.
        data (Data): What they are trained on.
        steps (int): Length of the schedule.
        grouped (bool): Whether all seeds of an arm are one network of grouped convolutions.
        streams (bool): Whether networks run in CUDA streams of their own.
    """

    def __init__(
        self,
        regime: str,
        seeds: Sequence[int],
        data: Data,
        steps: int,
        grouped: bool = False,
        streams: bool = False,
    ) -> None:
        self.data, self.seeds = data, seeds
        device = data.device
        of_each = [list(range(len(seeds)))] if grouped else [[i] for i in range(len(seeds))]
        # Which seeds a network has, by its place in the list.
        self.members = [members for _ in ARMS for members in of_each]
        self.networks = nn.ModuleList()
        for arm, members in itertools.product(ARMS, of_each):
            network = stacked([first_weights(data.width, seeds[i]) for i in members])
            switch_norms(network, arm)
            self.networks.append(network)
        self.networks.to(device, memory_format=torch.channels_last)
        make = REGIMES[regime]
        self.lr = torch.tensor(make.keywords['lr'], device=device)
        settings = dict(capturable=device.type == 'cuda') if 'Adam' in regime else {}
        self.optimizer = make(self.networks.parameters(), lr=self.lr, fused=True, **settings)
        self.rates = torch.tensor(
            [
                make.keywords['lr']
                * min(1, (step + 1) / data.per_epoch)
                * (1 + math.cos(math.pi * step / steps))
                / 2
                for step in range(steps)
            ],
            device=device,
        )
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # the step
        self.order = torch.zeros(
            len(seeds), data.per_epoch, data.batch, dtype=torch.long, device=device
        )
        self.streams = [torch.cuda.Stream() for _ in self.networks] if streams else None
        torch.manual_seed(seeds[0])

    def shuffle(self) -> None:
        """Choose the batches of an epoch."""
        shape = (len(self.seeds), len(self.data.train[0]))
        order = torch.rand(shape, device=self.order.device).argsort(1)
        self.order.copy_(order[:, : self.order[0].numel()].view_as(self.order))

    def step(self) -> None:
        """Train all networks by a step; nothing in it waits for the device."""
        self.lr.copy_(self.rates.index_select(0, self.at).squeeze())
        chosen = self.order.index_select(1, self.at % self.data.per_epoch).flatten()
        images, labels = (part[chosen] for part in self.data.train)
        images = normalised(augmented(images)).unflatten(0, (len(self.seeds), -1))
        labels = labels.unflatten(0, (len(self.seeds), -1))
        self.optimizer.zero_grad()
        main = torch.cuda.current_stream() if self.streams else None
        for number, network in enumerate(self.networks):
            members = self.members[number]
            mine = slice(members[0], members[-1] + 1)
            if main is None:
                self._backward(network, images[mine], labels[mine])
                continue
            stream = self.streams[number]
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                self._backward(network, images[mine], labels[mine])
        for stream in self.streams or []:
            main.wait_stream(stream)
        self.optimizer.step()
        self.at += 1

    def _backward(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        logits = logits_of(network, images)
        # The sum over the seeds, each with its own mean.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * len(labels)
        loss.backward()

    def captured(self) -> Callable[[], None]:
        """A step as a CUDA graph, after three that make moments and workspaces."""
        if self.data.device.type == 'cpu':
            return self.step
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def first_weights(width: int, seed: int) -> CifarResNet:
    """A ResNet-20 as it starts."""
    torch.manual_seed(seed)
    return CifarResNet(3, width)


def stacked(networks: Sequence[CifarResNet]) -> CifarResNet:
    """One network of grouped convolutions that computes what all compute."""
    if len(networks) == 1:
        return networks[0]
    width = networks[0].conv1.out_channels
    whole = CifarResNet(3, width, groups=len(networks))
    parts = zip(*(network.state_dict().values() for network in networks))
    for held, values in zip(whole.state_dict().values(), parts):
        value = torch.cat(values) if values[0].dim() else values[0]
        held.copy_(value.view_as(held))
    return whole


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (S, N, 10) of the seeds' images (S, N, 3, 32, 32)."""
    x = images.transpose(0, 1).flatten(1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    return network(x).unflatten(1, (len(images), 10)).transpose(0, 1)


def time_way(way: str, data: Data, seconds: dict[str, float]) -> dict:
    """Seconds of a step of both arms, for one seed."""
    if 'streams' in way and data.device.type == 'cpu':
        return {'text': 'only CUDA has it'}
    on_cpu = data.device.type == 'cpu'
    seeds, steps = (2, 2) if on_cpu else (8, 60)
    training = SideBySide('SGD 0.5', range(seeds), data, 10 * steps, **WAYS[way])
    training.shuffle()
    step = training.captured()
    step()
    start = now(data.device)
    for _ in range(steps):
        step()
    seconds[way] = (now(data.device) - start) / steps / seeds
    return {'text': f'{1e3 * seconds[way]:.3f} ms', 'seconds_of_step_and_seed': seconds[way]}


def train(
    regime: str, seeds: Sequence[int], way: str, data: Data, steps: int, rows: list[dict]
) -> dict:
    """Accuracy and collapsed filters of both arms and all seeds."""
    training = SideBySide(regime, seeds, data, steps, **WAYS[way])
    networks = training.networks
    structure = trace_structure(CifarResNet(3).eval(), torch.randn(2, 3, 32, 32))
    rectifiers = {
        f'{number}.{name}': kind
        for number in range(len(networks))
        for name, kind in structure.rectifiers.items()
    }
    training.shuffle()
    step = training.captured()
    done = int(training.at)
    watched = min(WINDOW, steps // 2)
    watch = None
    for number in range(done, steps):
        if number % data.per_epoch == 0:
            training.shuffle()
        if number == steps - watched:  # a graph calls no hooks
            watch = GradientWatch([training.optimizer], find_norms(networks))
            step = training.step
        step()
    census = census_of_model(networks, rectifiers=rectifiers, trapped=watch.trapped())
    row: dict = {'regime': regime, 'seeds': list(seeds), 'steps': steps, 'way': way, 'keep': True}
    for arm in ARMS:
        row[arm] = {kind: [0] * len(seeds) for kind in ('collapsed', 'vanished', 'dead', 'trapped')}
        row[arm]['accuracy'] = [0.0] * len(seeds)
    of_arm = len(networks) // len(ARMS)
    for number, network in enumerate(networks):
        found = row[ARMS[number // of_arm]]
        members = training.members[number]
        scores = accuracies(network, len(members), *data.test)
        for place, member in enumerate(members):
            found['accuracy'][member] = scores[place]
            for kind in found.keys() - {'accuracy'}:
                masks = [
                    getattr(layer, kind)
                    for layer in census.layers
                    if layer.name.startswith(f'{number}.')
                ]
                # None where it is not known, as of dead filters before a sum.
                found[kind][member] = sum(
                    int(mask.reshape(len(members), -1)[place].sum())
                    for mask in masks
                    if mask is not None
                )
    rows.append(row)
    return {'text': '; '.join(told(arm, row[arm]) for arm in ARMS), **row}


@torch.no_grad()
def accuracies(network: nn.Module, members: int, images: Tensor, labels: Tensor) -> list[float]:
    """Share of right answers of each seed in a network."""
    network.eval()
    right = [
        logits_of(network, normalised(part).expand(members, *part.shape)).argmax(2) == truth
        for part, truth in zip(images.split(1000), labels.split(1000))
    ]
    return torch.cat(right, 1).double().mean(1).tolist()


def told(arm: str, found: dict[str, list]) -> str:
    """An arm's accuracy and collapsed filters with their intervals."""
    accuracy = interval([100 * value for value in found['accuracy']], 2)
    return f'{arm} {accuracy} %, collapsed filters {interval(found["collapsed"], 1)}'


def interval(values: Sequence[float], digits: int) -> str:
    """Mean and its 95 % confidence interval."""
    mean, low, high = mean_ci(values)
    return f'{mean:.{digits}f}' + ('' if low is None else f' [{low:.{digits}f}, {high:.{digits}f}]')


def joined(lists: Iterable[list]) -> list:
    """One list of several."""
    return list(itertools.chain.from_iterable(lists))


def sum_up(rows: Sequence[dict]) -> dict:
    """All seeds of a regime: each arm, and psBN over BN."""
    pooled = {
        arm: {kind: joined(row[arm][kind] for row in rows) for kind in rows[0][arm]} for arm in ARMS
    }
    seeds = joined(row['seeds'] for row in rows)
    points = {
        arm: dict(zip(seeds, (100 * score for score in pooled[arm]['accuracy']))) for arm in ARMS
    }
    over = contrast('psBN over BN', points['psBN'], points['BN'])
    text = [f'{len(seeds)} seeds', *(told(arm, pooled[arm]) for arm in ARMS)]
    widths = []
    for values in points.values():
        _, low, high = mean_ci(list(values.values()))
        widths.append(math.inf if low is None else high - low)
    if over['low'] is not None:
        text.append(f'psBN over BN {over["mean"]:.2f} [{over["low"]:.2f}, {over["high"]:.2f}]')
    text.append(f'intervals narrower than {GOAL} points: {"yes" if max(widths) < GOAL else "no"}')
    return {'text': '; '.join(text), 'contrast': over, 'goal_met': max(widths) < GOAL}
