"""CIFAR-10: what collapse costs a classifier, what psBN and recovery save of it.

ResNet-20 and one of half its width, from scratch on a quarter of the images with crops and flips,
an epoch of warm-up and a cosine schedule to 0: SGD at the usual rate and at five times that, and
Adam at a large one. Besides BN, psBN and psBN with recovery, the last without the filters that
collapse with BN: as many are taken away in each layer from the first step on, so that the
difference is what filters kept alive are worth.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cifar_data import BATCH, REGIMES, augmented, load_images, normalised
from common import (
    BLUE,
    GREEN,
    GREY,
    RED,
    ROOT,
    Experiment,
    as_many_others,
    cell_of,
    contrasts_of,
    contrasts_table,
    in_process,
    make_constant,
    markdown_table,
    table,
    take_away,
)
from matplotlib.figure import Figure
from recovery import recover
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from psbn_mmdet.collapse import GradientWatch, census_of_model, find_norms, trace_structure
from psbn_mmdet.layers import switch_norms

sys.path.insert(0, str(ROOT / 'tests'))
from cifar_resnet import CifarResNet

WINDOW = 100  # last steps, in which a trapped filter gets no gradient
WIDTHS = {'half': 8, 'ResNet-20': 16}
WITHOUT = 'psBN, recovery, without them'
COLOURS = {
    'BN': RED,
    'psBN': BLUE,
    'psBN, recovery': GREEN,
    WITHOUT: GREY,
}
CONTRASTS = {
    'what the filters are worth: psBN with recovery over the same without them': (
        'psBN, recovery',
        WITHOUT,
    ),
    'psBN over BN': ('psBN', 'BN'),
    'psBN with recovery over BN': ('psBN, recovery', 'BN'),
    'whole over without the recovered filters': ('psBN, recovery', 'without recovered'),
    'whole over without as many others': ('psBN, recovery', 'without others'),
}
OPTIONS = [
    ('--cifar', '../shared/data/cifar10', 'folder of train.zip and test.zip, images by class'),
    ('--networks', 'half,ResNet-20', 'networks, with commas'),
    ('--seeds', '3', 'seeds of each arm'),
    ('--jobs', '2', 'runs at a time'),
]


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


def first_of_each(counts: dict[str, int], network: nn.Module) -> dict[str, np.ndarray]:
    """Masks of as many filters as are counted in each layer."""
    norms = find_norms(network)
    return {name: np.arange(norms[name].num_features) < n for name, n in counts.items()}


def fit(
    network: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    away: dict[str, np.ndarray],
    late: GradientWatch,
) -> None:
    """Train; the gradients of the last steps are watched."""
    per_epoch = len(images) // BATCH
    steps = epochs * per_epoch
    (lr,) = (group['lr'] for group in optimizer.param_groups)
    late.active = False
    network.train()
    step = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            if len(chosen) < BATCH:
                continue
            loss = F.cross_entropy(network(normalised(augmented(images[chosen]))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            late.active = step >= steps - WINDOW
            warm_up = min(1, (step + 1) / per_epoch)
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]['lr'] = lr * warm_up * cosine
            optimizer.step()
            take_away(network.state_dict(), away)
            step += 1


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
    away = first_of_each(lost or {}, model)
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
    if arm == 'psBN, recovery':
        opened = {name: mask.numpy() for name, mask in recovery.opened().items()}
        row |= contribution(model, opened, collapsed, *test, row['accuracy'])
    # Last, since it changes the network: filters that pass nothing pass nothing without gamma.
    make_constant(model.state_dict(), collapsed)
    row['pruned'] = accuracy(model, *test)
    return [row]


def contribution(
    model: nn.Module,
    opened: dict[str, np.ndarray],
    collapsed: dict[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    whole: float,
) -> dict:
    """How much accuracy goes with the recovered filters, and with as many others."""
    found = {'recovered': sum(int(mask.sum()) for mask in opened.values())}
    others = as_many_others(opened, collapsed)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, masks in (('recovered_worth', opened), ('others_worth', others)):
        take_away(model.state_dict(), masks)
        found[key] = whole - accuracy(model, images, labels)
        model.load_state_dict(state)
    return found


def main() -> None:
    """Train, write."""
    experiment = Experiment('cifar', __doc__, OPTIONS)
    folder = Path(experiment.args.cifar)
    if not (folder / 'train.zip').is_file():
        print(f'cifar: {folder} has no train.zip: skipped')
        return
    size = dict(epochs=20, each=1250)  # a quarter of the images
    networks, regimes = experiment.args.networks.split(','), list(REGIMES)
    arms = [arm for arm in COLOURS if arm != WITHOUT]
    seeds = int(experiment.args.seeds)
    if experiment.quick:
        size, regimes, seeds = dict(epochs=1, each=13), ['SGD 0.5'], 1
        networks = networks[:1]
        arms = ['BN', 'psBN, recovery']
    settings = [
        dict(network=network, regime=regime, arm=arm, seed=seed, **size)
        for seed in range(seeds)
        for network in networks
        for regime in regimes
        for arm in arms
        if regime != 'SGD 0.1' or arm != 'psBN, recovery'  # nothing collapses there
    ]
    jobs = int(experiment.args.jobs)
    do = partial(in_process, run, folder=str(folder))
    runs = experiment.run(settings, do, jobs)
    without = [
        {**setting, 'arm': WITHOUT, 'lost': row['by_layer']}
        for setting, (row,) in runs
        if setting['arm'] == 'BN'
        # Where nothing has collapsed it would be psBN with recovery once more.
        and (experiment.quick or row['collapsed'])
    ]
    runs += experiment.run(without, do, jobs)
    rows = [{**setting, **found} for setting, (found,) in runs]
    cells, contrasts = compare(rows)
    columns = ('accuracy', 'pruned', 'collapsed', 'vanished', 'dead', 'trapped')
    extra = ('recovered', 'recovered_worth', 'others_worth')
    experiment.write(
        cells=table(cells),
        contrasts=table(contrasts),
        runs=table(
            [{key: row.get(key) for key in (*settings[0], *columns, *extra)} for row in rows]
        ),
    )
    experiment.save(draw(cells))
    experiment.tell(as_markdown(cells, contrasts))


def compare(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The arms' means in each network and regime, and their contrasts."""
    cells, contrasts = [], []
    for network, regime in dict.fromkeys((row['network'], row['regime']) for row in rows):
        scores = {}
        for arm in COLOURS:
            mine = [
                row
                for row in rows
                if (row['network'], row['regime'], row['arm']) == (network, regime, arm)
            ]
            if not mine:
                continue
            counts = ('collapsed', 'trapped', 'recovered')
            cell, scores[arm] = cell_of(mine, 'accuracy', counts, factor=100)
            cell = {'network': network, 'regime': regime, 'arm': arm, **cell}
            cell['filters'] = mine[0]['filters']
            cell['pruning'] = 100 * max(abs(row['accuracy'] - row['pruned']) for row in mine)
            cells.append(cell)
            for less in ('recovered', 'others'):
                if mine[0].get('recovered'):
                    scores[f'without {less}'] = {
                        row['seed']: 100 * (row['accuracy'] - row[f'{less}_worth']) for row in mine
                    }
        contrasts += contrasts_of(scores, CONTRASTS, f'{network}, {regime}: ')
    return cells, contrasts


def as_markdown(cells: list[dict], contrasts: list[dict]) -> str:
    """The tables of the page."""
    first = markdown_table(
        [
            '',
            '',
            '',
            'accuracy, %',
            'collapsed',
            'trapped',
            'recovered',
            'pruning changes, at most',
        ],
        [
            [c['network'], c['regime'], c['arm'], f'{c["accuracy"]:.2f}']
            + [f'{c[name]:.0f}' for name in ('collapsed', 'trapped', 'recovered')]
            + [f'{c["pruning"]:.2f}']
            for c in cells
        ],
    )
    return first + '\n' + contrasts_table(contrasts, '%')


def draw(cells: list[dict]) -> Figure:
    """Accuracy over collapsed filters, a panel for each network and regime that was run."""
    networks, regimes = (
        list(dict.fromkeys(cell[key] for cell in cells)) for key in ('network', 'regime')
    )
    size = 3.6 * len(regimes), 0.8 + 2.8 * len(networks)
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(len(networks), len(regimes), squeeze=False)
    shown = {}
    for cell in cells:
        ax = axes[networks.index(cell['network']), regimes.index(cell['regime'])]
        low, high = (cell[end] or cell['accuracy'] for end in ('low', 'high'))
        shown[cell['arm']] = ax.errorbar(
            cell['collapsed'],
            cell['accuracy'],
            yerr=[[cell['accuracy'] - low], [high - cell['accuracy']]],
            fmt='o',
            color=COLOURS[cell['arm']],
        )
        ax.set_title(f'{cell["network"]}, {cell["regime"]}', fontsize=10)
        ax.set_xlabel('collapsed filters at the end')
        ax.grid(alpha=0.3, lw=0.5)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    figure.supylabel('accuracy, % (mean, 95 % CI)', fontsize=10)
    figure.legend(shown.values(), shown, loc='outside lower center', ncols=len(shown))
    figure.suptitle('CIFAR-10, a quarter of the images, from scratch')
    return figure


if __name__ == '__main__':
    main()
