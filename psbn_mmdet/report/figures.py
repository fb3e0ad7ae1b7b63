"""The figures of a report: each a function from runs to a figure, or to the reason for none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .channels import GREY, YELLOW, draw_channels
from .downsampling import downsample
from .events import Life
from .runs import Run
from .scores import SCORES
from .stage_table import COLUMNS, stage_rows
from .style import COLOURS, axis_from_zero, grid_shape, iterations_on, shorten, whole_numbers, wrap

LIFE_LINES = 150  # of each run
NAMED_LIVES = 40  # of one run: as many as have room for their names
LAYER_NAMES = 60  # beside a heat map
WIDTH = 9.0  # inches
DOTS: Any = dict(linestyle='', marker='o')
RECOVERED: Any = dict(marker='x', color='#009E73')  # Okabe and Ito's green


def counts(runs: Sequence[Run]) -> Figure:
    """Collapsed, trapped and vanished filters over iterations, and the learning rate."""
    panels = {
        'collapsed': 'collapsed filters\n(any of the kinds)',
        'trapped': 'trapped filters\n(no gradient)',
        'vanished': f'vanished filters\n(|gamma| <= {_same(runs, "tau")})',
    }
    figure = Figure(figsize=(WIDTH, 7.5), layout='constrained')
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 1.3])
    for number, (run, colour) in enumerate(zip(runs, COLOURS)):
        width = 1.6 + (len(runs) - 1 - number)  # equal curves lie upon one another
        for ax, kind in zip(axes, panels):
            ax.plot(*downsample(run.iterations, run.counts[kind]), color=colour)
        axes[-1].plot(*downsample(run.iterations, run.learning_rate), color=colour, linewidth=width)
    for ax, text in zip(axes, (*panels.values(), 'learning rate\n(no unit)')):
        ax.set_ylabel(text)
    axis_from_zero(axes[:-1])
    axes[-1].set_ylim(bottom=0)
    iterations_on(axes[-1])
    axes[-1].set_xlim(0, 1.01 * max(int(run.iterations[-1]) for run in runs))
    figure.align_ylabels(axes)
    if len(runs) > 1:
        _legend(figure, _handles(runs))
    collapsed = [run.last['total']['collapsed'] for run in runs]
    title = _each(runs, collapsed, f' of {_filters(runs)} filters collapsed at the end')
    return _titled(figure, title)


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
            ax.set_title(shorten(run.label, 40), color=COLOURS[number], fontweight='bold')
        repeated = number % columns > 0 and run.names == runs[number - 1].names
        _name_layers(ax, run, named=not repeated)
    for ax in axes.flat[len(runs) :]:
        ax.remove()
    panels = list(axes.flat[: len(runs)])
    bar = figure.colorbar(mesh, ax=panels, format=PercentFormatter(1))
    bar.set_label('channels collapsed\n(%, square-root scale)')
    bar.outline.set_visible(False)
    worst = []
    for run, (_, share) in zip(runs, shares):
        layer = int(share[:, -1].argmax())
        worst.append(f'{shorten(run.names[layer])} ({share[layer, -1]:.1%})')
    return _titled(figure, f'Most collapsed layer at the end: {_each(runs, worst)}')


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
        centre = (layers[0] + layers[-1] + 1) / 2
        if not centres or centre - list(centres)[-1] >= apart:
            centres[centre] = shorten(stage.removeprefix('backbone.'), 22)
    ax.set_yticks(list(centres), list(centres.values()), fontsize=8, fontweight='bold')
    ax.tick_params(axis='y', which='major', pad=8 + 3.9 * max(map(len, labels.values())))


def channels(runs: Sequence[Run]) -> Figure | str:
    """Gamma against the bias of all channels, at the start, the middle and the end."""
    if not any(run.snapshots for run in runs):
        return 'No snapshots of gamma and bias are beside the record.'
    columns = max(len(run.snapshots) for run in runs)
    figure = Figure(figsize=(WIDTH, 1.1 + 3.1 * len(runs)), layout='constrained')
    axes = figure.subplots(len(runs), columns, sharex='col', sharey='col', squeeze=False)
    inside = []
    for number, (row, run, colour) in enumerate(zip(axes, runs, COLOURS)):
        k = run.header['k']
        for index, (ax, snapshot) in enumerate(zip(row, run.snapshots)):
            draw_channels(ax, snapshot.gamma, snapshot.bias, snapshot.collapsed, k, colour=colour)
            # Always in sight: the origin, where weight decay leads to, and the region's tip.
            deep = np.abs(snapshot.bias[np.isfinite(snapshot.bias)]).max(initial=0)
            ax.update_datalim([(0, 0), (0, -deep / 4)])
            ax.autoscale_view()
            if np.ptp(snapshot.gamma) == np.ptp(snapshot.bias) == 0:
                place = snapshot.gamma[0], snapshot.bias[0]
                ax.annotate('all channels', place, (-6, 0), textcoords='offset points', ha='right')
            when = 'start' if index == 0 else 'end' if index == len(run.snapshots) - 1 else 'middle'
            ax.set_title(
                f'{_named(runs, run)}{when}, iteration {snapshot.iteration:,}\n'
                f'{snapshot.collapsed.sum():,} of {len(snapshot.collapsed):,} collapsed'
            )
            if index:
                ax.set_ylabel('')
            if number < len(runs) - 1:
                ax.set_xlabel('')
        for ax in row[max(1, len(run.snapshots)) :]:
            ax.remove()
        if not run.snapshots:
            row[0].set_title(f'{_named(runs, run)}no snapshots')
            inside.append('unknown')
            continue
        end = run.snapshots[-1]
        within = end.bias <= -k * np.abs(end.gamma)
        inside.append(f'{(within & end.collapsed).sum():,} of {end.collapsed.sum():,}')
    region = f'non-trainable: b <= -{_same(runs, "k")} |gamma|'
    handles = [
        Line2D([], [], color=GREY, markersize=3, label='not collapsed', **DOTS),
        Patch(color=YELLOW, alpha=0.35, label=region),
        *_handles(runs, 'collapsed', **DOTS),
    ]
    _legend(figure, handles)
    what = ' collapsed channels end in the non-trainable region'
    return _titled(figure, _each(runs, inside, what))


def life_lines(runs: Sequence[Run]) -> Figure | str:
    """For channels that ever collapsed, when they did and when they were revived."""
    ever = [int(run.ever_collapsed.sum()) for run in runs]
    if not any(ever):
        return 'No channel was collapsed at any report: there are no life lines to draw.'
    rows, columns = grid_shape(len(runs))
    lives = [run.events.lives(LIFE_LINES) for run in runs]
    most = max(map(len, lives))
    named = len(runs) == 1 and most <= NAMED_LIVES
    height = min(7.5, max(2.6, (0.14 if named else 0.055) * most))
    figure = Figure(figsize=(WIDTH, 1.2 + height * rows), layout='constrained')
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, (ax, run, mine) in enumerate(zip(axes.flat, runs, lives)):
        colour = COLOURS[number]
        last = float(run.iterations[-1])
        pixel, border = last / 1000, 1.02 * last  # what is still collapsed runs to the border
        lines = [
            [(begin, y), (end, y)]
            for y, life in enumerate(mine, start=1)
            for begin, end in _joined(life.spans, pixel, border)
        ]
        width = float(np.clip(0.6 * 72 * height / (most + 1), 0.6, 3))
        revivals = [(x, y) for y, life in enumerate(mine, 1) for x in _apart(_ends(life), pixel)]
        dense = len(revivals) > 2000  # too many for circles, and for an SVG
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=width, rasterized=dense))
        if revivals:
            ax.scatter(
                *zip(*revivals),
                s=width**2 if dense else (1.8 * width + 1) ** 2,
                marker='|' if dense else 'o',
                facecolor='black' if dense else 'white',
                edgecolor=None if dense else 'black',
                linewidth=0.4 if dense else 0.7,
                rasterized=dense,
                zorder=3,
            )
        opened = [(x, y) for y, life in enumerate(mine, 1) for x in _apart(life.recovered, pixel)]
        if opened:
            ax.scatter(*zip(*opened), **RECOVERED, s=(1.8 * width + 1) ** 2, zorder=4)
        ax.set_xlim(0, border)
        ax.set_ylim(most + 1, 0)
        ax.yaxis.set_major_locator(whole_numbers())
        few = len(mine) < ever[number]
        shown = f'{len(mine)} of {ever[number]:,} shown' if few else f'all {len(mine)} shown'
        ax.set_title(f'{_named(runs, run)}{shown}')
        iterations_on(ax)
        if named:
            names = [f'{shorten(run.names[life.layer], 30)}: {life.channel}' for life in mine]
            ax.set_yticks(range(1, len(mine) + 1), names, fontsize=7)
            ax.set_ylabel('channels, by first collapse')
        else:
            ax.set_ylabel('channels, by first collapse (rank)')
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
    _legend(figure, handles)
    numbers = [
        f'{int((run.ever_revived & ~run.collapsed).sum()):,} of {count:,}'
        for run, count in zip(runs, ever)
    ]
    return _titled(figure, _each(runs, numbers, ' channels that collapsed are alive at the end'))


def _joined(
    spans: list[tuple[int, int | None]], pixel: float, border: float
) -> list[tuple[float, float]]:
    """Spans with gaps joined that no screen shows, and one that lasts drawn to the border."""
    joined: list[tuple[float, float]] = []
    for begin, last in spans:
        end = border if last is None else last
        if joined and begin - joined[-1][1] < pixel:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _ends(life: Life) -> list[int]:
    return [end for _, end in life.spans if end is not None]


def _apart(times: Sequence[int], pixel: float) -> list[int]:
    """Times, without those that a screen would draw over the one before."""
    kept: list[int] = []
    for time in times:
        if not kept or time - kept[-1] >= pixel:
            kept.append(time)
    return kept


def scores(runs: Sequence[Run]) -> Figure | str:
    """AP and AP50 over epochs."""
    names = [name for name in SCORES if any(name in run.scores for run in runs)]
    if not names:
        return 'No AP: the logs (vis_data/scalars.json) have no validation yet.'
    figure = Figure(figsize=(WIDTH, 3.6), layout='constrained')
    axes = figure.subplots(1, len(names), squeeze=False, sharex=True)[0]
    for ax, name in zip(axes, names):
        for run, colour in zip(runs, COLOURS):
            if name in run.scores:
                steps, values = run.scores[name]
                ax.plot(steps, values, color=colour, marker='o', markersize=3.5)
        units = sorted({run.score_unit for run in runs if name in run.scores})
        ax.set_xlabel(f'training time ({" or ".join(units)}s)')
        ax.set_ylabel(f'{name} (0 to 1)')
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        _legend(figure, _handles(runs))
    last = [
        f'{run.scores[names[0]][1][-1]:.3f}' if names[0] in run.scores else 'unknown'
        for run in runs
    ]
    return _titled(figure, f'{names[0]} at the last validation: {_each(runs, last)}')


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
    for run, colour, table in zip(runs, COLOURS, tables):
        ax.text(0, y, shorten(run.label, 30), color=colour, fontweight='bold', va='center')
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
    return _titled(figure, f'Most collapsed filters at the end: {_each(runs, worst)}')


@dataclass(frozen=True)
class Entry:
    """A figure's place in the report.

    Attributes:
        draw (Callable): From runs to the figure, or to the sentence that stands in its place.
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
        'One point per channel, in colour if it was collapsed at the last report; b is the bias. '
        'In the shaded region a rectifier right behind the layer passes next to nothing, so that '
        'no gradient comes back; where something else stands between, such as a residual '
        'addition, a channel may train there. Without a gradient weight decay alone moves it. BN '
        'stays in the region all the way to the origin; psBN leaves it, since its bias decays '
        'towards the shift.',
    ),
    'life_lines': Entry(
        life_lines,
        'Life lines',
        'One line per channel, drawn while it was collapsed; a circle marks the report that found '
        'it revived (a black tick, where there are too many for circles), a green cross that '
        'RecoveryHook had opened it.',
    ),
    'scores': Entry(
        scores, 'Average precision', 'On the validation set; resumed runs are put together.'
    ),
    'stages': Entry(
        stages,
        'By stage',
        'At the last report; "ever" counts channels over the whole run. Unstarted filters are as '
        'their initialisation left them, such as those that begin at gamma = 0: they have not '
        'begun, and lost nothing. A dash: not observed, or no rectifier is known to follow.',
    ),
}


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(wrap(title, figure.get_figwidth()))
    return figure


def _handles(runs: Sequence[Run], what: str = '', **marker: Any) -> list[Line2D]:
    """For a legend: each run's colour."""
    labels = [
        ', '.join(filter(None, (what, shorten(run.label, 40) if len(runs) > 1 else '')))
        for run in runs
    ]
    return [
        Line2D([], [], color=colour, linewidth=2.5, label=label, **marker)
        for label, colour in zip(labels, COLOURS)
    ]


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draw a legend below the panels, in as many columns as the longest label leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(9 * figure.get_figwidth()) // (longest + 6)
    figure.legend(
        handles=handles, loc='outside lower center', ncols=min(len(handles), max(1, columns))
    )


def _named(runs: Sequence[Run], run: Run) -> str:
    """The first line of a panel's title: the run's label if there are several."""
    return f'{shorten(run.label, 24)}\n' if len(runs) > 1 else ''


def _each(runs: Sequence[Run], values: Sequence[object], what: str = '') -> str:
    """What was found in each run, such as '43 trapped with BN, 1 with psBN'."""
    texts = [f'{value:,}' if isinstance(value, int) else f'{value}' for value in values]
    texts[0] += what
    if len(runs) == 1:
        return texts[0]
    return ', '.join(f'{text} with {shorten(run.label, 24)}' for run, text in zip(runs, texts))


def _filters(runs: Sequence[Run]) -> str:
    """The number of filters of the runs' networks."""
    sizes = dict.fromkeys(f'{sum(run.sizes):,}' for run in runs)
    return ' or '.join(sizes)


def _same(runs: Sequence[Run], name: str) -> str:
    """A threshold of all runs."""
    return ' or '.join(dict.fromkeys(f'{run.header[name]:g}' for run in runs))
