"""From scratch with other detectors and data than decay.py's: BN, psBN and BN with psBN's start.

Faster R-CNN on photographs of blood cells, RetinaNet on the drawn data and on the photographs, with
the demo's optimiser and as many steps, RetinaNet, which learns later, also with three times as
many: with the weight decay of all other parameters on gamma and beta, and with 20 times that. The
arms are those of decay.py. Each run is one of tools/train.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from common import (
    IMAGES,
    Experiment,
    best_pair,
    cell_of,
    cells_table,
    contrasts_of,
    contrasts_table,
    plot_arms,
    table,
)
from decay import write_config
from detection import (
    CONFIGS,
    OPTIONS,
    QUICK,
    data_options,
    drawn_data,
    outcome,
    remove_checkpoints,
    train,
)
from matplotlib.figure import Figure


class Task(NamedTuple):
    """A detector and its data: a config with BN, and for how many epochs."""

    config: str
    epochs: int

    @property
    def schedule(self) -> str:
        """The demo's over that time, as lines of a config."""
        return f"""
load_from = None
max_epochs = {self.epochs}
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs // 4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=0, convert_to_iter_based=True),
]
"""


TASKS = {  # an epoch has 90 steps of drawn images, 52 of photographs
    'Faster R-CNN, photographs': Task('faster-rcnn_r18_fpn_photographs', 28),
    'RetinaNet, drawn data': Task('retinanet_r18_fpn_drawn', 16),
    'RetinaNet, drawn data, steps x 3': Task('retinanet_r18_fpn_drawn', 48),
    'RetinaNet, photographs, steps x 3': Task('retinanet_r18_fpn_photographs', 84),
}
ARMS = (
    'BN',
    'BN, starts at 0.1',
    'psBN',
    'BN x 20',
    'BN x 20, starts at 0.1',
    'psBN x 20',
    'psBN x 20, recovery',
)
CONTRASTS = {
    'psBN over BN': ('psBN', 'BN'),
    'the start alone: BN that starts at 0.1 over BN': ('BN, starts at 0.1', 'BN'),
    'psBN x 20 over BN x 20': ('psBN x 20', 'BN x 20'),
    'psBN x 20 with recovery over BN x 20': ('psBN x 20, recovery', 'BN x 20'),
    'the start alone: BN x 20 that starts at 0.1 over BN x 20': (
        'BN x 20, starts at 0.1',
        'BN x 20',
    ),
    'psBN x 20 over BN x 20 that starts at 0.1': ('psBN x 20', 'BN x 20, starts at 0.1'),
}


def main() -> None:
    """Train, write."""
    experiment = Experiment('scratch', __doc__, [*OPTIONS, IMAGES, ('--seeds', '3', 'of each arm')])
    if not Path(experiment.args.images, 'annotations/train.json').is_file():
        print(f'scratch: {experiment.args.images} has no annotations/train.json: skipped')
        return
    data = {
        'drawn data': drawn_data(experiment),
        'photographs': data_options(os.path.abspath(experiment.args.images)),
    }
    folder = experiment.work_dir.resolve() / 'scratch'
    folder.mkdir(parents=True, exist_ok=True)
    quick = QUICK if experiment.quick else {}

    def run(task: str, arm: str, seed: int) -> list[dict]:
        """One run."""
        work_dir = folder / f'{task}_{arm}_{seed}'.replace(', ', '_').replace(' ', '-')
        config = folder / f'{work_dir.name}.py'
        base = CONFIGS / f'{TASKS[task].config}.py'
        write_config(config, arm, base=base, more=TASKS[task].schedule)
        options = {'randomness.seed': seed, 'default_hooks.checkpoint.save_best': None}
        train(config, work_dir, **data[task.split(', ')[1]], **options, **quick)
        remove_checkpoints(work_dir)
        return [outcome(work_dir)]

    settings = [
        dict(task=task, arm=arm, seed=seed)
        for task in (list(TASKS)[-1:] if experiment.quick else TASKS)
        for seed in range(1 if experiment.quick else int(experiment.args.seeds))
        for arm in (['BN x 20, starts at 0.1', 'psBN x 20'] if experiment.quick else ARMS)
    ]
    runs = experiment.run(settings, run, int(experiment.args.jobs))
    rows = [{**setting, **found} for setting, (found,) in runs]
    cells, contrasts = compare(rows)
    experiment.write(cells=table(cells), contrasts=table(contrasts), runs=table(rows))
    experiment.save(draw(rows))
    experiment.tell(
        cells_table(
            cells,
            ['task', 'arm'],
            {'collapsed': 'collapsed', 'trapped': 'trapped', 'revived': 'revived'},
        )
        + '\n'
        + contrasts_table(contrasts, 'AP')
    )


def compare(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The arms' means in each task, and their contrasts, with the best psBN over the best BN."""
    cells, contrasts = [], []
    for task in dict.fromkeys(row['task'] for row in rows):
        scores, means = {}, {}
        for arm in ARMS:
            mine = [row for row in rows if (row['task'], row['arm']) == (task, arm)]
            if mine:
                counts = ('collapsed', 'trapped', 'new', 'revived')
                cell, scores[arm] = cell_of(mine, 'AP', counts)
                cells.append({'task': task, 'arm': arm, **cell})
                means[arm] = cell['AP']
        # The best of some arms alone tell nothing, nor do means of unlike seeds.
        whole = len({frozenset(scores.get(arm, ())) for arm in ARMS}) == 1
        pairs = CONTRASTS | (best_pair(means) if whole else {})
        contrasts += contrasts_of(scores, pairs, f'{task}: ')
    return cells, contrasts


def draw(rows: list[dict]) -> Figure:
    """AP of each arm, a panel for each task."""
    tasks = list(dict.fromkeys(row['task'] for row in rows))
    figure = Figure(figsize=(2.5 + 3 * len(tasks), 3.6), layout='constrained')
    for ax, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks):
        mine = [row for row in rows if row['task'] == task]
        plot_arms(ax, {arm: [row['AP'] for row in mine if row['arm'] == arm] for arm in ARMS})
        ax.set_title(task, fontsize=10)
        ax.set_xlabel('AP')
        ax.grid(alpha=0.3, lw=0.5)
    figure.axes[0].invert_yaxis()
    figure.suptitle('AP from scratch (dots: runs; bars: their mean)')
    return figure


if __name__ == '__main__':
    main()
