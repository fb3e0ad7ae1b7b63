"""The figures: what they show, and that no text is lost, parsed or laid upon another."""

import itertools
import re
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from psbn_mmdet.report import read_run
from psbn_mmdet.report.figures import FIGURES
from psbn_mmdet.report.style import COLORS, STYLE, shorten

HOSTILE = {
    'markup': '<script>alert(1)</script> "x" &',
    'formula': r'$\alpha_{$ $x^2$',
    'long': 'L' * 300,
    'unicode': 'Ünï 漢字 🙂',
    'control': 'a\x00b\x1b\n\u202ec\ud800',
}


@pytest.fixture(scope='module')
def pair(tmp_path_factory, write_run):
    """A run in which 3 filters end collapsed, one in which all are revived."""
    root = tmp_path_factory.mktemp('pair')
    scores = {'BN': {1: 0.1, 2: 0.2}, 'psBN': {1: 0.15, 2: 0.345}}
    states = {'BN': [[], [1], [1, 70, 71], [1, 70, 71]], 'psBN': [[], [1], [1, 70], []]}
    return [
        read_run(write_run(root / name, states[name], scores=scores[name]), name)
        for name in ('BN', 'psBN')
    ]


def draw(name, runs) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name].draw(runs)
        assert isinstance(figure, Figure), figure
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', r'Glyph .* missing')
            FigureCanvasAgg(figure).draw()
    return figure


def texts(figure) -> list:
    """All that is written but numbers, of which some are out of sight, as matplotlib's artists."""
    found = figure.findobj(matplotlib.text.Text)
    return [t for t in found if t.get_visible() and re.search(r'[^\W\d]', t.get_text())]


@pytest.mark.parametrize(
    ('name', 'title'),
    [
        ('counts', '3 of 160 filters collapsed at the end with BN, 0 with psBN'),
        ('heat_map', 'Most collapsed layer at the end: backbone.layer1.0.bn1 (3.1%) with BN'),
        ('channels', 'collapsed filters end in the non-trainable region with BN, 0 of 0 with'),
        ('life_lines', '0 of 3 filters that collapsed are alive at the end with BN, 2 of 2 with'),
        ('scores', 'AP at the last validation: 0.200 with BN, 0.345 with psBN'),
        ('stages', 'Most collapsed filters at the end: backbone.layer1 (2) with BN'),
    ],
)
def test_titles_state_what_was_found(pair, name, title):
    assert title in draw(name, pair).get_suptitle().replace('\n', ' ')


def test_the_title_of_one_run_needs_no_label(pair):
    assert draw('counts', pair[:1]).get_suptitle() == '3 of 160 filters collapsed at the end'


def test_the_counts_are_drawn_in_the_color_of_the_run(pair):
    axes = draw('counts', pair).axes
    assert [ax.get_ylabel().split('\n')[0] for ax in axes] == [
        'collapsed filters',
        'trapped filters',
        'vanished filters',
        'learning rate',
    ]
    for line, color, values in zip(axes[0].lines, COLORS, ([0, 1, 3, 3], [0, 1, 2, 0])):
        assert to_hex(line.get_color()).upper() == color
        assert line.get_xdata().tolist() == [50, 100, 150, 200]
        assert line.get_ydata().tolist() == values
    assert axes[3].lines[0].get_ydata().tolist() == [0.1] * 4


def test_the_heat_map_has_a_row_per_layer_and_a_column_per_report(pair):
    figure = draw('heat_map', pair)
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    values = mesh.get_array().filled(0)
    assert values[:, -1].tolist() == [1 / 64, 2 / 64, 0]
    ticks = [*figure.axes[0].get_yticklabels(), *figure.axes[0].get_yticklabels(minor=True)]
    assert {'backbone', 'layer1', 'neck', 'bn1', '0.bn1', 'lateral_convs.0.bn'} == {
        text.get_text() for text in ticks
    }


def test_every_channel_is_a_point_at_start_middle_and_end(pair):
    figure = draw('channels', pair)
    titles = [ax.get_title() for ax in figure.axes]
    assert [title.split('\n')[1] for title in titles[:3]] == [
        'start, iteration 0',
        'middle, iteration 100',
        'end, iteration 200',
    ]
    assert titles[2].split('\n')[2] == '3 of 160 collapsed'
    for ax in figure.axes:
        assert sum(len(points.get_offsets()) for points in ax.collections) == 160
        assert ax.get_xlim()[0] <= 0 <= ax.get_xlim()[1] and ax.get_ylim()[0] < 0


def test_life_lines_are_drawn_from_collapse_to_revival(pair):
    figure = draw('life_lines', pair)
    lines, circles = figure.axes[1].collections
    assert isinstance(lines, LineCollection)
    assert [segment[:, 0].tolist() for segment in lines.get_segments()] == [[100, 200], [150, 200]]
    assert circles.get_offsets()[:, 0].tolist() == [200, 200]
    lasting = figure.axes[0].collections[0].get_segments()[0]
    assert lasting[1, 0] == figure.axes[0].get_xlim()[1]


def test_few_life_lines_of_one_run_have_the_channels_names(pair):
    (ax,) = draw('life_lines', pair[:1]).axes
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ['backbone.bn1: 1', 'backbone.layer1.0.bn1: 6', 'backbone.layer1.0.bn1: 7']


def test_many_life_lines_are_capped_and_say_so(tmp_path, write_run):
    states = [[], range(100), range(160), range(50)]
    figure = draw('life_lines', [read_run(write_run(tmp_path, states), 'BN')])
    assert figure.axes[0].get_title() == '150 of 160 shown'


def test_what_there_is_nothing_of_is_said_in_a_sentence(tmp_path, write_run):
    run = read_run(write_run(tmp_path, [[], []], snapshots=()), 'BN')
    for name, reason in (('channels', 'No snapshots'), ('life_lines', 'No filter was collapsed')):
        assert FIGURES[name].draw([run]).startswith(reason)
    assert FIGURES['scores'].draw([run]).startswith('No AP')
    draw('heat_map', [run])


def test_a_run_without_snapshots_or_ap_keeps_the_colors_of_the_others(tmp_path, write_run, pair):
    runs = [read_run(write_run(tmp_path, snapshots=()), 'bare'), pair[0]]
    figure = draw('channels', runs)
    assert 'region with bare' in figure.get_suptitle() and 'of 3 with BN' in figure.get_suptitle()
    assert figure.axes[0].get_title() == 'bare\nno snapshots'
    collapsed = figure.axes[-1].collections[1]
    assert to_hex(collapsed.get_facecolor()[0]).upper() == COLORS[1]
    figure = draw('scores', runs)
    assert figure.get_suptitle() == 'AP at the last validation: unknown with bare, 0.200 with BN'
    assert to_hex(figure.axes[0].lines[0].get_color()).upper() == COLORS[1]


def test_colors_are_told_apart_by_the_color_blind():
    """Distances in CIE Lab between the palette's colors as deuteranopes and protanopes see them.

    Machado, Oliveira, Fernandes 2009, severity 1.
    """
    seen_as = {
        'deuteranopia': [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        'protanopia': [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    }
    to_xyz = np.array([[0.412, 0.358, 0.180], [0.213, 0.715, 0.072], [0.019, 0.119, 0.950]])
    rgb = np.array([matplotlib.colors.to_rgb(color) for color in COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in seen_as.values():
        xyz = np.clip(linear @ np.array(matrix).T, 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.00886, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])])
        for a, b in itertools.combinations(lab.T, 2):
            assert np.linalg.norm(a - b) > 10


@pytest.mark.parametrize('label', HOSTILE)
@pytest.mark.parametrize('name', FIGURES)
def test_hostile_labels_and_names_are_drawn_as_they_are(tmp_path, write_run, name, label):
    text = HOSTILE[label]
    layers = [(f'backbone.{text}.bn1', 64), (text, 64), ('neck.' + text, 32)]
    runs = [
        read_run(write_run(tmp_path / run, layers=layers, scores={1: 0.5}), f'{run} {text}')
        for run in 'ab'
    ]
    figure = draw(name, runs)
    written = texts(figure)
    assert any('a ' + shorten(text)[:2] in t.get_text() for t in written)
    assert not any(t.get_parse_math() for t in written if t.get_text() == t.get_text().strip())
    assert max(len(line) for t in written for line in t.get_text().split('\n')) < 140
    size = figure.get_size_inches() * figure.dpi
    for t in written:  # within the picture
        box = t.get_window_extent()
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < size[0] + 2 and box.y1 < size[1] + 2, t


def many_layers(count: int) -> list:
    body = count - 8
    layers = [(f'backbone.layer{1 + index * 6 // body}.{index}.bn', 8) for index in range(body)]
    return [*layers, *((f'neck.lateral.{index}.bn', 8) for index in range(8))]


@pytest.mark.parametrize('count', [53, 300])
def test_the_layers_names_beside_a_heat_map_do_not_overlap(tmp_path, write_run, count):
    run = read_run(write_run(tmp_path, layers=many_layers(count), snapshots=()), 'BN')
    ax = draw('heat_map', [run]).axes[0]
    names = [text for text in ax.get_yticklabels(minor=True) if text.get_text()]
    stages = [text for text in ax.get_yticklabels() if text.get_text()]
    assert len(stages) == 7 and len(names) == (53 if count == 53 else 60)
    for column in (names, stages):
        boxes = sorted(
            (text.get_window_extent().y0, text.get_window_extent().y1) for text in column
        )
        for (_, top), (bottom, _) in zip(boxes, boxes[1:]):
            assert top <= bottom + 1.5
    rightmost = max(text.get_window_extent().x1 for text in stages)
    assert rightmost <= min(text.get_window_extent().x0 for text in names)


def test_seven_runs_have_seven_colors_and_a_panel_each(tmp_path, write_run):
    runs = [read_run(write_run(tmp_path / f'{n}', scores={1: 0.1}), f'run {n}') for n in range(7)]
    for name in FIGURES:
        figure = draw(name, runs)
        written = '\n'.join(text.get_text() for text in texts(figure))
        assert all(f'run {n}' in written for n in range(7)), name
