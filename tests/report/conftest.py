"""Runs as the hook leaves them, without a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from psbn_mmdet.records import COUNTS, RecordWriter, format_ranges, write_snapshot

RESNET50 = [
    ('backbone.bn1', 64),
    *(
        (f'backbone.layer{stage}.{block}.{name}', 2 ** (5 + stage) * factor)
        for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
        for block in range(blocks)
        for name, factor in (
            ('bn1', 1),
            ('bn2', 1),
            ('bn3', 4),
            *([('downsample.1', 4)] if block == 0 else []),
        )
    ),
]


def header_of(layers: Sequence[tuple[str, int]], **settings) -> dict:
    return {
        'layers': [
            dict(name=name, channels=n, norm='BN', shift=0.0, rectifier='relu', frozen=False)
            for name, n in layers
        ],
        'interval': 50,
        'window': 50,
        'tau': 0.001,
        'k': 3.0,
        **settings,
    }


def body_of(layers: Sequence[tuple[str, int]], before: np.ndarray, now: np.ndarray) -> dict:
    """A report's channels, from who was collapsed before and who is now, (C,) each."""
    bounds = np.cumsum([n for _, n in layers])[:-1]
    masks = dict.fromkeys(COUNTS, now & False)
    masks |= dict.fromkeys(('dead', 'trapped', 'collapsed'), now)
    masks |= {'new': now & ~before, 'revived': before & ~now}
    channels = {k: list(map(format_ranges, np.split(mask, bounds))) for k, mask in masks.items()}
    return {'channels': channels}


@pytest.fixture(scope='session')
def write_run() -> Callable[..., Path]:
    """A function that writes a run's folder, and returns its work dir."""

    def write_run(
        work_dir: Path,
        states: Sequence[Sequence[int]] = ((), (1,), (1, 70), (70,)),
        *,
        layers: Sequence[tuple[str, int]] = (
            ('backbone.bn1', 64),
            ('backbone.layer1.0.bn1', 64),
            ('neck.lateral_convs.0.bn', 32),
        ),
        start: Sequence[int] = (),
        first: int = 50,
        snapshots: Sequence[int] = (0, 100, 200),
        scores: dict[int, float] | None = None,
        timestamp: str = '20260101_000000',
        **settings,
    ) -> Path:
        """Args: states, the collapsed channels, numbered through, at each report."""
        folder = work_dir / timestamp
        channels = sum(n for _, n in layers)
        writer = RecordWriter(folder / 'collapse.jsonl', header_of(layers, **settings))
        masks = [np.isin(np.arange(channels), state) for state in (start, *states)]
        for index, (before, now) in enumerate(zip(masks, masks[1:])):
            iteration = first + 50 * index
            body = body_of(layers, before, now)
            report = dict(iter=iteration, epoch=1 + (iteration - 1) // 100, lr=dict(lr=0.1))
            writer.append(report | dict(steps=50) | body)
        rng = np.random.default_rng(0)
        for iteration in snapshots:
            gamma, bias = rng.normal(0.3, 0.1, channels), rng.normal(0, 0.2, channels)
            write_snapshot(folder, iteration, gamma, bias)
        if scores:
            log_scores(folder, scores)
        return work_dir

    return write_run


def log_scores(folder: Path, scores: dict[int, float], first_epoch: int = 1) -> None:
    """Write the log of a run folder: a line of training, and AP by epoch."""
    lines = [dict(lr=0.1, loss=1.0, epoch=first_epoch, iter=20, step=20)]
    for step, ap in scores.items():
        lines.append({'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': 2 * ap, 'time': 0.1, 'step': step})
    log = folder / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(''.join(json.dumps(line) + '\n' for line in lines))


@pytest.fixture(scope='session')
def write_scores() -> Callable[..., None]:
    """A function that writes AP by epoch into the log of a run's folder."""
    return log_scores


@pytest.fixture(scope='session')
def long_record(tmp_path_factory) -> Path:
    """A record of 100,000 reports of a ResNet-50 whose filters collapse and are revived."""
    path = tmp_path_factory.mktemp('long') / '20260101_000000' / 'collapse.jsonl'
    RecordWriter(path, header_of(RESNET50))
    rng = np.random.default_rng(0)
    states = [rng.random(sum(n for _, n in RESNET50)) < 0.001]
    for _ in range(200):
        states.append(states[-1] ^ (rng.random(len(states[0])) < 3e-5))
    # There and back again: each state is met thousands of times, but written out only twice.
    states = states[:-1] + states[::-1]
    bodies = [
        json.dumps(body_of(RESNET50, before, now))[1:] for before, now in zip(states, states[1:])
    ]
    with open(path, 'a') as file:
        for index in range(100_000):
            iteration = 50 * (index + 1)
            head = dict(iter=iteration, epoch=1 + iteration // 7000, lr=dict(lr=0.1), steps=50)
            file.write(f'{json.dumps(head)[:-1]}, {bodies[index % len(bodies)]}\n')
    write_snapshot(path.parent, 0, np.ones(len(states[0])), np.zeros(len(states[0])))
    write_snapshot(path.parent, 5_000_000, rng.normal(size=26_560), rng.normal(size=26_560))
    return path
