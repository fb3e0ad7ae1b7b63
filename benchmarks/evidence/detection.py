"""Detectors with closed filters, finetuned on photographs: what psBN, recovery and revival do.

Faster R-CNN and RetinaNet (ResNet-18, FPN) are pretrained with BN on the synthetic data until
filters collapse, then finetuned on photographs of blood cells, with the backbone's BN statistics
frozen (norm_eval) or not, at the baseline's learning rate and at 4x that.
"""

from __future__ import annotations

from detectors import (
    LEARNING_RATES,
    OPTIONS,
    Arm,
    config_of,
    finetuning_options,
    photographs,
    pretrain,
    slug,
    train_arm,
)
from study import IMAGES, Study, group_by, markdown_table, table

# What the forecast advised for norm_decay_mult at 4x the learning rate.
DECAY = {'faster-rcnn': 160, 'retinanet': 250}
DETECTORS = {'faster-rcnn': 'Faster R-CNN', 'retinanet': 'RetinaNet'}
ARMS = {
    'BN': Arm(),
    'psBN': Arm('psBN'),
    'psBN, recovery': Arm('psBN', recovery=100),
    'psBN, decay': Arm('psBN'),
    'psBN, revived': Arm('psBN'),
}
OTHERS = list(ARMS)[1:]
STUDY = Study(
    'detection',
    __doc__,
    [*OPTIONS, IMAGES],
    arms=list(ARMS),
    factors=('setting',),
    contrasts={f'{arm} over BN': (arm, 'BN') for arm in OTHERS},
    counts=dict.fromkeys(('collapsed_first', 'collapsed', 'trapped', 'new', 'revived'), ''),
)
SEEDS = 3


def finetune(detector: str, arm: str, norm_eval: bool, times: int, seed: int) -> list[dict]:
    """Finetune on the photographs."""
    own = ARMS[arm]
    if arm == 'psBN, decay':
        own = own._replace(gamma=DECAY[detector] * 4 / times, beta=DECAY[detector] * 4 / times)
    options = finetuning_options(
        STUDY, detector, norm_eval, times, seed, revived=arm == 'psBN, revived'
    )
    work_dir = STUDY.folder / slug(detector, arm, norm_eval, times, seed)
    return [train_arm(work_dir, config_of(f'{detector}_r18_fpn_photographs'), own, options)]


def name_of(row: dict) -> str:
    """A setting in words."""
    statistics = 'frozen' if row['norm_eval'] else 'batch'
    return f'{DETECTORS[row["detector"]]}, {statistics}, x {row["times"]}'


def with_settings(records: list[dict]) -> list[dict]:
    """Records with their settings in words, in the order of the tables."""
    ordered = sorted(records, key=lambda row: (row['detector'], not row['norm_eval'], row['times']))
    return [{'setting': name_of(row), **row} for row in ordered]


def pivot(cells: list[dict], contrasts: list[dict]) -> str:
    """AP, and filters at the end, with a row for each setting and a column for each arm."""
    found = {contrast['contrast']: contrast for contrast in contrasts}
    scores, counts = [], []
    for (setting,), rows in group_by(cells, 'setting').items():
        scores.append([setting, f'{rows[0]["AP"]:.3f}'])
        for arm in OTHERS:
            c = found[f'{setting}: {arm} over BN']
            text = f'{c["mean"]:+.3f}'
            if c['low'] is not None:
                text += f' [{c["low"]:.3f}, {c["high"]:.3f}]'
            scores[-1].append(f'**{text}**' if c['verdict'] in ('higher', 'lower') else text)
        means = [row[kind] for kind in ('trapped', 'collapsed') for row in rows]
        counts.append([setting, *(f'{mean:.1f}'.removesuffix('.0') for mean in means)])
    first, names = 'detector, BN statistics, lr', [arm.replace('psBN, ', '') for arm in OTHERS]
    heads = [first, 'trapped: BN', *names, 'collapsed: BN', *names]
    differences = [f'{name} - BN' for name in names]
    return (
        markdown_table([first, 'AP of BN', *differences], scores)
        + '\n'
        + markdown_table(heads, counts)
    )


def main() -> None:
    """Pretrain, finetune, write."""
    STUDY.start()
    if photographs(STUDY) is None:
        return
    jobs, quick = int(STUDY.args.jobs), STUDY.quick
    detectors = ['retinanet'] if quick else list(LEARNING_RATES)
    pretrained = STUDY.run(
        [{'detector': name} for name in detectors], lambda detector: pretrain(STUDY, detector), jobs
    )
    settings = [
        dict(detector=detector, arm=arm, norm_eval=norm_eval, times=times, seed=seed)
        for seed in range(1 if quick else SEEDS)
        for times in ((1,) if quick else (1, 4))
        for norm_eval in ((True,) if quick else (True, False))
        for detector in detectors
        for arm in ARMS
    ]
    records = STUDY.run(settings, finetune, jobs)
    STUDY.finish(with_settings(records), tell=pivot, pretrained=table(pretrained))


if __name__ == '__main__':
    main()
