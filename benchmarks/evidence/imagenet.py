"""Finetuning from ImageNet weights, as MMDetection's users do.

MMDetection's SSDLite with public MobileNetV2 weights, on photographs of blood cells at 320 px: BN,
psBN and psBN with recovery at the baseline's learning rate and at 4x that, with the statistics of
ImageNet in the backbone (norm_eval) or those of the batch. Controls at the larger rate: BN whose
new layers, those of neck and head, start at b = 0.1 as psBN's do; and psBN without the filters that
collapse with BN, which are taken away from the first step on. The weights are those of networks.py,
which says where to get them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from detectors import (
    QUICK,
    Arm,
    config_of,
    filters_of,
    is_finished,
    photographs,
    slug,
    train_arm,
)
from matplotlib.figure import Figure
from mmdet.models.backbones import MobileNetV2
from study import IMAGES, JOBS, PACKAGES, SEEDS, Study, group_by, lines, mean_of, rows_of, table

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.records import read_records, stage_of
from psbn_mmdet.report import find_record

WEIGHTS = 'mobilenet_v2-b0353104.pth'
BASE = config_of('ssdlite_mobilenetv2_photographs')
LEARNING_RATE = 0.015 * 8 / 192  # the baseline's, for 8 images
RECOVERY = 'psBN, recovery'
CONTROL = 'BN, starts at 0.1'
WITHOUT = 'psBN, without them'
ARMS = {
    'BN': Arm('BN'),
    'psBN': Arm('psBN'),
    RECOVERY: Arm('psBN', recovery=100),
    CONTROL: Arm('BN', start=0.1, loaded='backbone.'),
    WITHOUT: Arm('psBN'),
}
IN_ALL = ('BN', 'psBN', RECOVERY)  # settings
STUDY = Study(
    'imagenet',
    __doc__,
    [JOBS, SEEDS, PACKAGES, IMAGES],
    arms=list(ARMS),
    factors=('setting',),
    counts={
        'collapsed_first': 'collapsed at the start',
        'collapsed': 'collapsed',
        'trapped': 'trapped',
    },
    contrasts={
        'psBN over BN': ('psBN', 'BN'),
        'psBN with recovery over BN': (RECOVERY, 'BN'),
        'the start alone: BN that starts at 0.1 over BN': (CONTROL, 'BN'),
        'psBN with recovery over BN that starts at 0.1': (RECOVERY, CONTROL),
        'what the filters are worth: psBN over psBN without them': ('psBN', WITHOUT),
    },
)


def as_backbone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Torchvision's weights under the names of MMDetection's MobileNetV2, in the same order.

    Raises:
        ValueError: If they are of another network.
    """
    features = [value for key, value in weights.items() if key.startswith('features.')]
    own = MobileNetV2().state_dict()
    names = [name for name in own if not name.endswith('num_batches_tracked')]
    features = [value for value in features if value.dim()]
    if [value.shape for value in features] != [own[name].shape for name in names]:
        raise ValueError('the weights are not those of a MobileNetV2')
    return dict(zip(names, features))


def options_of(times: int, norm_eval: bool, seed: int) -> dict[str, object]:
    """The options of a finetuning."""
    quick = {**QUICK, 'train_dataloader.batch_size': 4} if STUDY.quick else {}
    data = {**(photographs(STUDY) or {}), **quick}
    return {  # of the data set within the one that repeats it
        key.replace('train_dataloader.dataset', 'train_dataloader.dataset.dataset'): value
        for key, value in data.items()
    } | {
        'model.backbone.init_cfg.checkpoint': STUDY.folder / 'mobilenet_v2.pth',
        'model.backbone.norm_eval': norm_eval,
        'optim_wrapper.optimizer.lr': LEARNING_RATE * times,
        'randomness.seed': seed,
    }


def run(arm: str, times: int, norm_eval: bool, seed: int) -> list[dict]:
    """Finetune."""
    lost = None
    if arm == WITHOUT:
        bn = STUDY.folder / slug('BN', times, norm_eval, seed)
        if not is_finished(bn):  # in this work dir, which has its record
            run('BN', times, norm_eval, seed)
        masks = filters_of(bn, 'collapsed')
        lost = {layer: np.flatnonzero(mask).tolist() for layer, mask in masks.items()}
    work_dir = STUDY.folder / slug(arm, times, norm_eval, seed)
    found = train_arm(work_dir, BASE, ARMS[arm], options_of(times, norm_eval, seed), lost=lost)
    return [{**found, 'course': course(work_dir)}]


def course(work_dir: Path) -> list[dict]:
    """Collapsed filters by stage in each report."""
    records = read_records(find_record(work_dir))
    rows = []
    for report in records.reports:
        counts: dict[str, int] = {}
        for i, layer in enumerate(records.header['layers']):
            stage = stage_of(layer['name'])
            counts[stage] = counts.get(stage, 0) + report['layers']['collapsed'][i]
        rows += [{'iter': report['iter'], 'stage': k, 'collapsed': n} for k, n in counts.items()]
    return rows


def main() -> None:
    """Finetune, write."""
    STUDY.start()
    found = sorted(Path(STUDY.args.packages).rglob(WEIGHTS))
    if not STUDY.args.finished:
        if not found or photographs(STUDY) is None:
            print('imagenet: no weights in --packages, or no photographs in --images: skipped')
            return
        STUDY.folder.mkdir(exist_ok=True)
        weights = as_backbone(read_weights(found[0]).state_dict)
        torch.save({'state_dict': weights}, STUDY.folder / 'mobilenet_v2.pth')
    quick = STUDY.quick
    settings = [
        dict(arm=arm, times=times, norm_eval=norm_eval, seed=seed)
        for seed in range(1 if quick else int(STUDY.args.seeds))
        for times in ((4,) if quick else (1, 4))
        for norm_eval in ((True,) if quick else (False, True))
        for arm in ([RECOVERY] if quick else IN_ALL if times == 1 else (*IN_ALL, CONTROL))
    ]
    jobs = int(STUDY.args.jobs)
    records = STUDY.run(settings, run, jobs)
    without = [{**s, 'arm': WITHOUT} for s in settings if s['times'] == 4 and s['arm'] == 'BN']
    records += STUDY.run(without, run, jobs)  # after those that they are like
    courses = [
        {**{key: row[key] for key in settings[0]}, **step}
        for row in records
        for step in row['course']
    ]
    records = with_settings(records)
    cells, contrasts = compare(records)
    result = {'cells': table(cells), 'contrasts': table(contrasts), 'runs': table(records)}
    result['courses'] = table(courses)
    STUDY.publish(result, STUDY.tables(cells, contrasts), draw(result))


def name_of(times: int, norm_eval: bool) -> str:
    """A setting in words."""
    return f'lr x {times}, statistics {"of ImageNet" if norm_eval else "of the batch"}'


def with_settings(records: list[dict]) -> list[dict]:
    """Records with their settings in words."""
    return [{'setting': name_of(row['times'], row['norm_eval']), **row} for row in records]


def compare(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """The cells and contrasts of each setting, and the contrasts of all settings together.

    There a seed counts once, with its mean, and only if it has BN and both psBN in each setting:
    runs of one seed see the same images in the same order, and are not independent.
    """
    cells, contrasts = STUDY.compare(records)
    whole = [
        rows
        for (_, seed), rows in group_by(records, 'setting', 'seed').items()
        if {row['arm'] for row in rows}.issuperset(IN_ALL)
    ]
    of_seeds = group_by([row for rows in whole for row in rows], 'seed', 'arm')
    most = max((len(rows) for (_, arm), rows in of_seeds.items() if arm == 'BN'), default=0)
    means = [
        {**rows[0], 'setting': 'all settings', 'AP': mean_of([row['AP'] for row in rows])}
        for (seed, arm), rows in of_seeds.items()
        if arm in IN_ALL and len(of_seeds[seed, 'BN']) == most
    ]
    return cells, contrasts + STUDY.compare(means)[1]


def draw(result: dict) -> Figure:
    """Collapsed filters of each stage over the steps, a panel for each setting and arm."""
    courses = group_by(rows_of(result['courses']), 'times', 'norm_eval', 'arm', 'stage', 'iter')
    return lines(
        (
            {
                'panel': f'{arm}\n{name_of(times, norm_eval)}',
                'line': stage,
                'style': '-',
                'x': step,
                'y': mean_of([row['collapsed'] for row in rows]),
            }
            for (times, norm_eval, arm, stage, step), rows in sorted(
                courses.items(), key=lambda item: item[0][:2]
            )
        ),
        columns=4,
    )


if __name__ == '__main__':
    main()
