"""The report of runs that are being trained, written again as they go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..records import NoReportError
from .page import check_request, stop_reloading, write_report
from .runs import has_ended, inputs_of


def follow_report(
    work_dirs: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    seconds: float = 30.0,
    say: Callable[[str], None] = print,
    write: Callable[..., Path] = write_report,
) -> None:
    """Write a report, and write it again whenever a file of its runs has changed.

    Until all trainings have come to their end, or Ctrl-C. In a browser the page loads itself again
    meanwhile. Where there is no report yet it is waited for.

    Args:
        work_dirs (Mapping[str, str | PathLike]): As for :func:`write_report`.
        out (str | PathLike): The page to write.
        seconds (float): How long to wait before the files are looked at again. Defaults to 30.
        say (Callable[[str], None]): Called with a sentence when there is news.
        write (Callable): What writes the page, called as ``write(work_dirs, out, reload=seconds)``.

    Raises:
        ValueError: As :func:`write_report`, but for runs without a report.
    """
    check_request(work_dirs, out)
    seen: Any = None
    said = end = ''
    written = False
    try:
        while not end:
            try:
                # Both before the files are read: what comes meanwhile is for the next time.
                last = all(has_ended(path) for path in work_dirs.values())
                now = [inputs_of(path) for path in work_dirs.values()]
                if now != seen:
                    seen = now
                    write(work_dirs, out, reload=seconds)
                    written = True
                    news = f'The report is in {out} and follows the training until Ctrl-C'
                end = 'The training has ended' if last else ''
            except (FileNotFoundError, NoReportError) as error:
                news = f'Waiting for a report: {error}'
            if news != said and not end:
                say(news)
                said = news
            if not end:
                time.sleep(seconds)
    except KeyboardInterrupt:
        end = 'Followed no longer'
    finally:
        written = written and Path(out).is_file()
        if written:
            stop_reloading(Path(out), seconds)
    say(f'{end}: the report is in {out}' if written else f'{end}: there is no report')
