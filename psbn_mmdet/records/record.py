"""The collapse record of a training run: a file of JSON lines.

The first line is the header: the layers, their channel counts, the thresholds, the versions, and an
``id`` by which a resumed run finds the record that it continues. Each further line is a report of
one iteration. Channels are written as ranges, '0-3,7' for 0, 1, 2, 3 and 7. Lines are appended and
flushed one by one, so that a killed run loses at most the last one.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..atomic import replacing

RECORD_FILE = 'collapse.jsonl'  # in a run's log folder
ENDED_FILE = 'collapse.ended'  # beside it, empty, once the training has come to its end
FORMAT = 1
MOST_BYTES = 2**23  # of a line: a report on 200,000 channels, each second one collapsed, is smaller
MOST_CHANNELS = 10**6  # of all layers; a damaged header could claim any number
_RANGE = re.compile(r'(\d{1,9})(?:-(\d{1,9}))?', re.ASCII)
# What reading a line of anything may raise.
_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


class NoReportError(ValueError):
    """A record has no header, or no report: a training that has just begun, or none."""


@dataclass(frozen=True)
class Records:
    """The collapse record of a run.

    Attributes:
        header (dict): The file's first line.
        reports (list[dict]): The other lines, by iteration.
    """

    header: dict[str, Any]
    reports: list[dict[str, Any]]

    def series(self, kind: str) -> tuple[list[int], list[float]]:
        """Counts of a kind over iterations, NaN where it was not observed.

        Args:
            kind (str): 'collapsed', 'vanished', 'dead', 'trapped', 'broken', 'unstarted', 'new' or
                'revived'; records of earlier versions lack some.

        Returns:
            tuple[list[int], list[float]]: Iterations and counts.
        """
        counts = [report['total'].get(kind) for report in self.reports]
        return (
            [report['iter'] for report in self.reports],
            [float('nan') if count is None else count for count in counts],
        )

    def mask(self, report: dict[str, Any], kind: str, layer: int) -> np.ndarray:
        """Bool mask of shape (C,) of a layer's channels of a kind in a report."""
        return parse_ranges(
            report['channels'].get(kind, {}).get(str(layer), ''),
            self.header['layers'][layer]['channels'],
        )


def read_records(path: str | os.PathLike, last_of: int | None = None) -> Records:
    """Read the collapse record of a run.

    A torn last line, left by a killed run or being written, is passed over.

    Args:
        path (str | PathLike): A ``collapse.jsonl`` file.
        last_of (int, optional): Keep only the last report up to this iteration, if there is any.
            Defaults to None: all reports.

    Returns:
        Records: Header and reports.

    Raises:
        NoReportError: If the file has no whole header; it is a ValueError.
        ValueError: If a line is damaged; the message has its number.
    """
    with open(path, 'rb') as file:
        lines = stream_records(file, lambda header: None, _check_report)
        header = next(lines)
        if last_of is None:
            return Records(header, list(lines))
        return Records(header, list(deque((r for r in lines if r['iter'] <= last_of), maxlen=1)))


def stream_records(
    file: BinaryIO, take_header: Callable[[dict], object], take_report: Callable[[dict], object]
) -> Iterator[dict[str, Any]]:
    """Read a collapse record line by line, holding no more than one.

    Args:
        file (BinaryIO): A ``collapse.jsonl`` file, opened.
        take_header (Callable[[dict], object]): Called with the header. What it raises for want of
            a key, or for a value out of place, is an error of that line.
        take_report (Callable[[dict], object]): The same, for each report.

    Yields:
        dict: The header, then the reports.

    Raises:
        NoReportError: If the file has no whole header; it is a ValueError.
        ValueError: If a line is damaged; the message has its number.
    """
    last = -1

    def take(number: int, value: Any) -> None:
        nonlocal last
        if number == 1 and value['format'] != FORMAT:
            raise ValueError(f'format {reprlib.repr(value["format"])}, this version reads {FORMAT}')
        if number > 1:
            iteration = value['iter']
            if type(iteration) is not int or not last < iteration < 2**63:
                raise ValueError(
                    f'iteration {reprlib.repr(iteration)} does not follow the one before'
                )
            last = iteration
        (take_header if number == 1 else take_report)(value)

    empty = True
    for value in stream_json(file, take):
        empty = False
        yield value
    if empty:
        raise NoReportError(
            f'{file.name} has no header line: it is no collapse record, or was cut off'
        )


def stream_json(file: BinaryIO, take: Callable[[int, Any], object]) -> Iterator[Any]:
    """Read a file of JSON lines one by one, without a torn last line.

    Args:
        file (BinaryIO): The file, opened.
        take (Callable[[int, Any], object]): Called with each line's number and value.

    Yields:
        Any: The lines' values.

    Raises:
        ValueError: If a line is no JSON, or ``take`` finds it damaged.
    """
    for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b''), start=1):
        if not line.endswith(b'\n') and len(line) < MOST_BYTES:
            return
        try:
            if len(line) == MOST_BYTES:
                raise ValueError(f'it has {MOST_BYTES:,} bytes or more')
            value = json.loads(line)
            take(number, value)
        except _DAMAGES as error:
            raise ValueError(
                f'{file.name}, line {number} is damaged ({_shown(error)}): restore the file, '
                'or delete the line'
            ) from None
        yield value


def _check_report(report: dict[str, Any]) -> None:
    count = report['total']['collapsed']
    if count is not None and type(count) is not int:
        raise ValueError(f'the count {reprlib.repr(count)} is no integer')
    report['channels']['collapsed'].items()


def _shown(error: BaseException) -> str:
    """What is wrong with a line; of a key that is missing the error has the name only."""
    return f'no {error}' if isinstance(error, KeyError) else str(error)


class RecordWriter:
    """Append reports to a collapse record.

    Args:
        path (str | PathLike): The file; it is made with its header, and with the reports of an
            earlier record at once, or not at all.
        header (dict): Layers, thresholds and versions.
        earlier (str | PathLike, optional): The record of the run that this one continues.
            Defaults to None.
        last (int): The iteration up to which its reports are taken over. Defaults to 0.

    Raises:
        ValueError: If a line of ``earlier`` is damaged; the message has its number.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        header: dict[str, Any],
        earlier: str | os.PathLike | None = None,
        last: int = 0,
    ) -> None:
        self.path = Path(path)
        with replacing(self.path) as part, open(part, 'w') as file:
            file.write(json.dumps({'format': FORMAT, **header}) + '\n')
            for report in _reports_until(earlier, last) if earlier else ():
                file.write(json.dumps(report) + '\n')

    def append(self, report: dict[str, Any]) -> None:
        """Write a report and flush it."""
        with open(self.path, 'a') as file:
            file.write(json.dumps(report) + '\n')

    def end(self) -> None:
        """Note that no more reports will come."""
        self.path.with_name(ENDED_FILE).touch()


def _reports_until(path: str | os.PathLike, last: int) -> Iterator[dict[str, Any]]:
    with open(path, 'rb') as file:
        lines = stream_records(file, lambda header: None, _check_report)
        next(lines)
        yield from (report for report in lines if report['iter'] <= last)


def format_ranges(mask: np.ndarray) -> str:
    """Write the set channels of a bool mask of shape (C,) as ranges, such as '0-3,7'."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return ','.join(
        f'{start}' if stop == start + 1 else f'{start}-{stop - 1}'
        for start, stop in edges.reshape(-1, 2)
    )


def parse_ranges(ranges: str, channels: int) -> np.ndarray:
    """Read ranges, such as '0-3,7', as a bool mask of shape (channels,).

    Raises:
        ValueError: If a part is no range of these channels, or if they are too many.
    """
    if not 0 <= channels <= MOST_CHANNELS:
        raise ValueError(f'{channels} is no number of channels from 0 to {MOST_CHANNELS:,}')
    mask = np.zeros(channels, dtype=bool)
    for part in filter(None, ranges.split(',')):
        match = _RANGE.fullmatch(part)
        start, stop = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not start <= stop < channels:
            raise ValueError(f'{reprlib.repr(part)} is no range of {channels} channels')
        mask[start : stop + 1] = True
    return mask
