"""Finetuning to the end: what psBN and recovery are worth when a detector trains on and on.

The Faster R-CNN of detection.py with its collapsed filters, finetuned on the photographs of blood
cells for twelve times as long, at four times the baseline's learning rate and with the statistics
of the batch, where most filters collapse. At the end the filters that RecoveryHook has opened are
taken away, or as many others of their layers, and the collapsed ones are pruned exactly.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from common import (
    BLUE,
    IMAGES,
    ORANGE,
    RED,
    Experiment,
    as_many_others,
    cell_of,
    contrasts_of,
    contrasts_table,
    in_process,
    make_constant,
    markdown_table,
    read_config,
    table,
    take_away,
)
from detection import (
    OPTIONS,
    Detection,
    filters_of,
    last_checkpoint,
    outcome,
    remove_checkpoints,
    scores_of,
    train,
)
from matplotlib.figure import Figure
from mmengine.runner import Runner

from psbn_mmdet.checkpoints import read_content
from psbn_mmdet.records import find_snapshots, read_records, read_snapshot
from psbn_mmdet.report import find_record

DETECTOR = 'faster-rcnn'
COLOURS = {'BN': RED, 'psBN': BLUE, 'psBN, recovery': ORANGE}
RECOVERY = 'psBN, recovery'
CONTRASTS = {
    'psBN over BN': ('psBN', 'BN'),
    'psBN with recovery over BN': (RECOVERY, 'BN'),
    'psBN with recovery over psBN': (RECOVERY, 'psBN'),
    'whole over without the recovered filters': (RECOVERY, 'without_recovered'),
    'whole over without as many others': (RECOVERY, 'without_others'),
}
LENGTH = {
    'train_cfg.max_epochs': 72,
    'train_cfg.val_interval': 6,
    'param_scheduler.1.milestones': '[48,60]',
}
STEPS = {'custom_hooks.1.steps': 500}  # RecoveryHook's default


class Finetuning:
    """The runs, in a work dir."""

    def __init__(self, experiment: Experiment) -> None:
        self.folder = experiment.work_dir.resolve() / 'finetuning'
        self.detection = Detection(experiment)
        self.length = {} if experiment.quick else LENGTH
        self.steps = {} if experiment.quick else STEPS

    def run(self, arm: str, seed: int) -> list[dict]:
        """Finetune, and test without some filters."""
        work_dir = self.folder / f'{arm.replace(", ", "_")}_{seed}'
        config, options = self.detection.options_of(DETECTOR, arm, False, 4, seed)
        more = self.length | (self.steps if arm == RECOVERY else {})
        train(config, work_dir, **{**options, **more})
        found = outcome(work_dir)
        collapsed = filters_of(work_dir, 'collapsed')
        changes = {'pruned': (make_constant, collapsed)}
        if arm == RECOVERY:
            ever = filters_of(work_dir, 'recovered', ever=True)
            recovered = {
                name: mask & ~collapsed.get(name, np.zeros_like(mask))
                for name, mask in ever.items()
            }
            others = as_many_others(recovered, collapsed)
            found['recovered'] = sum(int(mask.sum()) for mask in recovered.values())
            found['gamma_recovered'] = median_gamma(work_dir, recovered)
            found['gamma_others'] = median_gamma(work_dir, others)
            changes['without_recovered'] = (take_away, recovered)
            changes['without_others'] = (take_away, others)
        aps = in_process(
            aps_changed,
            config=config,
            options=options,
            checkpoint=last_checkpoint(work_dir),
            work_dir=work_dir / 'changed',
            changes=list(changes.values()),
        )
        remove_checkpoints(work_dir)
        return [{**found, **dict(zip(changes, aps)), 'scores': scores_of(work_dir)}]


def median_gamma(work_dir: Path, masks: Mapping[str, np.ndarray]) -> float | None:
    """Of |gamma| of some filters at the end of a run."""
    record = find_record(work_dir)
    layers = read_records(record).header['layers']
    chosen = np.concatenate(
        [masks.get(layer['name'], np.zeros(layer['channels'], bool)) for layer in layers]
    )
    snapshots = find_snapshots(record.parent)
    gamma, _ = read_snapshot(snapshots[max(snapshots)], len(chosen))
    return float(np.median(np.abs(gamma[chosen]))) if chosen.any() else None


def aps_changed(
    config: Path, options: dict, checkpoint: Path, work_dir: Path, changes: list[tuple]
) -> list[float]:
    """AP of a checkpoint's detector after each of some changes: the function, and its filters."""
    torch.set_num_threads(1)
    cfg = read_config(config)
    cfg.merge_from_dict({**options, 'load_from': None, 'custom_hooks': []})
    cfg.work_dir = str(work_dir)
    state = read_content(checkpoint)['state_dict']
    found = []
    with redirect_stdout(io.StringIO()):
        runner = Runner.from_cfg(cfg)
        for change, masks in changes:
            runner.model.load_state_dict(state)
            change(runner.model.state_dict(), masks)
            found.append(runner.test().get('coco/bbox_mAP', 0.0))
    return found


def main() -> None:
    """Pretrain, finetune, test, write."""
    experiment = Experiment('finetuning', __doc__, [*OPTIONS, IMAGES, ('--seeds', '3', 'of each')])
    if not Path(experiment.args.images, 'annotations/train.json').is_file():
        print(f'finetuning: {experiment.args.images} has no annotations/train.json: skipped')
        return
    finetuning = Finetuning(experiment)
    experiment.run([{'detector': DETECTOR}], finetuning.detection.pretrain)
    arms = [RECOVERY] if experiment.quick else list(COLOURS)
    seeds = 1 if experiment.quick else int(experiment.args.seeds)
    settings = [dict(arm=arm, seed=seed) for seed in range(seeds) for arm in arms]
    runs = experiment.run(settings, finetuning.run, int(experiment.args.jobs))
    rows = [{**setting, **found} for setting, (found,) in runs]
    cells, contrasts = compare(rows)
    names = (
        'arm',
        'seed',
        'AP',
        'AP50',
        'collapsed_first',
        'collapsed',
        'trapped',
        'new',
        'revived',
    )
    extra = ('pruned', 'recovered', 'without_recovered', 'without_others')
    gammas = ('gamma_recovered', 'gamma_others')
    experiment.write(
        cells=table(cells),
        contrasts=table(contrasts),
        runs=table([{key: row.get(key) for key in (*names, *extra, *gammas)} for row in rows]),
        scores=table(
            [{'arm': r['arm'], 'seed': r['seed'], **score} for r in rows for score in r['scores']]
        ),
    )
    experiment.save(draw(rows))
    experiment.tell(as_markdown(cells, contrasts))


def compare(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The arms' means, and their contrasts."""
    cells, scores = [], {}
    for arm in dict.fromkeys(row['arm'] for row in rows):
        mine = [row for row in rows if row['arm'] == arm]
        cell, scores[arm] = cell_of(mine, 'AP', ('collapsed', 'trapped', 'new', 'recovered'))
        pruning = max(abs(row['AP'] - row['pruned']) for row in mine)
        cells.append({'arm': arm, **cell, 'pruning': pruning})
    for less in ('without_recovered', 'without_others'):
        scores[less] = {row['seed']: row[less] for row in rows if less in row}
    return cells, contrasts_of(scores, CONTRASTS)


def as_markdown(cells: list[dict], contrasts: list[dict]) -> str:
    """The tables of the page."""
    first = markdown_table(
        ['', 'seeds', 'AP', 'collapsed', 'trapped', 'recovered', 'pruning changes, at most'],
        [
            [c['arm'], c['seeds'], f'{c["AP"]:.3f}']
            + [f'{c[name]:.0f}' for name in ('collapsed', 'trapped', 'recovered')]
            + [f'{c["pruning"]:.3f}']
            for c in cells
        ],
    )
    return first + '\n' + contrasts_table(contrasts, 'AP')


def draw(rows: list[dict]) -> Figure:
    """AP of each run over the epochs, and of the filters what is collapsed at its end."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for row in rows:
        colour = COLOURS[row['arm']]
        epochs = [score['epoch'] for score in row['scores']]
        label = row['arm'] if row['seed'] == 0 else None
        left.plot(epochs, [s['AP'] for s in row['scores']], color=colour, lw=1, label=label)
        right.plot(row['trapped'], row['AP'], 'o', color=colour, ms=5)
    left.set_xlabel('epoch')
    left.set_ylabel('COCO AP, one line for each run')
    right.set_xlabel('trapped filters at the end')
    right.set_ylabel('COCO AP at the end')
    for ax in (left, right):
        ax.grid(alpha=0.3, lw=0.5)
    left.legend()
    figure.suptitle('Faster R-CNN, finetuned on photographs of blood cells until AP stands still')
    return figure


if __name__ == '__main__':
    main()
