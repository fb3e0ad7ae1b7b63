"""What a report shows of a run, read from its work dir."""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import is_among
from ..records import (
    KINDS,
    RECORD_FILE,
    find_snapshots,
    read_snapshot,
    stage_of,
    stream_json,
    stream_records,
)
from ..records.reader import MOST_BYTES, check_integer, check_number
from .events import CollapseEvents, Life
from .thinning import Columns

_AP, _AP50 = r'(.*/)?(bbox_)?m?AP', r'(.*/)?(bbox_)?m?AP_?50'
SCORES = {
    'AP': f'(?!teacher/|student/){_AP}',
    'AP50': f'(?!teacher/|student/){_AP50}',
    # Both are validated where one learns from the other.
    **{f'AP of the {of}': f'{of}/{_AP}' for of in ('teacher', 'student')},
    **{f'AP50 of the {of}': f'{of}/{_AP50}' for of in ('teacher', 'student')},
}
SCORE_LOG = Path('vis_data', 'scalars.json')  # in a run's log folder


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
        columns (Columns): Collapsed channels of each layer over iterations.
        last (dict): The last report.
        snapshots (list[Snapshot]): At the start, the middle and the end, as far as there are any.
        scores (dict[str, tuple[list, list]]): Steps and values of 'AP' and 'AP50', where logged,
            and of those of a teacher and a student.
        events (CollapseEvents): When which channels collapsed and were revived.
    """

    label: str
    path: Path
    header: dict[str, Any]
    iterations: np.ndarray
    counts: dict[str, np.ndarray]
    learning_rate: np.ndarray
    columns: Columns
    last: dict[str, Any]
    snapshots: list[Snapshot]
    scores: dict[str, tuple[list[int], list[float]]]
    events: CollapseEvents

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
        """The layers of each stage, by their places in the header."""
        stages: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            stages.setdefault(stage_of(name), []).append(index)
        return stages

    @property
    def ever_collapsed(self) -> np.ndarray:
        """Channels that were collapsed at any report, bool of shape (C,)."""
        return self.events.start | self.events.ever(True)

    @property
    def ever_revived(self) -> np.ndarray:
        """Channels that were revived at any report, bool of shape (C,)."""
        return self.events.ever(False)

    @property
    def ever_recovered(self) -> int:
        """Number of channels that RecoveryHook has opened."""
        return len(self.events.recovered)

    @property
    def collapsed(self) -> np.ndarray:
        """Channels that were collapsed at the last report, bool of shape (C,)."""
        return self.events.collapsed

    @property
    def score_unit(self) -> str:
        """What the steps of the scores are: 'epoch' or 'iteration'."""
        steps = [step for steps, _ in self.scores.values() for step in steps]
        # A loop without epochs is always in its first.
        return 'epoch' if self.last['epoch'] > 1 or max(steps, default=1) <= 1 else 'iteration'

    def final(self, kind: str) -> int | None:
        """The last report's count of a kind, None if it was not observed."""
        return self.last['total'][kind]

    def share_collapsed(self) -> tuple[np.ndarray, np.ndarray]:
        """The layers' shares of collapsed channels over iterations.

        Returns:
            tuple[np.ndarray, np.ndarray]: Edges in iterations, shape (columns + 1,), and shares
            from 0 to 1, shape (L, columns).
        """
        edges = np.concatenate(([self._begin], self.columns.ends))
        return edges, self.columns.values / np.maximum(self.sizes, 1)[:, None]

    def lives(self, limit: int) -> list[Life]:
        """The lives of channels that ever collapsed, by the time of their first collapse.

        Args:
            limit (int): The most to return: if there are more, evenly chosen ones.
        """
        return self.events.lives(limit, self._begin)

    @property
    def _begin(self) -> int:
        return max(0, int(self.iterations[0]) - self.header['interval'])


def find_record(path: str | os.PathLike) -> Path:
    """Find the collapse record of a run.

    Args:
        path (str | PathLike): A record, the folder that it lies in, or a work dir, of which the
            latest run is taken.

    Returns:
        Path: The record.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / RECORD_FILE).is_file():
        return path / RECORD_FILE
    found = [found for found in path.glob(f'*/{RECORD_FILE}') if found.is_file()]
    if not found:
        raise FileNotFoundError(
            f'{path} has no */{RECORD_FILE}: give the work dir of a run with the CollapseHook'
        )
    return max(found, key=lambda record: _age_of(record.parent))


def _age_of(run: Path) -> list[str | int]:
    """What orders log folders, named by the second, then numbered: ..._2, ..., ..._10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', run.name)]


def read_run(
    path: str | os.PathLike, label: str, progress: Callable[[float], None] = lambda share: None
) -> Run:
    """Read what a report shows of a run. No more than a line of the record is held at a time.

    Args:
        path (str | PathLike): As for :func:`find_record`.
        label (str): What to call the run.
        progress (Callable[[float], None]): Called with the share done, from 0 to 1.

    Returns:
        Run: Thinned to what a screen can show.

    Raises:
        FileNotFoundError: If there is no record.
        ValueError: If the record has no report yet, or if a file is damaged.
    """
    path = find_record(path)
    # Before the record, which then has all reports up to them, also while a training adds to both.
    snapshots, scores = find_snapshots(path.parent), _read_scores(path)
    iterations, learning_rate = array('q'), array('d')
    counts = {kind: array('d') for kind in (*KINDS, 'collapsed')}
    last: dict[str, Any] = {}
    with open(path, 'rb') as file:
        size = max(1, os.fstat(file.fileno()).st_size)
        lines = stream_records(file)
        header = next(lines)
        sizes = [layer['channels'] for layer in header['layers']]
        events, columns = CollapseEvents(sizes), Columns(len(sizes))
        for number, last in enumerate(lines):
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
        snapshots=_read_snapshots(snapshots, events),
        scores=scores,
        events=events,
    )


def is_input(file: str | os.PathLike, path: str | os.PathLike) -> bool:
    """Whether a file is one that :func:`read_run` reads.

    Args:
        file (str | PathLike): Which may not exist.
        path (str | PathLike): As for :func:`find_record`; there may be no record.

    Returns:
        bool: Also by another path to the same file.
    """
    try:
        record = find_record(path)
    except FileNotFoundError:
        return False
    return is_among(file, [*_files_of(record), *find_snapshots(record.parent).values()])


def _files_of(record: Path) -> list[Path]:
    """A record, and the logs with the scores of its run and of those that it continues."""
    files = [record, *(folder / SCORE_LOG for folder in _lineage(record))]
    return [file for file in files if file.is_file()]


def _read_snapshots(found: dict[int, Path], events: CollapseEvents) -> list[Snapshot]:
    """Those of the start, the middle and the end."""
    if not found:
        return []
    last = max(found)
    middle = min(found, key=lambda iteration: abs(iteration - last / 2))
    snapshots = []
    for iteration in sorted({min(found), middle, last}):
        collapsed = events.collapsed_at(iteration)
        values = read_snapshot(found[iteration], len(collapsed))
        snapshots.append(Snapshot(iteration, *values, collapsed))
    return snapshots


def _read_scores(record: Path) -> dict[str, tuple[list[int], list[float]]]:
    """AP and AP50 of the run and of those that it continues."""
    found: dict[str, dict[int, float]] = {name: {} for name in SCORES}
    iteration, has_epochs = 0, True  # as the lines so far tell

    def take(number: int, values: dict[str, Any]) -> None:
        nonlocal iteration, has_epochs
        if 'loss' in values:
            iteration = check_integer(values['step'])
        if number == 1:  # a resumed run starts here: what came after in the earlier one is void
            start = values.get('epoch', values.get('step', 0)) if has_epochs else iteration
            for name, scores in found.items():
                found[name] = {step: score for step, score in scores.items() if step < start}
        for key, value in values.items():
            for name, pattern in SCORES.items():
                if re.fullmatch(pattern, key) and math.isfinite(check_number(value)):
                    step = check_integer(values['step'])
                    has_epochs = step > 0  # MMEngine logs 0 where there are none
                    found[name][step or iteration] = float(value)

    for folder in _lineage(record):
        log = folder / SCORE_LOG
        if log.is_file():
            with open(log, 'rb') as file:
                for _ in stream_json(file, take):
                    pass
    return {name: (sorted(v), [v[s] for s in sorted(v)]) for name, v in found.items() if v}


def _lineage(record: Path) -> list[Path]:
    """The folder of a record, after those of the earlier runs in its work dir that it continues."""
    folders = [record.parent.resolve()]
    work_dir = folders[0].parent
    while (folders[0] / RECORD_FILE).is_file():  # not a pipe, which would be waited for
        try:
            with open(folders[0] / RECORD_FILE, 'rb') as file:
                header = json.loads(file.readline(MOST_BYTES))
            earlier = (folders[0] / header['continues']).resolve()
            # A record may come from anybody: what it names elsewhere is not looked at.
            if earlier in folders or work_dir not in earlier.parents or not earlier.is_dir():
                return folders
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return folders
        folders.insert(0, earlier)
    return folders
