"""What psBN and the hooks cost in a training step.

First the time in which psBN's bias is moved for the optimiser, as a share of a step. Then training
steps with and without the CollapseHook, side by side.

Steps of one detector alternate in one process: with the hook, without, with, ... Each pair gives
a ratio. Their median says little where a step's own noise is larger than the hook's cost, so the
time spent inside the hook is taken as well, and given as a share of the step. The same for the
RecoveryHook, without closed filters and with 2 % of them. Then the time of a report against the
number of channels, which must grow linearly.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import now, spread, write  # noqa: E402

from psbn_mmdet.collapse import GradientWatch, census_of_model, find_norms  # noqa: E402
from psbn_mmdet.hooks import CollapseHook, RecoveryHook  # noqa: E402
from psbn_mmdet.layers import decay  # noqa: E402

DETECTORS = {
    'demo': ('demo/faster-rcnn_r18_fpn_psbn_demo.py', (128, 128)),
    'faster-rcnn_r50': ('configs/psbn/faster-rcnn_r50_fpn_psbn_1x_coco.py', (320, 192)),
}
PARTS_OF_RECOVERY = (
    'note_step',
    'exchange_evidence',
    'exchange_gradients',
    'judge',
    'clear_moments',
    'decay',
    'choose',
)


def ready(
    path: str, scale: tuple[int, int], data_root: str, work_dir: str, lr: float | None = None
) -> tuple[Runner, dict]:
    """A Runner of a config of this repository that can make steps, and a batch of drawn images."""
    cfg = Config.fromfile(ROOT / path)
    cfg.work_dir = work_dir
    cfg.model.backbone.init_cfg = None
    cfg.custom_hooks = []
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=0)
    if lr is not None:
        cfg.optim_wrapper.optimizer.lr = lr
    cfg.visualizer.name = Path(work_dir).name  # MMEngine keeps visualizers by name
    classes = ('disc', 'square', 'triangle', 'cross')
    for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        cfg[f'{loader}_dataloader'].update(num_workers=0, persistent_workers=False)
        cfg[f'{loader}_dataloader'].dataset.update(
            data_root=data_root,
            ann_file=f'annotations/{split}.json',
            data_prefix=dict(img=f'{split}/'),
            metainfo=dict(classes=classes),
        )
    cfg.train_dataloader.dataset.pipeline[2].scale = scale
    for evaluator in ('val_evaluator', 'test_evaluator'):
        cfg[evaluator].ann_file = f'{data_root}annotations/val.json'
    runner = Runner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper.initialize_count_status(runner.model, 0, 10**6)
    runner.model.init_weights()
    batch = next(iter(runner.train_dataloader))
    # Statistics of the batch in place of those of ImageNet, or the losses are not finite.
    norms = find_norms(runner.model).values()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        runner.model.extract_feat(runner.model.data_preprocessor(batch, True)['inputs'])
    for norm in norms:
        norm.momentum = 0.1
    runner.model.train()
    return runner, batch


def close(model: nn.Module, count: int) -> None:
    """Close filters here and there, so far that they stay closed."""
    norms = list(find_norms(model).values())
    ends = np.cumsum([norm.num_features for norm in norms])
    for index in np.random.default_rng(0).choice(ends[-1], count, replace=False):
        layer = int(np.searchsorted(ends, index, side='right'))
        norms[layer].weight.data[index - ends[layer]] = 0.01
        norms[layer].bias.data[index - ends[layer]] = -100.0


def attach(runner: Runner, hooks: Sequence[Hook]) -> None:
    """Start hooks in a Runner that is ready."""
    for hook in hooks:
        hook.before_run(runner)
    for hook in hooks:
        hook.before_train(runner)


def step(runner: Runner, batch: dict, hooks: Sequence[Hook]) -> None:
    """An iteration."""
    for hook in hooks:
        hook.before_train_iter(runner, 0)
    runner.model.train_step(batch, runner.optim_wrapper)
    for hook in hooks:
        hook.after_train_iter(runner, 0)
    runner.train_loop._iter += 1


def summed(inside: list[float], function: Callable) -> Callable:
    """The function, whose time is added to ``inside[0]``."""

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        inside[0] += time.perf_counter() - start
        return result

    return call


def time_bias(name: str, steps: int, data_root: str) -> float:
    """Time in which the bias of all psBN layers is moved and put back, as a share of a step."""
    inside = [0.0]
    timed = {name: summed(inside, getattr(decay, name)) for name in ('_move', '_put_back')}
    with tempfile.TemporaryDirectory() as work_dir, patch.multiple(decay, **timed):
        runner, batch = ready(*DETECTORS[name], data_root, work_dir)
        device = next(runner.model.parameters()).device
        shares = []
        for number in range(3 + steps):
            inside[0] = 0.0
            start = now(device)
            runner.model.train_step(batch, runner.optim_wrapper)
            if number >= 3:
                shares.append(inside[0] / (now(device) - start))
        return float(np.median(shares))


def time_recovery(name: str, steps: int, data_root: str, closed: float) -> dict:
    """Time inside the RecoveryHook, as a share of a step, with a share of all filters closed."""
    with tempfile.TemporaryDirectory() as work_dir:
        runner, batch = ready(*DETECTORS[name], data_root, work_dir)
        device = next(runner.model.parameters()).device
        filters = sum(norm.num_features for norm in find_norms(runner.model).values())
        close(runner.model, round(closed * filters))
        hook = RecoveryHook(steps=10**6)  # so that they stay closed
        attach(runner, [hook])
        while hook._recovery is None:  # until it is known what stands around the layers
            step(runner, batch, [hook])
        inside = [0.0]
        for group in hook._recovery._groups:
            for part in PARTS_OF_RECOVERY:
                setattr(group, part, summed(inside, getattr(group, part)))
            for layer in group.layers:
                layer.look_at = summed(inside, layer.look_at)
        shares = []
        for number in range(2 * hook.window + steps):
            inside[0] = 0.0
            start = now(device)
            step(runner, batch, [hook])
            if number >= 2 * hook.window:
                shares.append(inside[0] / (now(device) - start))
        watched = sum(int(mask.sum()) for mask in hook._recovery.decayed().values())
        hook.after_train(runner)
        # The mean: once in `window` steps all gradients are looked at.
        return {
            'closed': closed,
            'watched': watched,
            'inside_hook_per_step': float(np.mean(shares)),
        }


def time_detector(name: str, steps: int, data_root: str) -> dict:
    """Time pairs of steps of a detector, with and without the hook at its default settings."""
    with tempfile.TemporaryDirectory() as work_dir:
        runner, batch = ready(*DETECTORS[name], data_root, work_dir)
        device = next(runner.model.parameters()).device

        hook = CollapseHook()
        attach(runner, [hook])
        inside = [0.0]
        timed = partial(summed, inside)
        monitor = hook._monitor
        for group in monitor.watch._groups:
            group.observe = timed(group.observe)

        def paired(watched: bool) -> float:
            start = now(device)
            runner.model.train_step(batch, runner.optim_wrapper)
            if watched:
                timed(hook.after_train_iter)(runner, 0)
                runner.train_loop._iter += 1
            return now(device) - start

        for _ in range(3):  # the first one finds the rectifiers, once in a run
            paired(watched=True)
        ratios, plain, shares, reports = [], [], [], []
        for pair in range(steps):
            times = {}
            for watched in (True, False) if pair % 2 else (False, True):
                monitor.watch.active = watched
                inside[0] = 0.0
                times[watched] = paired(watched)
                if watched:
                    spent = inside[0]
            plain.append(times[False])
            if runner.iter % hook.interval:
                ratios.append(times[True] / times[False])
                shares.append(spent / times[False])
            else:
                reports.append(spent)
        for _ in range(20 - len(reports)):
            runner.train_loop._iter = hook.interval - 1
            start = now(device)
            hook.after_train_iter(runner, 0)
            reports.append(now(device) - start)
        step_time = float(np.median(plain))
        per_step = float(np.median(shares))
        per_report = float(np.median(reports)) / hook.interval / step_time
        hook.after_train(runner)
        return {
            'channels': sum(norm.num_features for norm in find_norms(runner.model).values()),
            'step_ms': 1e3 * step_time,
            'ratio': spread(ratios),
            'inside_hook_per_step': per_step,
            'report_ms': 1e3 * float(np.median(reports)),
            'report_share': per_report,
            'overhead': 1 + per_step + per_report,
        }


def time_growth(device: torch.device) -> list[dict]:
    """Time of a step's reading and of a report's counting against the number of channels."""
    rows = []
    for channels in (1_000, 10_000, 100_000, 1_000_000):
        layers = nn.ModuleList(nn.BatchNorm2d(500) for _ in range(channels // 500)).to(device)
        for param in layers.parameters():
            param.grad = torch.randn_like(param)
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        watch = GradientWatch([optimizer], find_norms(layers))
        rectifiers = dict.fromkeys(find_norms(layers), 'relu')
        observing, counting = [], []
        for _ in range(7):
            start = now(device)
            for group in watch._groups:
                group.observe(0, None)
            middle = now(device)
            census_of_model(layers, rectifiers=rectifiers, trapped=watch.trapped())
            observing.append(middle - start)
            counting.append(now(device) - middle)
        rows.append(
            {
                'channels': channels,
                'observe_ms': 1e3 * float(np.median(observing)),
                'count_ms': 1e3 * float(np.median(counting)),
            }
        )
    return rows


def main() -> None:
    """Time the detectors and the growth, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-root', default='data/demo/', help='made by demo/make_dataset.py')
    parser.add_argument('--steps', type=int, default=20, help='pairs of steps per detector')
    parser.add_argument(
        '--out', help='JSON file, else benchmarks/results/hook_overhead_DEVICE.json'
    )
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    result = {
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine(),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'steps': args.steps,
        'detectors': {},
    }
    for name in DETECTORS:
        data_root = args.data_root.rstrip('/') + '/'
        row = time_detector(name, args.steps, data_root)
        row['bias_per_step'] = time_bias(name, args.steps, data_root)
        result['detectors'][name] = row
        print(f'{name}: the bias is moved for {100 * row["bias_per_step"]:.3f} % of a step')
        print(
            f'{name}: {row["channels"]} channels, step {row["step_ms"]:.0f} ms, with/without '
            f'{row["ratio"]["median"]:.4f} [{row["ratio"]["q25"]:.4f}, {row["ratio"]["q75"]:.4f}], '
            f'inside the hook {100 * row["inside_hook_per_step"]:.3f} % of a step, report '
            f'{row["report_ms"]:.1f} ms; in all {row["overhead"]:.5f}'
        )
    result['recovery'] = {}
    for name in DETECTORS:
        rows = [
            time_recovery(name, args.steps, args.data_root.rstrip('/') + '/', closed)
            for closed in (0.0, 0.02)
        ]
        result['recovery'][name] = rows
        for row in rows:
            print(
                f'{name}: RecoveryHook with {row["watched"]} closed filters, '
                f'{100 * row["inside_hook_per_step"]:.3f} % of a step'
            )
    result['growth'] = time_growth(device)
    for row in result['growth']:
        print(
            f'{row["channels"]:>9,} channels: {row["observe_ms"]:8.3f} ms to read a step, '
            f'{row["count_ms"]:8.3f} ms to count'
        )
    write(result, f'hook_overhead_{device.type}', args.out)


if __name__ == '__main__':
    main()
