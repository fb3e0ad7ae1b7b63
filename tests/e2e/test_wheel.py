"""The wheel, far from the checkout."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import mmengine
import pytest
import torch
from subprocesses import ROOT, run


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> Path:
    """The built wheel, unpacked far from the checkout."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    # Of what git knows alone: a build leaves files in its folder.
    files = run('git', 'ls-files', '-co', '--exclude-standard').stdout.split('\n')
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(('docs/', 'benchmarks/', 'tests/')):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = 'from setuptools import build_meta as b; b.build_wheel("..")'
    result = run(sys.executable, '-c', build, cwd=source)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / 'site')
    return folder / 'site'


def test_the_wheel_has_what_mim_looks_for(installed):
    mim = installed / 'psbn_mmdet/.mim'
    for name in ('configs', 'tools'):
        own = {p.relative_to(ROOT) for p in (ROOT / name).rglob('*.*') if p.suffix != '.pyc'}
        assert own == {p.relative_to(mim) for p in (mim / name).rglob('*.*')}
    index = mmengine.load(mim / 'model-index.yml')
    for file in index['Import']:
        for model in mmengine.load(mim / file)['Models']:
            assert (mim / model['Config']).is_file()
            assert model['Weights'].startswith('https://')


def test_its_tools_and_commands_work_without_the_checkout(installed, tmp_path):
    torch.save(torch.nn.BatchNorm2d(4).state_dict(), tmp_path / 'bn.pth')
    for command in (
        [installed / 'psbn_mmdet/.mim/tools/audit.py', 'bn.pth'],
        ['-m', 'psbn_mmdet', 'audit', 'bn.pth'],
        ['-m', 'psbn_mmdet', 'revive', '--help'],
        ['-m', 'psbn_mmdet', 'prune', '--help'],
    ):
        result = run(sys.executable, *command, cwd=tmp_path, PYTHONPATH=str(installed))
        assert result.returncode == 0, result.stderr
    where = [sys.executable, '-c', 'import psbn_mmdet; print(psbn_mmdet.__file__)']
    assert str(installed) in run(*where, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    result = run(sys.executable, '-m', 'psbn_mmdet', 'nothing', cwd=tmp_path)
    assert result.returncode == 2 and '{audit,prune,report,revive}' in result.stderr


def test_a_config_of_the_wheel_is_trained_by_its_script_as_far_as_its_data(installed, tmp_path):
    mim = installed / 'psbn_mmdet/.mim'
    config = mim / 'configs/psbn/retinanet_r50_fpn_psbn_1x_coco.py'
    script = mim / 'tools/train.py'
    result = run(sys.executable, script, config, cwd=tmp_path, PYTHONPATH=str(installed))
    assert result.returncode == 1
    assert 'error: train_dataloader.dataset.ann_file: data/coco/' in result.stderr
