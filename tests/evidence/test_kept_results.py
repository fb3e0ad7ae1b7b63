"""The experiments' tables, made again from their kept results: nothing is run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

pytest.importorskip('sklearn')

import study
from study import rows_of, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'benchmarks/results/evidence'
NAMES = sorted(path.stem for path in RESULTS.glob('*.json'))
COMPARED = ('decay', 'scratch', 'finetuning', 'cifar', 'imagenet')
PREPARED = {
    'cifar': 'with_changes',
    'detection': 'with_settings',
    'finetuning': 'with_pruning',
    'imagenet': 'with_settings',
}


def result_of(name: str) -> dict:
    return json.loads((RESULTS / f'{name}.json').read_text())


def told(name: str) -> str:
    """The tables of a page, which its script puts there."""
    page = (ROOT / f'docs/evidence/{name}.md').read_text()
    return page.split(f'<!-- {name}.py -->\n')[1].split(f'<!-- end of {name}.py -->')[0]


def records_of(name: str) -> list[dict]:
    """The runs of a result, those that were kept whole from their own file."""
    kept = RESULTS / f'{name}.jsonl'
    if kept.exists():
        records = study.records_of(study.read_finished(kept).values())
    else:
        records = rows_of(result_of(name)['runs'])
    prepare = getattr(importlib.import_module(name), PREPARED.get(name, ''), None)
    return prepare(records) if prepare else records


def assert_kept(found: list[dict], kept: list[dict], least: float = 1e-9) -> None:
    """That rows are those of a kept result, whose floats have five digits."""
    assert len(found) == len(kept)
    for row, other in zip(rows_of(table(found)), kept):
        for key, value in row.items():
            plain = value is None or isinstance(value, str)
            expected = other[key] if plain else pytest.approx(other[key], rel=1e-4, abs=least)
            assert value == expected, (key, row, other)


@pytest.mark.parametrize('name', COMPARED)
def test_cells_contrasts_and_tables_come_out_of_the_kept_runs(name):
    module = importlib.import_module(name)
    compare = getattr(module, 'compare', module.STUDY.compare)
    cells, contrasts = compare(records_of(name))
    result = result_of(name)
    assert_kept(cells, rows_of(result['cells']))
    assert_kept(contrasts, rows_of(result['contrasts']))
    assert told(name) == module.STUDY.tables(cells, contrasts)


@pytest.mark.parametrize('name', [path.stem for path in sorted(RESULTS.glob('*.jsonl'))])
def test_finished_writes_the_kept_results_again(name, tmp_path, monkeypatch):
    """From a copy of the kept runs in the work dir, without any data."""
    work_dir, page = tmp_path / 'work', tmp_path / f'docs/evidence/{name}.md'
    for folder in (work_dir, page.parent, tmp_path / 'docs/images'):
        folder.mkdir(parents=True)
    (work_dir / f'{name}.jsonl').write_text((RESULTS / f'{name}.jsonl').read_text())
    page.write_text(f'<!-- {name}.py -->\nold\n<!-- end of {name}.py -->\n')
    monkeypatch.setattr(study, 'ROOT', tmp_path)
    monkeypatch.setattr(sys, 'argv', [name, '--finished', '--work-dir', str(work_dir)])
    importlib.import_module(name).main()
    assert page.read_text().splitlines()[1:-1] == told(name).splitlines()
    folder = tmp_path / 'benchmarks/results/evidence'
    written = json.loads((folder / f'{name}.json').read_text())
    for part in ('cells', 'contrasts'):
        assert_kept(rows_of(written[part]), rows_of(result_of(name)[part]))
    assert study.read_finished(folder / f'{name}.jsonl') == study.read_finished(
        RESULTS / f'{name}.jsonl'
    )
    assert (tmp_path / f'docs/images/evidence_{name}.png').stat().st_size > 10_000


def test_detectors_come_out_of_the_kept_runs():
    detection = importlib.import_module('detection')
    cells, contrasts = detection.STUDY.compare(records_of('detection'))
    kept = {
        (row['setting'], row['arm']): row
        for row in detection.with_settings(rows_of(result_of('detection')['cells']))
    }
    assert len(cells) == len(kept) == 40 and len(contrasts) == 32
    for cell in cells:
        other = kept[cell['setting'], cell['arm']]
        for key in ('seeds', 'AP', 'collapsed_first', 'collapsed', 'trapped', 'new', 'revived'):
            assert cell[key] == pytest.approx(other[key], rel=1e-4)
    for contrast in contrasts:
        setting, name = contrast['contrast'].split(': ')
        other = kept[setting, name.replace(' over BN', '')]
        for key, end in (('mean', ''), ('low', '_low'), ('high', '_high')):
            assert contrast[key] == pytest.approx(other[f'AP-BN{end}'], rel=1e-4, abs=1e-9)
    assert told('detection') == detection.pivot(cells, contrasts)


def test_costs_come_out_of_the_kept_results():
    rows = importlib.import_module('costs').gather()
    assert_kept(rows, rows_of(result_of('costs')['networks']))


def test_collapse_on_digits_comes_out_of_the_kept_runs():
    found = importlib.import_module('when').summarise(records_of('when'))
    kept = result_of('when')
    assert found['worst_that_work'] == kept['worst_that_work']
    for name in ('groups', 'cells', 'runs'):
        assert_kept(rows_of(found[name]), rows_of(kept[name]))


def test_shifts_come_out_of_the_kept_runs():
    records = [{'part': 'scratch', **row} for row in records_of('alpha')]
    found = importlib.import_module('alpha').summarise(records)
    assert_kept(rows_of(found['scratch']), rows_of(result_of('alpha')['scratch']))


def test_public_networks_come_out_of_their_layers():
    networks = importlib.import_module('networks')
    files = {network: file for file, network, _, _ in networks.NETWORKS}
    kept = result_of('networks')
    layers = [{**row, 'file': files[row['network']]} for row in rows_of(kept['layers'])]
    found = networks.summarise(layers)
    assert_kept(rows_of(found['networks']), rows_of(kept['networks']))


def test_recovery_comes_out_of_the_kept_filters():
    recovery = importlib.import_module('recovery')
    kept = result_of('recovery')
    filters = study.group_by(rows_of(kept['filters']), *recovery.KEYS, 'arm')
    for row in rows_of(kept['summary']):
        arm = recovery.ARMS.index(row['arm'])
        own = filters[(*(row[key] for key in recovery.KEYS), arm)]
        found = recovery.what_opened(own, row['steps'], with_prediction=arm in (1, 2))
        assert_kept([found], [row], least=6e-3)  # of differences of large numbers
    predicted = [row for rows in filters.values() for row in rows if row['arm'] in (1, 2)]
    assert recovery.late_by(predicted) == kept['opened_by_predicted']


def test_the_law_comes_out_of_the_kept_measurements():
    law = importlib.import_module('law')
    kept = result_of('law')
    steps, walks, shares, curves = (
        rows_of(kept[name]) for name in ('one_step', 'walk', 'real_walk', 'real_drift')
    )
    slopes = law.powers(steps, walks, shares)
    assert slopes.keys() == kept['slopes'].keys()
    for name, found in slopes.items():
        assert found['slope'] == pytest.approx(kept['slopes'][name]['slope'], abs=2e-3)
        for row, other in zip(found['local'], kept['slopes'][name]['local']):
            assert row == pytest.approx(other, rel=1e-3, abs=2e-3)
    found = law.boundaries(kept['slopes'], max(row['steps'] for row in walks))
    assert found == pytest.approx(kept['law'], abs=0.011)
    for row in kept['real_noise']:
        points = study.group_by(curves, 'arch', 'spread')[row['arch'], row['spread']]
        assert law.power_over_lr(points) == pytest.approx(row['over_lr'], abs=2e-3)


@pytest.mark.parametrize('name', [n for n in NAMES if n not in (*COMPARED, 'detection', 'costs')])
def test_the_page_has_the_table_of_the_kept_result(name):
    assert told(name) == importlib.import_module(name).tell(result_of(name))


def test_the_page_of_costs_has_their_table():
    assert told('costs') == importlib.import_module('costs').tell(
        rows_of(result_of('costs')['networks'])
    )


@pytest.mark.parametrize('name', NAMES)
def test_figures_are_drawn_from_the_kept_results(name):
    module = importlib.import_module(name)
    result = result_of(name)
    if name == 'costs':
        figure = module.draw(rows_of(result['networks']))
    elif hasattr(module, 'draw'):
        figure = module.draw(result)
    else:
        records = records_of(name)
        cells, _ = module.STUDY.compare(records)
        figure = study.forest(cells, records, module.STUDY.score, module.STUDY.factor)
    assert isinstance(figure, Figure) and figure.axes


def test_scripts_import_no_tests_and_no_other_script():
    """Only the framework and the helpers, which have no page."""
    folder = ROOT / 'benchmarks/evidence'
    for path in folder.glob('*.py'):
        text = path.read_text()
        for name in NAMES:
            assert f'from {name} import' not in text and f'\nimport {name}\n' not in text
        assert "'tests" not in text
