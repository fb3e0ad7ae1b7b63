"""The table by stage."""

from psbn_mmdet.report import read_run
from psbn_mmdet.report.stage_table import COLUMNS, stage_rows


def test_counts_of_the_last_report_and_of_the_whole_run_add_up(tmp_path, write_run):
    run = read_run(write_run(tmp_path, [[1], [1, 2, 70], [2, 3]]), 'BN')
    table = [dict(zip(COLUMNS, row)) for row in stage_rows(run)]
    assert [row['stage'] for row in table] == ['backbone', 'backbone.layer1', 'neck', 'all']
    assert [row['filters'] for row in table] == ['64', '64', '32', '160']
    assert [row['collapsed'] for row in table] == ['2', '0', '0', '2']
    assert [row['share'] for row in table] == ['3.1%', '0.0%', '0.0%', '1.2%']
    assert [row['ever collapsed'] for row in table] == ['3', '1', '0', '4']
    assert [row['ever revived'] for row in table] == ['1', '1', '0', '2']


def test_what_is_not_known_is_a_dash(tmp_path, write_run):
    run = read_run(write_run(tmp_path), 'BN')
    run.last['layers']['dead'] = [None, None, None]
    run.last['layers']['trapped'] = [1, None, None]
    table = [dict(zip(COLUMNS, row)) for row in stage_rows(run)]
    assert [row['dead'] for row in table] == ['-', '-', '-', '-']
    assert [row['trapped'] for row in table] == ['1', '-', '-', '1']
