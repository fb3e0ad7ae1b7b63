"""The figure of life lines: when each channel was collapsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .events import Life
from .labels import DOTS, add_legend, each_run, panel_label, titled
from .runs import Run
from .style import COLORS, WIDTH, grid_shape, iterations_on, shorten, whole_numbers

LIFE_LINES = 150  # of each run
NAMED_LIVES = 40  # of one run: as many as have room for their names
RECOVERED: Any = dict(marker='x', color='#009E73')  # Okabe and Ito's green


def life_lines(runs: Sequence[Run]) -> Figure | str:
    """Draw when the channels that ever collapsed did so, and when they were revived."""
    ever = [int(run.ever_collapsed.sum()) for run in runs]
    if not any(ever):
        return 'No filter was collapsed at any report: there are no life lines to draw.'
    rows, columns = grid_shape(len(runs))
    lives = [run.events.lives(LIFE_LINES) for run in runs]
    most = max(map(len, lives))
    named = len(runs) == 1 and most <= NAMED_LIVES
    height = min(7.5, max(2.6, (0.14 if named else 0.055) * most))
    figure = Figure(figsize=(WIDTH, 1.2 + height * rows), layout='constrained')
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, (ax, run, mine) in enumerate(zip(axes.flat, runs, lives)):
        border = 1.02 * float(run.iterations[-1])
        width = float(np.clip(0.6 * 72 * height / (most + 1), 0.6, 3))
        _draw_lives(ax, mine, COLORS[number], width, border)
        ax.set_xlim(0, border)
        ax.set_ylim(most + 1, 0)
        ax.yaxis.set_major_locator(whole_numbers())
        few = len(mine) < ever[number]
        shown = f'{len(mine)} of {ever[number]:,} shown' if few else f'all {len(mine)} shown'
        ax.set_title(f'{panel_label(runs, run)}{shown}')
        iterations_on(ax)
        if named:
            names = [f'{shorten(run.names[life.layer], 30)}: {life.channel}' for life in mine]
            ax.set_yticks(range(1, len(mine) + 1), names, fontsize=7)
            ax.set_ylabel('filters, by first collapse')
        else:
            ax.set_ylabel('filters, by first collapse (rank)')
        ax.label_outer()
    for ax in axes.flat[len(runs) :]:
        ax.remove()
    handles = [
        Line2D([], [], color='#555555', linewidth=2.5, label='collapsed'),
        Line2D([], [], color='black', markerfacecolor='white', label='revived', **DOTS),
    ]
    if any(run.ever_recovered for run in runs):
        label = 'opened by RecoveryHook'
        handles.append(Line2D([], [], linestyle='', label=label, markersize=5, **RECOVERED))
    add_legend(figure, handles)
    numbers = [
        f'{int((run.ever_revived & ~run.collapsed).sum()):,} of {count:,}'
        for run, count in zip(runs, ever)
    ]
    return titled(figure, each_run(runs, numbers, ' filters that collapsed are alive at the end'))


def _draw_lives(ax: Axes, lives: Sequence[Life], color: str, width: float, border: float) -> None:
    """Draw a line of ``width`` points for each life; one that lasts runs to the border."""
    pixel = border / 1000
    lines = [
        [(begin, y), (end, y)]
        for y, life in enumerate(lives, start=1)
        for begin, end in _joined(life.spans, pixel, border)
    ]

    def points(times: Iterable[list[int]]) -> list[tuple[int, int]]:
        return [(x, y) for y, mine in enumerate(times, start=1) for x in _apart(mine, pixel)]

    revivals = points([end for _, end in life.spans if end is not None] for life in lives)
    openings = points(life.recovered for life in lives)
    dense = len(revivals) > 2000  # too many for circles, and for an SVG
    ax.add_collection(LineCollection(lines, colors=color, linewidths=width, rasterized=dense))
    size = (1.8 * width + 1) ** 2
    circles: Any = dict(s=size, marker='o', facecolor='white', edgecolor='black', linewidth=0.7)
    ticks: Any = dict(s=width**2, marker='|', facecolor='black', linewidth=0.4, rasterized=True)
    if revivals:
        ax.scatter(*zip(*revivals), **(ticks if dense else circles), zorder=3)
    if openings:
        ax.scatter(*zip(*openings), **(RECOVERED | dict(s=size)), zorder=4)


def _joined(
    spans: list[tuple[int, int | None]], pixel: float, border: float
) -> list[tuple[float, float]]:
    """Spans, joined where no screen would show the gap; one that lasts ends at the border."""
    joined: list[tuple[float, float]] = []
    for begin, last in spans:
        end = border if last is None else last
        if joined and begin - joined[-1][1] < pixel:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _apart(times: Sequence[int], pixel: float) -> list[int]:
    """Drop times that a screen would draw over the previous one."""
    kept: list[int] = []
    for time in times:
        if not kept or time - kept[-1] >= pixel:
            kept.append(time)
    return kept
