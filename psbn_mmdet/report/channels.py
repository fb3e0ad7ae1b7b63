"""The picture of a network's channels: gamma against the bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon

from .labels import DOTS, add_legend, each_run, panel_label, run_handles, shared_setting, titled
from .runs import Run
from .style import COLORS, WIDTH

GREY = '#8C8C8C'
BLUE, YELLOW = '#0072B2', '#F0E442'  # of Okabe and Ito's palette


def draw_channels(
    ax: Axes,
    gamma: np.ndarray,
    bias: np.ndarray,
    collapsed: np.ndarray,
    k: float,
    color: str = BLUE,
) -> None:
    """Draw one point per channel into an Axes, and shade the non-trainable region.

    The region is ``b <= -k |gamma|``: a rectifier behind the layer then passes nothing for inputs
    up to k standard deviations. Points, region and axes are labelled; a legend, where one is
    wanted, is for the caller to draw. Channels whose values are not finite are left out.

    Args:
        ax (Axes): Where to draw.
        gamma (np.ndarray): Scales, shape (C,), no unit.
        bias (np.ndarray): Biases b, shape (C,), no unit.
        collapsed (np.ndarray): Bool, shape (C,): which channels stand out in ``color``.
        k (float): Threshold of the region, in standard deviations.
        color (str): Color of the collapsed channels. Defaults to blue.

    Raises:
        ValueError: If the arrays differ in shape.

    Examples:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from psbn_mmdet.report import draw_channels
        >>> ax = Figure().subplots()
        >>> gamma, bias = np.array([1.0, 0.1]), np.array([0.0, -0.5])
        >>> draw_channels(ax, gamma, bias, bias + 3 * gamma <= 0, k=3)
        >>> ax.get_ylabel()
        'bias b (no unit)'
    """
    gamma, bias, collapsed = map(np.asarray, (gamma, bias, collapsed))
    if not gamma.shape == bias.shape == collapsed.shape == (gamma.size,):
        raise ValueError(
            'draw_channels: gamma, bias and collapsed must have one shape (C,), got '
            f'{gamma.shape}, {bias.shape} and {collapsed.shape}'
        )
    finite = np.isfinite(gamma) & np.isfinite(bias)
    gamma, bias, collapsed = gamma[finite], bias[finite], collapsed[finite].astype(bool)
    for chosen, name, size, face in (
        (~collapsed, 'not collapsed', 7, to_rgba(GREY, 0.5)),
        (collapsed, 'collapsed', 14, to_rgba(color)),
    ):
        ax.scatter(
            gamma[chosen],
            bias[chosen],
            s=size,
            color=[face],
            linewidths=0,
            rasterized=True,  # in an SVG, tens of thousands of points would each be an element
            zorder=2,
            label=f'{name}: {chosen.sum():,}',
        )
    # An artist, not a patch: the region reaches far out of the picture and must not scale the axes.
    far = 100 * float(np.abs(np.concatenate((gamma, bias, [1]))).max())
    deep = -max(1, k) * far
    ax.add_artist(
        Polygon(
            [(0, 0), (far, -k * far), (far, deep), (-far, deep), (-far, -k * far)],
            color=YELLOW,
            alpha=0.35,
            linewidth=0,
            zorder=1,
            label=f'non-trainable: b <= -{k:g} |gamma|',
        )
    )
    ax.set_xlabel('gamma (no unit)')
    ax.set_ylabel('bias b (no unit)')


def channels(runs: Sequence[Run]) -> Figure | str:
    """Draw gamma against the bias of all channels at the start, the middle and the end."""
    if not any(run.snapshots for run in runs):
        return 'No snapshots of gamma and bias are beside the record.'
    columns = max(len(run.snapshots) for run in runs)
    figure = Figure(figsize=(WIDTH, 1.1 + 3.1 * len(runs)), layout='constrained')
    axes = figure.subplots(len(runs), columns, sharex='col', sharey='col', squeeze=False)
    inside = []
    for number, (row, run, color) in enumerate(zip(axes, runs, COLORS)):
        k = run.header['k']
        for index, (ax, snapshot) in enumerate(zip(row, run.snapshots)):
            draw_channels(ax, snapshot.gamma, snapshot.bias, snapshot.collapsed, k, color=color)
            # Always in sight: the origin, where weight decay leads to, and the region's tip.
            deep = np.abs(snapshot.bias[np.isfinite(snapshot.bias)]).max(initial=0)
            ax.update_datalim([(0, 0), (0, -deep / 4)])
            ax.autoscale_view()
            if np.ptp(snapshot.gamma) == np.ptp(snapshot.bias) == 0:
                place = snapshot.gamma[0], snapshot.bias[0]
                ax.annotate('all filters', place, (-6, 0), textcoords='offset points', ha='right')
            when = 'start' if index == 0 else 'end' if index == len(run.snapshots) - 1 else 'middle'
            ax.set_title(
                f'{panel_label(runs, run)}{when}, iteration {snapshot.iteration:,}\n'
                f'{snapshot.collapsed.sum():,} of {len(snapshot.collapsed):,} collapsed'
            )
            if index:
                ax.set_ylabel('')
            if number < len(runs) - 1:
                ax.set_xlabel('')
        for ax in row[max(1, len(run.snapshots)) :]:
            ax.remove()
        if not run.snapshots:
            row[0].set_title(f'{panel_label(runs, run)}no snapshots')
            inside.append('unknown')
            continue
        end = run.snapshots[-1]
        within = end.bias <= -k * np.abs(end.gamma)
        inside.append(f'{(within & end.collapsed).sum():,} of {end.collapsed.sum():,}')
    region = f'non-trainable: b <= -{shared_setting(runs, "k")} |gamma|'
    handles = [
        Line2D([], [], color=GREY, markersize=3, label='not collapsed', **DOTS),
        Patch(color=YELLOW, alpha=0.35, label=region),
        *run_handles(runs, 'collapsed', **DOTS),
    ]
    add_legend(figure, handles)
    what = ' collapsed filters end in the non-trainable region'
    return titled(figure, each_run(runs, inside, what))
