"""The scripts in tools/, each run as a user runs it, from a folder elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import subprocess
import sys
import threading
from argparse import Namespace
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from limits import HANG
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

import psbn_mmdet  # noqa: F401  # so that the original MMEngine can read its checkpoints

ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIR = ROOT / 'configs' / 'psbn'


def run(script: str, *arguments: object, cwd: Path, **environment: str):
    """Run a script of tools/ in the folder ``cwd``; the repository is not on PYTHONPATH."""
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': '', **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def refusal(result: subprocess.CompletedProcess) -> str:
    """The one sentence with which the script stopped."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'Traceback' not in result.stdout + result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    return sentence


@pytest.fixture(scope='module')
def trained(shrink, tmp_path_factory) -> tuple[Path, Path]:
    """The config and the work dir of a small detector trained for one epoch of two steps."""
    folder = tmp_path_factory.mktemp('tools')
    cfg = Config.fromfile(CONFIG_DIR / 'retinanet_r50_fpn_psbn_1x_coco.py')
    shrink(cfg)
    cfg.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 16,
            'model.neck.in_channels': [16, 32, 64, 128],
            'model.bbox_head.num_classes': 4,
            'model.test_cfg.score_thr': 0.0,
        }
    )
    cfg.dump(folder / 'small.py')
    work_dir = folder / 'work'
    options = ['--work-dir', work_dir, '--cfg-options', 'train_cfg.max_epochs=1']
    result = run('train.py', folder / 'small.py', *options, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / 'small.py', work_dir


def test_training_writes_a_checkpoint_and_the_counts(trained):
    _, work_dir = trained
    state_dict = CheckpointLoader.load_checkpoint(str(work_dir / 'epoch_1.pth'))['state_dict']
    assert state_dict['backbone.bn1.bias'].mean() == pytest.approx(0.1, abs=0.01)
    (scalars,) = work_dir.glob('*/vis_data/scalars.json')
    steps = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [step['collapse/collapsed'] for step in steps if 'loss' in step]
    assert 'coco/bbox_mAP' in steps[-1]


def test_a_checkpoint_is_tested(trained, tmp_path):
    config, work_dir = trained
    result = run('test.py', config, work_dir / 'epoch_1.pth', '--work-dir', tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'coco/bbox_mAP' in result.stdout + result.stderr


def test_training_resumes(trained):
    config, work_dir = trained
    result = run(
        'train.py',
        *[config, '--work-dir', work_dir, '--resume', '--cfg-options', 'train_cfg.max_epochs=2'],
        cwd=work_dir,
        TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1',  # which the script overrules
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'resumed epoch: 1, iter: 2' in result.stdout + result.stderr
    assert (work_dir / 'epoch_2.pth').is_file()


@pytest.mark.parametrize('begun', [False, True])
def test_resuming_where_nothing_was_begun_starts_from_load_from(tmp_path, monkeypatch, begun):
    """MMDetection's script would start from random weights."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # which the script sets, for good
    script = runpy.run_path(str(ROOT / 'tools/train.py'))
    monkeypatch.setitem(script['check'].__globals__, 'check_train_config', lambda cfg: None)
    if begun:
        (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    args = Namespace(
        work_dir=str(tmp_path),
        resume='auto',
        norm=None,
        norm_scope=None,
        shrink=None,
        watch_collapse=False,
    )
    cfg = Config(dict(load_from='start.pth'))
    script['check'](args, cfg)
    wanted = (True, None, 'auto') if begun else (None, 'start.pth', None)
    assert (cfg.get('resume'), cfg.load_from, args.resume) == wanted


@pytest.fixture
def bad_checkpoint(bomb, tmp_path) -> Path:
    """A checkpoint that creates the folder ``touched`` beside it when it is unpickled."""
    torch.save(dict(state_dict={}, meta=bomb), tmp_path / 'bad.pth')
    return tmp_path / 'bad.pth'


def test_the_bad_checkpoint_runs_code_where_pickles_do(bad_checkpoint):
    torch.load(bad_checkpoint, weights_only=False)
    assert (bad_checkpoint.parent / 'touched').is_dir()


def test_a_checkpoint_that_would_run_code_is_refused(trained, bad_checkpoint, tmp_path):
    sentence = refusal(run('test.py', trained[0], bad_checkpoint, cwd=tmp_path))
    assert str(bad_checkpoint) in sentence
    assert 'mkdir' in sentence
    assert not (tmp_path / 'touched').exists()


@pytest.mark.slow
def test_a_downloaded_checkpoint_runs_no_code(trained, bad_checkpoint, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with HTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        result = run(
            'test.py',
            *[trained[0], f'http://127.0.0.1:{server.server_port}/bad.pth'],
            cwd=tmp_path,
            TORCH_HOME=str(tmp_path / 'cache'),
            no_proxy='127.0.0.1',
        )
        server.shutdown()
    assert (tmp_path / 'cache/hub/checkpoints/bad.pth').is_file()
    assert result.returncode != 0
    assert pickle.UnpicklingError.__name__ in result.stderr
    assert not (tmp_path / 'touched').exists()


def test_training_without_coco_stops_with_one_sentence(tmp_path):
    config = CONFIG_DIR / 'faster-rcnn_r50_fpn_psbn_1x_coco.py'
    sentence = refusal(run('train.py', config, cwd=tmp_path))
    assert f'data/coco/annotations/instances_train2017.json (in {tmp_path})' in sentence
    assert not (tmp_path / 'work_dirs').exists()


@pytest.mark.parametrize('script', ['train.py', 'test.py'])
def test_help_shows_the_options_of_mmdetection(script, tmp_path):
    result = run(script, '--help', cwd=tmp_path)
    assert result.returncode == 0
    assert all(option in result.stdout for option in ('--work-dir', '--cfg-options', '--launcher'))


@pytest.mark.parametrize('package', ['mmengine', 'mmdet'])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / '__init__.py').write_text('raise ImportError("not installed")')
    result = run('train.py', 'nowhere.py', cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "pip install --no-build-isolation -e '.[onedl]'" in refusal(result)


def arguments_of(script: str, program: str, *arguments: str, cwd: Path, **environment: str):
    """What a shell script of tools/ hands to ``program``, which only prints it here."""
    (cwd / program).write_text('#!/bin/sh\nprintf "%s\\\\n" "$@"\n')
    (cwd / program).chmod(0o755)
    result = subprocess.run(
        [os.path.relpath(ROOT / 'tools' / script, cwd), *arguments],
        cwd=cwd,
        env={**os.environ, 'PATH': f'{cwd}{os.pathsep}{os.environ["PATH"]}', **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()


OPTIONS = ['--cfg-options', 'a=[1, 2]', "b='c d'"]


@pytest.mark.parametrize(
    ('script', 'given', 'handed_on'),
    [
        ('dist_train.sh', ['c.py', '3'], ['c.py', '--launcher', 'pytorch']),
        ('dist_test.sh', ['c.py', 'x y.pth', '3'], ['c.py', 'x y.pth', '--launcher', 'pytorch']),
        (
            'slurm_train.sh',
            ['part', 'job', 'c.py', 'w d'],
            ['c.py', '--work-dir', 'w d', '--launcher', 'slurm'],
        ),
        (
            'slurm_test.sh',
            ['part', 'job', 'c.py', 'x y.pth'],
            ['c.py', 'x y.pth', '--launcher', 'slurm'],
        ),
    ],
)
def test_launchers_hand_on_every_argument_whole(script, given, handed_on, tmp_path):
    program = 'python' if script.startswith('dist') else 'srun'
    environment = dict(PORT='1234', NNODES='2', NODE_RANK='1', MASTER_ADDR='there', GPUS='3')
    arguments = arguments_of(script, program, *given, *OPTIONS, cwd=tmp_path, **environment)
    assert arguments[-len(OPTIONS) :] == OPTIONS
    assert arguments[-len(OPTIONS) - len(handed_on) : -len(OPTIONS)] == handed_on
    target = tmp_path / arguments[-len(OPTIONS) - len(handed_on) - 1]
    assert target.resolve() == ROOT / 'tools' / f'{script.split("_")[1][:-3]}.py'
    if program == 'python':
        wanted = {'--nnodes=2', '--node_rank=1', '--master_addr=there', '--master_port=1234'}
        assert {*wanted, '--nproc_per_node=3'} <= set(arguments)
    else:
        assert {'--job-name=job', '--ntasks=3', '--gres=gpu:3'} <= set(arguments)


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_launchers_without_arguments_say_how_they_are_used(script):
    result = subprocess.run([ROOT / 'tools' / script], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'usage: ' in result.stderr
