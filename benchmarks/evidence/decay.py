"""A detector from scratch: what a larger weight decay on gamma and beta does, and by what.

The demo's Faster R-CNN on the drawn data with BN and psBN, with the weight decay of all other
parameters and with 20 times that on both, on gamma alone and on beta alone; and BN whose biases
start at psBN's 0.1. Each run is one of tools/train.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import BLUE, GREY, ORANGE, RED, ROOT, Experiment, mean_ci, table
from detection import OPTIONS, QUICK, drawn_data, outcome, train
from matplotlib.figure import Figure
from mmengine.registry import DefaultScope

from psbn_mmdet.checkpoints.config_model import model_of_config
from psbn_mmdet.collapse import find_norms
from psbn_mmdet.preflight import load_config

SHIFT = 0.1
# The norm, what of it is decayed 20 times as much, and where the bias b starts.
ARMS = {
    'BN': ('bn', '', 0.0),
    'psBN': ('psbn', '', SHIFT),
    'BN, starts at 0.1': ('bn', '', SHIFT),
    'BN x 20': ('bn', 'both', 0.0),
    'psBN x 20': ('psbn', 'both', SHIFT),
    'BN x 20, starts at 0.1': ('bn', 'both', SHIFT),
    'psBN, gamma x 20': ('psbn', 'gamma', SHIFT),
    'psBN, beta x 20': ('psbn', 'beta', SHIFT),
}
SEEDS = 2
TIMES = 20


def config_of(arm: str, folder: Path) -> str:
    """The arm as a config on top of the demo's; what it starts from goes to a folder."""
    norm, decayed, start = ARMS[arm]
    paramwise: dict[str, object] = {'norm_decay_mult': TIMES if decayed in ('both', 'gamma') else 1}
    if decayed in ('gamma', 'beta'):
        paramwise['custom_keys'] = {'beta': {'decay_mult': TIMES if decayed == 'beta' else 1}}
    base = ROOT / f'demo/faster-rcnn_r18_fpn_{norm}_demo.py'
    text = f"""_base_ = {str(base)!r}
custom_hooks = [dict(type='CollapseHook', interval=50)]
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, **{paramwise}))
"""
    if norm == 'bn' and start:
        biases = folder / 'biases.pth'
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = model_of_config(load_config(str(base)))
        state = {
            f'{name}.bias': torch.full_like(n.bias, start) for name, n in find_norms(model).items()
        }
        torch.save({'state_dict': state}, biases)
        text += f'load_from = {str(biases)!r}\n'
    return text


def main() -> None:
    """Train, write."""
    experiment = Experiment('decay', __doc__, OPTIONS)
    drawn = drawn_data(experiment)
    folder = experiment.work_dir.resolve() / 'decay'
    quick = QUICK if experiment.quick else {}

    def run(arm: str, seed: int) -> list[dict]:
        """One run."""
        work_dir = folder / f'{arm.replace(", ", "_").replace(" ", "-")}_{seed}'
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f'{work_dir.name}.py'
        config.write_text(config_of(arm, folder))
        options = {'randomness.seed': seed, 'default_hooks.checkpoint.save_best': None}
        train(config, work_dir, **drawn, **options, **quick)
        for checkpoint in work_dir.glob('*.pth'):
            checkpoint.unlink()
        return [outcome(work_dir)]

    arms = ['BN, starts at 0.1', 'psBN, gamma x 20'] if experiment.quick else list(ARMS)
    seeds = range(1 if experiment.quick else SEEDS)
    settings = [dict(arm=arm, seed=seed) for seed in seeds for arm in arms]
    runs = experiment.run(settings, run, int(experiment.args.jobs))
    rows = [{**setting, **found} for setting, (found,) in runs]
    cells = []
    for arm in arms:
        mine = [row for row in rows if row['arm'] == arm]
        collapsed = float(np.mean([row['collapsed'] for row in mine]))
        mean, low, high = mean_ci([row['AP'] for row in mine])
        cells.append(
            {'arm': arm, 'seeds': len(mine), 'AP': mean, 'low': low, 'high': high}
            | {'collapsed': collapsed}
        )
    experiment.write(cells=table(cells), runs=table(rows))
    experiment.save(draw(cells, rows))


def draw(cells: list[dict], rows: list[dict]) -> Figure:
    """AP of each run by arm, and how many filters are collapsed at its end."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    arms = [cell['arm'] for cell in cells]
    for row in rows:
        y = arms.index(row['arm'])
        colour = RED if row['arm'].startswith('BN') else BLUE
        left.plot(row['AP'], y, 'o', color=colour)
        right.plot(row['collapsed'], y, 'o', color=ORANGE)
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
