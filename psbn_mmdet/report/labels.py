"""Titles and legends of figures that show one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .runs import Run
from .style import COLORS, shorten, wrap

DOTS: Any = dict(linestyle='', marker='o')  # in a legend


def titled(figure: Figure, title: str) -> Figure:
    """Give a figure its title, and return it."""
    figure.suptitle(wrap(title, figure.get_figwidth()))
    return figure


def run_handles(runs: Sequence[Run], what: str = '', **marker: Any) -> list[Line2D]:
    """Legend entries with the color of each run."""
    labels = [
        ', '.join(filter(None, (what, shorten(run.label, 40) if len(runs) > 1 else '')))
        for run in runs
    ]
    return [
        Line2D([], [], color=color, linewidth=2.5, label=label, **marker)
        for label, color in zip(labels, COLORS)
    ]


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draw a legend below the panels, in as many columns as the longest label leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(9 * figure.get_figwidth()) // (longest + 6)
    figure.legend(
        handles=handles, loc='outside lower center', ncols=min(len(handles), max(1, columns))
    )


def panel_label(runs: Sequence[Run], run: Run) -> str:
    """The first line of a panel's title: the run's label if there are several."""
    return f'{shorten(run.label, 24)}\n' if len(runs) > 1 else ''


def each_run(runs: Sequence[Run], values: Sequence[object], what: str = '') -> str:
    """What was found in each run, such as '43 trapped with BN, 1 with psBN'."""
    texts = [f'{value:,}' if isinstance(value, int) else f'{value}' for value in values]
    texts[0] += what
    if len(runs) == 1:
        return texts[0]
    return ', '.join(f'{text} with {shorten(run.label, 24)}' for run, text in zip(runs, texts))


def shared_setting(runs: Sequence[Run], name: str) -> str:
    """A threshold of all runs."""
    return ' or '.join(dict.fromkeys(f'{run.header[name]:g}' for run in runs))
