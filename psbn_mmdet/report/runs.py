"""What a report shows of a run, read from its work dir."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import is_among
from ..records import (
    ENDED_FILE,
    KINDS,
    MOST_BYTES,
    MOST_CHANNELS,
    RECORD_FILE,
    NoReportError,
    find_snapshots,
    parse_ranges,
    read_snapshot,
    stage_of,
    stream_json,
    stream_records,
)
from .thinning import Columns

# What a record may claim, so that a damaged one takes no memory without bound.
MOST_LAYERS, MOST_CHANGES, MOST_K = 10**4, 2 * 10**7, 10**6
_COUNTS = {int, type(None)}
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
class Life:
    """When a channel was collapsed.

    Attributes:
        layer (int): Place of its layer in the header.
        channel (int): Its number in the layer.
        spans (list[tuple[int, int | None]]): Iterations of the reports at which it became
            collapsed and was revived, None if it was not.
        recovered (list[int]): Iterations of the reports before which RecoveryHook had opened it.
    """

    layer: int
    channel: int
    spans: list[tuple[int, int | None]]
    recovered: list[int]


@dataclass(frozen=True)
class Run:
    """A run, as far as a report shows it. R reports, L layers, C channels in all.

    Attributes:
        label (str): What the user calls it.
        path (Path): Its record.
        header (dict): The record's header.
        iterations (np.ndarray): Shape (R,).
        counts (dict[str, np.ndarray]): Of each kind, shape (R,), NaN where not observed or, in
            records of earlier versions, not counted yet.
        learning_rate (np.ndarray): Shape (R,).
        columns (Columns): Collapsed channels of each layer over iterations.
        last (dict): The last report.
        snapshots (list[Snapshot]): At the start, the middle and the end, as far as there are any.
        scores (dict[str, tuple[list, list]]): Steps and values of 'AP' and 'AP50', where logged,
            and of those of a teacher and a student.
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
    _events: _Events

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
        return self._events.start | self._events.touched(True)

    @property
    def ever_revived(self) -> np.ndarray:
        """Channels that were revived at any report, bool of shape (C,)."""
        return self._events.touched(False)

    @property
    def ever_recovered(self) -> int:
        """Number of channels that RecoveryHook has opened."""
        return self._events.recovered

    @property
    def collapsed(self) -> np.ndarray:
        """Channels that were collapsed at the last report, bool of shape (C,)."""
        return self._events.state

    @property
    def score_unit(self) -> str:
        """What the steps of the scores are: 'epoch' or 'iteration'."""
        steps = [step for steps, _ in self.scores.values() for step in steps]
        # A loop without epochs is always in its first.
        return 'epoch' if self.last['epoch'] > 1 or max(steps, default=1) <= 1 else 'iteration'

    def final(self, kind: str) -> int | None:
        """The last report's count of a kind, None if it was not observed."""
        return self.last['total'].get(kind)

    def share_collapsed(self) -> tuple[np.ndarray, np.ndarray]:
        """The layers' shares of collapsed channels over iterations.

        Returns:
            tuple[np.ndarray, np.ndarray]: Edges in iterations, shape (columns + 1,), and shares
            from 0 to 1, shape (L, columns).
        """
        start = max(0.0, self.iterations[0] - self.header['interval'])
        edges = np.concatenate(([start], self.columns.ends))
        return edges, self.columns.values / np.maximum(self.sizes, 1)[:, None]

    def lives(self, limit: int) -> list[Life]:
        """The lives of channels that ever collapsed, by the time of their first collapse.

        Args:
            limit (int): The most to return: if there are more, evenly chosen ones.
        """
        return self._events.lives(limit, self.sizes, self.header['interval'], self.iterations)


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
        NoReportError: If the record has no report yet; it is a ValueError.
        ValueError: If a file is damaged.
    """
    path = find_record(path)
    # Before the record, which then has all reports up to them, also while a training adds to both.
    snapshots, scores = find_snapshots(path.parent), _read_scores(path)
    reading = _Reading()
    with open(path, 'rb') as file:
        size = max(1, os.fstat(file.fileno()).st_size)
        for number, _ in enumerate(stream_records(file, reading.take_header, reading.take_report)):
            if number % 1000 == 0:
                progress(min(1.0, file.tell() / size))
    if not reading.iterations:
        raise NoReportError(
            f'{path} has no report yet: train for more than one interval '
            f'({reading.header["interval"]} iterations)'
        )
    try:
        events = reading.finish()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'{path}, the last line is damaged ({error}): restore the file, or delete the line'
        ) from None
    iterations = np.array(reading.iterations)
    last = reading.last
    progress(1.0)
    return Run(
        label=label,
        path=path,
        header=reading.header,
        iterations=iterations,
        counts={kind: np.array(values) for kind, values in reading.counts.items()},
        learning_rate=np.array(reading.learning_rate),
        columns=reading.columns,
        last=last,
        snapshots=_read_snapshots(snapshots, events),
        scores=scores,
        _events=events,
    )


def inputs_of(path: str | os.PathLike) -> list[tuple]:
    """What differs once any file that :func:`read_run` reads has changed.

    Args:
        path (str | PathLike): As for :func:`find_record`.

    Returns:
        list[tuple]: Of each file its path, time and size, of snapshots their iterations.

    Raises:
        FileNotFoundError: If there is no record.
    """
    record = find_record(path)
    found: list[tuple] = [tuple(find_snapshots(record.parent))]
    for file in _files_of(record):
        stat = file.stat()
        found.append((file, stat.st_mtime_ns, stat.st_size))
    return found


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


def has_ended(path: str | os.PathLike) -> bool:
    """Whether a run's training has come to its end, and no later one has begun in its work dir.

    Args:
        path (str | PathLike): As for :func:`find_record`.

    Returns:
        bool: False also where it cannot be told, as of a training that was killed.
    """
    try:
        run = find_record(path).parent
    except FileNotFoundError:
        return False
    folders = [data.parent for data in Path(path).glob('*/vis_data')]
    later = [folder for folder in folders if _age_of(folder) > _age_of(run)]
    # A test leaves its scores in a file named after its folder, and is no training.
    later = [folder for folder in later if not (folder / f'{folder.name}.json').is_file()]
    return (run / ENDED_FILE).exists() and not later


class _Events:
    """When which channels became or ceased to be collapsed."""

    def __init__(self, channels: int) -> None:
        self.start = np.zeros(channels, bool)
        self.state = np.zeros(channels, bool)
        self.count = 0  # of collapsed channels in the state
        self._growing = array('q'), array('q'), array('b')
        self._recovered: dict[int, list[int]] = {}  # iterations by channel
        self._openings = 0
        self.iterations: np.ndarray = np.empty(0, np.int64)
        self.channels: np.ndarray = self.iterations
        self.values: np.ndarray = self.iterations

    def add(self, iteration: int, channels: np.ndarray, value: bool) -> None:
        """Note that channels, by their numbers among all, became collapsed or ceased to be."""
        channels = channels[self.state[channels] != value]
        self.state[channels] = value
        self.count += len(channels) if value else -len(channels)
        iterations, numbers, values = self._growing
        if len(iterations) + len(channels) > MOST_CHANGES:
            raise ValueError(f'more than {MOST_CHANGES:,} changes of channels')
        iterations.extend([iteration] * len(channels))
        numbers.extend(channels.tolist())
        values.extend([value] * len(channels))

    def recover(self, iteration: int, channels: np.ndarray) -> None:
        """Note that channels, by their numbers among all, were opened by RecoveryHook."""
        self._openings += len(channels)
        if self._openings > MOST_CHANGES:
            raise ValueError(f'more than {MOST_CHANGES:,} openings of channels')
        for channel in channels.tolist():
            self._recovered.setdefault(channel, []).append(iteration)

    def finish(self) -> None:
        """No more events will come."""
        self.iterations, self.channels, self.values = (np.array(c, np.int64) for c in self._growing)
        self._growing = array('q'), array('q'), array('b')

    @property
    def recovered(self) -> int:
        """Number of channels that RecoveryHook has opened."""
        return len(self._recovered)

    def touched(self, value: bool) -> np.ndarray:
        """Which channels ever became collapsed, or ceased to be; bool, shape (C,)."""
        mask = np.zeros(len(self.state), bool)
        mask[self.channels[self.values == value]] = True
        return mask

    def state_at(self, iteration: int) -> np.ndarray:
        """Which channels are collapsed as of the last report up to an iteration; shape (C,)."""
        state = self.start.copy()
        until = np.searchsorted(self.iterations, iteration, side='right')
        state[self.channels[:until]] = self.values[:until]  # the last of several stands
        return state

    def lives(
        self, limit: int, sizes: np.ndarray, interval: int, iterations: np.ndarray
    ) -> list[Life]:
        """The lives of at most ``limit`` channels, by the time of their first collapse."""
        begin, end = max(0, int(iterations[0]) - interval), int(iterations[-1])
        ever = np.flatnonzero(self.start | self.touched(True))
        first = np.full(len(self.state), end)
        np.minimum.at(first, self.channels, self.iterations)  # a revival is after the collapse
        first[self.start] = begin
        ever = ever[np.argsort(first[ever], kind='stable')]
        if len(ever) > limit:
            ever = ever[np.linspace(0, len(ever) - 1, limit).round().astype(int)]
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        order = np.argsort(self.channels, kind='stable')
        bounds = np.searchsorted(self.channels[order], [ever, ever + 1]).T
        lives = []
        for channel, (start, stop) in zip(ever, bounds):
            mine = order[start:stop]
            times, values = self.iterations[mine], self.values[mine]
            begins, ends = times[values == 1].tolist(), times[values == 0].tolist()
            if self.start[channel]:
                begins.insert(0, begin)
            layer = int(np.searchsorted(offsets, channel, side='right')) - 1
            lives.append(
                Life(
                    layer=layer,
                    channel=int(channel - offsets[layer]),
                    spans=list(zip(begins, [*ends, None])),
                    recovered=self._recovered.get(int(channel), []),
                )
            )
        return lives


class _Reading:
    """Takes a record in, line by line."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.iterations = array('q')
        self.learning_rate = array('d')
        self.counts = {kind: array('d') for kind in (*KINDS, 'collapsed')}

    def take_header(self, header: dict[str, Any]) -> None:
        names = [(layer['name'], layer['norm']) for layer in header['layers']]
        if not all(isinstance(text, str) for pair in names for text in pair):
            raise ValueError('a name of a layer or of its norm is no text')
        sizes = [_integer(layer['channels']) for layer in header['layers']]
        if not 1 <= sum(sizes) <= MOST_CHANNELS or len(sizes) > MOST_LAYERS:
            raise ValueError(f'{sum(sizes)} channels in {len(sizes)} layers')
        if not _integer(header['interval']) or not _integer(header['window']):
            raise ValueError(f'interval = {header["interval"]}, window = {header["window"]}')
        if not (0 <= _number(header['tau']) < 1 and 0 <= _number(header['k']) <= MOST_K):
            raise ValueError(f'tau = {header["tau"]}, k = {header["k"]}')
        self.header = header
        self.sizes = sizes
        self.offsets = np.concatenate(([0], np.cumsum(sizes))).tolist()
        self.events = _Events(sum(sizes))
        self.columns = Columns(len(sizes))

    def take_report(self, report: dict[str, Any]) -> None:
        iteration = report['iter']
        _integer(report['epoch'])
        _integer(report['total']['collapsed'])
        counts = [_count(report['total'].get(kind)) for kind in self.counts]
        rate = _number(next(iter(report['lr'].values()), math.nan))
        for kind in self.counts:
            layers = report['layers'].get(kind, self.sizes)
            if len(layers) != len(self.sizes):
                raise ValueError(f'{len(layers)} layers, the header has {len(self.sizes)}')
            if not isinstance(layers, list) or not _COUNTS.issuperset(map(type, layers)):
                raise ValueError(f'a number of {kind} channels is none')
            total = report['total'].get(kind) or 0
            summed = sum(filter(None, layers)) if kind in report['layers'] else total
            if not 0 <= total == summed <= self.offsets[-1]:
                raise ValueError(f'its {total} {kind} channels are not those of its layers')
        self._take_channels(report, iteration)
        by_layer = np.array(report['layers']['collapsed'])
        total, known = report['total']['collapsed'], by_layer.dtype.kind == 'i'
        if not (known and (by_layer >= 0).all() and total == self.events.count):
            raise ValueError(f'its {total} collapsed channels are not those of its layers')
        self.columns.add(iteration, by_layer)
        for series, count in zip(self.counts.values(), counts):
            series.append(count)
        self.learning_rate.append(rate)
        self.iterations.append(iteration)
        self.last = report

    def _take_channels(self, report: dict[str, Any], iteration: int) -> None:
        events = self.events
        if not self.iterations:  # the first report: what was so at the start?
            start = self._mask(report, 'collapsed') & ~self._mask(report, 'new')
            events.start = start | self._mask(report, 'revived')
            events.state = events.start.copy()
            events.count = int(events.start.sum())
        for kind, value in (('new', True), ('revived', False)):
            if report['channels'][kind]:
                events.add(iteration, self._mask(report, kind).nonzero()[0], value)
        if report['channels'].get('recovered'):
            events.recover(iteration, self._mask(report, 'recovered').nonzero()[0])
        if events.count != report['total']['collapsed']:  # a report between is missing
            collapsed = self._mask(report, 'collapsed')
            for value, mask in ((True, collapsed), (False, ~collapsed)):
                events.add(iteration, mask.nonzero()[0], value)

    def _mask(self, report: dict[str, Any], kind: str) -> np.ndarray:
        mask = np.zeros(self.offsets[-1], bool)
        for index, ranges in report['channels'][kind].items():
            layer = int(index)
            if not 0 <= layer < len(self.sizes):
                raise ValueError(f'there is no layer {layer}')
            mask[self.offsets[layer] : self.offsets[layer + 1]] = parse_ranges(
                ranges, self.sizes[layer]
            )
        return mask

    def finish(self) -> _Events:
        """Check what is shown of the last report alone."""
        for kind, counts in self.last['layers'].items():
            if len(counts) != len(self.sizes):
                raise ValueError(f'{len(counts)} layers have a number of {kind} filters')
            for count in counts:
                _count(count)
        self.events.finish()
        return self.events


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f'{reprlib.repr(value)} is no integer >= 0')
    return value


def _count(value: Any) -> float:
    return math.nan if value is None else _integer(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f'{reprlib.repr(value)} is no number')
    return float(value)


def _read_snapshots(found: dict[int, Path], events: _Events) -> list[Snapshot]:
    """Those of the start, the middle and the end."""
    if not found:
        return []
    channels = len(events.state)
    last = max(found)
    middle = min(found, key=lambda iteration: abs(iteration - last / 2))
    return [
        Snapshot(iteration, *read_snapshot(found[iteration], channels), events.state_at(iteration))
        for iteration in sorted({min(found), middle, last})
    ]


def _read_scores(record: Path) -> dict[str, tuple[list[int], list[float]]]:
    """AP and AP50 of the run and of those that it continues."""
    found: dict[str, dict[int, float]] = {name: {} for name in SCORES}
    iteration, has_epochs = 0, True  # as the lines so far tell

    def take(number: int, values: dict[str, Any]) -> None:
        nonlocal iteration, has_epochs
        if 'loss' in values:
            iteration = _integer(values['step'])
        if number == 1:  # a resumed run starts here: what came after in the earlier one is void
            start = values.get('epoch', values.get('step', 0)) if has_epochs else iteration
            for name, scores in found.items():
                found[name] = {step: score for step, score in scores.items() if step < start}
        for key, value in values.items():
            for name, pattern in SCORES.items():
                if re.fullmatch(pattern, key) and math.isfinite(_number(value)):
                    step = _integer(values['step'])
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
