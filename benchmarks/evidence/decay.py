"""A detector from scratch: what a larger weight decay on gamma and beta does, and by what.

The demo's Faster R-CNN on the drawn data with BN and psBN, with the weight decay of all other
parameters and with 20 times that on gamma and beta, or on gamma or beta alone; BN whose biases
start at psBN's 0.1 (the start without the mechanism) and psBN whose b starts at BN's 0 (the
mechanism without the start); psBN without the filters that collapse with BN: as many in each layer
are taken away from the first step on, so that the difference is what filters kept alive are worth.
Each run is one of tools/train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from common import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    ROOT,
    Experiment,
    cell_of,
    contrasts_of,
    contrasts_table,
    markdown_table,
    table,
)
from detection import (
    OPTIONS,
    QUICK,
    drawn_data,
    filters_of,
    outcome,
    remove_checkpoints,
    train,
)
from matplotlib.figure import Figure
from mmengine.registry import DefaultScope

from psbn_mmdet.checkpoints.config_model import model_of_config
from psbn_mmdet.collapse import find_norms
from psbn_mmdet.layers import PostShiftedBatchNorm
from psbn_mmdet.preflight import load_config

SHIFT = 0.1
WITHOUT = 'psBN x 20, without them'
MANY, FEW = 5, 2  # seeds: of the arms that answer the question, and of the others


class Arm(NamedTuple):
    """One kind of run: how many times gamma and beta are decayed, and where the bias b starts."""

    norm: str
    gamma: float = 1
    beta: float = 1
    start: float | None = None  # None is the norm's own
    seeds: int = FEW


ARMS = {
    'BN': Arm('bn'),
    'psBN': Arm('psbn'),
    'BN, starts at 0.1': Arm('bn', start=SHIFT),
    'BN x 20': Arm('bn', 20, 20, seeds=MANY),
    'BN x 20, starts at 0.1': Arm('bn', 20, 20, start=SHIFT, seeds=MANY),
    'psBN x 20': Arm('psbn', 20, 20, seeds=MANY),
    'psBN x 20, starts at 0': Arm('psbn', 20, 20, start=0.0, seeds=MANY),
    WITHOUT: Arm('psbn', 20, 20, seeds=MANY),
    'psBN, gamma x 20': Arm('psbn', gamma=20),
    'psBN, beta x 20': Arm('psbn', beta=20),
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
}


def config_of(name: str, folder: Path, lost: dict[str, int] | None = None) -> str:
    """The arm as a config on top of the demo's; what it starts from goes to a folder.

    ``lost`` is how many filters of which layers are taken away.
    """
    arm = ARMS[name]
    base = ROOT / f'demo/faster-rcnn_r18_fpn_{arm.norm}_demo.py'
    paramwise: dict[str, object] = {'norm_decay_mult': arm.gamma}
    if arm.beta != arm.gamma:
        paramwise['custom_keys'] = {'beta': {'decay_mult': arm.beta}}
    text = f"""_base_ = {str(base)!r}
custom_hooks = [dict(type='CollapseHook', interval=50)]
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, **{paramwise}))
"""
    if lost is not None:
        channels = {layer: list(range(count)) for layer, count in lost.items()}
        text += f"""custom_imports = dict(imports=['psbn_mmdet', 'take_away'])
custom_hooks += [dict(type='TakeAwayHook', channels={channels})]
"""
    if arm.start is not None:
        biases = folder / f'{arm.norm}_{arm.start}.pth'
        with DefaultScope.overwrite_default_scope('mmdet'):
            norms = find_norms(model_of_config(load_config(str(base))))
        state = {}
        for layer, norm in norms.items():
            is_psbn = isinstance(norm, PostShiftedBatchNorm)
            own = norm.beta if is_psbn else norm.bias
            torch.nn.init.constant_(own, arm.start - (SHIFT if is_psbn else 0))
            state |= {f'{layer}.{key}': value for key, value in norm.state_dict().items()}
        torch.save({'state_dict': state}, biases)
        text += f'load_from = {str(biases)!r}\n'
    return text


def main() -> None:
    """Train, write."""
    experiment = Experiment('decay', __doc__, OPTIONS)
    drawn = drawn_data(experiment)
    folder = experiment.work_dir.resolve() / 'decay'
    quick = QUICK if experiment.quick else {}

    def folder_of(arm: str, seed: int) -> Path:
        return folder / f'{arm.replace(", ", "_").replace(" ", "-")}_{seed}'

    def run(arm: str, seed: int, lost: dict[str, int] | None = None) -> list[dict]:
        """One run."""
        work_dir = folder_of(arm, seed)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f'{work_dir.name}.py'
        config.write_text(config_of(arm, folder, lost))
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
    without = []
    for setting in settings:
        if setting['arm'] == 'BN x 20':
            lost = filters_of(folder_of(**setting), 'collapsed')
            counts = {layer: int(mask.sum()) for layer, mask in lost.items()}
            without.append({**setting, 'arm': WITHOUT, 'lost': counts})
    runs += experiment.run(without, run, jobs)
    rows = [{'arm': s['arm'], 'seed': s['seed'], **found} for s, (found,) in runs]
    cells, contrasts = compare(rows)
    experiment.write(cells=table(cells), contrasts=table(contrasts), runs=table(rows))
    experiment.save(draw(cells, rows))
    experiment.tell(
        markdown_table(
            ['', 'seeds', 'AP', 'collapsed at the end', 'collapsed on the way', 'revived'],
            [
                [c['arm'], c['seeds'], f'{c["AP"]:.3f}']
                + [f'{c[name]:.0f}' for name in ('collapsed', 'new', 'revived')]
                for c in cells
            ],
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
    pairs = dict(CONTRASTS)
    whole = [cell for cell in cells if cell['arm'] != WITHOUT]
    best = {
        norm: max((c for c in whole if ARMS[c['arm']].norm == norm), key=lambda c: c['AP'])['arm']
        for norm in ('psbn', 'bn')
        if any(ARMS[c['arm']].norm == norm for c in whole)
    }
    if len(best) == 2:
        pairs[f'the best psBN ({best["psbn"]}) over the best BN ({best["bn"]})'] = (
            best['psbn'],
            best['bn'],
        )
    return cells, contrasts_of(scores, pairs)


def draw(cells: list[dict], rows: list[dict]) -> Figure:
    """AP of each run by arm, and how many filters are collapsed at its end."""
    figure = Figure(figsize=(9, 5), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    arms = [cell['arm'] for cell in cells]
    for row in rows:
        y = arms.index(row['arm'])
        colour = RED if row['arm'].startswith('BN') else BLUE
        left.plot(row['AP'], y, 'o', color=colour, ms=4)
        right.plot(row['collapsed'], y, 'o', color=ORANGE, ms=4)
    left.plot([cell['AP'] for cell in cells], range(len(arms)), '|', ms=14, color=GREY)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    left.set_xlabel('AP (one run each; grey: mean)')
    right.set_xlabel('collapsed filters at the end')
    most = max(cells, key=lambda cell: cell['AP'])
    figure.suptitle(f'The best mean AP, {most["AP"]:.3f}, is that of {most["arm"]}')
    for ax in (left, right):
        ax.grid(alpha=0.3, lw=0.5)
    return figure


if __name__ == '__main__':
    main()
