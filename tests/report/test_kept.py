"""What is kept of the runs that docs/images show."""

import importlib.util
import json
from pathlib import Path

from psbn_mmdet.report import read_run, write_report
from psbn_mmdet.report.figures import FIGURES

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location('compare', ROOT / 'scripts/compare.py')
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


def test_what_is_kept_gives_the_same_report_as_the_run(tmp_path, write_run):
    states = [[], [1], [1, 70], [70]]
    work_dir = write_run(
        tmp_path / 'run', states, snapshots=(0, 50, 100, 150, 200), scores={1: 0.1, 2: 0.3}
    )
    kept = tmp_path / 'kept'
    for _ in range(2):  # the second time in place of the first
        compare.keep(work_dir, kept)
    pages = [
        write_report({'run': path}, tmp_path / f'{path.name}.html') for path in (work_dir, kept)
    ]
    pictures = [
        {path.name: path.read_bytes() for path in page.with_name(f'{page.stem}_figures').iterdir()}
        for page in pages
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 2 * len(FIGURES)
    assert len(list(kept.glob('snapshots/*'))) == 3
    assert json.loads((kept / 'scores.json').read_text())['2'] == {'AP': 0.3, 'AP50': 0.6}


def test_the_kept_runs_show_collapse_in_bn_and_hardly_any_in_psbn():
    bn, psbn = (read_run(ROOT / compare.RESULTS / norm, norm) for norm in compare.NORMS)
    assert [layer['norm'] for layer in bn.header['layers']] == ['BN'] * len(bn.names)
    assert [layer['norm'] for layer in psbn.header['layers']] == ['psBN'] * len(psbn.names)
    assert bn.last['total']['trapped'] > 10 * max(1, psbn.last['total']['trapped'])
    assert bn.snapshots and bn.scores and psbn.snapshots and psbn.scores


def test_every_figure_is_in_the_docs():
    images = {path.stem for path in (ROOT / 'docs/images').glob('*.png')}
    assert images >= {*FIGURES, 'page_one_run', 'page_two_runs'}
