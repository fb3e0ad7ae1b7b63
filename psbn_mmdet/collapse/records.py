"""The collapse record of a training run: a file of JSON lines.

The first line is the header: the layers, their channel counts, the thresholds, the versions. Each
further line is a report of one iteration. Channels are written as ranges, '0-3,7' for
0, 1, 2, 3 and 7. Lines are appended and flushed one by one, so that a killed run loses at most
the last one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing

RECORD_FILE = 'collapse.jsonl'  # in a run's log folder
FORMAT = 1


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
            kind (str): 'collapsed', 'vanished', 'dead', 'trapped', 'new' or 'revived'.

        Returns:
            tuple[list[int], list[float]]: Iterations and counts.
        """
        counts = [report['total'][kind] for report in self.reports]
        return (
            [report['iter'] for report in self.reports],
            [float('nan') if count is None else count for count in counts],
        )

    def mask(self, report: dict[str, Any], kind: str, layer: int) -> np.ndarray:
        """Bool mask of shape (C,) of a layer's channels of a kind in a report."""
        return parse_ranges(
            report['channels'][kind].get(str(layer), ''), self.header['layers'][layer]['channels']
        )


def read_records(path: str | os.PathLike) -> Records:
    """Read the collapse record of a run.

    A torn last line, left by a killed run, is passed over.

    Args:
        path (str | PathLike): A ``collapse.jsonl`` file.

    Returns:
        Records: Header and reports.

    Raises:
        ValueError: If a line is damaged; the message has its number.
    """
    lines = Path(path).read_bytes().split(b'\n')
    lines.pop()  # what follows the last newline: nothing, or the torn line
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            if number == 1 and value['format'] != FORMAT:
                raise ValueError(f'format {value["format"]}, this version reads {FORMAT}')
            parsed.append(value if number == 1 else _checked_report(value))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number} is damaged ({error}): restore the file, or delete the line'
            ) from None
    if not parsed:
        raise ValueError(f'{path} has no header line: it is no collapse record, or was cut off')
    return Records(parsed[0], parsed[1:])


def _checked_report(report: dict[str, Any]) -> dict[str, Any]:
    report['iter'], report['total']['collapsed'], report['channels']['collapsed']
    return report


class RecordWriter:
    """Append reports to a collapse record.

    Args:
        path (str | PathLike): The file; it is made with its header, and with ``reports`` at once,
            or not at all.
        header (dict): Layers, thresholds and versions.
        reports (list[dict]): Reports of the run that this one continues. Defaults to ().
    """

    def __init__(
        self, path: str | os.PathLike, header: dict[str, Any], reports: list | tuple = ()
    ) -> None:
        self.path = Path(path)
        with replacing(self.path) as part, open(part, 'w') as file:
            for line in ({'format': FORMAT, **header}, *reports):
                file.write(json.dumps(line) + '\n')

    def append(self, report: dict[str, Any]) -> None:
        """Write a report and flush it."""
        with open(self.path, 'a') as file:
            file.write(json.dumps(report) + '\n')


def format_ranges(mask: np.ndarray) -> str:
    """Write the set channels of a bool mask of shape (C,) as ranges, such as '0-3,7'."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return ','.join(
        f'{start}' if stop == start + 1 else f'{start}-{stop - 1}'
        for start, stop in edges.reshape(-1, 2)
    )


def parse_ranges(ranges: str, channels: int) -> np.ndarray:
    """Read ranges, such as '0-3,7', as a bool mask of shape (channels,)."""
    mask = np.zeros(channels, dtype=bool)
    for part in filter(None, ranges.split(',')):
        start, _, stop = part.partition('-')
        mask[int(start) : int(stop or start) + 1] = True
    return mask
