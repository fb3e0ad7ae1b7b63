"""Recovery: networks with closed filters train further with BN and with psBN, helped or not.

The networks are small ones on digits, collapsed in the setting of when.py in which SGD leaves the
most trapped filters in networks that still work (accuracy > 0.9), and public ResNets for CIFAR-10,
finetuned to tell red cells, white cells and platelets apart on crops of microscope photographs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from cifar10 import MEAN, STD, CifarResNet
from closed import Arrivals, Reach, converted, recover
from digits import COLLAPSING, train_further
from matplotlib.figure import Figure
from PIL import Image
from study import (
    CHECKPOINTS,
    IMAGES,
    Study,
    group_by,
    lines,
    markdown_table,
    mean_ci,
    quartiles,
    rows_of,
    table,
)
from torch import Tensor, nn
from torch.nn import functional as F

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.collapse import GradientWatch, census_of_model, find_norms, trace_structure

STUDY = Study('recovery', __doc__, [CHECKPOINTS, IMAGES])
TAU = 1e-3
ARMS = ('BN', 'psBN', 'psBN, revive', 'psBN, recovery')
KEYS = ('network', 'lr', 'weight_decay')
RECOVERY_STEPS = 100  # as in detection.py; of the public networks alone
RESNETS = {'resnet20': (3, 'resnet20-12fca82f.th'), 'resnet32': (5, 'resnet32-d509ac18.th')}
NAMES = {'vgg': 'VGG', 'resnet': 'ResNet'}
NAMES |= {'resnet20': 'ResNet-20, cells', 'resnet32': 'ResNet-32, cells'}
BATCH = 16  # crops
FURTHER = ((0.1, 5e-3), (0.1, 5e-4), (0.1, 0.0), (0.03, 5e-3))  # lr, weight decay


@cache
def load_cells(folder: Path, split: str, most: int) -> tuple[Tensor, Tensor]:
    """Crops of cells at 32 x 32 px, so many of each kind, and their kinds."""
    content = json.loads((folder / f'annotations/{split}.json').read_text())
    names = {image['id']: image['file_name'] for image in content['images']}
    crops, labels = [], []
    opened: dict[str, Image.Image] = {}
    for box in content['annotations']:
        kind = box['category_id'] - 1
        x, y, width, height = box['bbox']
        if labels.count(kind) >= most or min(width, height) < 8:
            continue
        name = names[box['image_id']]
        if name not in opened:
            opened[name] = Image.open(folder / 'images' / name).convert('RGB')
        crop = opened[name].resize((32, 32), box=(x, y, x + width, y + height))
        crops.append(torch.tensor(np.asarray(crop)))
        labels.append(kind)
    images = torch.stack(crops).permute(0, 3, 1, 2).float() / 255
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std, torch.tensor(labels)


def load_resnet(network: str) -> CifarResNet:
    """A public ResNet."""
    blocks, file = RESNETS[network]
    model = CifarResNet(blocks)
    model.load_state_dict(read_weights(Path(STUDY.args.checkpoints, file)).state_dict)
    return model


def on_cells(
    network: str, arm: str, lr: float, weight_decay: float, steps: int, seed: int
) -> list[dict]:
    """Finetune a public ResNet: a row for each filter that was dead in it.

    In the last fifth of the steps the learning rate goes down to 0, as on digits.
    """
    images, labels = load_cells(Path(STUDY.args.images), 'train', 200)
    model = load_resnet(network)
    torch.manual_seed(seed)
    model.linear = nn.Linear(64, 3)
    structure = trace_structure(model, torch.randn(2, 3, 32, 32))
    probe = copy.deepcopy(model)
    reach = Reach(probe)
    with torch.no_grad():
        for part in images[:320].split(BATCH):
            probe(part)
    dead = {
        layer.name: np.flatnonzero(layer.dead)
        for layer in census_of_model(model, rectifiers=structure.rectifiers).layers
        if layer.dead is not None
    }
    model = converted(model, arm, structure)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    arrivals = Arrivals(optimizer, model)
    norms = find_norms(model)
    late = GradientWatch([optimizer], norms)
    late.active = False
    if arm == 'psBN, recovery':
        recover(model, optimizer, RECOVERY_STEPS)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(labels), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        late.active = step >= steps * 3 // 4
        optimizer.param_groups[0]['lr'] = lr * min(1, 5 * (steps - step) / steps)
        optimizer.step()
        arrivals.look(step)
    model.eval()
    images, labels = load_cells(Path(STUDY.args.images), 'val', 80)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    trapped = late.trapped()
    rows = [
        {
            'seed': seed,
            **arrivals.fate(name, channel, reach.largest, 0.1, lr=lr, weight_decay=weight_decay),
            'trapped_at_end': int(trapped[name][channel]),
            'gamma_at_end': float(norms[name].weight.detach()[channel]),
        }
        for name, channels in dead.items()
        for channel in channels
    ]
    score = round(float(right.double().mean()), 4)
    return [{'filters': rows, 'networks': [{'seed': seed, 'accuracy': score}]}]


def sizes_around(network: str) -> Iterator[dict]:
    """How large the weights around a public ResNet's dead filters are.

    Yields:
        dict: By filter, the norm of its own convolution's weights and of those by which the next
        one reads it, over the median of the layer's other filters.
    """
    model = load_resnet(network)
    structure = trace_structure(model.eval(), torch.randn(2, 3, 32, 32))
    for layer in census_of_model(model, rectifiers=structure.rectifiers).layers:
        if layer.rectifier != 'relu' or not layer.dead.any():
            continue
        own = model.get_submodule(structure.producers[layer.name]).weight.detach()
        read = model.get_submodule(structure.consumers[layer.name][0]).weight.detach()
        relative = {}
        for kind, weight in (('own', own), ('read', read.transpose(0, 1))):
            size = weight.flatten(1).norm(dim=1)
            relative[kind] = size / size[~torch.tensor(layer.dead)].median()
        for channel in np.flatnonzero(layer.dead):
            values = {kind: float(sizes[channel]) for kind, sizes in relative.items()}
            yield {'network': network, 'layer': layer.name, 'channel': int(channel), **values}


def run(part: str, **setting) -> list[dict]:
    """One run of one part."""
    return train_further(**setting) if part == 'digits' else on_cells(**setting)


def settings(quick: bool, with_cells: bool) -> list[dict]:
    """All runs; 'part' says of what."""
    steps, before, seeds = (60, 150, [0, 1]) if quick else (800, 500, list(range(5)))
    digits = dict(part='digits', steps=steps, seeds=seeds, steps_before=before)
    cells = dict(part='cells', lr=0.05, weight_decay=1e-3, steps=2 if quick else 300)
    runs = [
        dict(arch=arch, arm=arm, lr=lr, weight_decay=decay, **digits)
        for arch in (('vgg',) if quick else ('vgg', 'resnet'))
        for lr, decay in ([(0.1, 0.02)] if quick else FURTHER)
        for arm in ARMS[:3]
    ]
    if with_cells:
        runs += [
            dict(network=network, arm=arm, seed=seed, **cells)
            for seed in ([0] if quick else [0, 1, 2])
            for network in (['resnet20'] if quick else RESNETS)
            for arm in ARMS
        ]
    return runs


def summarise(records: list[dict]) -> dict:
    """Of each cell, what became of the closed filters and of the accuracy; and the filters."""
    cells: dict[tuple, dict] = {}
    records = [{**row, 'network': row.get('arch') or row['network']} for row in records]
    for key, rows in group_by(records, *KEYS, 'arm').items():
        cells[key] = {
            'steps': rows[0]['steps'],
            **{kind: [x for row in rows for x in row[kind]] for kind in ('filters', 'networks')},
        }
    summary, filters = [], []
    for (*key, arm), cell in cells.items():
        bn = cells[(*key, 'BN')]
        # Of the filters that are dead by their parameters, those that BN never opens.
        closed = [key[0] not in RESNETS or row['first'] < 0 for row in bn['filters']]
        rows = [row for row, shut in zip(cell['filters'], closed) if shut]
        gains = [a['accuracy'] - b['accuracy'] for a, b in zip(cell['networks'], bn['networks'])]
        setting = dict(zip(KEYS, key))
        summary.append(
            {
                **setting,
                'arm': arm,
                'steps': cell['steps'],
                'dead': len(closed),
                'closed': len(rows),
                **what_opened(rows, cell['steps'], with_prediction=arm in ARMS[1:3]),
                'accuracy': mean_ci([row['accuracy'] for row in cell['networks']]),
                'gain_on_BN': mean_ci(gains) if arm != 'BN' else None,
            }
        )
        filters += [{**setting, 'arm': ARMS.index(arm), **row} for row in rows]
    return {
        'collapsing': COLLAPSING,
        'arms': ARMS,
        'opened_by_predicted': late_by([row for row in filters if row['arm'] in (1, 2)]),
        'summary': table(summary),
        'filters': table(filters),
    }


def what_opened(rows: list[dict], steps: int, with_prediction: bool) -> dict:
    """How many filters opened and respond, and when, against the prediction."""
    opened = [row['first'] for row in rows if row['first'] >= 0]
    open_at_end = [row for row in rows if not row['trapped_at_end']]
    known = [row for row in rows if with_prediction and row['predicted'] is not None]
    due = [row for row in known if row['predicted'] <= steps]
    met = [row for row in known if row['first'] >= 0]
    ratios = [row['first'] / row['predicted'] for row in met if row['predicted'] >= 10]
    return {
        'opened': len(opened),
        'open_at_end': len(open_at_end),
        'responding_at_end': sum(abs(row['gamma_at_end']) > TAU for row in open_at_end),
        'due': len(due),
        'due_and_opened': sum(row['first'] >= 0 for row in due),
        'opened_at': quartiles(opened),
        'predicted_at': quartiles([row['predicted'] for row in known]),
        'opened_by_predicted': quartiles(ratios),
        'late_by': quartiles([row['first'] - row['predicted'] for row in met]),
    }


def late_by(filters: list[dict]) -> dict:
    """Steps taken over those predicted, where so many are predicted."""
    met = [row for row in filters if row['first'] >= 0 and row['predicted'] is not None]
    return {
        f'from {least} steps': quartiles(
            [row['first'] / row['predicted'] for row in met if row['predicted'] >= least]
        )
        for least in (10, 100)
    }


def tell(result: dict) -> str:
    """The table of the page."""
    lines = []
    for (network, lr, decay), rows in group_by(rows_of(result['summary']), *KEYS).items():
        arms = {row['arm']: row for row in rows}
        of = [arms.get(arm, {}) for arm in ARMS]
        lines.append([NAMES[network], f'{lr:g}, {decay:g}', of[0]['closed']])
        lines[-1] += [arm['opened'] for arm in of[:3]] + [of[1]['due']]
        lines[-1] += [arm.get('responding_at_end', '') for arm in of]
    return markdown_table(
        ['networks', 'lr, decay', 'closed', 'opened: BN', 'psBN', 'revive', 'due: psBN']
        + ['responding: BN', 'psBN', 'revive', 'recovery'],
        lines,
    )


def draw(result: dict) -> Figure:
    """Open filters over steps, and observed over predicted steps."""
    filters = group_by(rows_of(result['filters']), *KEYS)
    digits = [key for key in filters if key[0] not in RESNETS]
    _, lr, decay = max(digits, key=lambda key: (key[2], key[1]))
    share = 'share of closed filters opened, over steps:\n'
    against = 'steps until a gradient, over predicted steps'
    points = []
    for panel, keys in (
        (f'{share}digits, lr {lr:g}, decay {decay:g}', [k for k in digits if k[1:] == (lr, decay)]),
        (f'{share}public ResNets', [key for key in filters if key[0] in RESNETS]),
    ):
        rows = [row for key in keys for row in filters[key]]
        for (arm,), mine in group_by(rows, 'arm').items():
            for end, style in (('', '-'), (': predicted', '--')):
                if not end or arm in (1, 2):
                    found = [row['predicted' if end else 'first'] for row in mine]
                    found = sorted(step for step in found if step is not None and step >= 0)
                    place = {'panel': panel, 'line': ARMS[arm] + end, 'style': style}
                    points += [
                        {**place, 'x': step, 'y': (i + 1) / len(mine)}
                        for i, step in enumerate(found)
                    ]
    points += [
        {'panel': against, 'line': ARMS[row['arm']], 'style': '.'}
        | {'x': row['predicted'], 'y': row['first'] + 1}
        for rows in filters.values()
        for row in rows
        if row['arm'] in (1, 2) and row['first'] >= 0 and (row['predicted'] or 0) >= 1
    ]
    points += [
        {'panel': against, 'line': 'as predicted', 'style': '--', 'x': x, 'y': x} for x in (1, 1000)
    ]
    return lines(points, log={against: 'xy'})


def main() -> None:
    """Train further, write."""
    STUDY.start()
    absent = [
        folder
        for folder in (Path(STUDY.args.checkpoints), Path(STUDY.args.images))
        if not folder.exists()
    ]
    for folder in absent:
        print(f'recovery: {folder} does not exist: the public ResNets are skipped')
    records = STUDY.run(settings(STUDY.quick, not absent), run)
    result = summarise(records)
    networks = dict.fromkeys(row['network'] for row in records if row['part'] == 'cells')
    result['sizes_around'] = table([row for name in networks for row in sizes_around(name)])
    STUDY.publish(result, tell(result), draw(result))


if __name__ == '__main__':
    main()
