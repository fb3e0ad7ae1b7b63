"""tools/audit.py and tools/revive.py, run as a user runs them."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from limits import HANG
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import psbn_mmdet  # noqa: F401
from psbn_mmdet.checkpoints import read_content
from psbn_mmdet.collapse import find_norms

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/psbn/retinanet_r50_fpn_psbn_1x_coco.py'


def run(script: str, *arguments: object, cwd: Path) -> SimpleNamespace:
    """What a script of tools/ does in the folder ``cwd``: exit code and output."""
    spec = importlib.util.spec_from_file_location(script[:-3], ROOT / 'tools' / script)
    module = importlib.util.module_from_spec(spec)
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, 'argv', [script, *map(str, arguments)])
        patch.setattr(sys, 'path', list(sys.path))
        patch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # which the script sets, for good
        spec.loader.exec_module(module)
        code = module.main()
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Checkpoints of a small BN detector: collapsed.pth with three collapsed filters, well.pth."""
    folder = tmp_path_factory.mktemp('checkpoints')
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(depth=18, base_channels=8, norm_cfg=dict(type='BN'))
    cfg.model.neck.update(in_channels=[8, 16, 32, 64])
    cfg.dump(folder / 'detector.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    for norm in find_norms(model).values():  # as if trained
        torch.nn.init.normal_(norm.weight, 1, 0.01)
        torch.nn.init.normal_(norm.running_mean)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=1)), folder / 'well.pth')
    norms = model.backbone.layer1[0]
    norms.bn1.weight.data[2] = 0  # vanished, but alive
    norms.bn1.bias.data[2] = 1
    norms.bn1.bias.data[5] = -4  # dead
    norms.bn2.bias.data[1] = -4  # dead by the rule, alive in the network: an addition follows
    norms.bn2.weight.data[7] = 0  # both by the rule, vanished in the network
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=1)), folder / 'collapsed.pth')
    return folder


def test_both_run_as_scripts_from_any_folder(folder, tmp_path):
    for arguments, words in (
        (['audit.py', folder / 'collapsed.pth'], 'vanished 2; dead 5'),
        (
            [
                'revive.py',
                folder / 'collapsed.pth',
                'revived.pth',
                '--config',
                folder / 'detector.py',
            ],
            'state_dict: 1 filters opened, to b = 0.02',
        ),
    ):
        result = subprocess.run(
            [sys.executable, ROOT / 'tools' / arguments[0], *map(str, arguments[1:])],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': ''},
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        assert result.returncode == 0, result.stderr
        assert words in result.stdout
    assert (tmp_path / 'revived.pth').is_file()


def by_name(audit: dict) -> dict[str, dict]:
    return {layer['name']: layer for layer in audit['layers']}


def test_json_has_what_the_parameters_tell(folder):
    result = run('audit.py', 'collapsed.pth', '--format', 'json', cwd=folder)
    assert result.returncode == 0, result.stderr
    audit = json.loads(result.stdout)
    assert audit['total'] == dict(
        channels=600, unstarted=0, vanished=2, dead=3, broken=0, collapsed=4
    )
    layers = by_name(audit)
    assert len(layers) == 20
    layer = layers['backbone.layer1.0.bn2']
    assert (layer['channels'], layer['vanished'], layer['dead'], layer['rectified']) == (
        8,
        1,
        2,
        None,
    )
    assert layer['which'] == dict(
        unstarted=[], vanished=[7], dead=[1, 7], broken=[], collapsed=[1, 7]
    )
    assert layers['backbone.layer1.0.bn1']['which']['dead'] == [5]


def test_with_a_config_it_is_known_what_follows(folder):
    arguments = ['collapsed.pth', '--config', 'detector.py', '--format', 'json']
    result = run('audit.py', *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    audit = json.loads(result.stdout)
    assert audit['total'] == dict(
        channels=600, unstarted=0, vanished=2, dead=1, broken=0, collapsed=3
    )
    layers = by_name(audit)
    assert layers['backbone.layer1.0.bn1']['rectified'] is True
    assert layers['backbone.layer1.0.bn2']['rectified'] is False
    assert layers['backbone.layer1.0.bn2']['which'] == dict(
        unstarted=[], vanished=[7], dead=[], broken=[], collapsed=[7]
    )


def test_the_table_says_what_it_cannot_know(folder):
    result = run('audit.py', 'collapsed.pth', cwd=folder)
    assert 'backbone.layer1.0.bn1' in result.stdout
    assert 'vanished 2; dead 5' in result.stdout
    assert '18 of 20 layers have none' in result.stdout
    assert 'it is not known whether a rectifier follows' in result.stdout
    assert '--config' in result.stdout
    result = run('audit.py', 'collapsed.pth', '--config', 'detector.py', cwd=folder)
    assert 'not known' not in result.stdout


def test_csv_has_a_line_per_layer_and_the_total(folder):
    result = run('audit.py', 'collapsed.pth', '--format', 'csv', cwd=folder)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 21
    assert rows[-1]['layer'] == 'total' and rows[-1]['collapsed'] == '4'
    (row,) = [row for row in rows if row['layer'] == 'backbone.layer1.0.bn1']
    assert (row['vanished'], row['dead'], row['which_collapsed']) == ('1', '1', '2 5')


def test_two_checkpoints_are_compared(folder):
    result = run('audit.py', 'well.pth', 'collapsed.pth', '--format', 'json', cwd=folder)
    total = json.loads(result.stdout)['total']
    assert (total['collapsed'], total['new'], total['revived']) == (4, 4, 0)
    result = run('audit.py', 'collapsed.pth', 'well.pth', '--format', 'json', cwd=folder)
    audit = json.loads(result.stdout)
    assert (audit['total']['collapsed'], audit['total']['revived']) == (0, 4)
    assert by_name(audit)['backbone.layer1.0.bn1']['which']['revived'] == [2, 5]
    assert audit['unmatched'] == []
    result = run('audit.py', 'collapsed.pth', 'well.pth', cwd=folder)
    assert 'revived 2,5' in result.stdout


@pytest.mark.parametrize(('percent', 'code'), [('0.5', 3), ('1', 0), ('0', 3)])
def test_the_exit_code_tells_of_too_much_collapse(folder, percent, code):
    result = run('audit.py', 'collapsed.pth', '--fail-above', percent, cwd=folder)
    assert result.returncode == code
    assert ('0.67 % of the filters are collapsed' in result.stderr) == (code == 3)


def test_thresholds_are_options(folder):
    result = run('audit.py', 'collapsed.pth', '--k', '5', '--tau', '0.9', cwd=folder)
    assert '│        2 │    1 │         2 │' in result.stdout


def test_a_picture_is_drawn(folder, tmp_path):
    result = run('audit.py', folder / 'collapsed.pth', '--plot', 'new/a.png', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    picture = cv2.imread(str(tmp_path / 'new/a.png'))
    assert picture.shape[0] > 300 and picture.std() > 10


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['none.pth'], 'none.pth does not exist'),
        (['well.pth', '--config', 'none.py'], 'none.py (in '),
        (['well.pth', '--k', '-1'], 'must be a number from 0 to 1,000,000, got -1'),
        (['well.pth', 'other.pth'], 'have no layer in common'),
        (['plain.pth'], 'only BN that cannot be audited'),
        (['well.pth', '--key', 'ema'], "no state dict 'ema'"),
        (['well.pth', '--plot', './well.pth'], './well.pth is read and is not overwritten'),
    ],
)
def test_bad_input_gets_one_sentence(folder, arguments, words):
    whole = (folder / 'well.pth').read_bytes()
    torch.save(nn.Sequential(nn.BatchNorm2d(3)).state_dict(), folder / 'other.pth')
    torch.save(nn.BatchNorm2d(3, affine=False).state_dict(), folder / 'plain.pth')
    result = run('audit.py', *arguments, cwd=folder)
    assert (folder / 'well.pth').read_bytes() == whole
    assert result.returncode == 1
    assert result.stdout == ''
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith('audit: ') and words in sentence


def test_what_is_revived_is_told_and_all_else_is_kept(folder, tmp_path):
    content = read_content(folder / 'collapsed.pth')
    average = {f'module.{key}': value for key, value in content['state_dict'].items()}
    torch.save(content | dict(ema_state_dict=average), tmp_path / 'two.pth')
    out = tmp_path / 'revived.pth'
    config = ['--config', folder / 'detector.py']
    result = run('revive.py', 'two.pth', out, *config, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        'state_dict: 1 filters opened, to b = 0.02\n    backbone.layer1.0.bn1: 5' in result.stdout
    )
    assert 'ema_state_dict: 1 filters opened' in result.stdout
    revived = read_content(out)
    assert revived['meta'] == dict(epoch=1)
    changed = 'backbone.layer1.0.bn1.bias'
    expected = content['state_dict'][changed].clone()
    expected[5] = 0.02
    for key, value in revived['state_dict'].items():
        assert torch.equal(value, expected if key == changed else content['state_dict'][key])
        assert torch.equal(value, revived['ema_state_dict'][f'module.{key}'])


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['well.pth', 'well.pth'], 'well.pth exists and is not overwritten'),
        (['none.pth', 'a.pth'], 'none.pth does not exist'),
        (['other.pth', 'a.pth'], 'has no BN layer named as in the checkpoint'),
    ],
)
def test_a_revival_that_cannot_be_done_writes_nothing(folder, arguments, words):
    before = (folder / 'well.pth').read_bytes()
    torch.save(nn.Sequential(nn.BatchNorm2d(3)).state_dict(), folder / 'other.pth')
    result = run('revive.py', *arguments, '--config', 'detector.py', cwd=folder)
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith('revive: ') and words in sentence
    assert (folder / 'well.pth').read_bytes() == before
    assert not list(folder.glob('a.pth*'))


@pytest.mark.slow
def test_no_pickle_runs_in_what_a_config_s_model_loads(tmp_path, bomb):
    """Such as the teachers of LD and LAD."""
    torch.save(dict(state_dict=bomb), tmp_path / 'teacher.pth')
    bn = {f'bn.{name}': value for name, value in nn.BatchNorm2d(4).state_dict().items()}
    torch.save(bn, tmp_path / 'good.pth')
    (tmp_path / 'taught.py').write_text("""
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn


@MODELS.register_module()
class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        load_checkpoint(self, 'teacher.pth', map_location='cpu')
""")
    (tmp_path / 'config.py').write_text("""
default_scope = 'mmengine'
custom_imports = dict(imports=['taught'])
model = dict(type='Taught')
""")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    for command in (
        [str(ROOT / 'tools/audit.py'), 'good.pth'],
        [str(ROOT / 'tools/revive.py'), 'good.pth', 'out.pth'],
        ['-m', 'psbn_mmdet', 'audit', 'good.pth'],
    ):
        result = subprocess.run(
            [sys.executable, *command, '--config', 'config.py'],
            cwd=tmp_path,
            env=environment | ({'PYTHONPATH': f'{tmp_path}:{ROOT}'} if '-m' in command else {}),
            capture_output=True,
            text=True,
        )
        assert not bomb.path.exists(), command
        assert 'the model of config.py loads a file that may run any code' in result.stderr
        assert 'Traceback' not in result.stderr


def test_folded_statistics_are_told_and_left(folder, tmp_path):
    content = read_content(folder / 'collapsed.pth')
    for key, value in content['state_dict'].items():
        if 'running_' in key:
            value.fill_(key.endswith('var'))
    torch.save(content, tmp_path / 'caffe.pth')
    result = run('audit.py', 'caffe.pth', cwd=tmp_path)
    assert 'are not known in 20 layers: their running statistics are 0 and 1' in result.stdout
    total = json.loads(run('audit.py', 'caffe.pth', '--format', 'json', cwd=tmp_path).stdout)[
        'total'
    ]
    assert total['collapsed'] == total['dead'] == 0
    config = ['--config', folder / 'detector.py']
    result = run('revive.py', 'caffe.pth', 'out.pth', *config, cwd=tmp_path)
    assert '0 filters opened, to b = 0.02\n    20 layers left: their running' in result.stdout
