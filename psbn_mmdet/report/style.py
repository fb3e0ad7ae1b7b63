"""How the figures look, and how users' text is put into them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Okabe and Ito's palette without its yellow, which is too light for lines: told apart by
# color-blind readers too. One for each run.
COLORS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')

WIDTH = 9.0  # of a figure, in inches

# Settings of matplotlib while figures are built and written. Labels and layers' names are no
# formulas, whatever dollar signs they have.
STYLE: Any = {
    'text.parse_math': False,
    'svg.hashsalt': 'psbn_mmdet',  # the same figure gives the same file
    'font.family': 'DejaVu Sans',
    'font.size': 9,
    'axes.titlesize': 9.5,
    'axes.labelsize': 9,
    'xtick.labelsize': 8,
    'ytick.labelsize': 8,
    'legend.fontsize': 8.5,
    'legend.frameon': False,
    'figure.titlesize': 11.5,
    'figure.titleweight': 'bold',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#E4E4E4',
    'lines.linewidth': 1.6,
}


def printable(text: str) -> str:
    """Text without what neither a page nor a picture can show: control characters and the like."""
    return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)


def shorten(text: str, length: int = 28) -> str:
    """Text with its middle cut out if it is longer than ``length`` characters.

    Examples:
        >>> shorten('backbone.layer1.0.bn1', 11)
        'backb…0.bn1'
    """
    text = printable(text)
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f'{text[: length - 1 - half]}…{text[-half:]}'


def wrap(title: str, width: float) -> str:
    """A title broken into lines of much the same length that fit a figure of ``width`` inches."""
    longest = round(9.5 * width)
    lines = textwrap.wrap(title, longest)
    for shorter in range(len(title) // len(lines), longest):
        balanced = textwrap.wrap(title, shorter)
        if len(balanced) == len(lines):
            return '\n'.join(balanced)
    return '\n'.join(lines)


def grid_shape(panels: int) -> tuple[int, int]:
    """Rows and columns of so many panels."""
    columns = min(panels, 3)
    return -(-panels // columns), columns


def axis_from_zero(axes: Sequence[Axes]) -> None:
    """Let count axes start at 0, with whole numbers and a height of at least 1."""
    for ax in axes:
        ax.set_ylim(0, max(1, ax.get_ylim()[1]))
        ax.yaxis.set_major_locator(whole_numbers())


def whole_numbers() -> MaxNLocator:
    """A few ticks at round whole numbers."""
    return MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])


def iterations_on(ax: Axes) -> None:
    """Make the horizontal axis one of iterations."""
    ax.set_xlabel('training time (iterations)')
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
