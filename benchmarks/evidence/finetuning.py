"""Finetuning to the end: what psBN and recovery are worth once AP no longer rises.

The Faster R-CNN of detection.py with its closed filters, finetuned on the photographs of blood
cells for 12x as many steps, at 4x the baseline's learning rate and with batch statistics, where
most filters collapse. At the end the filters that RecoveryHook has opened are taken away, or as
many others of their layers, and the collapsed ones are pruned exactly.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from detectors import (
    OPTIONS,
    Arm,
    config_of,
    filters_of,
    finetuning_options,
    last_checkpoint,
    outcome,
    photographs,
    pretrain,
    read_config,
    remove_checkpoints,
    scores_of,
    slug,
    train,
    write_config,
)
from matplotlib.figure import Figure
from mmengine.runner import Runner
from study import IMAGES, SEEDS, Study, group_by, in_process, lines, mean_of, rows_of, table
from take_away import as_many_others, make_constant, take_away

from psbn_mmdet.checkpoints import read_content
from psbn_mmdet.records import find_snapshots, read_records, read_snapshot
from psbn_mmdet.report import find_record

DETECTOR = 'faster-rcnn'
RECOVERY = 'psBN, recovery'
ARMS = {'BN': Arm('BN'), 'psBN': Arm('psBN'), RECOVERY: Arm('psBN', recovery=500)}
STUDY = Study(
    'finetuning',
    __doc__,
    [*OPTIONS, IMAGES, SEEDS],
    arms=list(ARMS),
    counts={'collapsed': 'collapsed', 'trapped': 'trapped', 'recovered': 'recovered'},
    largest={'pruning': 'pruning changes, at most'},
    changed=('without_recovered', 'without_others'),
    contrasts={
        'psBN over BN': ('psBN', 'BN'),
        'psBN with recovery over BN': (RECOVERY, 'BN'),
        'psBN with recovery over psBN': (RECOVERY, 'psBN'),
        'whole over without the recovered filters': (RECOVERY, 'without_recovered'),
        'whole over without as many others': (RECOVERY, 'without_others'),
    },
)
LENGTH = {
    'train_cfg.max_epochs': 72,
    'train_cfg.val_interval': 6,
    'param_scheduler.1.milestones': '[48,60]',
}


def run(arm: str, seed: int) -> list[dict]:
    """Finetune, and test without some filters."""
    work_dir = STUDY.folder / slug(arm, seed)
    config = STUDY.folder / f'{work_dir.name}.py'
    STUDY.folder.mkdir(exist_ok=True)
    write_config(config, config_of(f'{DETECTOR}_r18_fpn_photographs'), ARMS[arm])
    options = finetuning_options(STUDY, DETECTOR, norm_eval=False, times=4, seed=seed)
    train(config, work_dir, **{**options, **({} if STUDY.quick else LENGTH)})
    found = outcome(work_dir)
    collapsed = filters_of(work_dir, 'collapsed')
    changes = {'pruned': (make_constant, collapsed)}
    if arm == RECOVERY:
        ever = filters_of(work_dir, 'recovered', ever=True)
        recovered = {
            name: mask & ~collapsed.get(name, np.zeros_like(mask)) for name, mask in ever.items()
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
    STUDY.start()
    if photographs(STUDY) is None:
        return
    STUDY.run([{'detector': DETECTOR}], lambda detector: pretrain(STUDY, detector))
    arms = [RECOVERY] if STUDY.quick else list(ARMS)
    seeds = 1 if STUDY.quick else int(STUDY.args.seeds)
    settings = [dict(arm=arm, seed=seed) for seed in range(seeds) for arm in arms]
    records = STUDY.run(settings, run, int(STUDY.args.jobs))
    scores = [
        {'arm': row['arm'], 'seed': row['seed'], **score}
        for row in records
        for score in row['scores']
    ]
    more = {'scores': table(scores)}
    STUDY.finish(with_pruning(records), figure=draw(more), **more)


def with_pruning(records: list[dict]) -> list[dict]:
    """Records with the change of AP by pruning."""
    return [{**row, 'pruning': abs(row['AP'] - row['pruned'])} for row in records]


def draw(result: dict) -> Figure:
    """AP over the epochs."""
    scores = group_by(rows_of(result['scores']), 'arm', 'epoch')
    return lines(
        {
            'panel': 'AP over epochs (mean, least, most)',
            'line': arm,
            'x': epoch,
            'y': [mean_of(found), min(found), max(found)],
        }
        for (arm, epoch), rows in scores.items()
        for found in [[row['AP'] for row in rows]]
    )


if __name__ == '__main__':
    main()
