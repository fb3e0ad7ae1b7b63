"""Reading the collapse record of a training run, a file of JSON lines.

The first line is the header: the layers, their channel counts, the thresholds, the versions, and an
``id`` by which a resumed run finds the record that it continues. Each further line is the report of
one iteration. Its ``channels`` hold, for each kind, the channels of each layer as ranges, None
where they are unknown. The counts are not in the file: they are added to each report as it is read,
``layers`` for each layer and ``total`` for all.

Records are untrusted: each line is checked, and memory is bounded.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .names import COUNTS, RECOVERED
from .ranges import MOST_CHANNELS, parse_ranges

FORMAT = 2
MOST_BYTES = 2**23  # of a line: a report on 200,000 channels, each second one collapsed, is smaller
MOST_LAYERS, MOST_K = 10**4, 10**6
# What reading a damaged line may raise.
_DAMAGES = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Records:
    """The collapse record of a run.

    Attributes:
        header (dict): The file's first line.
        reports (list[dict]): The other lines, by iteration, with their counts.
    """

    header: dict[str, Any]
    reports: list[dict[str, Any]]

    def mask(self, report: dict[str, Any], kind: str, layer: int) -> np.ndarray:
        """Bool mask of shape (C,) of a layer's channels of a kind, all False if unknown."""
        return parse_ranges(
            report['channels'][kind][layer] or '', self.header['layers'][layer]['channels']
        )


def read_records(path: str | os.PathLike, last_of: int | None = None) -> Records:
    """Read the collapse record of a run.

    An incomplete last line, left by a killed run or being written, is skipped.

    Args:
        path (str | PathLike): A ``collapse.jsonl`` file.
        last_of (int, optional): Keep only the last report up to this iteration, if there is any.
            Defaults to None: all reports.

    Returns:
        Records: Header and reports.

    Raises:
        ValueError: If the file has no header, or if a line is damaged; the message has its number.
    """
    with open(path, 'rb') as file:
        lines = stream_records(file)
        header = next(lines)
        if last_of is None:
            return Records(header, list(lines))
        return Records(header, list(deque((r for r in lines if r['iter'] <= last_of), maxlen=1)))


def stream_records(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Read a collapse record line by line, holding no more than one line.

    Args:
        file (BinaryIO): A ``collapse.jsonl`` file, opened.

    Yields:
        dict: The header, then the reports with their counts.

    Raises:
        ValueError: If the file has no header, or if a line is damaged; the message has its number.
    """
    report_reader: _ReportReader | None = None

    def check(number: int, value: Any) -> None:
        nonlocal report_reader
        if report_reader is None:
            report_reader = _ReportReader(_check_header(value))
        else:
            report_reader.add_counts(value)

    yield from stream_json(file, check)
    if report_reader is None:
        raise ValueError(
            f'{file.name} has no header line: it is no collapse record, or was cut off'
        )


def stream_json(file: BinaryIO, check: Callable[[int, Any], object]) -> Iterator[Any]:
    """Read a file of JSON lines one by one, without an incomplete last line.

    Args:
        file (BinaryIO): The file, opened.
        check (Callable[[int, Any], object]): Called with each line's number and value. What it
            raises for a missing key or a wrong value becomes an error with that number.

    Yields:
        Any: The lines' values.

    Raises:
        ValueError: If a line is no JSON, or ``check`` finds it damaged.
    """
    for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b''), start=1):
        if not line.endswith(b'\n') and len(line) < MOST_BYTES:
            return
        try:
            if len(line) == MOST_BYTES:
                raise ValueError(f'it has {MOST_BYTES:,} bytes or more')
            value = json.loads(line)
            check(number, value)
        except _DAMAGES as error:
            why = f'no {error}' if isinstance(error, KeyError) else error
            raise ValueError(
                f'{file.name}, line {number} is damaged ({why}): restore the file, or delete the '
                'line'
            ) from None
        yield value


def sum_known(counts: Sequence[int | None]) -> int | None:
    """Sum of the known counts, None if all are unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def check_integer(value: Any) -> int:
    """Check that a value is an integer from 0 to 2**53."""
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f'{reprlib.repr(value)} is no integer >= 0')
    return value


def check_number(value: Any) -> float:
    """Check that a value is a number."""
    if type(value) not in (int, float):
        raise ValueError(f'{reprlib.repr(value)} is no number')
    return float(value)


def _check_header(header: dict[str, Any]) -> list[int]:
    """Check the header, and return the layers' numbers of channels."""
    if header['format'] != FORMAT:
        raise ValueError(f'format {reprlib.repr(header["format"])}, this version reads {FORMAT}')
    names = [(layer['name'], layer['norm']) for layer in header['layers']]
    if not all(isinstance(text, str) for pair in names for text in pair):
        raise ValueError('a name of a layer or of its norm is no text')
    sizes = [check_integer(layer['channels']) for layer in header['layers']]
    if not 1 <= sum(sizes) <= MOST_CHANNELS or len(sizes) > MOST_LAYERS:
        raise ValueError(f'{sum(sizes)} channels in {len(sizes)} layers')
    if not check_integer(header['interval']) or not check_integer(header['window']):
        raise ValueError(f'interval = {header["interval"]}, window = {header["window"]}')
    if not (0 <= check_number(header['tau']) < 1 and 0 <= check_number(header['k']) <= MOST_K):
        raise ValueError(f'tau = {header["tau"]}, k = {header["k"]}')
    return sizes


class _ReportReader:
    """Checks reports one after another, and counts their channels.

    Args:
        sizes (list[int]): The layers' numbers of channels.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._iteration = -1
        nothing: list = [None] * len(sizes)
        # By kind, the ranges and counts of the last report; most do not change in the next.
        self._last: dict[str, tuple[list, list, int | None]]
        self._last = dict.fromkeys((*COUNTS, RECOVERED), (nothing, nothing, None))

    def add_counts(self, report: dict[str, Any]) -> None:
        """Add ``layers`` and ``total``, the counts by kind, to a report."""
        iteration = report['iter']
        if type(iteration) is not int or not self._iteration < iteration < 2**63:
            raise ValueError(f'iteration {reprlib.repr(iteration)} does not follow the previous')
        self._iteration = iteration
        check_integer(report['epoch'])
        for rate in report['lr'].values():
            check_number(rate)
        channels = report['channels']
        kinds = (*COUNTS, RECOVERED) if RECOVERED in channels else COUNTS
        counts = {kind: self._count(kind, channels[kind]) for kind in kinds}
        report['layers'] = {kind: by_layer for kind, (by_layer, _) in counts.items()}
        report['total'] = {kind: total for kind, (_, total) in counts.items()}
        for kind in ('collapsed', 'new', 'revived'):
            if None in channels[kind]:
                raise ValueError(f'the {kind} channels of a layer are unknown')

    def _count(self, kind: str, ranges: list[str | None]) -> tuple[list[int | None], int | None]:
        """Count the channels of each layer and of all, parsing only changed ranges."""
        last_ranges, layers, total = self._last[kind]
        if ranges != last_ranges:
            if not isinstance(ranges, list) or len(ranges) != len(self._sizes):
                raise ValueError(f'{reprlib.repr(ranges)} are no {kind} channels of each layer')
            layers = [
                count if new == old else None if new is None else int(parse_ranges(new, size).sum())
                for new, old, count, size in zip(ranges, last_ranges, layers, self._sizes)
            ]
            total = sum_known(layers)
            self._last[kind] = ranges, layers, total
        return layers, total
