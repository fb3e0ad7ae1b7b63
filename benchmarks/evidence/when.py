"""When filters collapse: networks, learning rates, optimisers, weight decays, activations, norms.

Each run trains one cell of the grid with all its seeds side by side, and counts.
"""

from __future__ import annotations

from itertools import product

from digits import OPTIMISERS, train_from_scratch
from matplotlib.figure import Figure
from study import Study, group_by, lines, markdown_table, mean_ci, mean_of, rows_of, table

from psbn_mmdet.records import KINDS

STUDY = Study('when', __doc__)
LRS = {
    'sgd': (0.01, 0.03, 0.1, 0.3, 1.0),
    'adam': (0.001, 0.003, 0.01, 0.03, 0.1),
    'adamw': (0.001, 0.003, 0.01, 0.03, 0.1),
}
DECAYS = (0.0, 5e-4, 5e-3)
FILTERS = {'vgg': 112, 'resnet': 120}
NAMES = {'relu': 'ReLU', 'leaky_relu': 'LeakyReLU', 'sgd': 'SGD', 'adam': 'Adam', 'adamw': 'AdamW'}
KEYS = ('activation', 'optimiser', 'arch', 'weight_decay', 'lr')


def grid(quick: bool) -> list[dict]:
    """The settings of all runs; fewer seeds for LeakyReLU with Adam and AdamW."""
    steps, seeds = (120, [0, 1]) if quick else (500, [0, 1, 2, 3, 4])
    archs = ('vgg',) if quick else ('vgg', 'resnet')
    optimisers = ('sgd',) if quick else tuple(OPTIMISERS)
    decays = (5e-3,) if quick else DECAYS
    activations = ('relu',) if quick else ('relu', 'leaky_relu')
    return [
        dict(
            arch=arch,
            optimiser=optimiser,
            lr=lr,
            weight_decay=decay,
            activation=activation,
            norm=norm,
            steps=steps,
            seeds=seeds[:3] if activation == 'leaky_relu' and optimiser != 'sgd' else seeds,
        )
        for activation, optimiser, arch, decay, norm in product(
            activations, optimisers, archs, decays, ('BN', 'psBN')
        )
        for lr in (LRS[optimiser][::4] if quick else LRS[optimiser])
    ]


def summarise(records: list[dict]) -> dict:
    """A row for each cell with psBN beside BN, the worst cell of each optimiser, all runs."""
    cells = []
    for key, rows in group_by(records, *KEYS).items():
        cell = dict(zip(KEYS, key))
        norms = group_by(rows, 'norm')
        for (norm,), of_norm in norms.items():
            for kind in (*KINDS, 'collapsed', 'accuracy'):
                if kind in of_norm[0]:  # older results lack some
                    cell[f'{kind}: {norm}'] = mean_of([row[kind] for row in of_norm])
        for kind in ('collapsed', 'accuracy'):
            pairs = zip(norms['psBN',], norms['BN',])
            cell[f'{kind}: psBN - BN'] = mean_ci([a[kind] - b[kind] for a, b in pairs])
        cells.append(cell)
    working = group_by((cell for cell in cells if cell['accuracy: BN'] > 0.9), 'optimiser')
    return {
        'filters': FILTERS,
        'worst_that_work': [
            max(of_one, key=lambda cell: cell['trapped: BN']) for of_one in working.values()
        ],
        'groups': table(groups(cells)),
        'cells': table(cells),
        'runs': table(records, but=('steps', 'seeds')),
    }


def groups(cells: list[dict]) -> list[dict]:
    """Means over all learning rates and both networks, and how many cells tell BN from psBN."""
    keys = ('activation', 'optimiser', 'weight_decay')
    rows = []
    for key, chosen in group_by(cells, *keys).items():
        row = dict(zip(keys, key))
        for name in ('collapsed', 'accuracy'):
            for norm in ('BN', 'psBN'):
                row[f'{name}: {norm}'] = mean_of([cell[f'{name}: {norm}'] for cell in chosen])
            for sign, word in ((-1, 'lower'), (1, 'higher')):
                intervals = [cell[f'{name}: psBN - BN'] for cell in chosen]
                row[f'{name} {word} with psBN'] = sum(
                    low * high > 0 and sign * mean > 0 for mean, low, high in intervals
                )
        rows.append({**row, 'cells': len(chosen)})
    return rows


def tell(result: dict) -> str:
    """The table of the page."""
    rows = group_by(rows_of(result['groups']), 'activation', 'optimiser')
    return markdown_table(
        ['activation', 'optimiser'] + [f'decay {decay:g}: BN, psBN' for decay in DECAYS],
        [
            [NAMES[activation], NAMES[optimiser]]
            + [
                f'{g["collapsed: BN"]:.1f}, {g["collapsed: psBN"]:.1f} '
                f'[{g["collapsed lower with psBN"]}]'
                for g in of_one
            ]
            for (activation, optimiser), of_one in rows.items()
        ],
    )


def draw(result: dict) -> Figure:
    """Collapsed filters over the learning rate, mean of both networks."""
    cells = group_by(rows_of(result['cells']), 'optimiser', 'weight_decay', 'activation', 'lr')
    return lines(
        (
            {
                'panel': f'{NAMES[optimiser]}, decay {decay:g}: collapsed filters (%) over lr',
                'line': f'{norm}, {NAMES[activation]}',
                'x': lr,
                'y': mean_of([100 * c[f'collapsed: {norm}'] / FILTERS[c['arch']] for c in rows]),
            }
            for (optimiser, decay, activation, lr), rows in cells.items()
            for norm in ('BN', 'psBN')
        ),
        log='x',
    )


def main() -> None:
    """Train, write."""
    STUDY.start()
    result = summarise(STUDY.run(grid(STUDY.quick), train_from_scratch))
    STUDY.publish(result, tell(result), draw(result))


if __name__ == '__main__':
    main()
