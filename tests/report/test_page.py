"""The page: opened in a browser, with hostile text, and from a very long record."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from psbn_mmdet.report import find_record, write_report
from psbn_mmdet.report.figures import FIGURES

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    '<script>document.title = "hacked"</script>"><img src=x onerror="document.title=1">',
    r"' onload='document.title=1 {{ 7 * 7 }} $\alpha$ Ünï 漢字 🙂",
    'L' * 300,
]
SCORES = {1: 0.1, 2: 0.2}

spec = importlib.util.spec_from_file_location('browser', ROOT / 'scripts/browser.py')
chromium = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chromium)


@pytest.fixture(scope='module')
def driver():
    reason = chromium.missing()
    if reason:
        pytest.skip(reason)
    with chromium.browser() as driver:
        yield driver


def console(driver) -> list:
    return driver.get_log('browser')


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data):
        self.text += f'{data} '


@pytest.fixture(scope='module')
def pair(tmp_path_factory, write_run):
    """The page of two runs."""
    root = tmp_path_factory.mktemp('pair')
    runs = {
        'BN': write_run(root / 'bn', [[], [1], [1, 70]], scores=SCORES),
        'psBN': write_run(root / 'psbn', [[], [1], []], scores=SCORES),
    }
    return write_report(runs, root / 'out' / 'report.html')


@pytest.fixture(scope='module')
def hostile(tmp_path_factory, write_run):
    """The page of runs with hostile text in every place that it prints."""
    root = tmp_path_factory.mktemp('hostile')
    folder = '<img src=x onerror="document.title=1">'
    layers = [(f'backbone.{text}.bn1', 32) for text in HOSTILE] + [('a\x00\x1b\u202eb', 4)]
    states = [[], [1, 40, 70, 98]]
    runs = {
        text: write_run(root / folder / f'{index}', states, layers=layers, scores=SCORES)
        for index, text in enumerate(HOSTILE)
    }
    for work_dir, text in zip(runs.values(), HOSTILE):
        record = find_record(work_dir)
        header, *reports = record.read_text().splitlines()
        header = json.loads(header) | dict(versions=dict(torch=text), id=text)
        for layer in header['layers']:
            layer.update(norm=text, rectifier=text)
        record.write_text('\n'.join([json.dumps(header), *reports, '']))
    return write_report(runs, root / f'{folder}.html')


def test_the_page_opens_in_a_browser_without_an_error(driver, pair):
    picture = chromium.screenshot(driver, pair)
    assert console(driver) == []
    assert driver.title == 'Collapsed filters: BN, psBN'
    figures = driver.execute_script(
        'return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth,'
        ' i.clientHeight, i.alt, i.getBoundingClientRect().toJSON()])'
    )
    assert len(figures) == len(FIGURES) - 1  # the table is none
    pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    for complete, natural, width, height, text, box in figures:
        assert complete and natural > 0 and width > 500 and height > 150
        assert text
        y, x = round(box['y']), round(box['x'])
        part = pixels[y : y + round(box['height']), x : x + round(box['width'])]
        assert part.std() > 8 and len(np.unique(part.reshape(-1, 3), axis=0)) > 20, text
    rows = driver.execute_script('return document.querySelectorAll(".stages tbody tr").length')
    assert rows == 2 * 4
    overflow = 'return document.documentElement.scrollWidth - document.documentElement.clientWidth'
    assert driver.execute_script(overflow) <= 0


def test_hostile_text_does_nothing_in_a_browser(driver, hostile):
    chromium.screenshot(driver, hostile)
    assert console(driver) == []
    assert driver.title.startswith('Collapsed filters: <script>document.title')
    assert driver.execute_script('return document.scripts.length') == 0
    shown = driver.execute_script('return document.body.textContent')
    assert all(text in shown for text in HOSTILE)
    overflow = 'return document.documentElement.scrollWidth - document.documentElement.clientWidth'
    assert driver.execute_script(overflow) <= 0


def test_hostile_text_is_escaped(hostile):
    page = Page(hostile)
    assert 'script' not in page.tags and page.tags.count('img') == len(FIGURES) - 1
    assert not [name for name, _ in page.attributes if name.startswith('on')]
    for text in HOSTILE:
        assert page.text.count(text) > 5, 'labels, norms and windows are whole'
        assert f'backbone.{text}.bn1' in page.text, 'and so are the names of layers'
    assert 'a\ufffd\ufffd\ufffdb' in page.text
    assert page.text.count('<img src=x onerror="document.title=1">') > 6, 'and so are paths'
    pictures = list((hostile.parent / f'{hostile.stem}_figures').glob('*.svg'))
    assert len(pictures) == len(FIGURES)
    for svg in pictures:
        tags = {element.tag for element in xml.etree.ElementTree.parse(svg).iter()}
        assert not any('script' in tag for tag in tags)


def test_the_page_asks_nothing_of_the_network(pair):
    page = Page(pair)
    links = [value for name, value in page.attributes if name in ('src', 'href', 'data', 'action')]
    assert links and all(link.startswith('data:') for link in links)
    assert 'url(' not in pair.read_text() and '@import' not in pair.read_text()
    policy = dict(page.attributes)['content']
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_same_figures_lie_beside_the_page_as_png_and_svg(pair):
    folder = pair.parent / 'report_figures'
    files = {f'{name}.{ending}' for name in FIGURES for ending in ('png', 'svg')}
    assert {path.name for path in folder.iterdir()} == files
    assert {path.name for path in pair.parent.iterdir()} == {'report.html', 'report_figures'}
    page = pair.read_text()
    for name in FIGURES:
        assert cv2.imread(str(folder / f'{name}.png')).std() > 8
        svg = (folder / f'{name}.svg').read_bytes()
        assert xml.etree.ElementTree.fromstring(svg).tag.endswith('svg')
        assert (base64.b64encode(svg).decode() in page) == (name != 'stages')


def test_the_same_runs_give_the_same_page(pair, tmp_path):
    runs = {'BN': pair.parents[1] / 'bn', 'psBN': pair.parents[1] / 'psbn'}
    assert write_report(runs, tmp_path / 'report.html').read_bytes() == pair.read_bytes()


def test_the_channels_are_named(pair):
    text = ' '.join(Page(pair).text.split())
    assert 'backbone.bn1 1 1 backbone.layer1.0.bn1 1 6' in text  # layer, number, channels


def test_a_figure_that_cannot_be_is_replaced_by_a_sentence_and_its_old_files_go(
    tmp_path, write_run
):
    out = tmp_path / 'report.html'
    write_report({'run': write_run(tmp_path / 'a', scores=SCORES)}, out)
    assert (tmp_path / 'report_figures/scores.png').exists()
    write_report({'run': write_run(tmp_path / 'b', snapshots=())}, out)
    left = {path.stem for path in (tmp_path / 'report_figures').iterdir()}
    assert left == {'counts', 'heat_map', 'life_lines', 'stages'}
    assert 'No AP' in out.read_text() and 'No snapshots' in out.read_text()


def test_a_failed_report_leaves_the_old_page(tmp_path, write_run):
    work_dir = write_run(tmp_path / 'run')
    out = write_report({'run': work_dir}, tmp_path / 'report.html')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    record = find_record(work_dir)
    before[record] = record.read_bytes().replace(b'"iter"', b'"xxxx"', 1)
    record.write_bytes(before[record])
    with pytest.raises(ValueError, match='line 2 is damaged'):
        write_report({'run': work_dir}, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


LIMITED = """
import re, sys
from psbn_mmdet.report import write_report

def peak():
    # Not ru_maxrss: that has what the process was started from, too.
    return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024

before = peak()
write_report({'long run': sys.argv[1]}, sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
def test_a_record_of_100_000_reports_takes_150_mb_at_most(long_record, tmp_path):
    out = tmp_path / 'report.html'
    try:
        command = [sys.executable, '-c', LIMITED, str(long_record), str(out)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        long_record.unlink()  # 0.4 GB
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 150, 'MB'
    text = Page(out).text
    assert re.search(r'100,000 reports\s+up to iteration 5,000,000', text)
    assert out.stat().st_size < 3e6, 'what a screen cannot show is thinned'
