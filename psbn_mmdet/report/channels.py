"""The picture of a network's channels: gamma against the bias."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Polygon

GREY = '#8C8C8C'
BLUE, YELLOW = '#0072B2', '#F0E442'  # of Okabe and Ito's palette


def draw_channels(
    ax: Axes,
    gamma: np.ndarray,
    bias: np.ndarray,
    collapsed: np.ndarray,
    k: float,
    colour: str = BLUE,
) -> None:
    """Draw one point per channel into an Axes, and shade the non-trainable region.

    The region is ``b <= -k |gamma|``: a rectifier behind the layer then passes nothing for inputs
    up to k standard deviations. Points, region and axes are labelled; a legend, where one is
    wanted, is for the caller to draw. Channels whose values are not finite are left out.

    Args:
        ax (Axes): Where to draw.
        gamma (np.ndarray): Scales, shape (C,), no unit.
        bias (np.ndarray): Biases b, shape (C,), no unit.
        collapsed (np.ndarray): Bool, shape (C,): which channels stand out in ``colour``.
        k (float): Threshold of the region, in standard deviations.
        colour (str): Colour of the collapsed channels. Defaults to blue.

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
        (collapsed, 'collapsed', 14, to_rgba(colour)),
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
