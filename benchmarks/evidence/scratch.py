"""From scratch with other detectors and data than decay.py's: BN, psBN and BN with psBN's start.

Faster R-CNN on photographs of blood cells, RetinaNet on the synthetic data and on the photographs,
with the demo's optimiser and as many steps, RetinaNet, which learns later, also with three times as
many: with the weight decay of all other parameters on gamma and beta, and with 20 times that.
"""

from __future__ import annotations

from detectors import (
    DEMO,
    OPTIONS,
    Arm,
    config_of,
    drawn_data,
    photographs,
    quick,
    read_config,
    slug,
    train_arm,
)
from study import IMAGES, SEEDS, Study

TASKS = {  # a config, and epochs; an epoch has 90 steps of synthetic images, 52 of photographs
    'Faster R-CNN, photographs': ('faster-rcnn_r18_fpn_photographs', 28),
    'RetinaNet, drawn data': ('retinanet_r18_fpn_drawn', 16),
    'RetinaNet, drawn data, steps x 3': ('retinanet_r18_fpn_drawn', 48),
    'RetinaNet, photographs, steps x 3': ('retinanet_r18_fpn_photographs', 84),
}
ARMS = {
    'BN': Arm('BN'),
    'BN, starts at 0.1': Arm('BN', start=0.1),
    'psBN': Arm('psBN'),
    'BN x 20': Arm('BN', 20, 20),
    'BN x 20, starts at 0.1': Arm('BN', 20, 20, start=0.1),
    'psBN x 20': Arm('psBN', 20, 20),
    'psBN x 20, recovery': Arm('psBN', 20, 20, recovery=300),
}
STUDY = Study(
    'scratch',
    __doc__,
    [*OPTIONS, IMAGES, SEEDS],
    arms=list(ARMS),
    factors=('task',),
    best=list(ARMS),
    counts={'collapsed': 'collapsed', 'trapped': 'trapped', 'revived': 'revived'},
    contrasts={
        'psBN over BN': ('psBN', 'BN'),
        'the start alone: BN that starts at 0.1 over BN': ('BN, starts at 0.1', 'BN'),
        'psBN x 20 over BN x 20': ('psBN x 20', 'BN x 20'),
        'psBN x 20 with recovery over BN x 20': ('psBN x 20, recovery', 'BN x 20'),
        'the start alone: BN x 20 that starts at 0.1 over BN x 20': (
            'BN x 20, starts at 0.1',
            'BN x 20',
        ),
        'psBN x 20 over BN x 20 that starts at 0.1': ('psBN x 20', 'BN x 20, starts at 0.1'),
    },
)


def schedule(epochs: int) -> str:
    """The demo's schedule over that time, as lines of a config."""
    return f"""
load_from = None
train_cfg = dict(max_epochs={epochs}, val_interval={epochs // 4})
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max={epochs}, eta_min=0, convert_to_iter_based=True),
]
"""


def run(task: str, arm: str, seed: int) -> list[dict]:
    """One run."""
    name, epochs = TASKS[task]
    data = drawn_data(STUDY) if 'drawn' in task else photographs(STUDY)
    return [
        train_arm(
            STUDY.folder / slug(task, arm, seed),
            config_of(name),
            ARMS[arm],
            {**(data or {}), 'randomness.seed': seed, **quick(STUDY)},
            optimizer=read_config(DEMO).optim_wrapper.to_dict(),
            lines=schedule(epochs),
        )
    ]


def main() -> None:
    """Train, write."""
    STUDY.start()
    if photographs(STUDY) is None:
        return
    drawn_data(STUDY)
    settings = [
        dict(task=task, arm=arm, seed=seed)
        for task in (list(TASKS)[-1:] if STUDY.quick else TASKS)
        for seed in range(1 if STUDY.quick else int(STUDY.args.seeds))
        for arm in (['BN x 20, starts at 0.1', 'psBN x 20'] if STUDY.quick else ARMS)
    ]
    STUDY.finish(STUDY.run(settings, run, int(STUDY.args.jobs)))


if __name__ == '__main__':
    main()
