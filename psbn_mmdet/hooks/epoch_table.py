"""The table by stage that is logged at an epoch's end."""

from __future__ import annotations

import io
import locale
import sys

import rich.box
from rich.console import Console
from rich.table import Table

from ..collapse import Census, Report
from ..records import KINDS, sum_known

COLUMNS = ('unstarted', *KINDS, 'collapsed')
FOOT = (
    'new, revived: in this epoch; -: not observed; unstarted: as initialized, has not begun; '
    'collapsed: vanished, dead, trapped or broken'
)


class EpochTable:
    """Counts of one epoch: the last ones stand, new and revived add up."""

    def __init__(self) -> None:
        self._last: Report | None = None
        self._changes: dict[str, dict[str, int]] = {'new': {}, 'revived': {}}

    def add(self, report: Report) -> None:
        """Take a report in."""
        self._last = report
        for kind, sums in self._changes.items():
            for stage, count in report.by_stage(kind).items():
                sums[stage] = sums.get(stage, 0) + (count or 0)

    def render(self, iteration: int, now: Census) -> str:
        """The table as text.

        Args:
            iteration (int): The iteration it is now.
            now (Census): What the parameters tell now, for an epoch without a report.
        """
        report = self._last or _report_of(now, iteration)
        columns = {kind: report.by_stage(kind) for kind in COLUMNS}
        columns |= {kind: dict(sums) for kind, sums in self._changes.items()}
        boxes = rich.box.HEAVY_HEAD if _can_be_written('┏━') else rich.box.ASCII
        table = Table(box=boxes, title=f'Collapsed filters at iteration {report.iteration}')
        table.add_column('stage', no_wrap=True)
        for name in ('filters', 'frozen', *columns):
            table.add_column(name, justify='right')
        stages = report.census.stages()
        for stage, part in stages.items():
            counts = [values.get(stage) for values in columns.values()]
            table.add_row(stage, *map(_cell, [part.channels, part.frozen, *counts]))
        table.add_section()
        sums = [sum_known([values.get(stage) for stage in stages]) for values in columns.values()]
        table.add_row('all', *map(_cell, [report.census.channels, report.census.frozen, *sums]))
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        return f'\n{text.getvalue().rstrip()}\n{FOOT}'


def _report_of(census: Census, iteration: int) -> Report:
    """What a census tells by itself."""
    masks = {kind: [getattr(layer, kind) for layer in census.layers] for kind in COLUMNS}
    return Report(iteration, 0, census, masks)


def _can_be_written(text: str) -> bool:
    """Whether the log's stream and its file, which has the locale's encoding, can take a text."""
    encodings = {getattr(sys.stdout, 'encoding', None), locale.getpreferredencoding(False)}
    try:
        for encoding in filter(None, encodings):
            text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _cell(count: int | None) -> str:
    return '-' if count is None else str(count)
