"""Which record is read, and which runs it continues."""

import pytest

from psbn_mmdet.report import find_record, read_run
from psbn_mmdet.report.work_dirs import run_folders


def test_a_work_dir_a_run_folder_and_a_record_are_found(tmp_path, write_run):
    write_run(tmp_path)
    write_run(tmp_path, timestamp='20260102_000000')
    latest = tmp_path / '20260102_000000/collapse.jsonl'
    assert find_record(tmp_path) == find_record(latest.parent) == find_record(latest) == latest
    for number in (2, 10):
        write_run(tmp_path, timestamp=f'{latest.parent.name}_{number}')
    assert find_record(tmp_path).parent.name == f'{latest.parent.name}_10'


def test_a_work_dir_without_a_record_or_a_report_is_named(tmp_path, write_run):
    with pytest.raises(FileNotFoundError, match='CollapseHook'):
        read_run(tmp_path, 'BN')
    with pytest.raises(ValueError, match='no report yet'):
        read_run(write_run(tmp_path, []), 'BN')


@pytest.mark.parametrize('claim', ['.', '../gone', '../20260101_000000', 5, 'x' * 5000, 'a\0b'])
def test_a_run_that_continues_itself_in_circles_or_what_is_gone(tmp_path, write_run, claim):
    write_run(tmp_path, timestamp='20260101_000000', continues='../20260102_000000')
    write_run(tmp_path, timestamp='20260102_000000', continues=claim)
    folders = [folder.name for folder in run_folders(find_record(tmp_path))]
    circle = ['20260101_000000'] if claim == '../20260101_000000' else []
    assert folders == [*circle, '20260102_000000']
