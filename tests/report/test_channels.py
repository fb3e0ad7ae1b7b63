"""Gamma against the bias."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from psbn_mmdet.report import draw_channels

YELLOW = np.array([0xF0, 0xE4, 0x42])


def draw(gamma, bias, collapsed, k=3.0, **kwargs):
    figure = Figure(figsize=(4, 4))
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    draw_channels(ax, np.array(gamma), np.array(bias), np.array(collapsed, bool), k, **kwargs)
    canvas.draw()
    return ax, np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def shaded(ax, picture, gamma, bias) -> bool:
    """Whether the picture is yellowish at a place of the axes."""
    x, y = ax.transData.transform((gamma, bias))
    red, _, blue = picture[round(picture.shape[0] - y), round(x)]
    return red - blue > 40


def test_every_channel_is_a_point_and_the_collapsed_ones_stand_out():
    ax, _ = draw([1.0, 0.5, 0.1], [0.0, 0.2, -0.9], [False, False, True], color='#D55E00')
    alive, collapsed = ax.collections
    assert alive.get_offsets().tolist() == [[1.0, 0.0], [0.5, 0.2]]
    assert collapsed.get_offsets().tolist() == [[0.1, -0.9]]
    assert collapsed.get_facecolor()[0][:3] == pytest.approx(np.array([0xD5, 0x5E, 0]) / 255)
    labels = ax.get_legend_handles_labels()[1]
    assert sorted(labels) == [
        'collapsed: 1',
        'non-trainable: b <= -3 |gamma|',
        'not collapsed: 2',
    ]


@pytest.mark.parametrize('k', [0.0, 0.5, 3.0])
def test_exactly_the_region_is_shaded(k):
    corners = [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -4.0, -4.0]
    ax, picture = draw(*corners, [False] * 4, k)
    for gamma in (-0.8, -0.3, 0.3, 0.8):
        edge = -k * abs(gamma)
        assert shaded(ax, picture, gamma, edge - 0.2)
        assert not shaded(ax, picture, gamma, edge + 0.2)


def test_the_region_does_not_scale_the_axes():
    ax, _ = draw([0.9, 1.1], [-0.1, 0.1], [False, False])
    assert 0.8 < ax.get_xlim()[0] < ax.get_xlim()[1] < 1.2
    assert -0.2 < ax.get_ylim()[0] < ax.get_ylim()[1] < 0.2


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r'got \(2,\), \(1,\) and \(2,\)'):
        draw([1.0, 1.0], [0.0], [False, False])
