"""CIFAR-10: what collapse costs a classifier, what psBN and recovery save of it.

ResNet-20 and one of half its width, from scratch on a quarter of the images with crops and flips,
an epoch of warm-up and a cosine schedule to 0: SGD at the usual rate and at 5x that, and Adam at a
large one. Besides BN, psBN and psBN with recovery, the last without the filters that collapse with
BN: as many are taken away in each layer from the first step on, so that the difference is what
filters kept alive are worth.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cifar10 import BATCH, REGIMES, CifarResNet, augmented, load_images, normalised
from closed import recover
from study import JOBS, SEEDS, Study, in_process
from take_away import Masks, as_many_others, make_constant, take_away
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from psbn_mmdet.collapse import GradientWatch, census_of_model, find_norms, trace_structure
from psbn_mmdet.layers import switch_norms

WINDOW = 100  # last steps, in which a trapped filter gets no gradient
WIDTHS = {'half': 8, 'ResNet-20': 16}
RECOVERY = 'psBN, recovery'
WITHOUT = 'psBN, recovery, without them'
STUDY = Study(
    'cifar',
    __doc__,
    [
        ('--cifar', '../shared/data/cifar10', 'folder of train.zip and test.zip, images by class'),
        ('--networks', 'half,ResNet-20', 'networks, with commas'),
        SEEDS,
        JOBS,
    ],
    arms=['BN', 'psBN', RECOVERY, WITHOUT],
    factors=('network', 'regime'),
    score='accuracy',
    factor=100,
    counts={'collapsed': 'collapsed', 'trapped': 'trapped', 'recovered': 'recovered'},
    largest={'pruning': 'pruning changes, at most'},
    changed=('without_recovered', 'without_others'),
    contrasts={
        'what the filters are worth: psBN with recovery over the same without them': (
            RECOVERY,
            WITHOUT,
        ),
        'psBN over BN': ('psBN', 'BN'),
        'psBN with recovery over BN': (RECOVERY, 'BN'),
        'whole over without the recovered filters': (RECOVERY, 'without_recovered'),
        'whole over without as many others': (RECOVERY, 'without_others'),
    },
)


def build(width: int, arm: str, seed: int) -> CifarResNet:
    """A network as it starts; all arms of a seed have the same weights."""
    torch.manual_seed(seed)
    network = CifarResNet(3, width)
    if arm.startswith('psBN'):
        switch_norms(network, 'psBN')
    return network.to(memory_format=torch.channels_last)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    network.eval()
    with torch.no_grad():
        right = [
            network(normalised(part)).argmax(1) == truth
            for part, truth in zip(images.split(500), labels.split(500))
        ]
    return float(torch.cat(right).double().mean())


def fit(
    network: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    away: Masks,
    late: GradientWatch,
) -> None:
    """Train; the gradients of the last steps are watched."""
    per_epoch = len(images) // BATCH
    steps = epochs * per_epoch
    (lr,) = (group['lr'] for group in optimizer.param_groups)
    network.train()
    batches = (
        chosen
        for _ in range(epochs)
        for chosen in torch.randperm(len(images)).split(BATCH)
        if len(chosen) == BATCH
    )
    for step, chosen in enumerate(batches):
        loss = F.cross_entropy(network(normalised(augmented(images[chosen]))), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        late.active = step >= steps - WINDOW
        warm_up = min(1, (step + 1) / per_epoch)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]['lr'] = lr * warm_up * cosine
        optimizer.step()
        take_away(network.state_dict(), away)


def run(
    network: str,
    regime: str,
    arm: str,
    seed: int,
    epochs: int,
    each: int | None,
    folder: str,
    lost: dict[str, int] | None = None,
) -> list[dict]:
    """Train one network and look at its filters."""
    torch.set_num_threads(1)
    images, labels = load_images(Path(folder) / 'train.zip', each)
    test = load_images(Path(folder) / 'test.zip', each if each and each < 100 else None)
    model = build(WIDTHS[network], arm, seed)
    structure = trace_structure(model, torch.randn(2, 3, 32, 32))
    optimizer = REGIMES[regime](model.parameters())
    norms = find_norms(model)
    late = GradientWatch([optimizer], norms)
    recovery = recover(model, optimizer, steps=500) if 'recovery' in arm else None
    # The first of each layer: at the start all are alike.
    away = {name: np.arange(norms[name].num_features) < n for name, n in (lost or {}).items()}
    take_away(model.state_dict(), away)
    torch.manual_seed(seed)
    fit(model, optimizer, images, labels, epochs, away, late)
    census = census_of_model(model, rectifiers=structure.rectifiers, trapped=late.trapped())
    collapsed = {layer.name: layer.collapsed for layer in census.layers}
    row = {
        'accuracy': accuracy(model, *test),
        'filters': sum(len(layer.gamma) for layer in census.layers),
        **{kind: census.count(kind) for kind in ('collapsed', 'vanished', 'dead', 'trapped')},
        'by_layer': {name: int(mask.sum()) for name, mask in collapsed.items()},
    }
    if arm == RECOVERY:
        opened = {name: mask.numpy() for name, mask in recovery.opened().items()}
        row['recovered'] = sum(int(mask.sum()) for mask in opened.values())
        state = {key: value.clone() for key, value in model.state_dict().items()}
        others = as_many_others(opened, collapsed)
        for key, masks in (('recovered_worth', opened), ('others_worth', others)):
            take_away(model.state_dict(), masks)
            row[key] = row['accuracy'] - accuracy(model, *test)
            model.load_state_dict(state)
    # Last, since it changes the network: filters that pass nothing pass nothing without gamma.
    make_constant(model.state_dict(), collapsed)
    row['pruned'] = accuracy(model, *test)
    return [row]


def with_changes(records: list[dict]) -> list[dict]:
    """Records with the accuracy of the changed networks."""
    rows = []
    for record in records:
        row = {**record, 'pruning': abs(record['accuracy'] - record['pruned'])}
        for kind in ('recovered', 'others'):
            if row.get(f'{kind}_worth') is not None:
                row[f'without_{kind}'] = row['accuracy'] - row[f'{kind}_worth']
        rows.append(row)
    return rows


def main() -> None:
    """Train, write."""
    STUDY.start()
    folder = Path(STUDY.args.cifar)
    if not STUDY.args.finished and STUDY.lacks(folder / 'train.zip'):
        return
    size = dict(epochs=20, each=1250)  # a quarter of the images
    networks, regimes = STUDY.args.networks.split(','), list(REGIMES)
    arms, seeds = ['BN', 'psBN', RECOVERY], int(STUDY.args.seeds)
    if STUDY.quick:
        size, regimes, seeds = dict(epochs=1, each=13), ['SGD 0.5'], 1
        networks, arms = networks[:1], ['BN', RECOVERY]
    settings = [
        dict(network=network, regime=regime, arm=arm, seed=seed, **size)
        for seed in range(seeds)
        for network in networks
        for regime in regimes
        for arm in arms
        if regime != 'SGD 0.1' or arm != RECOVERY  # nothing collapses there
    ]
    jobs = int(STUDY.args.jobs)
    do = partial(in_process, run, folder=str(folder))
    records = STUDY.run(settings, do, jobs)
    keys = ('network', 'regime', 'seed', *size)
    without = [
        {**{key: row[key] for key in keys}, 'arm': WITHOUT, 'lost': row['by_layer']}
        for row in records
        # Where nothing has collapsed it would be psBN with recovery once more.
        if row['arm'] == 'BN' and (STUDY.quick or row['collapsed'])
    ]
    STUDY.finish(with_changes(records + STUDY.run(without, do, jobs)))


if __name__ == '__main__':
    main()
