"""The figures of a report: each a function from runs to a figure, or to the reason for none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .channels import channels
from .downsampling import downsample
from .labels import add_legend, each_run, run_handles, shared_setting, titled
from .life_lines import life_lines
from .runs import Run
from .scores import SCORES
from .stage_table import COLUMNS, stage_rows
from .style import COLORS, WIDTH, axis_from_zero, grid_shape, iterations_on, shorten

LAYER_NAMES = 60  # beside a heat map


def counts(runs: Sequence[Run]) -> Figure:
    """Collapsed, trapped and vanished filters over iterations, and the learning rate."""
    panels = {
        'collapsed': 'collapsed filters\n(any of the kinds)',
        'trapped': 'trapped filters\n(no gradient)',
        'vanished': f'vanished filters\n(|gamma| <= {shared_setting(runs, "tau")})',
    }
    figure = Figure(figsize=(WIDTH, 7.5), layout='constrained')
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 1.3])
    for number, (run, color) in enumerate(zip(runs, COLORS)):
        width = 1.6 + (len(runs) - 1 - number)  # equal curves lie upon one another
        for ax, kind in zip(axes, panels):
            ax.plot(*downsample(run.iterations, run.counts[kind]), color=color)
        axes[-1].plot(*downsample(run.iterations, run.learning_rate), color=color, linewidth=width)
    for ax, text in zip(axes, (*panels.values(), 'learning rate\n(no unit)')):
        ax.set_ylabel(text)
    axis_from_zero(axes[:-1])
    axes[-1].set_ylim(bottom=0)
    iterations_on(axes[-1])
    axes[-1].set_xlim(0, 1.01 * max(int(run.iterations[-1]) for run in runs))
    figure.align_ylabels(axes)
    if len(runs) > 1:
        add_legend(figure, run_handles(runs))
    collapsed = [run.last['total']['collapsed'] for run in runs]
    filters = ' or '.join(dict.fromkeys(f'{run.sizes.sum():,}' for run in runs))
    title = each_run(runs, collapsed, f' of {filters} filters collapsed at the end')
    return titled(figure, title)


def heat_map(runs: Sequence[Run]) -> Figure:
    """The share of collapsed channels of each layer over iterations."""
    rows, columns = grid_shape(len(runs))
    layers = max(len(run.names) for run in runs)
    height = min(9.0, max(3.2, 1.2 + 0.135 * layers))
    figure = Figure(figsize=(max(WIDTH, 1.6 + 4.2 * columns), height * rows), layout='constrained')
    shares = [run.share_collapsed() for run in runs]
    top = max(0.01, max(share.max(initial=0) for _, share in shares))
    # By the square root: a few collapsed channels beside a layer full of them stay in sight.
    norm = PowerNorm(0.5, vmin=0, vmax=top)
    axes = figure.subplots(rows, columns, squeeze=False)
    for number, (ax, run, (edges, share)) in enumerate(zip(axes.flat, runs, shares)):
        mesh = ax.pcolormesh(
            edges,
            np.arange(len(run.names) + 1),
            np.ma.masked_equal(share, 0),  # white
            cmap='magma_r',
            norm=norm,
            rasterized=True,
        )
        ax.grid(visible=False)
        ax.spines[:].set(visible=True, color='#666666', linewidth=0.6)
        ax.invert_yaxis()
        iterations_on(ax)
        if len(runs) > 1:
            ax.set_title(shorten(run.label, 40), color=COLORS[number], fontweight='bold')
        repeated = number % columns > 0 and run.names == runs[number - 1].names
        _name_layers(ax, run, named=not repeated)
    for ax in axes.flat[len(runs) :]:
        ax.remove()
    panels = list(axes.flat[: len(runs)])
    bar = figure.colorbar(mesh, ax=panels, format=PercentFormatter(1))
    bar.set_label('filters collapsed\n(%, square-root scale)')
    bar.outline.set_visible(False)
    worst = []
    for run, (_, share) in zip(runs, shares):
        layer = int(share[:, -1].argmax())
        worst.append(f'{shorten(run.names[layer])} ({share[layer, -1]:.1%})')
    return titled(figure, f'Most collapsed layer at the end: {each_run(runs, worst)}')


def _name_layers(ax: Axes, run: Run, named: bool) -> None:
    """Label rows by layer, every n-th if there are many, and group them by stage."""
    every = -(-len(run.names) // LAYER_NAMES)
    labels = {}
    for stage, layers in run.stages.items():
        if layers[0]:
            ax.axhline(layers[0], color='#666666', linewidth=0.6)
        for index in layers:
            if index % every == 0:
                labels[index + 0.5] = shorten(run.names[index].removeprefix(f'{stage}.'), 22)
    ax.tick_params(axis='y', which='both', length=0)
    ax.yaxis.remove_overlapping_locs = False  # a stage's label may stand level with a layer's
    if not named:
        ax.set_yticks([])
        return
    ax.set_yticks(list(labels), list(labels.values()), minor=True, fontsize=6)
    apart = len(run.names) / 40  # rows between the labels of two stages, at least
    centres: dict[float, str] = {}
    for stage, layers in run.stages.items():
        center = (layers[0] + layers[-1] + 1) / 2
        if not centres or center - list(centres)[-1] >= apart:
            centres[center] = shorten(stage.removeprefix('backbone.'), 22)
    ax.set_yticks(list(centres), list(centres.values()), fontsize=8, fontweight='bold')
    ax.tick_params(axis='y', which='major', pad=8 + 3.9 * max(map(len, labels.values())))


def scores(runs: Sequence[Run]) -> Figure | str:
    """AP and AP50 over epochs."""
    names = [name for name in SCORES if any(name in run.scores for run in runs)]
    if not names:
        return 'No AP: the logs (vis_data/scalars.json) have no validation yet.'
    figure = Figure(figsize=(WIDTH, 3.6), layout='constrained')
    axes = figure.subplots(1, len(names), squeeze=False, sharex=True)[0]
    for ax, name in zip(axes, names):
        for run, color in zip(runs, COLORS):
            if name in run.scores:
                steps, values = run.scores[name]
                ax.plot(steps, values, color=color, marker='o', markersize=3.5)
        units = sorted({run.score_unit for run in runs if name in run.scores})
        ax.set_xlabel(f'training time ({" or ".join(units)}s)')
        ax.set_ylabel(f'{name} (0 to 1)')
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        add_legend(figure, run_handles(runs))
    last = [
        f'{run.scores[names[0]][1][-1]:.3f}' if names[0] in run.scores else 'unknown'
        for run in runs
    ]
    return titled(figure, f'{names[0]} at the last validation: {each_run(runs, last)}')


def stages(runs: Sequence[Run]) -> Figure:
    """The table by stage, as a picture."""
    tables = [stage_rows(run) for run in runs]
    lines = sum(len(table) + 2 for table in tables) - 0.7
    figure = Figure(figsize=(WIDTH, 0.75 + 0.24 * lines), layout='constrained')
    ax = figure.subplots()
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(lines, 0))
    places = np.linspace(0.34, 1, len(COLUMNS) - 1)
    y = 0.5
    for run, color, table in zip(runs, COLORS, tables):
        ax.text(0, y, shorten(run.label, 30), color=color, fontweight='bold', va='center')
        for x, name in zip(places, COLUMNS[1:]):
            text = name.replace(' ', '\n')
            ax.text(x, y - 0.1, text, ha='right', va='center', color='#555555', fontsize=8)
        ax.plot([0, 1], [y + 0.5] * 2, color='black', linewidth=0.8)
        for row in table:
            y += 1
            weight = 'bold' if row is table[-1] else 'normal'
            ax.text(0, y, shorten(row[0], 30), va='center', fontweight=weight)
            for x, cell in zip(places, row[1:]):
                ax.text(x, y, cell, ha='right', va='center', fontweight=weight)
        y += 2
    worst = []
    for run in runs:
        parts = {
            stage: sum(run.last['layers']['collapsed'][index] for index in layers)
            for stage, layers in run.stages.items()
        }
        stage = max(parts, key=parts.__getitem__)
        worst.append(f'{shorten(stage)} ({parts[stage]:,})')
    return titled(figure, f'Most collapsed filters at the end: {each_run(runs, worst)}')


class Entry(NamedTuple):
    """A figure of the report.

    Attributes:
        draw (Callable): From runs to the figure, or to a sentence that says why there is none.
        heading (str): What it is about.
        text (str): How to read it.
    """

    draw: Callable[[Sequence[Run]], Figure | str]
    heading: str
    text: str


FIGURES = {  # by the names of their files, in the order of the page
    'counts': Entry(
        counts,
        'Over time',
        'Collapsed filters are vanished, dead, trapped or broken (gamma or bias is not a finite '
        'number). Trapped ones got no gradient in the window before the report, in which others '
        'of their layer did; a gap means that this was not observed.',
    ),
    'heat_map': Entry(
        heat_map,
        'By layer',
        'One row per layer, in the order of the network and grouped by stage; white: none is '
        'collapsed. Where a long run has more reports than columns, a column shows the highest of '
        'its reports.',
    ),
    'channels': Entry(
        channels,
        'In the plane of gamma and bias',
        'One point per filter, in color if it was collapsed at the last report; b is the bias. '
        'In the shaded region a rectifier right behind the layer passes next to nothing, so that '
        'no gradient comes back; where something else stands between, such as a residual '
        'addition, a filter may train there. Without a gradient weight decay alone moves it. BN '
        'stays in the region all the way to the origin; psBN leaves it, since its bias decays '
        'towards the shift.',
    ),
    'life_lines': Entry(
        life_lines,
        'Life lines',
        'One line per filter, drawn while it was collapsed; a circle marks the report that found '
        'it revived (a black tick, where there are too many for circles), a green cross that '
        'RecoveryHook had opened it.',
    ),
    'scores': Entry(
        scores, 'Average precision', 'On the validation set; resumed runs are put together.'
    ),
    'stages': Entry(
        stages,
        'By stage',
        'At the last report; "ever" counts filters over the whole run. Unstarted filters are as '
        'their initialization left them, such as those that begin at gamma = 0: they have not '
        'begun, and lost nothing. A dash: not observed, or no rectifier is known to follow.',
    ),
}
