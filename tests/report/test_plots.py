"""Figures from records, and the tool that draws them."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from psbn_mmdet.collapse import RecordWriter
from psbn_mmdet.report import find_record, plot_collapse

ROOT = Path(__file__).resolve().parents[2]


def write_run(work_dir: Path, counts: list, timestamp: str = '20260101_000000') -> Path:
    header = dict(layers=[dict(name='bn', channels=64)], interval=50)
    writer = RecordWriter(work_dir / timestamp / 'collapse.jsonl', header)
    for index, count in enumerate(counts):
        total = dict(collapsed=count, vanished=0, trapped=None if index == 1 else count)
        writer.append(
            dict(iter=50 * (index + 1), lr=dict(lr=0.1), total=total, channels=dict(collapsed={}))
        )
    return work_dir


@pytest.mark.parametrize('ending', ['png', 'svg'])
def test_two_runs_in_one_picture(tmp_path, ending):
    runs = {
        'BN': write_run(tmp_path / 'bn', [1, 5, 9]),
        'psBN <b>&': write_run(tmp_path / 'psbn', [1, 0, 0]),
    }
    out = plot_collapse(runs, tmp_path / 'new' / f'plot.{ending}')
    assert out.stat().st_size > 10_000
    if ending == 'png':
        picture = cv2.imread(str(out)).astype(int)
        for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
            near = np.abs(picture - np.array(colour[::-1])).sum(-1) < 20
            assert near.sum() > 200, 'each run has a line of its own colour'
    else:
        text = out.read_text()
        assert '<svg' in text and '<b>' not in text.split('<metadata>')[-1].split('</metadata>')[1]


def test_the_latest_run_of_a_work_dir_is_taken(tmp_path):
    write_run(tmp_path, [1], '20260101_000000')
    write_run(tmp_path, [2], '20260102_000000')
    assert find_record(tmp_path).parent.name == '20260102_000000'
    assert find_record(find_record(tmp_path)) == find_record(tmp_path)


def test_a_work_dir_without_a_record_or_a_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='CollapseHook'):
        plot_collapse({'run': tmp_path}, tmp_path / 'plot.png')
    with pytest.raises(ValueError, match='no report yet'):
        plot_collapse({'run': write_run(tmp_path, [])}, tmp_path / 'plot.png')
    assert not (tmp_path / 'plot.png').exists()


def tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / 'tools/plot_collapse.py'), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tool_says_where_the_picture_is(tmp_path):
    result = tool(write_run(tmp_path / 'run', [1, 2]))
    path = tmp_path / 'run/20260101_000000/collapse.png'
    assert result.returncode == 0 and str(path) in result.stdout
    assert cv2.imread(str(path)) is not None


def test_the_tool_stops_with_one_sentence(tmp_path):
    result = tool(tmp_path / 'nowhere')
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.startswith('plot_collapse: ') and result.stderr.count('\n') == 1
