"""When filters collapse: networks, learning rates, optimisers, weight decays, activations, norms.

Each run trains one cell of the grid with all its seeds side by side, and counts.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from common import BLUE, ORANGE, Experiment, mean_ci, table
from digits import OPTIMISERS, train_from_scratch
from matplotlib.figure import Figure

from psbn_mmdet.records import KINDS

LRS = {
    'sgd': (0.01, 0.03, 0.1, 0.3, 1.0),
    'adam': (0.001, 0.003, 0.01, 0.03, 0.1),
    'adamw': (0.001, 0.003, 0.01, 0.03, 0.1),
}
DECAYS = (0.0, 5e-4, 5e-3)
FILTERS = {'vgg': 112, 'resnet': 120}
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


def summarise(runs: list[tuple[dict, list[dict]]]) -> dict:
    """A row for each cell with psBN beside BN, the worst cell of each optimiser, all runs."""
    cells: dict[tuple, dict] = {}
    every = []
    for setting, rows in runs:
        keys = {name: setting[name] for name in KEYS}
        cells.setdefault(tuple(keys.values()), {})[setting['norm']] = rows
        every += [{**keys, 'norm': setting['norm'], **row} for row in rows]
    summary = []
    for key, norms in cells.items():
        row = dict(zip(KEYS, key))
        for norm, rows in norms.items():
            for kind in (*KINDS, 'collapsed'):
                row[f'{kind}: {norm}'] = float(np.mean([r[kind] for r in rows]))
            row[f'accuracy: {norm}'] = float(np.mean([r['accuracy'] for r in rows]))
        pairs = list(zip(norms['psBN'], norms['BN']))
        row['collapsed: psBN - BN'] = mean_ci([a['collapsed'] - b['collapsed'] for a, b in pairs])
        row['accuracy: psBN - BN'] = mean_ci([a['accuracy'] - b['accuracy'] for a, b in pairs])
        summary.append(row)
    worst: dict[str, dict] = {}
    for row in summary:
        before = worst.get(row['optimiser'], {'trapped: BN': -1.0})
        if row['accuracy: BN'] > 0.9 and row['trapped: BN'] > before['trapped: BN']:
            worst[row['optimiser']] = row
    return {
        'filters': FILTERS,
        'worst_that_work': list(worst.values()),
        'groups': table(groups(summary)),
        'cells': table(summary),
        'runs': table(every),
    }


def groups(cells: list[dict]) -> list[dict]:
    """Means over all learning rates and both networks, and how many cells tell BN from psBN."""
    rows = []
    for activation, optimiser, decay in dict.fromkeys(
        (cell['activation'], cell['optimiser'], cell['weight_decay']) for cell in cells
    ):
        chosen = [
            cell
            for cell in cells
            if (cell['activation'], cell['optimiser'], cell['weight_decay'])
            == (activation, optimiser, decay)
        ]
        row = dict(activation=activation, optimiser=optimiser, weight_decay=decay)
        for name in ('collapsed', 'accuracy'):
            for norm in ('BN', 'psBN'):
                values = [cell[f'{name}: {norm}'] for cell in chosen]
                row[f'{name}: {norm}'] = float(np.mean(values))
            for sign, word in ((-1, 'lower'), (1, 'higher')):
                intervals = [cell[f'{name}: psBN - BN'] for cell in chosen]
                row[f'{name} {word} with psBN'] = sum(
                    low * high > 0 and sign * mean > 0 for mean, low, high in intervals
                )
        row['cells'] = len(chosen)
        rows.append(row)
    return rows


def draw(summary: dict) -> Figure:
    """Collapsed filters over the learning rate: a panel for each optimiser and weight decay."""
    cells = [dict(zip(summary['cells']['columns'], row)) for row in summary['cells']['rows']]
    optimisers = list(dict.fromkeys(cell['optimiser'] for cell in cells))
    decays = list(dict.fromkeys(cell['weight_decay'] for cell in cells))
    figure = Figure(figsize=(3.4 * len(decays) + 0.5, 2.8 * len(optimisers) + 0.6))
    figure.set_layout_engine('constrained')
    axes = figure.subplots(len(optimisers), len(decays), squeeze=False, sharey=True)
    styles = {('vgg', 'relu'): '-o', ('resnet', 'relu'): '-s', ('vgg', 'leaky_relu'): ':o'}
    styles['resnet', 'leaky_relu'] = ':s'
    for ax, (optimiser, decay) in zip(axes.flat, product(optimisers, decays)):
        chosen = [
            cell
            for cell in cells
            if cell['optimiser'] == optimiser and cell['weight_decay'] == decay
        ]
        for (arch, activation), style in styles.items():
            rows = [c for c in chosen if (c['arch'], c['activation']) == (arch, activation)]
            for norm, colour in (('BN', ORANGE), ('psBN', BLUE)):
                x = [row['lr'] for row in rows]
                y = [100 * row[f'collapsed: {norm}'] / FILTERS[arch] for row in rows]
                if rows:
                    label = f'{norm}, {arch}, {activation}'
                    ax.plot(x, y, style, ms=4, lw=1, color=colour, label=label)
        means = [np.mean([c[f'collapsed: {norm}'] for c in chosen]) for norm in ('BN', 'psBN')]
        ax.set_xscale('log')
        ax.set_title(
            f'{optimiser}, weight decay {decay:g}: BN {means[0]:.1f}, psBN {means[1]:.1f} filters',
            fontsize=8,
        )
        ax.grid(alpha=0.3, lw=0.5)
    axes[0, 0].legend(fontsize=6)
    for ax in axes[-1]:
        ax.set_xlabel('learning rate')
    for ax in axes[:, 0]:
        ax.set_ylabel('collapsed filters (%)')
    return figure


if __name__ == '__main__':
    experiment = Experiment('when', __doc__)
    summary = summarise(experiment.run(grid(experiment.quick), train_from_scratch))
    experiment.write(**summary)
    experiment.save(draw(summary))
