"""What a report shows of a run, read from its work dir."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..records import KINDS, find_snapshots, read_snapshot, stage_of, stream_records
from .downsampling import HeatMapColumns
from .events import CollapseEvents
from .scores import SCORE_LOG, read_scores
from .work_dirs import find_record, run_folders


@dataclass(frozen=True)
class Snapshot:
    """All channels after a number of iterations.

    Attributes:
        iteration (int): Number of iterations done.
        gamma (np.ndarray): Shape (C,).
        bias (np.ndarray): The bias b that the rectifier sees, shape (C,).
        collapsed (np.ndarray): Bool, shape (C,), as of the last report.
    """

    iteration: int
    gamma: np.ndarray
    bias: np.ndarray
    collapsed: np.ndarray


@dataclass(frozen=True)
class Run:
    """A run, as far as a report shows it. R reports, L layers, C channels in all.

    Attributes:
        label (str): What the user calls it.
        path (Path): Its record.
        header (dict): The record's header.
        iterations (np.ndarray): Shape (R,).
        counts (dict[str, np.ndarray]): Of each kind, shape (R,), NaN where not observed.
        learning_rate (np.ndarray): Shape (R,).
        columns (HeatMapColumns): Collapsed channels of each layer over iterations.
        last (dict): The last report.
        events (CollapseEvents): When which channels collapsed and were revived.
        snapshots (list[Snapshot]): At the start, the middle and the end, as far as there are any.
        scores (dict[str, tuple[list, list]]): Steps and values of :data:`.SCORES`.
    """

    label: str
    path: Path
    header: dict[str, Any]
    iterations: np.ndarray
    counts: dict[str, np.ndarray]
    learning_rate: np.ndarray
    columns: HeatMapColumns
    last: dict[str, Any]
    events: CollapseEvents
    snapshots: list[Snapshot]
    scores: dict[str, tuple[list[int], list[float]]]

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return [layer['name'] for layer in self.header['layers']]

    @property
    def sizes(self) -> np.ndarray:
        """The layers' numbers of channels, shape (L,)."""
        return np.array([layer['channels'] for layer in self.header['layers']])

    @property
    def stages(self) -> dict[str, list[int]]:
        """The layers of each stage, by their indices in the header."""
        stages: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            stages.setdefault(stage_of(name), []).append(index)
        return stages

    @property
    def collapsed(self) -> np.ndarray:
        """Channels collapsed at the last report, bool of shape (C,)."""
        return self.events.collapsed

    @property
    def ever_collapsed(self) -> np.ndarray:
        """Channels collapsed at any report, bool of shape (C,)."""
        return self.events.counts() > 0

    @property
    def ever_revived(self) -> np.ndarray:
        """Channels revived at any report, bool of shape (C,)."""
        return self.events.counts() > 1

    @property
    def ever_recovered(self) -> int:
        """Number of channels that RecoveryHook has opened."""
        return len(self.events.recovered)

    @property
    def score_unit(self) -> str:
        """What the steps of the scores are: 'epoch' or 'iteration'."""
        steps = [step for steps, _ in self.scores.values() for step in steps]
        # A loop without epochs is always in its first.
        return 'epoch' if self.last['epoch'] > 1 or max(steps, default=1) <= 1 else 'iteration'

    def share_collapsed(self) -> tuple[np.ndarray, np.ndarray]:
        """The layers' shares of collapsed channels over iterations.

        Returns:
            tuple[np.ndarray, np.ndarray]: Edges in iterations, shape (columns + 1,), and shares
            from 0 to 1, shape (L, columns).
        """
        start = max(0, self.iterations[0] - self.header['interval'])
        edges = np.concatenate(([start], self.columns.ends))
        return edges, self.columns.values / np.maximum(self.sizes, 1)[:, None]


def read_run(
    path: str | os.PathLike, label: str, progress: Callable[[float], None] = lambda share: None
) -> Run:
    """Read what a report shows of a run. No more than a line of the record is held at a time.

    Args:
        path (str | PathLike): As for :func:`find_record`.
        label (str): What to call the run.
        progress (Callable[[float], None]): Called with the share done, from 0 to 1.

    Returns:
        Run: Downsampled to what a screen can show.

    Raises:
        FileNotFoundError: If there is no record.
        ValueError: If the record has no report yet, or if a file is damaged.
    """
    path = find_record(path)
    # Before the record, which then has all reports up to them, even if a training adds to both.
    snapshots, scores = find_snapshots(path.parent), read_scores(run_folders(path))
    iterations, learning_rate = array('q'), array('d')
    counts = {kind: array('d') for kind in (*KINDS, 'collapsed')}
    last: dict[str, Any] = {}
    with open(path, 'rb') as file:
        size = max(1, os.fstat(file.fileno()).st_size)
        reports = stream_records(file)
        header = next(reports)
        sizes = [layer['channels'] for layer in header['layers']]
        events, columns = CollapseEvents(sizes, header['interval']), HeatMapColumns(len(sizes))
        for number, last in enumerate(reports):
            iterations.append(last['iter'])
            learning_rate.append(next(iter(last['lr'].values()), math.nan))
            for kind, series in counts.items():
                count = last['total'][kind]
                series.append(math.nan if count is None else count)
            columns.add(last['iter'], last['layers']['collapsed'])
            try:
                events.add(last)
            except ValueError as error:
                raise ValueError(f'{path} is damaged ({error}): restore it') from None
            if number % 1000 == 0:
                progress(min(1.0, file.tell() / size))
    if not iterations:
        raise ValueError(
            f'{path} has no report yet: train for more than one interval '
            f'({header["interval"]} iterations)'
        )
    progress(1.0)
    return Run(
        label=label,
        path=path,
        header=header,
        iterations=np.array(iterations),
        counts={kind: np.array(values) for kind, values in counts.items()},
        learning_rate=np.array(learning_rate),
        columns=columns,
        last=last,
        events=events,
        snapshots=_read_snapshots(snapshots, events),
        scores=scores,
    )


def input_files(path: str | os.PathLike) -> list[Path]:
    """The files that :func:`read_run` reads, of which any may not exist.

    Args:
        path (str | PathLike): As for :func:`find_record`; there may be no record.
    """
    try:
        record = find_record(path)
    except FileNotFoundError:
        return []
    logs = [folder / SCORE_LOG for folder in run_folders(record)]
    return [record, *logs, *find_snapshots(record.parent).values()]


def _read_snapshots(found: dict[int, Path], events: CollapseEvents) -> list[Snapshot]:
    """Those of the start, the middle and the end."""
    if not found:
        return []
    last = max(found)
    middle = min(found, key=lambda iteration: abs(iteration - last / 2))
    snapshots = []
    for iteration in sorted({min(found), middle, last}):
        collapsed = events.counts(iteration) % 2 == 1
        values = read_snapshot(found[iteration], len(collapsed))
        snapshots.append(Snapshot(iteration, *values, collapsed))
    return snapshots
