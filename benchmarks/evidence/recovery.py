"""Recovery: networks with collapsed filters go on with BN and with psBN, which is helped or not.

The networks are small ones on digits, collapsed in the setting of when.py in which SGD leaves the
most trapped filters in networks that still work (accuracy > 0.9), and public ResNets for CIFAR-10,
finetuned to tell red cells, white cells and platelets apart on crops of microscope photographs.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cifar_data
import numpy as np
import torch
from common import (
    BLUE,
    CHECKPOINTS,
    GREEN,
    GREY,
    IMAGES,
    ORANGE,
    ROOT,
    Experiment,
    mean_ci,
    revival_steps,
    table,
)
from digits import (
    OPTIMISERS,
    WINDOW,
    Nets,
    accuracy,
    draw_batches,
    load_data,
    loss_of,
    structure_of,
    train,
    train_and_count,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.collapse import (
    RECTIFIERS,
    GradientWatch,
    Structure,
    census_of_model,
    find_norms,
    trace_structure,
)
from psbn_mmdet.layers import bn_to_psbn
from psbn_mmdet.recovery import Recovery, revive

sys.path.insert(0, str(ROOT / 'tests'))
from cifar_resnet import CifarResNet

TAU = 1e-3
ARMS = ('BN', 'psBN', 'psBN, revive', 'psBN, recovery')
RECOVERY_STEPS = 100  # as in detection.py; of the public networks alone
WINDOW_OF_HOOK = 10
COLLAPSING = dict(lr=1.0, weight_decay=5e-4)
RESNETS = {'resnet20': (3, 'resnet20-12fca82f.th'), 'resnet32': (5, 'resnet32-d509ac18.th')}
BATCH = 16  # crops
GOING_ON = ((0.1, 5e-3), (0.1, 5e-4), (0.1, 0.0), (0.03, 5e-3))  # lr, weight decay


class Arrivals(GradientWatch):
    """Looks at every step: that at which a gradient first reached each channel."""

    def __init__(self, optimizer: torch.optim.Optimizer, norms: dict) -> None:
        super().__init__([optimizer], norms)
        self.first = {name: np.full(norm.num_features, -1) for name, norm in norms.items()}

    def look(self, step: int) -> None:
        """After an optimiser's step."""
        for name, reached in self.reached().items():
            first = self.first[name]
            first[reached & (first < 0)] = step


class Reach:
    """The largest xhat of each channel met in forward passes, on the side towards opening."""

    def __init__(self, network: nn.Module) -> None:
        self.largest: dict[str, Tensor] = {}
        for name, norm in find_norms(network).items():
            norm.register_forward_hook(self._hook(name))

    def _hook(self, name: str):
        def hook(norm: nn.Module, inputs: tuple, output: Tensor) -> None:
            xhat = F.batch_norm(inputs[0], None, None, training=True, eps=norm.eps)
            largest = (xhat * norm.weight.sign()[:, None, None]).amax((0, 2, 3))
            self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)

        return hook


def converted(network: nn.Module, arm: str, structure: Structure, shift: float = 0.1) -> nn.Module:
    """A copy of a network with the arm's norms."""
    network = copy.deepcopy(network)
    if arm == 'BN':
        return network
    bn_to_psbn(network, shift)
    if arm == 'psBN, revive':
        network.load_state_dict(revive(network.state_dict(), structure, 0.2 * shift)[0])
    return network


@cache
def collapsed_nets(arch: str, seeds: tuple[int, ...], steps: int) -> tuple[Nets, dict, dict]:
    """Networks trained until filters are trapped: with the masks, and how far xhat reaches."""
    data = load_data()
    nets = Nets(arch, 'BN', 'relu', seeds)
    optimizer = OPTIMISERS['sgd'](nets.parameters(), **COLLAPSING)
    found = train_and_count(nets, data, optimizer, steps)
    probe = copy.deepcopy(nets)
    reach = Reach(probe)
    with torch.no_grad():
        for batch in draw_batches(data, seeds, 40, first=2):
            loss_of(probe, data, batch)
    return nets, {layer.name: layer.trapped for layer in found.layers}, reach.largest


def on_digits(
    arch: str,
    arm: str,
    lr: float,
    weight_decay: float,
    steps: int,
    seeds: Sequence[int],
    shift: float = 0.1,
    steps_before: int = 500,
) -> list[dict]:
    """Go on with collapsed networks: a row for each of their trapped filters before a ReLU."""
    data = load_data()
    start, trapped, reach = collapsed_nets(arch, tuple(seeds), steps_before)
    structure = structure_of(start, data)
    nets = converted(start, arm, structure, shift)
    norms = find_norms(nets)
    begin = {
        name: (norm.weight.detach().clone(), norm.bias.detach().clone())
        for name, norm in norms.items()
    }
    optimizer = OPTIMISERS['sgd'](nets.parameters(), lr=lr, weight_decay=weight_decay)
    arrivals = Arrivals(optimizer, norms)
    train(nets, data, optimizer, draw_batches(data, seeds, steps, 3), after_step=arrivals.look)
    arrivals.close()
    before = accuracy(start, data)
    found = train_and_count(nets, data, optimizer, max(WINDOW, steps // 4), first=4)
    scores = accuracy(nets, data)
    rows = []
    for name, (gamma, b) in begin.items():
        if structure.rectifiers.get(name) not in RECTIFIERS:
            continue
        each = norms[name].num_features // len(seeds)
        rows += [
            {
                'seed': seeds[channel // each],
                **fate(gamma[channel], b[channel], reach[name][channel], shift, lr, weight_decay),
                'first': int(arrivals.first[name][channel]),
                'trapped_at_end': int(found[name].trapped[channel]),
                'gamma_at_end': float(found[name].gamma[channel]),
            }
            for channel in np.flatnonzero(trapped[name])
        ]
    networks = [
        {'seed': seed, 'before': before[i], 'accuracy': scores[i]} for i, seed in enumerate(seeds)
    ]
    return [{'filters': rows, 'networks': networks}]


def fate(
    gamma: Tensor, b: Tensor, reach: Tensor, shift: float, lr: float, weight_decay: float
) -> dict:
    """How a closed filter starts, and after how many steps of psBN it is to open.

    Predicted with its gamma and the largest xhat met, and as for gamma = 0.
    """
    known = dict(shift=shift, lr=lr, weight_decay=weight_decay, momentum=0.9)
    steps = revival_steps(float(b), gamma=float(gamma), reach=float(reach), **known)
    bound = revival_steps(float(b), **known)
    return {
        'gamma': float(gamma),
        'b': float(b),
        'reach': float(reach),
        'predicted': steps if math.isfinite(steps) else None,
        'predicted_without_gamma': bound if math.isfinite(bound) else None,
    }


class Cells:
    """Crops of cells at 32 x 32 px, by the given split; as many red cells as white in training."""

    def __init__(self, folder: Path) -> None:
        self.train = self._read(folder, 'train', 200)
        self.val = self._read(folder, 'val', 80)

    def _read(self, folder: Path, split: str, most: int) -> tuple[Tensor, Tensor]:
        content = json.loads((folder / f'annotations/{split}.json').read_text())
        names = {image['id']: image['file_name'] for image in content['images']}
        taken: dict[int, int] = {}
        crops, labels = [], []
        opened: dict[str, Image.Image] = {}
        for box in content['annotations']:
            kind = box['category_id'] - 1
            x, y, width, height = box['bbox']
            if taken.get(kind, 0) >= most or min(width, height) < 8:
                continue
            taken[kind] = taken.get(kind, 0) + 1
            name = names[box['image_id']]
            if name not in opened:
                opened[name] = Image.open(folder / 'images' / name).convert('RGB')
            crop = opened[name].resize((32, 32), box=(x, y, x + width, y + height))
            crops.append(torch.tensor(np.asarray(crop)))
            labels.append(kind)
        images = torch.stack(crops).permute(0, 3, 1, 2).float() / 255
        mean, std = (images.new_tensor(v)[:, None, None] for v in (cifar_data.MEAN, cifar_data.STD))
        return (images - mean) / std, torch.tensor(labels)


@cache
def load_cells(folder: str) -> Cells:
    """The crops, cut once."""
    return Cells(Path(folder))


def on_cells(
    network: str,
    arm: str,
    lr: float,
    weight_decay: float,
    steps: int,
    seed: int,
    folders: tuple[str, str] = ('', ''),
) -> list[dict]:
    """Finetune a public ResNet: a row for each filter that was dead in it.

    In the last fifth of the steps the learning rate goes down to 0, as on digits.
    """
    checkpoints, images = folders
    blocks, file = RESNETS[network]
    cells = load_cells(images)
    model = CifarResNet(blocks)
    model.load_state_dict(read_weights(Path(checkpoints) / file).state_dict)
    torch.manual_seed(seed)
    model.linear = nn.Linear(64, 3)
    structure = trace_structure(model, torch.randn(2, 3, 32, 32))
    probe = copy.deepcopy(model)
    reach = Reach(probe)
    with torch.no_grad():
        for start in range(0, min(320, len(cells.train[1])), BATCH):
            probe(cells.train[0][start : start + BATCH])
    dead = {
        layer.name: layer.dead
        for layer in census_of_model(model, rectifiers=structure.rectifiers).layers
    }
    model = converted(model, arm, structure)
    norms = find_norms(model)
    begin = {
        name: (norm.weight.detach().clone(), norm.bias.detach().clone())
        for name, norm in norms.items()
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    arrivals = Arrivals(optimizer, norms)
    late = GradientWatch([optimizer], norms)
    late.active = False
    if arm == 'psBN, recovery':
        recover(model, optimizer, RECOVERY_STEPS)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(cells.train[1]), (BATCH,))
        loss = F.cross_entropy(model(cells.train[0][chosen]), cells.train[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        late.active = step >= steps * 3 // 4
        optimizer.param_groups[0]['lr'] = lr * min(1, 5 * (steps - step) / steps)
        optimizer.step()
        arrivals.look(step)
    model.eval()
    with torch.no_grad():
        right = model(cells.val[0]).argmax(1) == cells.val[1]
    trapped = late.trapped()
    rows = [
        {
            'seed': seed,
            **fate(
                begin[name][0][channel],
                begin[name][1][channel],
                reach.largest[name][channel],
                0.1,
                lr,
                weight_decay,
            ),
            'first': int(arrivals.first[name][channel]),
            'trapped_at_end': int(trapped[name][channel]),
            'gamma_at_end': float(norms[name].weight.detach()[channel]),
        }
        for name, mask in dead.items()
        if mask is not None
        for channel in np.flatnonzero(mask)
    ]
    score = round(float(right.double().mean()), 4)
    return [{'filters': rows, 'networks': [{'seed': seed, 'accuracy': score}]}]


def recover(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Recovery:
    """What RecoveryHook does in a Runner."""
    structure = trace_structure(model.eval(), torch.randn(2, 3, 32, 32))

    def failed(error: Exception | None) -> None:
        if error is not None:
            raise error

    return Recovery(model, [optimizer], structure, steps, WINDOW_OF_HOOK, failed, list)


def sizes_around(network: str, checkpoints: str) -> list[dict]:
    """How large the weights around a public ResNet's dead filters are.

    Returns:
        list[dict]: By filter, the norm of its own convolution's weights and of those by which the
        next one reads it, over the median of the layer's other filters.
    """
    blocks, file = RESNETS[network]
    model = CifarResNet(blocks)
    model.load_state_dict(read_weights(Path(checkpoints) / file).state_dict)
    structure = trace_structure(model.eval(), torch.randn(2, 3, 32, 32))
    rows = []
    for layer in census_of_model(model, rectifiers=structure.rectifiers).layers:
        if layer.rectifier != 'relu' or not layer.dead.any():
            continue
        own = model.get_submodule(structure.producers[layer.name]).weight.detach()
        read = (
            model.get_submodule(structure.consumers[layer.name][0]).weight.detach().transpose(0, 1)
        )
        sizes = [weight.flatten(1).norm(dim=1) for weight in (own, read)]
        relative = [size / size[~torch.tensor(layer.dead)].median() for size in sizes]
        for channel in np.flatnonzero(layer.dead):
            values = {k: float(v[channel]) for k, v in zip(('own', 'read'), relative)}
            name = {'network': network, 'layer': layer.name, 'channel': int(channel)}
            rows.append({**name, **values})
    return rows


def settings(quick: bool, with_cells: bool) -> list[dict]:
    """All runs; 'part' says of what."""
    steps, before, seeds = (60, 150, [0, 1]) if quick else (800, 500, list(range(5)))
    runs = [
        dict(
            part='digits',
            arch=arch,
            arm=arm,
            lr=lr,
            weight_decay=decay,
            steps=steps,
            seeds=seeds,
            steps_before=before,
        )
        for arch in (('vgg',) if quick else ('vgg', 'resnet'))
        for lr, decay in ([(0.1, 0.02)] if quick else GOING_ON)
        for arm in ARMS[:3]
    ]
    if with_cells:
        runs += [
            dict(
                part='cells',
                network=network,
                arm=arm,
                lr=0.05,
                weight_decay=1e-3,
                steps=2 if quick else 300,
                seed=seed,
            )
            for seed in ([0] if quick else [0, 1, 2])
            for network in (['resnet20'] if quick else list(RESNETS))
            for arm in ARMS
        ]
    return runs


def summarise(runs: list[tuple[dict, list[dict]]]) -> dict:
    """Of each cell, what became of the closed filters and of the accuracy; and the filters."""
    cells: dict[tuple, dict] = {}
    for setting, (result,) in runs:
        network = setting.get('arch') or setting['network']
        key = (network, setting['lr'], setting['weight_decay'], setting['arm'])
        cell = cells.setdefault(key, {'filters': [], 'networks': [], 'steps': setting['steps']})
        cell['filters'] += result['filters']
        cell['networks'] += result['networks']
    summary, filters = [], []
    for (network, lr, decay, arm), cell in cells.items():
        base = cells[network, lr, decay, 'BN']
        # Of the filters that are dead by their parameters, those that BN never opens.
        closed = [row['first'] < 0 for row in base['filters']]
        if network not in RESNETS:
            closed = [True] * len(closed)
        rows = [row for row, shut in zip(cell['filters'], closed) if shut]
        opened = [row['first'] for row in rows if row['first'] >= 0]
        due = [row for row in rows if row['predicted'] is not None] if arm in ARMS[1:3] else []
        met = [row for row in due if row['first'] >= 0 and row['predicted'] >= 10]
        ratios = [row['first'] / row['predicted'] for row in met]
        gains = [a['accuracy'] - b['accuracy'] for a, b in zip(cell['networks'], base['networks'])]
        summary.append(
            {
                'network': network,
                'lr': lr,
                'weight_decay': decay,
                'arm': arm,
                'steps': cell['steps'],
                'dead': len(closed),
                'closed': len(rows),
                'opened': len(opened),
                'open_at_end': sum(not row['trapped_at_end'] for row in rows),
                'responding_at_end': sum(
                    not row['trapped_at_end'] and abs(row['gamma_at_end']) > TAU for row in rows
                ),
                'due': sum(row['predicted'] <= cell['steps'] for row in due),
                'due_and_opened': sum(
                    row['predicted'] <= cell['steps'] and row['first'] >= 0 for row in due
                ),
                'opened_at': quartiles(opened),
                'predicted_at': quartiles([row['predicted'] for row in due]),
                'opened_by_predicted': quartiles(ratios),
                'late_by': quartiles(
                    [row['first'] - row['predicted'] for row in due if row['first'] >= 0]
                ),
                'accuracy': mean_ci([row['accuracy'] for row in cell['networks']]),
                'gain_on_BN': mean_ci(gains) if arm != 'BN' else None,
            }
        )
        filters += [
            {'network': network, 'lr': lr, 'weight_decay': decay, 'arm': ARMS.index(arm), **row}
            for row in rows
        ]
    ratios = [
        (row['predicted'], row['first'] / row['predicted'])
        for row in filters
        if row['arm'] in (1, 2) and row['first'] >= 0 and (row['predicted'] or 0) >= 10
    ]
    return {
        'collapsing': COLLAPSING,
        'arms': ARMS,
        'opened_by_predicted': {
            f'from {least} steps': quartiles([ratio for steps, ratio in ratios if steps >= least])
            for least in (10, 100)
        },
        'summary': table(summary),
        'filters': table(filters),
    }


def quartiles(values: Sequence[float]) -> list[float] | None:
    """Lower quartile, median and upper quartile."""
    if not len(values):
        return None
    return [float(f'{q:.4g}') for q in np.percentile(values, [25, 50, 75])]


def draw(summary: dict) -> Figure:
    """Open filters over steps, observed over predicted steps, the public networks."""
    cells, filters = (
        [dict(zip(summary[name]['columns'], row)) for row in summary[name]['rows']]
        for name in ('summary', 'filters')
    )
    groups = list(dict.fromkeys((c['network'], c['lr'], c['weight_decay']) for c in cells))
    digits = [g for g in groups if g[0] not in RESNETS]
    public = [g for g in groups if g[0] in RESNETS]
    figure = Figure(figsize=(11, 3.9), layout='constrained')
    axes = figure.subplots(1, 3)
    shown = max(digits, key=lambda g: (g[2], g[1]))
    draw_open(axes[0], cells, filters, [g for g in digits if g[1:] == shown[1:]])
    axes[0].set_title(
        f'Digits, lr {shown[1]:g}, weight decay {shown[2]:g}, opened:\n'
        + title_of(cells, [g for g in digits if g[1:] == shown[1:]], 'opened'),
        fontsize=9,
    )
    ax = axes[1]
    both = [r for r in filters if r['arm'] and r['first'] >= 0 and (r['predicted'] or 0) >= 1]
    for arm, colour in ((1, BLUE), (2, ORANGE)):
        chosen = [r for r in both if r['arm'] == arm]
        x, y = [r['predicted'] for r in chosen], [r['first'] + 1 for r in chosen]
        ax.plot(x, y, '.', ms=3, color=colour, label=ARMS[arm])
    ends = np.array([1, 1000])
    ax.plot(ends, ends, '--', color=GREY, label='as predicted')
    ax.set(xscale='log', yscale='log', xlabel='predicted steps', ylabel='steps until a gradient')
    ratio = summary['opened_by_predicted']['from 10 steps']
    found = f'{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]' if ratio else 'none'
    ax.set_title(f'Observed / predicted steps:\nmedian [quartiles] {found}', fontsize=9)
    ax.legend(fontsize=7)
    if public:
        draw_open(axes[2], cells, filters, public)
        axes[2].set_title(
            'Public ResNets, responding at the end:\n'
            + title_of(cells, public, 'responding_at_end'),
            fontsize=8,
        )
    for ax in axes:
        ax.grid(alpha=0.3, lw=0.5)
    return figure


def title_of(cells: list[dict], groups: list[tuple], what: str) -> str:
    """How many filters have opened, or respond at the end, by arm."""
    texts = []
    for arm in ARMS:
        rows = [
            c
            for c in cells
            if c['arm'] == arm and (c['network'], c['lr'], c['weight_decay']) in groups
        ]
        if rows:
            reached, closed = (sum(row[key] for row in rows) for key in (what, 'closed'))
            texts.append(f'{arm} {reached}')
    return ', '.join(texts) + f' of {closed}'


def draw_open(ax: Axes, cells: list[dict], filters: list[dict], groups: list[tuple]) -> None:
    """The share of the closed filters that a gradient has reached, over the steps."""
    last = 0
    for number, colour in enumerate((GREY, BLUE, ORANGE, GREEN)):
        rows = [
            r
            for r in filters
            if r['arm'] == number and (r['network'], r['lr'], r['weight_decay']) in groups
        ]
        if not rows:
            continue
        steps = max(
            c['steps'] for c in cells if (c['network'], c['lr'], c['weight_decay']) in groups
        )
        first = np.sort([r['first'] for r in rows if r['first'] >= 0])
        share = np.arange(1, len(first) + 1) / len(rows)
        last = max(last, *first) if len(first) else last
        x = np.concatenate([[0], first, [steps]])
        y = np.concatenate([[0], share, [share[-1] if len(share) else 0]])
        ax.step(x, y, where='post', color=colour, label=ARMS[number])
        if number in (1, 2):
            due = np.sort([r['predicted'] for r in rows if r['predicted'] is not None])
            share = np.arange(1, len(due) + 1) / len(rows)
            ax.plot(due, share, '--', lw=1, color=colour, label=f'{ARMS[number]}: predicted')
    ax.set(xlabel='steps', ylabel='share of the closed filters opened')
    ax.set_xlim(0, min(steps, 2 * last + 1))
    ax.set_ylim(-0.03, 1.03)
    ax.legend(fontsize=7)


def missing(folders: Sequence[Path]) -> bool:
    """Whether some data are absent; says which."""
    absent = [folder for folder in folders if not folder.exists()]
    for folder in absent:
        print(f'recovery: {folder} does not exist: the public ResNets are skipped')
    return bool(absent)


if __name__ == '__main__':
    experiment = Experiment('recovery', __doc__, (CHECKPOINTS, IMAGES))
    checkpoints, images = Path(experiment.args.checkpoints), Path(experiment.args.images)

    def run(part: str, **setting) -> list[dict]:
        """One run of one part."""
        if part == 'digits':
            return on_digits(**setting)
        return on_cells(folders=(str(checkpoints), str(images)), **setting)

    with_cells = not missing([checkpoints, images])
    runs = experiment.run(settings(experiment.quick, with_cells), run)
    summary = summarise(runs)
    networks = dict.fromkeys(s['network'] for s, _ in runs if s['part'] == 'cells')
    around = [row for name in networks for row in sizes_around(name, str(checkpoints))]
    experiment.write(**summary, sizes_around=table(around))
    experiment.save(draw(summary))
