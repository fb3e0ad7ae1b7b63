"""A disk that is full, or may not be written to: what stood there stays, nothing half is left."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import count
from limits import HANG
from safetensors.torch import save_file
from small_run import Classifier
from small_run import run as train
from tiny_model import tiny_config
from torch import nn

from psbn_mmdet.commands import audit, report, revive
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import (
    COUNTS,
    RecordWriter,
    copy_snapshots,
    find_snapshots,
    read_records,
    write_snapshot,
)
from psbn_mmdet.report import find_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def limit():
    """A function that limits the size of the files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def refusal(limit):
    """A function that calls a tool whose files may have so many bytes: its one sentence.

    A file that is larger is EFBIG, where a full disk is ENOSPC.
    """

    def refusal(main, size: int, *arguments: object) -> str:
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr):
            limit(size)
            try:
                code = main([str(argument) for argument in arguments])
            finally:
                limit(resource.RLIM_INFINITY)
        assert code == 1 and stdout.getvalue() == ''
        (line,) = stderr.getvalue().splitlines()
        return line

    return refusal


HEADER = dict(
    layers=[dict(name='a.bn', channels=40, norm='BN', shift=0, rectifier='relu', frozen=False)],
    **dict(interval=50, window=50, tau=1e-3, k=3.0, continues=None),
)


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory) -> Path:
    """A run with a record, a snapshot and a log."""
    folder = tmp_path_factory.mktemp('work') / 'run/20260101_000000'
    writer = RecordWriter(folder / 'collapse.jsonl', HEADER)
    for iteration in (50, 100):
        line = dict(iter=iteration, epoch=1, lr=dict(lr=0.1), steps=50)
        writer.append(line | dict(channels={key: [''] for key in COUNTS}))
    write_snapshot(folder, 0, np.ones(40), np.zeros(40))
    return folder.parent


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.normal_(model[1].weight)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    return tmp_path / 'a.pth'


@pytest.mark.parametrize('size', [0, 1000, 60_000])
def test_a_report_on_a_full_disk_leaves_the_old_one(work_dir, tmp_path, size, refusal):
    """The sizes stop it at the first figure, at a later one, and at the page."""
    count()
    out = tmp_path / 'report.html'
    (tmp_path / 'report_figures').mkdir()
    for name in ('report.html', 'report_figures/counts.png', 'report_figures/scores.svg'):
        (tmp_path / name).write_text('old')
    before = contents(tmp_path)
    sentence = refusal(report.main, size, work_dir, '-o', out)
    assert f'report: {tmp_path}' in sentence and 'cannot be written (File too large)' in sentence
    assert sentence.endswith('make room or give another place')
    assert contents(tmp_path) == before


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_a_revival_on_a_full_disk_leaves_nothing(checkpoint, tmp_path, ending, refusal):
    count()
    source, config = checkpoint, tiny_config(tmp_path, 8)
    if ending == 'safetensors':
        source = tmp_path / 'a.safetensors'
        save_file(torch.load(tmp_path / 'plain.pth'), source)
    before = contents(tmp_path)
    for size in (400, 600):  # MMEngine writes a copy of the config, too
        out = tmp_path / f'out.{ending}'
        sentence = refusal(revive.main, size, source, out, '--config', config)
        assert f'out.{ending} cannot be written' in sentence and 'make room' in sentence
        assert contents(tmp_path) == before


def test_a_picture_on_a_full_disk_leaves_the_old_one(checkpoint, tmp_path, refusal):
    count()
    (tmp_path / 'a.png').write_text('old')
    before = contents(tmp_path)
    sentence = refusal(audit.main, 1000, checkpoint, '--plot', tmp_path / 'a.png')
    assert sentence.startswith(f'audit: {tmp_path}/a.png cannot be written (File too large)')
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    'script',
    [
        'audit.py',
        pytest.param('revive.py', marks=pytest.mark.slow),
        pytest.param('report.py', marks=pytest.mark.slow),
    ],
)
def test_an_output_on_a_full_disk_is_an_error(script, work_dir, checkpoint, tmp_path):
    count()
    arguments = {
        'audit.py': [checkpoint, '--format', 'json'],
        'revive.py': [checkpoint, 'out.pth', '--config', tiny_config(tmp_path, 8)],
        'report.py': [work_dir],
    }[script]
    command = [sys.executable, ROOT / 'tools' / script, *arguments]
    with open('/dev/full', 'w') as full:
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(ROOT / 'tests')},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
        )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert 'the output cannot be written (No space left on device): make room' in line


@pytest.mark.skipif(not Path('/sys').is_dir(), reason='needs a folder where even root cannot write')
def test_a_folder_that_may_not_be_written_to(work_dir, checkpoint, refusal):
    for main, arguments in (
        (report.main, [work_dir, '-o', '/sys/new/report.html']),
        (revive.main, [checkpoint, '/sys/out.pth', '--config', tiny_config(checkpoint.parent, 8)]),
        (audit.main, [checkpoint, '--plot', '/sys/a.png']),
        (audit.main, [checkpoint, '--plot', f'{checkpoint}/a.png']),
    ):
        count()
        sentence = refusal(main, resource.RLIM_INFINITY, *arguments)
        assert 'cannot be written (' in sentence and 'give another place' in sentence


# What a training writes


def test_a_record_and_a_snapshot_stay_whole(tmp_path, limit):
    folder = tmp_path / 'run'
    writer = RecordWriter(folder / 'collapse.jsonl', HEADER)
    line = dict(epoch=1, lr=dict(lr=0.1), channels={key: ['1,3,5,7,9'] for key in COUNTS})
    for iteration in (1, 2):
        writer.append(line | dict(iter=iteration))
    write_snapshot(folder, 0, np.ones(4), np.zeros(4))
    before = contents(folder)
    limit(writer.path.stat().st_size + 50)
    with pytest.raises(OSError, match='File too large'):
        writer.append(line | dict(iter=3))
    limit(100)
    for write in (
        lambda: write_snapshot(folder, 4, np.ones(40), np.zeros(40)),
        lambda: copy_snapshots(folder, tmp_path / 'new', 4),
        lambda: RecordWriter(tmp_path / 'new/collapse.jsonl', HEADER, writer.path, 2),
    ):
        count()
        with pytest.raises(OSError, match=r'cannot be written \(File too large\): make room'):
            write()
    limit(resource.RLIM_INFINITY)
    assert [line['iter'] for line in read_records(writer.path).reports] == [1, 2]
    assert writer.path.read_bytes().startswith(before.pop('collapse.jsonl'))
    assert contents(folder) == before | {'collapse.jsonl': writer.path.read_bytes()}
    assert contents(tmp_path / 'new') == {}
    assert list(find_snapshots(folder)) == [0]


class Filling(Classifier):
    """The disk is full from the third step on."""

    def __init__(self, limit, size, until=10**9):
        super().__init__(PostShiftedBatchNorm2d)
        self.limit, self.size, self.until, self.calls = limit, size, until, 0

    def train_step(self, data, optim_wrapper):
        self.calls += 1
        if self.calls == 3:
            self.limit(self.size)
        if self.calls == self.until:
            self.limit(resource.RLIM_INFINITY)
        return super().train_step(data, optim_wrapper)


@pytest.mark.parametrize('size', [0, 100, 300, 700, 1700])
def test_a_training_goes_on_and_says_so_once(tmp_path, limit, capsys, size):
    """The sizes stop the record before it begins, in its header, and in a report."""
    count()
    quiet = dict(type='Visualizer', vis_backends=[])  # MMEngine's own files are its own affair
    hooks = dict(logger=dict(type='LoggerHook', interval=4), checkpoint=None)
    model = Filling(limit, size)
    runner = train(tmp_path, model, default_hooks=hooks, visualizer=quiet)
    limit(resource.RLIM_INFINITY)
    assert runner.iter == 24
    said = capsys.readouterr().out
    assert said.count('records are off from iteration') == 1
    assert said.count('snapshots are off from iteration') == (size < 192)
    folder = Path(runner.log_dir)
    assert find_snapshots(folder)[0].stat().st_size == 192
    assert not list(tmp_path.rglob('*.part'))
    if (folder / 'collapse.jsonl').exists():
        read = read_records(folder / 'collapse.jsonl').reports
        assert [line['iter'] for line in read] == [4, 8, 12, 16, 20, 24][: len(read)]


def test_a_disk_that_has_room_again_continues_in_the_next_run(tmp_path, limit, capsys):
    """The record of the first run ends where the disk was full; that of the second is whole."""
    count()
    quiet = dict(type='Visualizer', vis_backends=[])
    logger = dict(type='LoggerHook', interval=4)
    checkpoint = dict(type='CheckpointHook', interval=1)
    settings = dict(default_hooks=dict(logger=logger, checkpoint=checkpoint), visualizer=quiet)
    first = train(tmp_path, Filling(limit, 800, until=11), epochs=1, **settings)
    assert 'records are off' in capsys.readouterr().out
    kept = [line['iter'] for line in read_records(f'{first.log_dir}/collapse.jsonl').reports]
    assert kept and kept[-1] < 12
    train(tmp_path, Classifier(PostShiftedBatchNorm2d), resume=True, **settings)
    # Not in its log folder, which may be that of the first run, of the same second.
    found = read_records(find_record(tmp_path)).reports
    assert [line['iter'] for line in found] == [*kept, 16, 20, 24]
