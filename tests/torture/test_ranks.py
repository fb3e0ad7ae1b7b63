"""Two ranks of which one dies, or is of another mind; two runs at the same second."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import cases
import pytest
from limits import HANG
from mmengine.hooks import Hook
from small_run import Classifier, records_of, run, texts

from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import find_snapshots, read_records

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def on_two_ranks(work_dir: Path, what: str) -> subprocess.CompletedProcess:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    folders = [str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(folders), OMP_NUM_THREADS='1')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
    return subprocess.run(
        [*launch, f'--master_port={port}', str(HERE / 'rank_run.py'), str(work_dir), what],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG,
    )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_the_record_is_whole(tmp_path):
    result = on_two_ranks(tmp_path, 'dies')
    cases.count()
    assert result.returncode != 0 and 'SIGKILL' in result.stderr
    (path,) = tmp_path.glob('*/collapse.jsonl')
    assert [report['iter'] for report in read_records(path).reports] == [2, 4]
    assert path.read_bytes().endswith(b'\n')
    assert list(find_snapshots(path.parent)) == [0]
    assert not list(tmp_path.rglob('*.part'))


@pytest.mark.slow
@pytest.mark.parametrize('what', ['kind', 'number', 'name'])
def test_ranks_with_other_layers_are_refused_before_the_first_step(tmp_path, what):
    result = on_two_ranks(tmp_path, what)
    cases.count()
    assert result.returncode != 0
    example = dict(
        kind='stem.1 (PostShiftedSyncBatchNorm, 8 channels)',
        number='head.1 (PostShiftedBatchNorm2d, 8 channels)',
        name='stem.norm (PostShiftedBatchNorm2d, 8 channels)',
    )[what]
    others = 1 if what == 'number' else 2
    sentence = (
        f'RuntimeError: the ranks have different BN and psBN layers, rank 0 2 and rank 1 {others}, '
        f'such as {example}: start all of them with the same config'
    )
    # Both ranks say it, unless the launcher ends one before.
    assert sentence in result.stderr, result.stderr[-3000:]
    assert 'loss: ' not in texts(tmp_path)
    assert not list(tmp_path.glob('*/collapse.jsonl'))


@pytest.mark.slow
def test_ranks_with_other_parameters_are_refused_by_torch(tmp_path):
    result = on_two_ranks(tmp_path, 'parameters')
    cases.count()
    assert result.returncode != 0
    assert 'DDP expects same model across all ranks' in result.stderr, result.stderr[-3000:]


class Another(Hook):
    """Trains another network in the same work dir in the midst of this training."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 9:
            self.runner = run(runner.work_dir, Classifier(killed={}))


def test_runs_started_in_the_same_second_keep_their_records_apart(tmp_path, monkeypatch):
    clock = time.strftime
    stopped = lambda form, *args: '20260101_000000' if '_' in form else clock(form, *args)  # noqa: E731
    monkeypatch.setattr(time, 'strftime', stopped)
    another = Another()
    hooks = [dict(type='CollapseHook', interval=4, window=4), another]
    checkpoints = dict(checkpoint=dict(type='CheckpointHook', interval=1, filename_tmpl='a_{}.pth'))
    model = Classifier(PostShiftedBatchNorm2d)
    first = run(tmp_path, model, custom_hooks=hooks, default_hooks=checkpoints)
    cases.count('runs')
    assert first.log_dir == another.runner.log_dir
    folder = Path(first.log_dir)
    beside = folder.with_name(f'{folder.name}_2')
    for log, kind, collapsed in ((folder, 'psBN', 4), (beside, 'BN', 0)):
        records = read_records(log / 'collapse.jsonl')
        assert records.header['layers'][0]['norm'] == kind
        assert [report['iter'] for report in records.reports] == [4, 8, 12, 16, 20, 24]
        assert {report['total']['trapped'] for report in records.reports} == {collapsed}
        assert list(find_snapshots(log)) == [0, 12, 24]
    assert f'the record of this run is in {beside}' in texts(tmp_path)
    # A run that resumes one of them in that very second continues the right one.
    model = Classifier(PostShiftedBatchNorm2d)
    load = dict(resume=True, load_from=str(tmp_path / 'a_1.pth'))
    run(tmp_path, model, default_hooks=checkpoints, epochs=3, **load)
    third = read_records(folder.with_name(f'{folder.name}_3') / 'collapse.jsonl')
    assert third.header['continues'] == f'../{folder.name}'
    assert third.reports[:3] == records_of(first).reports[:3]
    assert [report['iter'] for report in third.reports] == [*range(4, 37, 4)]
