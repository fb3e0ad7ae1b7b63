"""tools/report.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from psbn_mmdet.commands.report import main

RECORD = 'run/20260101_000000/collapse.jsonl'
TOOL = Path(__file__).resolve().parents[2] / 'tools/report.py'


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """A function that calls the tool in ``tmp_path``: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def tool(*arguments) -> tuple[int, str, str]:
        return main(arguments), *capsys.readouterr()

    return tool


def test_it_says_where_the_page_is_and_labels_runs_by_their_folders(tmp_path, write_run):
    write_run(tmp_path / 'bn')
    write_run(tmp_path / 'psbn')
    command = [sys.executable, str(TOOL), 'bn', 'psbn']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout == 'The report is in report.html\n'
    page = (tmp_path / 'report.html').read_text()
    assert '<title>Collapsed filters: bn, psbn</title>' in page


def test_labels_and_the_page_can_be_named(tmp_path, write_run, tool):
    write_run(tmp_path / 'run')
    result = tool('run', '--labels', 'a [b] c', '-o', 'new/page.html')
    assert result == (0, 'The report is in new/page.html\n', '')
    assert '<title>Collapsed filters: a [b] c</title>' in (tmp_path / 'new/page.html').read_text()
    assert (tmp_path / 'new/page_figures/counts.svg').exists()


def test_a_long_work_shows_a_bar_on_a_terminal(tmp_path, write_run):
    pty = pytest.importorskip('pty')
    write_run(tmp_path / 'run')
    shown = bytearray()

    def read(fd):
        data = os.read(fd, 1024)
        shown.extend(data)
        return data

    command = [sys.executable, str(TOOL), str(tmp_path / 'run')]
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ.update(TERM='xterm', COLUMNS='80')
        os.execv(command[0], command)
    try:
        while read(fd):
            pass
    except OSError:  # the other end is closed
        pass
    assert os.waitpid(pid, 0)[1] == 0
    assert b'reading run' in shown and b'drawing' in shown and b'%' in shown


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere has no */collapse.jsonl: give the work dir of a run'),
        (['empty'], 'has no report yet: train for more than one interval (50 iterations)'),
        (['damaged'], 'line 3 is damaged'),
        (['run', 'run'], 'the labels run, run are not all different: give others with --labels'),
        (['run', '--labels', 'a', 'b'], '1 runs, but 2 labels: give --labels one for each'),
        (['run', '--labels', ''], "a label is empty, '': give each run a name"),
        (['run', '-o', 'run/20260101_000000'], 'is a folder: name a file, such as'),
        (['run', '-o', RECORD], f'{RECORD} is of the run itself and is not overwritten'),
        (['run', RECORD, '-o', f'linked/{RECORD}'], 'is not overwritten: name another file'),
    ],
)
def test_it_stops_with_one_sentence(tmp_path, write_run, tool, arguments, message):
    write_run(tmp_path / 'run')
    write_run(tmp_path / 'empty', [])
    (tmp_path / 'linked').symlink_to(tmp_path)
    damaged = write_run(tmp_path / 'damaged') / '20260101_000000/collapse.jsonl'
    damaged.write_text(damaged.read_text().replace('"iter": 100', '"iter"'))
    whole = (tmp_path / RECORD).read_bytes()
    code, stdout, stderr = tool(*arguments)
    assert (tmp_path / RECORD).read_bytes() == whole
    assert code == 1 and stdout == ''
    assert stderr.startswith('report: ') and stderr.count('\n') == 1
    assert message in stderr
    assert not (tmp_path / 'report.html').exists()
