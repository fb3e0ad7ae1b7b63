"""Labels, paths and names of the report: shown as they are, or refused with a reason."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from attempts import attempt
from cases import count
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from psbn_mmdet.commands import report as tool
from psbn_mmdet.records import COUNTS, RecordWriter
from psbn_mmdet.report import draw_channels, page, write_report
from psbn_mmdet.report.downsampling import HeatMapColumns, downsample
from psbn_mmdet.report.style import COLORS, printable, shorten, wrap

REPLACED = '\N{REPLACEMENT CHARACTER}'
HOSTILE = [
    '',
    ' ',
    '\t\n',
    '\0',
    '\x1b[31mred',
    '<script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    "'&amp;{{ 7 * 7 }}{% raw %}",
    '$x_{1}$ \\frac',
    '[bold]a[/bold] [/]',
    'a' * 5000,
    'é' * 300,
    '\u202eright to left\u202c',
    '\U0001f600' * 40,
    '\ud800',
    'e\u0301',
    '名前 имя اسم',
    '--out',
    '../..',
    '%s %d {0}',
]
texts = st.sampled_from(HOSTILE) | st.text(max_size=30)


class Page(HTMLParser):
    """What a browser would see: tags, and the text of cells and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def write_run(folder: Path, names: list[str]) -> Path:
    """A run of layers of these names, in each of which one of two channels collapses."""
    layers = [dict(name=name, channels=2, norm='BN') for name in names]
    settings = dict(interval=50, window=50, tau=1e-3, k=3.0)
    writer = RecordWriter(folder / 'collapse.jsonl', dict(layers=layers, **settings))
    for index, n in enumerate((0, len(names)), start=1):
        channels = dict.fromkeys(COUNTS, [''] * len(names))
        channels |= dict.fromkeys(('collapsed', 'new'), ['1' if n else ''] * len(names))
        writer.append(dict(iter=50 * index, epoch=1, lr=dict(lr=0.1), channels=channels))
    return folder


@pytest.fixture
def unrendered(monkeypatch):
    """Pages without pictures, whose figures are built nevertheless."""
    monkeypatch.setattr(page, '_render', lambda figure: {'png': b'', 'svg': b'<svg/>'})


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures."""
    figures = [dict(name='counts', heading='', text='', title='', svg='')]
    files = {'counts.png': b'', 'counts.svg': b''}
    monkeypatch.setattr(page, '_draw', lambda runs, progress: (figures, files))


def run_tool(*args: str) -> tuple[int, str]:
    """The exit code of the tool, and what it writes to stderr; stdout is strict."""
    stdout = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    stderr = io.TextIOWrapper(io.BytesIO(), 'utf-8', 'backslashreplace')
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = tool.main(args)
    stdout.flush()
    stderr.flush()
    return code, stderr.buffer.getvalue().decode()


@given(
    labels=st.lists(texts, min_size=1, max_size=4, unique=True),
    names=st.lists(texts, min_size=1, max_size=4),
)
def test_any_label_and_layer_is_shown_as_text(unrendered, tmp_path_factory, labels, names):
    count()
    folder = tmp_path_factory.mktemp('labels')
    run = write_run(folder / 'run', names)
    out, error = attempt(write_report, dict.fromkeys(labels, run), folder / 'report.html')
    if error:
        assert error == "a label is empty, '': give each run a name"
        assert not all(label.strip() for label in labels)
        shutil.rmtree(folder)
        return
    text = out.read_text(encoding='utf-8')
    seen = Page(text)
    assert not seen.tags & {'script', 'img onerror', 'iframe'}
    assert not {name for name in seen.attributes if name.startswith('on')}
    assert not re.search(r'[\0-\x08\x0e-\x1f\x7f\ud800-\udfff]', text)
    for label in labels:
        assert printable(label) in seen.text
    for name in names:
        assert printable(name) in seen.text
    shutil.rmtree(folder)


@given(labels=st.lists(texts, min_size=1, max_size=3), given_labels=st.integers(0, 3))
def test_the_tool_writes_a_page_or_says_why_not(undrawn, tmp_path_factory, labels, given_labels):
    count()
    folder = tmp_path_factory.mktemp('tool')
    run = write_run(folder / 'run', ['bn'])
    labels = [label for label in labels if not label.startswith('-')] or ['x']
    runs = [str(run)] * (given_labels or len(labels))
    out = folder / 'page.html'
    code, error = run_tool(*runs, '--labels', *labels, '-o', str(out))
    if len(runs) != len(labels):
        assert 'labels: give --labels one for each' in error
    elif len(set(labels)) < len(labels):
        assert 'are not all different' in error
    elif not all(label.strip() for label in labels):
        assert 'a label is empty' in error
    else:
        assert code == 0 and out.is_file() and not error
        shutil.rmtree(folder)
        return
    assert code == 1 and not out.exists()
    assert '\x1b' not in error and error.count('\n') == 1 and len(error) < 1000
    shutil.rmtree(folder)


names_of_files = st.sampled_from(
    ['a.html', 'a', '.html', 'a' * 200, 'a' * 300, 'é.html', '\udcff.html', 'new/a.html']
    + ['folder', 'file/a.html', 'a\nb', '<b>.html', '..', '.', '', '/dev/null/a.html', 'a' * 5000]
)


@given(name=names_of_files)
def test_the_page_is_written_or_its_path_is_refused(undrawn, tmp_path_factory, name):
    count()
    folder = tmp_path_factory.mktemp('out')
    run = write_run(folder / 'run', ['bn'])
    (folder / 'folder').mkdir()
    (folder / 'file').touch()
    code, error = run_tool(str(run), '-o', str(folder / name))
    if code == 0:
        assert (folder / name).is_file()
        assert Page((folder / name).read_text('utf-8')).tags
    else:
        assert error.startswith('report: ') and error.count('\n') == 1
        assert len(error) < 12_000
        assert name.split('.')[0][:9] in error
    assert not list(folder.rglob('*.part'))


@given(
    work_dir=st.sampled_from(
        ['', '.', 'nothing', 'a\0b', 'a' * 300, 'a' * 5000, '\udcff', 'file', '/dev/null', '*', '[']
    )
)
def test_a_work_dir_without_a_run_is_refused_by_its_name(undrawn, tmp_path_factory, work_dir):
    count()
    folder = tmp_path_factory.mktemp('work_dir')
    (folder / 'file').touch()
    place = str(folder / work_dir)
    code, error = run_tool(place, '--labels', 'x', '-o', str(folder / 'out.html'))
    assert code == 1
    assert error.startswith('report: ') and error.count('\n') == 1
    assert 'no */collapse.jsonl' in error or 'too long' in error or 'no header line' in error, error
    assert not (folder / 'out.html').exists()


@pytest.mark.parametrize('labels', [[1], [None], [b'a'], [('a',)], ['a', 1]])
def test_labels_that_are_no_texts_are_refused(tmp_path, labels):
    count()
    _, error = attempt(write_report, dict.fromkeys(labels, tmp_path), tmp_path / 'a.html')
    assert 'give each run a name' in error and repr(labels[-1]) in error


@pytest.mark.parametrize('number', [0, len(COLORS) + 1, 1000])
def test_runs_without_colors_are_refused(tmp_path, number):
    count()
    runs = {f'run {index}': tmp_path for index in range(number)}
    _, error = attempt(write_report, runs, tmp_path / 'a.html')
    assert f'{number} runs cannot be told apart' in error


@given(text=texts, length=st.integers(3, 60))
def test_a_text_is_shortened_to_what_fits(text, length):
    count()
    short = shorten(text, length)
    assert len(short) <= length and short.isprintable()
    assert short == printable(text) or '…' in short
    assert len(printable(text)) == len(text)


@given(title=st.text(min_size=1, max_size=400).filter(str.strip), width=st.floats(3, 20))
@example(title='a' * 400, width=3.0)
def test_a_title_is_wrapped_without_a_loss(title, width):
    count()
    wrapped = wrap(title, width)
    assert max(map(len, wrapped.split('\n'))) <= round(9.5 * width)
    assert ''.join(wrapped.split()) == ''.join(title.split())


numbers = st.floats(width=16) | st.floats()


@given(
    points=st.lists(st.tuples(numbers, numbers, st.booleans()), max_size=20),
    k=st.floats(0, 10**6),
)
@example(points=[(1e308, 1e308, True), (float('nan'), 0.0, False)], k=1e6)
def test_channels_of_any_value_are_drawn(points, k):
    count()
    gamma, bias, collapsed = (np.array([p[i] for p in points], float) for i in range(3))
    ax = Figure().subplots()
    draw_channels(ax, gamma, bias, collapsed, k)
    finite = np.isfinite(gamma) & np.isfinite(bias)
    drawn = sum(len(scatter.get_offsets()) for scatter in ax.collections)
    assert drawn == finite.sum()


@given(
    counts=st.lists(st.lists(st.integers(0, 1000), min_size=2, max_size=2), max_size=60),
    limit=st.integers(1, 8),
)
def test_columns_keep_the_highest_count_and_the_end(counts, limit):
    count()
    columns = HeatMapColumns(2, limit)
    for index, pair in enumerate(counts, start=1):
        columns.add(index, pair)
        assert len(columns.ends) <= 2 * limit
    assert columns.values.shape == (2, len(columns.ends))
    if counts:
        assert columns.ends[-1] == len(counts) and (np.diff(columns.ends) > 0).all()
        assert columns.values.max(1).tolist() == np.max(counts, axis=0).tolist()


@given(values=st.lists(st.floats(0, 10) | st.just(float('nan')), max_size=300))
def test_thinning_keeps_the_extremes_in_their_order(values):
    count()
    y = np.array(values, float)
    x, kept = downsample(np.arange(len(y)), y, 40)
    assert len(kept) <= max(40, 0) and (np.diff(x) > 0).all()
    np.testing.assert_array_equal(kept, y[x.astype(int)])
    if not np.isnan(y).all():
        assert np.nanmax(kept) == np.nanmax(y) and np.nanmin(kept) == np.nanmin(y)
