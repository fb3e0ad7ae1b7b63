"""Write a report of one or more training runs: an HTML page, and its figures as PNG and SVG."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from ..report import write_report
from ..report.style import shorten
from . import complain, say


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, write the report, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help="a run's work dir, of which the latest run is taken, or a 'collapse.jsonl'",
    )
    parser.add_argument('--labels', nargs='+', help="a label for each run, else its folder's name")
    parser.add_argument(
        '-o', '--out', default='report.html', help='the page to write, default: %(default)s'
    )
    args = parser.parse_args(argv)
    labels = args.labels or [Path(work_dir).resolve().name for work_dir in args.work_dirs]
    try:
        if len(labels) != len(args.work_dirs):
            raise ValueError(
                f'{len(args.work_dirs)} runs, but {len(labels)} labels: give --labels one for each'
            )
        if len(set(labels)) != len(labels):
            raise ValueError(
                f'the labels {shorten(", ".join(labels), 200)} are not all different: give others '
                'with --labels'
            )
        runs = dict(zip(labels, args.work_dirs))
        say(f'The report is in {_write(runs, args.out)}')
    except (OSError, ValueError) as error:
        return complain('report', error)
    return 0


def _write(runs: Mapping[str, str], out: str) -> Path:
    """Write the page, under a bar where there is a terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # before rich 14.3 a disabled bar breaks a line
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what.replace('[', r'\['), total=1)
            bar.update(tasks[what], completed=share)

        return write_report(runs, out, progress)
