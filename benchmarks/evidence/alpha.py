"""How alpha matters: collapse, recovery time and accuracy for shifts from 0.02 to 0.5."""

from __future__ import annotations

import numpy as np
from common import BLUE, GREEN, GREY, ORANGE, PINK, RED, Experiment, mean_ci, table
from digits import train_from_scratch
from matplotlib.figure import Figure
from recovery import on_digits, quartiles

SHIFTS = (0.02, 0.05, 0.1, 0.2, 0.5)
SCRATCH = ((0.1, 5e-4), (0.3, 5e-3), (1.0, 5e-4))  # lr, weight decay: ordinary, then collapsing
RECOVERY = (0.1, 5e-3)


def run(part: str, **setting) -> list[dict]:
    """One run of one part; a shift of 0 stands for BN."""
    if part == 'recovery':
        return on_digits(**setting)
    norm = 'psBN' if setting['shift'] else 'BN'
    return train_from_scratch(norm=norm, activation='relu', optimiser='sgd', **setting)


def settings(quick: bool) -> list[dict]:
    """All runs; 'part' says of what."""
    archs = ('vgg',) if quick else ('vgg', 'resnet')
    shifts = SHIFTS[::4] if quick else SHIFTS
    runs = [
        dict(
            part='scratch',
            arch=arch,
            shift=shift,
            lr=lr,
            weight_decay=decay,
            steps=120 if quick else 500,
            seeds=[0, 1] if quick else list(range(10)),
        )
        for arch in archs
        for lr, decay in (SCRATCH[1:2] if quick else SCRATCH)
        for shift in (0.0, *shifts)
    ]
    runs += [
        dict(
            part='recovery',
            arch=arch,
            arm='psBN',
            shift=shift,
            lr=RECOVERY[0],
            weight_decay=0.02 if quick else RECOVERY[1],
            steps=60 if quick else 800,
            steps_before=150 if quick else 500,
            seeds=[0, 1] if quick else list(range(10)),
        )
        for arch in archs
        for shift in shifts
    ]
    return runs


def summarise(runs: list[tuple[dict, list[dict]]]) -> dict:
    """A row for each cell, and all runs."""
    scratch, recovery, every = [], [], []
    baseline: dict[tuple, list] = {}
    for setting, rows in runs:
        keys = {name: setting[name] for name in ('arch', 'lr', 'weight_decay', 'shift')}
        cell = (setting['arch'], setting['lr'], setting['weight_decay'])
        if setting['part'] == 'scratch':
            scores = [row['accuracy'] for row in rows]
            baseline.setdefault(cell, scores)
            gains = [a - b for a, b in zip(scores, baseline[cell])]
            scratch.append(
                {
                    **keys,
                    'collapsed': mean_ci([row['collapsed'] for row in rows]),
                    'trapped': mean_ci([row['trapped'] for row in rows]),
                    'accuracy': mean_ci(scores),
                    'gain_on_BN': mean_ci(gains) if setting['shift'] else None,
                }
            )
            every += [{**keys, **row} for row in rows]
        else:
            filters, scores = rows[0]['filters'], rows[0]['networks']
            opened = [row['first'] for row in filters if row['first'] >= 0]
            recovery.append(
                {
                    **keys,
                    'closed': len(filters),
                    'opened': len(opened),
                    'open_at_end': sum(not row['trapped_at_end'] for row in filters),
                    'opened_at': quartiles(opened),
                    'predicted_at': quartiles([row['predicted'] for row in filters]),
                    'accuracy': mean_ci([row['accuracy'] for row in scores]),
                }
            )
    return {'scratch': table(scratch), 'recovery': table(recovery), 'runs': table(every)}


def draw(summary: dict) -> Figure:
    """Collapsed filters, steps until they open, and accuracy, over the shift."""
    scratch, recovery = (
        [dict(zip(summary[name]['columns'], row)) for row in summary[name]['rows']]
        for name in ('scratch', 'recovery')
    )
    figure = Figure(figsize=(11, 3.9), layout='constrained')
    left, middle, right = figure.subplots(1, 3)
    shifts = list(dict.fromkeys(row['shift'] for row in scratch))
    cells = list(dict.fromkeys((row['arch'], row['lr'], row['weight_decay']) for row in scratch))
    colours = (BLUE, ORANGE, GREEN, PINK, RED, GREY)
    for number, ((arch, lr, decay), colour) in enumerate(zip(cells, colours)):
        rows = [r for r in scratch if (r['arch'], r['lr'], r['weight_decay']) == (arch, lr, decay)]
        x = np.arange(len(rows)) + 0.04 * (number - len(cells) / 2)  # so that no bar hides another
        for ax, kind in ((left, 'collapsed'), (right, 'accuracy')):
            y, low, high = np.array([row[kind] for row in rows]).T
            label = f'{arch}, lr {lr:g}, decay {decay:g}'
            ax.errorbar(x, y, [y - low, high - y], fmt='o-', ms=4, lw=1, color=colour, label=label)
    for ax, name in ((left, 'collapsed filters per network'), (right, 'accuracy on test images')):
        ax.set_ylabel(name)
    right.legend(fontsize=7)  # for both
    mean = {
        shift: np.mean([row['collapsed'][0] for row in scratch if row['shift'] == shift])
        for shift in shifts
    }
    left.set_title(
        'From scratch: collapsed '
        + ', '.join(f'{mean[shift]:.1f}' for shift in shifts)
        + '\n(mean of all settings)',
        fontsize=9,
    )
    times = []
    for arch, colour in (('vgg', BLUE), ('resnet', ORANGE)):
        rows = [row for row in recovery if row['arch'] == arch and row['opened_at']]
        if not rows:
            continue
        x = [shifts.index(row['shift']) for row in rows]
        low, y, high = np.array([row['opened_at'] for row in rows]).T
        middle.errorbar(x, y, [y - low, high - y], fmt='o', ms=4, color=colour, label=arch)
        predicted = [row['predicted_at'][1] for row in rows]
        middle.plot(x, predicted, '--', color=colour, label=f'{arch}: predicted')
        times.append(f'{arch} {y[0]:.0f} to {y[-1]:.0f}')
    middle.set_ylabel('steps until a filter opens: median, quartiles')
    middle.legend(fontsize=7)
    middle.set_title('Recovery, in steps: ' + ', '.join(times), fontsize=9)
    gains = [row['gain_on_BN'] for row in scratch if row['gain_on_BN']]
    telling = sum(gain[1] * gain[2] > 0 for gain in gains)
    right.set_title(f'Accuracy: {telling} of {len(gains)} differ from BN at 95 %', fontsize=9)
    for ax in (left, middle, right):
        ax.set_xticks(range(len(shifts)), [f'{shift:g}' if shift else 'BN' for shift in shifts])
        ax.set_xlabel('shift')
        ax.grid(alpha=0.3, lw=0.5)
    return figure


if __name__ == '__main__':
    experiment = Experiment('alpha', __doc__)
    summary = summarise(experiment.run(settings(experiment.quick), run))
    experiment.write(**summary)
    experiment.save(draw(summary))
