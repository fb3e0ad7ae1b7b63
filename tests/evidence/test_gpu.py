"""The script for a GPU, rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_right
import gpu_scale
import mmcv_on_gpu
import pytest
import torch
from limits import HANG
from mmcv.ops import RoIAlign, batched_nms
from mmdet.models.losses import FocalLoss
from naive import NaivePSBN2d
from torch import nn

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not gpu.NEW_ENOUGH, reason='benchmarks/gpu.py needs torch 2.4')


@pytest.mark.slow
def test_the_rehearsal(cifar, tmp_path):
    out = tmp_path / 'gpu.json'
    result = subprocess.run(
        [sys.executable, ROOT / 'benchmarks/gpu.py', '--device', 'cpu', '--minutes', '30']
        + ['--cifar', cifar, '--out', out],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert [row['name'] for row in found['right'] if 'ok' not in row] == [
        row['name'] for row in found['right'] if row['text'].startswith('only CUDA')
    ]
    assert sum(row.get('ok', False) for row in found['right']) >= 14
    *rows, detector = found['fast']
    layers, pruned = rows[:4], rows[4:]
    assert all(row['train']['ratio']['median'] > 0 for row in layers)
    assert all(row['multiples of 8']['median'] > 0 for row in pruned) and len(pruned) == 2
    assert {name.split(',')[0] for name in detector['arms']} == {'CollapseHook', 'RecoveryHook'}
    trained = [row for row in found['scale'] if row.get('keep')]
    assert [row['regime'] for row in trained] == ['SGD 0.5', 'Adam 0.03', 'SGD 0.1']
    for row in trained:
        assert all(len(row[arm]['accuracy']) == 2 for arm in ('BN', 'psBN'))
    for row in found['right'] + found['fast'] + found['scale']:
        assert f'| {row["name"]} |' in result.stdout


def test_the_comparison_tells_a_layer_that_is_wrong(monkeypatch):
    device = torch.device('cpu')
    assert gpu_right.compare(gpu_right.Case(), device, 5)['ok']
    monkeypatch.setattr('psbn_mmdet.layers.decay._move', lambda optimizer: [])
    assert not gpu_right.compare(gpu_right.Case(), device, 5)['ok']


def test_a_training_takes_over_the_state_of_another():
    naive, other = (
        gpu_right.Training(gpu_right.Case(), norm, torch.device('cpu'))
        for norm in (NaivePSBN2d, nn.BatchNorm2d)
    )
    batches = gpu_right.batches(torch.device('cpu'))
    for batch in batches[:3]:
        naive.step(*batch)
        other.step(*batch)
    assert not torch.allclose(other.beta(), naive.beta(), atol=1e-4)
    other.take_over(naive)
    torch.testing.assert_close(other.beta(), naive.beta())
    for mine, theirs in zip(other.net.parameters(), naive.net.parameters()):
        momenta = (t.optimizer.state[p] for t, p in ((other, mine), (naive, theirs)))
        assert torch.equal(*(state['momentum_buffer'] for state in momenta))


# What has been measured is kept


def parts(monkeypatch, *checks):
    """Have one part, `right`, do these."""

    def right(context):
        for number, check in enumerate(checks):
            yield f'check {number}', check

    monkeypatch.setattr(gpu, 'PARTS', {'right': (right, 1.0)})


def run(monkeypatch, out, *options):
    argv = ['gpu.py', '--device', 'cpu', '--out', str(out), *options]
    monkeypatch.setattr(sys, 'argv', argv)
    return gpu.main()


def test_a_run_that_is_stopped_leaves_what_it_has(monkeypatch, tmp_path):
    def stop():
        raise KeyboardInterrupt

    parts(monkeypatch, lambda: {'ok': True, 'text': 'done'}, stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / 'gpu.json')
    (row,) = json.loads((tmp_path / 'gpu.json').read_text())['right']
    assert (row['name'], row['text']) == ('check 0', 'done')


def test_what_is_wrong_or_fails_is_a_row_and_the_exit_status(monkeypatch, tmp_path, capsys):
    parts(monkeypatch, lambda: {'ok': False, 'text': 'differs'}, lambda: 1 / 0)
    assert run(monkeypatch, tmp_path / 'gpu.json') == 1
    told = capsys.readouterr().out
    assert '| right | check 0 | **WRONG** | differs |' in told
    assert '| right | check 1 | **WRONG** | ZeroDivisionError: division by zero |' in told
    parts(monkeypatch, lambda: {'ok': True, 'text': 'same'})
    assert run(monkeypatch, tmp_path / 'gpu.json') == 0


def test_without_time_nothing_is_done_and_said(monkeypatch, tmp_path, capsys):
    parts(monkeypatch, lambda: 1 / 0)
    assert run(monkeypatch, tmp_path / 'gpu.json', '--minutes', '0') == 0
    assert '| check 0 |  | no time left |' in capsys.readouterr().out


def test_trainings_of_earlier_runs_are_kept(monkeypatch, tmp_path):
    kept = []

    def right(context):
        kept.append(len(context.kept))
        yield 'training', lambda: {'text': 'seed 0', 'keep': True}
        yield 'sum', lambda: {'text': 'all'}

    monkeypatch.setattr(gpu, 'PARTS', {'right': (right, 1.0)})
    for _ in range(2):
        run(monkeypatch, tmp_path / 'gpu.json')
    rows = json.loads((tmp_path / 'gpu.json').read_text())['right']
    assert [row['name'] for row in rows] == ['training', 'training', 'sum']
    assert kept == [0, 1]


# Several networks in one


def test_stacked_networks_compute_what_each_computes():
    alone = [gpu_scale.first_weights(4, seed) for seed in range(3)]
    images = torch.randn(3, 5, 3, 32, 32)
    expected = torch.stack([network(x) for network, x in zip(alone, images)])
    found = gpu_scale.logits_of(gpu_scale.stacked(alone), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('regime', ['SGD 0.5', 'Adam 0.03'])
def test_seeds_in_groups_are_trained_as_alone(cifar, regime):
    context = gpu.Context(torch.device('cpu'), 0.0, cifar, cifar, cifar, [])
    data = gpu_scale.Data(context)
    trained = []
    for grouped in (False, True):
        training = gpu_scale.SideBySide(regime, [3, 4], data, 8, grouped=grouped)
        training.shuffle()
        for _ in range(2):
            training.step()
        trained.append(training)
    alone, stacked = (training.networks for training in trained)
    for arm, network in enumerate(stacked):
        pair = gpu_scale.stacked(alone[2 * arm : 2 * arm + 2])
        for (name, value), expected in zip(
            network.state_dict().items(), pair.state_dict().values()
        ):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3, msg=name)
    start = [gpu_scale.stacked([gpu_scale.first_weights(4, seed) for seed in (3, 4)])] * 2
    assert not torch.allclose(stacked[0].conv1.weight, start[0].conv1.weight, atol=1e-3)
    biases = [network.bn1.bias.mean().item() for network in stacked]
    assert biases[1] - biases[0] == pytest.approx(0.1, abs=0.05)


# Other forms of MMCV's operators


def test_other_forms_of_operators_compute_the_same(monkeypatch):
    pytest.importorskip('torchvision', reason='this torch has no torchvision')
    torch.manual_seed(0)
    boxes = torch.rand(200, 2).repeat(1, 2) * 80 + torch.tensor([0, 0, 9, 12])
    scores, classes = torch.rand(200), torch.randint(3, (200,))
    features = torch.randn(2, 4, 30, 30, requires_grad=True)
    rois = torch.cat([torch.randint(2, (200, 1)).float(), boxes], 1)
    align = dict(output_size=7, spatial_scale=0.25, sampling_ratio=0)

    def found():
        kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.5))[1]
        aligned = RoIAlign(**align)(features, rois)
        (gradient,) = torch.autograd.grad(aligned.square().sum(), features)
        return kept, aligned, gradient

    expected = found()
    with monkeypatch.context() as patch:
        for module, name in (
            (mmcv_on_gpu._ext, 'nms'),
            (RoIAlign, '__init__'),
            (mmcv_on_gpu.focal_loss, 'sigmoid_focal_loss'),
        ):
            patch.setattr(module, name, getattr(module, name))  # put back at the end
        mmcv_on_gpu.replace_operators()
        for ours, theirs in zip(found(), expected):
            torch.testing.assert_close(ours, theirs)


def test_the_other_focal_loss_is_mmdetections():
    logits = torch.randn(50, 4)
    target = torch.randint(5, (50,))
    weight = torch.rand(50)
    loss = FocalLoss(gamma=2.0, alpha=0.25)
    found = mmcv_on_gpu.sigmoid_focal_loss(
        logits, target, weight, gamma=2.0, alpha=0.25, reduction='mean', avg_factor=7.0
    )
    torch.testing.assert_close(found, loss(logits, target, weight, avg_factor=7.0))


# What travels


def test_packing_lists_what_travels_and_refuses_too_much(cifar, tmp_path):
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    (wheels / 'one-1.0-py3-none-any.whl').write_bytes(b'0' * 2**20)
    (wheels / 'onedl_mmcv-1.0.tar.gz').write_bytes(b'0' * 2**19)
    tree = tmp_path / 'tree'
    (tree / 'scripts').mkdir(parents=True)
    shutil.copy(ROOT / 'scripts/gpu.sh', tree / 'scripts')
    subprocess.run(['git', 'init', '-q', tree], check=True)
    (tree / '.gitignore').write_text('/.gpu/\n')

    def pack(*folders):
        command = [tree / 'scripts/gpu.sh', 'pack', *folders]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANG)

    result = pack(wheels, cifar)
    assert result.returncode == 0, result.stderr
    assert '1.00 MiB  .gpu/one-1.0-py3-none-any.whl' in result.stdout
    assert {path.name for path in (tree / '.gpu').iterdir()} >= {'train.zip.xz', 'test.zip.xz'}
    (wheels / 'two-1.0-py3-none-any.whl').write_bytes(bytes(63 * 2**20))
    result = pack(wheels)
    assert result.returncode == 1
    assert 'gpu: more than 64 MiB.' in result.stderr
    assert 'must hold train.zip' in pack(wheels, wheels).stderr
