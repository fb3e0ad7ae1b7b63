"""A detector from scratch: what a larger weight decay on gamma and beta does, and by what.

The demo's Faster R-CNN on the drawn data with BN, psBN and psBN with recovery, with the weight
decay of all other parameters on gamma and beta, or with 0, 5, 20 and 50 times that: the map. And at
20 times, what it comes from: gamma or beta alone decayed so; BN whose biases start at psBN's 0.1
(the start without the mechanism) and psBN whose b starts at BN's 0 (the mechanism without the
start); psBN without the filters that collapse with BN: as many in each layer are taken away from
the first step on, so that the difference is what filters kept alive are worth. Each run is one of
tools/train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from common import (
    BLUE,
    ORANGE,
    RED,
    ROOT,
    Experiment,
    best_pair,
    cell_of,
    cells_table,
    contrasts_of,
    contrasts_table,
    plot_arms,
    read_config,
    table,
)
from detection import (
    OPTIONS,
    QUICK,
    biases_at,
    drawn_data,
    filters_of,
    is_finished,
    outcome,
    parts_with_norms,
    remove_checkpoints,
    train,
)
from matplotlib.figure import Figure

SHIFT = 0.1
DEMO = ROOT / 'demo/faster-rcnn_r18_fpn_bn_demo.py'
WITHOUT = 'psBN x 20, without them'
MANY, SOME, FEW = 5, 3, 2  # seeds: at 20 times, of the map, and of single controls


class Arm(NamedTuple):
    """One kind of run: how many times gamma and beta are decayed, and where the bias b starts."""

    norm: str
    gamma: float = 1
    beta: float = 1
    start: float | None = None  # None is the norm's own
    seeds: int = FEW
    recovery: bool = False


ARMS = {
    'BN': Arm('bn', seeds=SOME),
    'psBN': Arm('psbn', seeds=SOME),
    'BN, starts at 0.1': Arm('bn', start=SHIFT),
    'BN x 20': Arm('bn', 20, 20, seeds=MANY),
    'BN x 20, starts at 0.1': Arm('bn', 20, 20, start=SHIFT, seeds=MANY),
    'psBN x 20': Arm('psbn', 20, 20, seeds=MANY),
    'psBN x 20, starts at 0': Arm('psbn', 20, 20, start=0.0, seeds=MANY),
    WITHOUT: Arm('psbn', 20, 20, seeds=MANY),
    'psBN, gamma x 20': Arm('psbn', gamma=20),
    'psBN, beta x 20': Arm('psbn', beta=20),
    'BN x 0': Arm('bn', 0, 0),
    'psBN x 0': Arm('psbn', 0, 0),
    'BN x 5': Arm('bn', 5, 5, seeds=SOME),
    'psBN x 5': Arm('psbn', 5, 5, seeds=SOME),
    'psBN x 5, recovery': Arm('psbn', 5, 5, seeds=SOME, recovery=True),
    'psBN x 20, recovery': Arm('psbn', 20, 20, seeds=SOME, recovery=True),
    'BN x 50': Arm('bn', 50, 50, seeds=SOME),
    'psBN x 50': Arm('psbn', 50, 50, seeds=SOME),
    'psBN x 50, recovery': Arm('psbn', 50, 50, seeds=SOME, recovery=True),
}
CONTRASTS = {
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
}

DECAYS = (0, 1, 5, 20, 50)
LINES = {
    'BN': ('bn', False, RED),
    'psBN': ('psbn', False, BLUE),
    'psBN, recovery': ('psbn', True, ORANGE),
}


def write_config(
    file: Path, name: str, lost: dict[str, int] | None = None, base: Path = DEMO, more: str = ''
) -> None:
    """Write an arm as a config on top of one with BN, and beside it what it starts from.

    Args:
        file (Path): The config.
        name (str): The arm.
        lost (dict[str, int] | None): How many filters of which layers are taken away.
        base (Path): Its optimiser is replaced by the demo's. Defaults to the demo.
        more (str): Lines of the config that follow the base's. Defaults to none.
    """
    arm = ARMS[name]
    paramwise: dict[str, object] = {'norm_decay_mult': arm.gamma}
    if arm.beta != arm.gamma:
        paramwise['custom_keys'] = {name: {'decay_mult': arm.beta} for name in biases_at(base, 0)}
    optimizer = {**read_config(DEMO).optim_wrapper.to_dict(), 'paramwise_cfg': paramwise}
    text = f"""_base_ = {str(base)!r}
{more}custom_hooks = [dict(type='CollapseHook', interval=50)]
optim_wrapper = dict(_delete_=True, **{optimizer})
"""
    if arm.norm == 'psbn':
        norm = dict(norm_cfg=dict(type='psBN'))
        text += f'model = dict(**{dict.fromkeys(parts_with_norms(base), norm)})\n'
    if arm.recovery:
        text += "custom_hooks += [dict(type='RecoveryHook', steps=300)]\n"
    if lost is not None:
        channels = {layer: list(range(count)) for layer, count in lost.items()}
        text += f"""custom_imports = dict(imports=['psbn_mmdet', 'take_away'])
custom_hooks += [dict(type='TakeAwayHook', channels={channels})]
"""
    if arm.start is not None:
        biases = file.with_suffix('.pth')
        torch.save({'state_dict': biases_at(base, arm.start)}, biases)
        text += f'load_from = {str(biases)!r}\n'
    file.write_text(text)


def main() -> None:
    """Train, write."""
    experiment = Experiment('decay', __doc__, OPTIONS)
    drawn = drawn_data(experiment)
    folder = experiment.work_dir.resolve() / 'decay'
    quick = QUICK if experiment.quick else {}

    def folder_of(arm: str, seed: int) -> Path:
        return folder / f'{arm.replace(", ", "_").replace(" ", "-")}_{seed}'

    def run(arm: str, seed: int) -> list[dict]:
        """One run."""
        work_dir = folder_of(arm, seed)
        lost = None
        if arm == WITHOUT:
            bn = folder_of('BN x 20', seed)
            if not is_finished(bn):  # in this work dir, which has its record
                run('BN x 20', seed)
            masks = filters_of(bn, 'collapsed')
            lost = {layer: int(mask.sum()) for layer, mask in masks.items()}
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f'{work_dir.name}.py'
        write_config(config, arm, lost)
        options = {'randomness.seed': seed, 'default_hooks.checkpoint.save_best': None}
        train(config, work_dir, **drawn, **options, **quick)
        remove_checkpoints(work_dir)
        return [outcome(work_dir)]

    arms = [arm for arm in ARMS if arm != WITHOUT]
    if experiment.quick:
        arms = ['BN x 20', 'psBN x 20']
    most = 1 if experiment.quick else MANY
    settings = [
        dict(arm=arm, seed=seed) for seed in range(most) for arm in arms if seed < ARMS[arm].seeds
    ]
    settings.sort(key=lambda setting: -ARMS[setting['arm']].seeds)  # what answers it first
    jobs = int(experiment.args.jobs)
    runs = experiment.run(settings, run, jobs)
    without = [{**s, 'arm': WITHOUT} for s in settings if s['arm'] == 'BN x 20']
    runs += experiment.run(without, run, jobs)  # after those that they are like
    rows = [{**setting, **found} for setting, (found,) in runs]
    cells, contrasts = compare(rows)
    experiment.write(cells=table(cells), contrasts=table(contrasts), runs=table(rows))
    experiment.save(draw(cells, rows))
    experiment.tell(
        cells_table(
            cells,
            ['arm'],
            {
                'collapsed': 'collapsed at the end',
                'new': 'collapsed on the way',
                'revived': 'revived',
            },
        )
        + '\n'
        + contrasts_table(contrasts, 'AP')
    )


def compare(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The arms' means, and the contrasts, with the best of psBN over the best of BN at last."""
    cells, scores = [], {}
    for arm in dict.fromkeys(row['arm'] for row in rows):
        mine = [row for row in rows if row['arm'] == arm]
        cell, scores[arm] = cell_of(mine, 'AP', ('collapsed', 'new', 'revived'))
        cells.append({'arm': arm, **cell})
    whole = {cell['arm']: cell['AP'] for cell in cells if cell['arm'] != WITHOUT}
    return cells, contrasts_of(scores, CONTRASTS | best_pair(whole))


def draw(cells: list[dict], rows: list[dict]) -> Figure:
    """AP and collapsed filters over the decay, and AP of the arms at 20 times."""
    figure = Figure(figsize=(13, 4.5), layout='constrained')
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    by_arm = {cell['arm']: cell for cell in cells}
    for label, (norm, recovery, colour) in LINES.items():
        on_line = {
            arm.gamma: name
            for name, arm in ARMS.items()
            if name in by_arm and name != WITHOUT and arm.gamma == arm.beta and arm.start is None
            if (arm.norm, arm.recovery) == (norm, recovery)
        }
        names = [on_line[times] for times in sorted(on_line)]
        x = [DECAYS.index(times) for times in sorted(on_line)]
        for ax, column in ((left, 'AP'), (middle, 'collapsed')):
            ax.plot(x, [by_arm[name][column] for name in names], color=colour, label=label)
            for at, name in zip(x, names):
                found = [row[column] for row in rows if row['arm'] == name]
                ax.plot([at] * len(found), found, 'o', color=colour, ms=4, alpha=0.6)
    for ax, label in ((left, 'AP'), (middle, 'collapsed filters at the end')):
        ax.set_xticks(range(len(DECAYS)), DECAYS)
        ax.set_xlabel('decay of gamma and beta, times')
        ax.set_ylabel(label)
    left.legend()
    controls = [name for name in by_arm if 20 in (ARMS[name].gamma, ARMS[name].beta)]
    plot_arms(right, {arm: [row['AP'] for row in rows if row['arm'] == arm] for arm in controls})
    right.invert_yaxis()
    right.set_xlabel('AP (dots: runs; bars: their mean)')
    most = max(cells, key=lambda cell: cell['AP'])
    figure.suptitle(f'The best mean AP, {most["AP"]:.3f}, is that of {most["arm"]}')
    for ax in (left, middle, right):
        ax.grid(alpha=0.3, lw=0.5)
    return figure


if __name__ == '__main__':
    main()
