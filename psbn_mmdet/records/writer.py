"""Writing the collapse record of a training run; :mod:`.reader` describes the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .atomic import replacing
from .reader import FORMAT, stream_records


class RecordWriter:
    """Append reports to a collapse record.

    Each line is flushed at once, so that a killed run loses at most the last one.

    Args:
        path (str | PathLike): The file, created with its header and the reports of an earlier
            record, or not at all.
        header (dict): Layers, thresholds and versions.
        earlier (str | PathLike, optional): The record of the run that this one continues.
            Defaults to None.
        last (int): The iteration up to which its reports are copied. Defaults to 0.

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
            if earlier:
                with open(earlier, 'rb') as source:
                    lines = stream_records(source)
                    next(lines)
                    for report in lines:
                        if report['iter'] <= last:
                            file.write(_line(report))

    def append(self, report: dict[str, Any]) -> None:
        """Write a report and flush it."""
        with open(self.path, 'a') as file:
            file.write(_line(report))


def _line(report: dict[str, Any]) -> str:
    """A report as a line, without its counts, which are derived from its channels."""
    return json.dumps({k: v for k, v in report.items() if k not in ('layers', 'total')}) + '\n'
