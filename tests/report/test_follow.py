"""tools/report.py --follow: the page of a training that goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from limits import HANG

from psbn_mmdet.commands.report import main
from psbn_mmdet.records import RecordWriter, read_records, write_snapshot
from psbn_mmdet.report import find_record, follow_report, read_run, write_report

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    'tool': [str(ROOT / 'tools/report.py')],
    'module': ['-m', 'psbn_mmdet', 'report'],
}


@pytest.fixture
def source(tmp_path, write_run):
    """A record of four reports, which the tests' trainings write one by one."""
    return read_records(find_record(write_run(tmp_path / 'source')))


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """A function that follows ``runs`` with one step of a training between two looks.

    It returns the iterations of each page written, how many there were at each step, and what was
    said. After the last step there is Ctrl-C.
    """

    def follow(*steps, runs=('run',)) -> tuple[list[int], list[int], list[str]]:
        written: list[int] = []
        at_step: list[int] = []
        said: list[str] = []
        left = list(steps)

        def sleep(seconds):
            at_step.append(len(written))
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        def write(work_dirs, out, reload):
            found = [read_run(path, label) for label, path in work_dirs.items()]
            out.write_text('')
            written.append(int(found[0].iterations[-1]))

        monkeypatch.setattr(time, 'sleep', sleep)
        work_dirs = {name: tmp_path / name for name in runs}
        follow_report(work_dirs, tmp_path / 'page.html', 5, said.append, write)
        return written, at_step, said

    return follow


def torn(path: Path, report: dict) -> tuple:
    """Two steps: the first half of a report's line, and the rest of it."""
    line = f'{json.dumps(report)}\n'

    def append(part):
        with open(path, 'a') as file:
            file.write(part)

    return lambda: append(line[: len(line) // 2]), lambda: append(line[len(line) // 2 :])


def test_it_waits_for_the_first_report_and_writes_each_that_comes(tmp_path, source, follow):
    path = tmp_path / 'run/20260101_000000/collapse.jsonl'
    header, (first, second, *_) = source.header, source.reports
    before, after = torn(path, second)
    _, at_step, said = follow(
        lambda: None,
        lambda: RecordWriter(path, header),
        lambda: RecordWriter(path, header).append(first),
        lambda: None,
        before,
        after,
    )
    assert at_step == [0, 0, 0, 1, 1, 2, 3]
    run, page = tmp_path / 'run', tmp_path / 'page.html'
    assert said == [
        f'Waiting for a report: {run} has no */collapse.jsonl: give the work dir of a run with the '
        'CollapseHook',
        f'Waiting for a report: {path} has no report yet: train for more than one interval '
        '(50 iterations)',
        f'The report is in {page} and follows the training until Ctrl-C',
        f'Followed no longer: the report is in {page}',
    ]


def test_a_torn_line_is_no_news_to_the_reader(tmp_path, source, follow, write_run):
    write_run(tmp_path / 'run', [[]])
    written, *_ = follow(*torn(find_record(tmp_path / 'run'), source.reports[1]))
    assert written == [50, 50, 100]


def test_each_file_that_is_shown_is_followed(tmp_path, follow, write_run, write_scores):
    folder = find_record(write_run(tmp_path / 'run', [[]], snapshots=())).parent
    earlier = '20251231_000000'
    write_run(tmp_path / 'run', [[]], timestamp=earlier)
    old = folder.with_name(earlier)
    resumed = dict(timestamp='20260102_000000', continues=f'../{earlier}')
    written, at_step, _ = follow(
        lambda: write_snapshot(folder, 0, [0.5] * 160, [0.5] * 160),
        lambda: write_scores(folder, {1: 0.1}),
        lambda: write_run(tmp_path / 'run', [[], []], **resumed),
        lambda: write_scores(old, {1: 0.2}),
        lambda: (folder / 'other.txt').write_text('of no interest'),
        lambda: write_run(tmp_path / 'second', [[], []]),
    )
    assert at_step == [1, 2, 3, 4, 5, 5, 5]
    assert written == [50, 50, 50, 100, 100]


def test_a_page_that_is_deleted_meanwhile_is_not_claimed(tmp_path, source, follow, write_run):
    write_run(tmp_path / 'run')
    *_, said = follow((tmp_path / 'page.html').unlink)
    assert said[-1] == 'Followed no longer: there is no report'


def test_of_two_runs_both_are_followed_to_their_ends(tmp_path, follow, write_run):
    paths = [find_record(write_run(tmp_path / name)) for name in ('bn', 'psbn')]
    ends = [path.with_name('collapse.ended').touch for path in paths]
    _, at_step, said = follow(*ends, lambda: None, runs=('bn', 'psbn'))
    assert at_step == [1, 1]
    assert said[1:] == [f'The training has ended: the report is in {tmp_path / "page.html"}']


def test_an_ended_training_whose_successor_has_begun_is_not_the_end(tmp_path, follow, write_run):
    path = find_record(write_run(tmp_path / 'run'))
    path.with_name('collapse.ended').touch()
    (tmp_path / 'run/20260102_000000/vis_data').mkdir(parents=True)
    later = dict(timestamp='20260102_000000')
    written, at_step, said = follow(lambda: write_run(tmp_path / 'run', [[]], **later))
    assert (at_step, written) == ([1, 2], [200, 50])
    assert said[-1].startswith('Followed no longer')


def test_a_test_in_the_work_dir_is_no_successor(tmp_path, follow, write_run):
    path = find_record(write_run(tmp_path / 'run'))
    path.with_name('collapse.ended').touch()
    (tmp_path / 'run/20260102_000000/vis_data').mkdir(parents=True)
    (tmp_path / 'run/20260102_000000/20260102_000000.json').write_text('{}')
    _, at_step, said = follow(lambda: None)
    assert at_step == []
    assert said[-1].startswith('The training has ended')


def test_what_is_wrong_is_no_reason_to_wait(tmp_path, follow, write_run):
    with pytest.raises(ValueError, match='a label is empty'):
        follow_report({' ': tmp_path / 'nowhere'}, tmp_path / 'page.html')
    with pytest.raises(ValueError, match='is a folder'):
        follow_report({'run': tmp_path / 'nowhere'}, tmp_path)
    path = find_record(write_run(tmp_path / 'run'))
    with pytest.raises(ValueError, match='line 6 is damaged'):
        follow(lambda: path.write_text(f'{path.read_text()}rubbish\n'))
    assert main([str(tmp_path / 'run'), '--follow', '-o', str(tmp_path / 'page.html')]) == 1


@pytest.mark.parametrize('value', ['0', '-1', 'nan', 'inf', 'work_dirs/run', '1e9', ''])
def test_bad_values_are_one_sentence(capsys, value):
    with pytest.raises(SystemExit) as stopped:
        main(['run', '--follow', value])
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert 'error: argument --follow: must be a number of seconds from 1 to 86400' in told
    assert told.endswith(f', got {value!r}: give --follow after the work dirs')


@pytest.fixture
def start(tmp_path):
    """A function that starts the tool in ``tmp_path``, with ``--follow 1``."""
    started = []

    def start(*command):
        environment = dict(os.environ, PSBN_MMDET_REGISTER='0', PYTHONPATH=str(ROOT))
        process = subprocess.Popen(
            [sys.executable, *command, 'run', '--follow', '1'],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells let what runs in the background ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('command', COMMANDS)
def test_ctrl_c_while_it_waits_ends_with_one_line(start, command):
    process = start(*COMMANDS[command])
    assert process.stdout.readline().startswith('Waiting for a report: run has no */collapse.jsonl')
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG) == ('Followed no longer: there is no report\n', '')
    assert process.returncode == 0


def test_a_running_trainings_page_is_whole_at_any_moment(tmp_path, source, start, monkeypatch):
    path, page = tmp_path / 'run/20260101_000000/collapse.jsonl', tmp_path / 'report.html'
    done, seen = threading.Event(), set()

    def train():
        writer = RecordWriter(path, source.header)
        for report in source.reports:
            writer.append(report)
            until = f'reports up to iteration {report["iter"]:,};'
            for _ in range(3000):
                if page.exists():
                    text = page.read_text()
                    seen.add(text.endswith('</html>') and text.count('<script>') == 1)
                    if until in text:
                        break
                time.sleep(0.02)
            else:
                seen.add(f'never any {until}')
        done.set()

    process = start(*COMMANDS['tool'])
    assert process.stdout.readline().startswith('Waiting')
    source.reports[2:] = []
    thread = threading.Thread(target=train)
    thread.start()
    assert process.stdout.readline() == (
        'The report is in report.html and follows the training until Ctrl-C\n'
    )
    thread.join()
    assert seen == {True}
    process.send_signal(signal.SIGINT)
    left = process.communicate(timeout=HANG)
    assert left == ('Followed no longer: the report is in report.html\n', '')
    assert process.returncode == 0
    assert not list(tmp_path.rglob('*.part'))
    monkeypatch.chdir(tmp_path)
    assert page.read_text() == write_report({'run': 'run'}, 'report.html').read_text()
