"""What the benchmarks share: a clock, rounds side by side, quartiles, and where results go."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / 'results'


def now(device: torch.device) -> float:
    """Seconds, with all work on the device done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds that a run takes, averaged over repeats."""
    start = now(device)
    for _ in range(repeats):
        run()
    return (now(device) - start) / repeats


def side_by_side(
    runs: dict[str, Callable[[], object]], rounds: int, repeats: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of each run in each round. Rounds differ in order, so that none is always first."""
    for run in runs.values():
        timed(run, 2, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for round_ in range(rounds):
        first = round_ // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order[::-1] if round_ % 2 else order:
            times[name].append(timed(runs[name], repeats, device))
    return {name: np.array(values) for name, values in times.items()}


def spread(values: list[float] | np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = np.percentile(values, [25, 50, 75])
    return dict(zip(('q25', 'median', 'q75'), map(float, quartiles)))


def hardware(device: torch.device) -> str:
    """The class of hardware that is measured."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()} CPU, {torch.get_num_threads()} threads'


def write(result: dict, name: str, out: str | None) -> None:
    """Write a result to ``out``, by default to ``benchmarks/results/NAME.json``."""
    path = Path(out or RESULTS / f'{name}.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(f'written to {os.path.relpath(path)}')
