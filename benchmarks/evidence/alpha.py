"""How alpha matters: collapse, recovery time and accuracy for shifts from 0.02 to 0.5."""

from __future__ import annotations

from digits import train_from_scratch, train_further
from matplotlib.figure import Figure
from study import Study, group_by, lines, markdown_table, mean_ci, quartiles, rows_of, table

STUDY = Study('alpha', __doc__)
SHIFTS = (0.02, 0.05, 0.1, 0.2, 0.5)
SCRATCH = ((0.1, 5e-4), (0.3, 5e-3), (1.0, 5e-4))  # lr, weight decay: ordinary, then collapsing
RECOVERY = (0.1, 5e-3)
NAMES = {'vgg': 'VGG', 'resnet': 'ResNet'}


def run(part: str, **setting) -> list[dict]:
    """One run of one part; a shift of 0 stands for BN."""
    if part == 'recovery':
        return train_further(**setting)
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


def summarise(records: list[dict]) -> dict:
    """A row for each cell, and all runs."""
    keys = ('arch', 'lr', 'weight_decay', 'shift')
    parts = {part: rows for (part,), rows in group_by(records, 'part').items()}
    scratch, recovery = [], []
    bn: dict[tuple, list[float]] = {}
    for key, rows in group_by(parts['scratch'], *keys).items():
        scores = [row['accuracy'] for row in rows]
        gains = [a - b for a, b in zip(scores, bn.setdefault(key[:-1], scores))]
        scratch.append(
            {
                **dict(zip(keys, key)),
                'collapsed': mean_ci([row['collapsed'] for row in rows]),
                'trapped': mean_ci([row['trapped'] for row in rows]),
                'accuracy': mean_ci(scores),
                'gain_on_BN': mean_ci(gains) if key[-1] else None,
            }
        )
    for row in parts.get('recovery', []):
        closed = row['filters']
        opened = [one['first'] for one in closed if one['first'] >= 0]
        recovery.append(
            {
                **{key: row[key] for key in keys},
                'closed': len(closed),
                'opened': len(opened),
                'open_at_end': sum(not one['trapped_at_end'] for one in closed),
                'opened_at': quartiles(opened),
                'predicted_at': quartiles([one['predicted'] for one in closed]),
                'accuracy': mean_ci([network['accuracy'] for network in row['networks']]),
            }
        )
    return {
        'scratch': table(scratch),
        'recovery': table(recovery),
        'runs': table(parts['scratch'], but=('part', 'steps', 'seeds')),
    }


def tell(result: dict) -> str:
    """The table of the page: where BN loses filters, recovery, and the accuracy of one setting."""
    rows = []
    cells = group_by(rows_of(result['scratch']), 'lr', 'weight_decay', 'arch')
    for (lr, decay, arch), of_one in cells.items():
        if of_one[0]['collapsed'][0] > 1:
            name = f'collapsed, {NAMES[arch]}, lr {lr:g}, decay {decay:g}'
            rows.append([name, *(f'{row["collapsed"][0]:.1f}' for row in of_one)])
    for (arch,), of_one in group_by(rows_of(result['recovery']), 'arch').items():
        steps = [
            f'{row["opened_at"][1]:.0f} ({row["predicted_at"][1]:.0f})' if row['opened_at'] else ''
            for row in of_one
        ]
        rows.append([f'steps until a filter opens, {NAMES[arch]} (predicted)', '', *steps])
    for bn, *others in [cells[key] for key in cells if key == (1.0, 5e-4, 'resnet')]:
        gains = [row['gain_on_BN'] for row in others]
        texts = [f'{mean:.3f} [{low:.3f}, {high:.3f}]' for mean, low, high in gains]
        name = 'accuracy of BN and psBN - BN, ResNet, lr 1, decay 0.0005'
        rows.append([name, f'{bn["accuracy"][0]:.3f}', *texts])
    shifts = dict.fromkeys(row['shift'] for row in rows_of(result['scratch']))
    return markdown_table(['', *(f'{shift:g}' if shift else 'BN' for shift in shifts)], rows)


def draw(result: dict) -> Figure:
    """Collapsed filters, accuracy, and steps until filters open, over the shift."""
    points = []
    for kind, name in (('collapsed', 'collapsed filters per network'), ('accuracy', 'accuracy')):
        points += [
            {
                'panel': f'{name}, over the shift (0: BN)',
                'line': f'{NAMES[row["arch"]]}, lr {row["lr"]:g}, decay {row["weight_decay"]:g}',
                'x': row['shift'],
                'y': row[kind],
            }
            for row in rows_of(result['scratch'])
        ]
    for row in rows_of(result['recovery']):
        for kind, style in (('opened', 'o'), ('predicted', '--')):
            if row[f'{kind}_at']:
                low, median, high = row[f'{kind}_at']
                point = {'panel': 'steps until a filter opens, over the shift', 'x': row['shift']}
                point |= {'line': f'{NAMES[row["arch"]]}, {kind}', 'style': style}
                points.append({**point, 'y': [median, low, high] if kind == 'opened' else median})
    return lines(points)


def main() -> None:
    """Train, write."""
    STUDY.start()
    result = summarise(STUDY.run(settings(STUDY.quick), run))
    STUDY.publish(result, tell(result), draw(result))


if __name__ == '__main__':
    main()
