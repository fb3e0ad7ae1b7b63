"""The second part of gpu.py: what psBN and the hooks cost, as ratios measured side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_right
import numpy as np
import torch
from hook_overhead import DETECTORS, attach, close, ready, step
from layer_speed import peak_memory, resnet50_shapes
from timing import now, side_by_side, spread, timed
from torch import nn
from torch.profiler import ProfilerActivity, profile

from psbn_mmdet.hooks import CollapseHook, RecoveryHook
from psbn_mmdet.layers import PostShiftedBatchNorm2d

GOAL = 0.003  # of a training step
SETTINGS: dict[str, dict] = {
    'fp32': {},
    'fp16, as in autocast': dict(dtype=torch.float16),
    'fp16, channels_last': dict(dtype=torch.float16, memory_format=torch.channels_last),
    'fp32, torch.compile': dict(compiled=True),
}
WAITING = ('cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize')


def measurements(context: Any) -> Iterator[tuple[str, Callable[[], dict]]]:
    """All measurements: their names, and what does them."""
    for batch in (2,) if context.small else (2, 8):
        for name, setting in SETTINGS.items():
            do = partial(layers, context.device, context.small, batch, **setting)
            yield f"psBN over BN, ResNet-50's layers, batch {batch}, {name}", do
    for name, dtype in (('fp32', None), ('autocast fp16', torch.float16)):
        yield f'a pruned backbone over the whole one, {name}', partial(pruned, context, dtype)
    yield "hooks in a detector's training step", partial(detector, context)


# The layers


def layers(
    device: torch.device,
    small: bool,
    batch: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    compiled: bool = False,
) -> dict:
    """All 53 norms of ResNet-50 at 800 x 1333 px: time of psBN over that of BN, and memory."""
    shapes = resnet50_shapes(*((64, 107) if small else (800, 1333)))
    if compiled:  # each shape is compiled for itself: only those at the ends of the stages
        shapes = Counter(dict.fromkeys(list(shapes)[3::6], 1))
    kinds = {'BN': nn.BatchNorm2d, 'psBN': PostShiftedBatchNorm2d}
    norms: dict[str, dict] = {}
    for name, kind in kinds.items():
        made = {shape: kind(shape[0]).to(device) for shape in shapes}
        # psBN looks at its bias until the first step.
        torch.optim.SGD(nn.ModuleList(made.values()).parameters(), lr=0.0).step()
        norms[name] = made
    if compiled:
        forwards = {name: {s: torch.compile(m) for s, m in norms[name].items()} for name in norms}
    else:
        forwards = norms
    inputs = {}
    for shape in shapes:
        x = torch.randn(batch, *shape, device=device, dtype=dtype)
        inputs[shape] = x.to(memory_format=memory_format).requires_grad_()

    def run(name: str, training: bool) -> None:
        with torch.set_grad_enabled(training):
            for shape, count in shapes.items():
                norms[name][shape].train(training)
                for _ in range(count):
                    y = forwards[name][shape](inputs[shape])
                    if training:
                        y.backward(inputs[shape].detach())
                        inputs[shape].grad = None

    row: dict = {}
    for mode in ('train', 'eval'):
        runs = {name: partial(run, name, mode == 'train') for name in norms}
        once = max(timed(runs['BN'], 3, device) for _ in range(2))
        repeats = max(1, round(0.02 / once))
        times = side_by_side(runs, 5 if small else 24, repeats, device)
        row[mode] = {
            'bn_ms': 1e3 * float(np.median(times['BN'])),
            'ratio': spread(times['psBN'] / times['BN']),
        }
    memory = {name: peak_memory(partial(run, name, True), device) for name in norms}
    row['memory_ratio'] = memory['psBN'] / memory['BN']
    text = ', '.join(f'{mode} {as_text(row[mode]["ratio"])}' for mode in ('train', 'eval'))
    return {'text': f'{text}, memory {row["memory_ratio"]:.3f}', **row}


def as_text(values: dict[str, float]) -> str:
    """Median and quartiles."""
    return f'{values["median"]:.4f} [{values["q25"]:.4f}, {values["q75"]:.4f}]'


# Pruning


@torch.no_grad()
def pruned(context: Any, dtype: torch.dtype | None) -> dict:
    """Without a third of the channels, and with widths rounded up to multiples of 8 and 16."""
    device, runs = context.device, {}

    def run(model: Any, image: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype, dtype is not None):
            model.backbone(image)

    for multiple in (1, 8, 16):
        whole, less, batch = gpu_right.pruned(context, multiple)
        image = whole.data_preprocessor(batch, False)['inputs']
        runs['whole'] = partial(run, whole, image)
        runs[f'multiples of {multiple}'] = partial(run, less, image)
    rounds = 4 if context.small else 40
    times = side_by_side(runs, rounds, 2, device)
    row = {name: spread(times[name] / times['whole']) for name in runs if name != 'whole'}
    return {'text': ', '.join(f'{name} {as_text(found)}' for name, found in row.items()), **row}


# The hooks


def detector(context: Any) -> dict:
    """A Faster R-CNN's whole step with hooks, over the step without; and what the GPU is asked for.

    Each arm is a detector of its own with the same weights, batch and random numbers, which do not
    change: the learning rate is 0. Closed filters change the boxes, so each is compared with a
    detector that has them, too.
    """
    device, small = context.device, context.small
    arms: dict[str, tuple[list, int]] = {'CollapseHook': ([CollapseHook()], 0)}
    for count in (0, 7, 70) if small else (0, 70, 700):
        hook = RecoveryHook(steps=10**6)  # so that they stay closed
        arms[f'RecoveryHook, {count} closed filters'] = [hook], count
        arms[f'{count}'] = [], count  # what the others are compared with
    runs = {}
    for number, (name, (hooks, count)) in enumerate(arms.items()):
        runner, batch = ready(
            DETECTORS['demo' if small else 'faster-rcnn_r50'][0],
            (128, 128) if small else (1333, 800),
            f'{context.drawn}/',
            f'{context.folder}/detector_{number}',
            lr=0.0,
        )
        close(runner.model, count)
        attach(runner, hooks)
        runs[name] = partial(same_step, runner, batch, hooks)
    # The hooks' first steps find the structure of the network, and which filters are closed.
    for run in runs.values():
        once = timed(run, 15, device)
    rounds = max(4, min(60, int(0.8 * context.left() / len(runs) / once)))
    times = side_by_side(runs, rounds, 1, device)
    asked = {name: asked_for(run, device) for name, run in runs.items()}
    row: dict = {'step_ms': 1e3 * float(np.median(times['0'])), 'arms': {}}
    for name, (hooks, count) in arms.items():
        if not hooks:
            continue
        plain, plainly = times[str(count)], asked[str(count)]
        # A report comes in one step of 50: it is in the mean, and not in the quartiles.
        row['arms'][name] = {
            'ratio': spread(times[name] / plain),
            'mean': float(times[name].mean() / plain.mean()),
            **{key: value - plainly[key] for key, value in asked[name].items()},
        }
    told = [
        f'{name} {as_text(arm["ratio"])}, mean {arm["mean"]:.4f}, kernels {arm["kernels"]:+g}, '
        f'waits for the device {arm["waits"]:+g}'
        for name, arm in row['arms'].items()
    ]
    row['goal_met'] = all(
        arm['ratio']['median'] <= 1 + GOAL and arm['waits'] <= 0 for arm in row['arms'].values()
    )
    return {'text': f'step {row["step_ms"]:.0f} ms; ' + '; '.join(told), **row}


def same_step(runner: Any, batch: dict, hooks: list) -> None:
    """An iteration with the random numbers of all others."""
    torch.manual_seed(0)
    step(runner, batch, hooks)


def asked_for(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Kernels launched in a step, and how often the host waits for the device in it.

    On CPUs, operators that are called, and values that are read.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    steps = 3
    with profile(activities=activities) as prof:
        for _ in range(steps):
            run()
        now(device)
    calls = Counter({event.key: event.count for event in prof.key_averages()})
    if device.type == 'cpu':
        kernels = sum(n for name, n in calls.items() if name.startswith('aten::'))
        return {'kernels': kernels / steps, 'waits': calls['aten::_local_scalar_dense'] / steps}
    kernels = sum(n for name, n in calls.items() if 'LaunchKernel' in name)
    return {'kernels': kernels / steps, 'waits': sum(calls[name] for name in WAITING) / steps}
