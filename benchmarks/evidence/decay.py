"""A detector from scratch: what a larger weight decay on gamma and beta does, and by what.

The demo's Faster R-CNN on the synthetic data with BN, psBN and psBN with recovery, with the weight
decay of all other parameters on gamma and beta, or with 0, 5, 20 and 50 times that. And at 20
times, what it comes from: gamma or beta alone decayed so; BN whose biases start at psBN's 0.1 (the
start without the mechanism) and psBN whose b starts at BN's 0 (the mechanism without the start);
psBN without the filters that collapse with BN: as many in each layer are taken away from the first
step on, so that the difference is what filters kept alive are worth.
"""

from __future__ import annotations

from detectors import (
    DEMO,
    OPTIONS,
    Arm,
    drawn_data,
    filters_of,
    is_finished,
    quick,
    read_config,
    slug,
    train_arm,
)
from study import Study

WITHOUT = 'psBN x 20, without them'
OF_5_SEEDS = {
    'BN x 20': Arm('BN', 20, 20),
    'BN x 20, starts at 0.1': Arm('BN', 20, 20, start=0.1),
    'psBN x 20': Arm('psBN', 20, 20),
    'psBN x 20, starts at 0': Arm('psBN', 20, 20, start=0.0),
}
OF_3_SEEDS = {
    'BN': Arm('BN'),
    'psBN': Arm('psBN'),
    'BN x 5': Arm('BN', 5, 5),
    'psBN x 5': Arm('psBN', 5, 5),
    'psBN x 5, recovery': Arm('psBN', 5, 5, recovery=300),
    'psBN x 20, recovery': Arm('psBN', 20, 20, recovery=300),
    'BN x 50': Arm('BN', 50, 50),
    'psBN x 50': Arm('psBN', 50, 50),
    'psBN x 50, recovery': Arm('psBN', 50, 50, recovery=300),
}
OF_2_SEEDS = {
    'BN, starts at 0.1': Arm('BN', start=0.1),
    'psBN, gamma x 20': Arm('psBN', gamma=20),
    'psBN, beta x 20': Arm('psBN', beta=20),
    'BN x 0': Arm('BN', 0, 0),
    'psBN x 0': Arm('psBN', 0, 0),
}
ARMS = {**OF_5_SEEDS, **OF_3_SEEDS, **OF_2_SEEDS, WITHOUT: Arm('psBN', 20, 20)}
STUDY = Study(
    'decay',
    __doc__,
    OPTIONS,
    arms=list(ARMS),
    best=[arm for arm in ARMS if arm != WITHOUT],
    counts={
        'collapsed': 'collapsed at the end',
        'new': 'collapsed on the way',
        'revived': 'revived',
    },
    contrasts={
        'psBN x 20 over BN x 20': ('psBN x 20', 'BN x 20'),
        'the start alone: BN that starts at 0.1 over BN': ('BN x 20, starts at 0.1', 'BN x 20'),
        'the mechanism alone: psBN that starts at 0 over BN': ('psBN x 20, starts at 0', 'BN x 20'),
        'the mechanism given the start: psBN over BN that starts at 0.1': (
            'psBN x 20',
            'BN x 20, starts at 0.1',
        ),
        'what the filters are worth: psBN over psBN without them': ('psBN x 20', WITHOUT),
        'recovery: psBN x 20 with it over psBN x 20': ('psBN x 20, recovery', 'psBN x 20'),
        'psBN x 0 over BN x 0': ('psBN x 0', 'BN x 0'),
        'psBN x 1 over BN x 1': ('psBN', 'BN'),
        'psBN x 5 over BN x 5': ('psBN x 5', 'BN x 5'),
        'psBN x 50 over BN x 50': ('psBN x 50', 'BN x 50'),
        'recovery: psBN x 50 with it over psBN x 50': ('psBN x 50, recovery', 'psBN x 50'),
        'what most filters are worth: BN x 50 over BN x 1': ('BN x 50', 'BN'),
    },
)


def run(arm: str, seed: int) -> list[dict]:
    """One run."""
    lost = None
    if arm == WITHOUT:
        bn = STUDY.folder / slug('BN x 20', seed)
        if not is_finished(bn):  # in this work dir, which has its record
            run('BN x 20', seed)
        masks = filters_of(bn, 'collapsed')
        lost = {layer: list(range(mask.sum())) for layer, mask in masks.items()}
    options = {**drawn_data(STUDY), 'randomness.seed': seed, **quick(STUDY)}
    optimizer = read_config(DEMO).optim_wrapper.to_dict()
    work_dir = STUDY.folder / slug(arm, seed)
    return [train_arm(work_dir, DEMO, ARMS[arm], options, optimizer, lost)]


def main() -> None:
    """Train, write."""
    STUDY.start()
    drawn_data(STUDY)
    seeds = {5: OF_5_SEEDS, 3: OF_3_SEEDS, 2: OF_2_SEEDS}
    if STUDY.quick:
        seeds = {1: ('BN x 20', 'psBN x 20')}
    jobs = int(STUDY.args.jobs)
    settings = [
        dict(arm=arm, seed=seed) for n, arms in seeds.items() for seed in range(n) for arm in arms
    ]
    records = STUDY.run(settings, run, jobs)
    # After those that they are like.
    without = [dict(arm=WITHOUT, seed=row['seed']) for row in records if row['arm'] == 'BN x 20']
    STUDY.finish(records + STUDY.run(without, run, jobs))


if __name__ == '__main__':
    main()
