"""The tables of docs/evidence.md, made again from the kept runs of the experiments."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parents[2]

import common  # noqa: E402


def result_of(name: str) -> dict:
    return json.loads((ROOT / f'benchmarks/results/evidence/{name}.json').read_text())


def rows_of(table: dict) -> list[dict]:
    return [dict(zip(table['columns'], row)) for row in table['rows']]


def section_of(name: str) -> str:
    page = (ROOT / 'docs/evidence.md').read_text()
    return page.split(f'<!-- {name} -->\n')[1].split(f'<!-- end of {name} -->')[0]


def records_of(name: str) -> list[dict]:
    """Runs of the result, those that were kept whole from their own file."""
    kept = ROOT / f'benchmarks/results/evidence/{name}.jsonl'
    if not kept.exists():
        rows = rows_of(result_of(name)['runs'])
        return [{key: value for key, value in row.items() if value is not None} for row in rows]
    lines = common.read_finished(kept).values()
    return [{**line['setting'], **row} for line in lines for row in line['rows']]


@pytest.mark.parametrize('name', ['decay', 'scratch', 'finetuning', 'cifar', 'imagenet'])
def test_cells_and_contrasts_come_out_of_the_kept_runs(name):
    module = importlib.import_module(name)
    cells, contrasts = module.compare(records_of(name))
    result = result_of(name)
    for found, kept in ((cells, result['cells']), (contrasts, result['contrasts'])):
        assert rows_of(common.table(found)) == rows_of(kept)
    assert section_of(name).endswith(common.contrasts_table(contrasts, 'AP').split('\n', 1)[1])


def test_cells_of_the_detectors_come_out_of_the_kept_runs():
    cells = importlib.import_module('detection').compare(records_of('detection'))
    assert rows_of(common.table(cells)) == rows_of(result_of('detection')['cells'])


def test_costs_come_out_of_the_kept_results():
    rows = importlib.import_module('costs').gather()
    assert rows_of(common.table(rows)) == rows_of(result_of('costs')['networks'])
