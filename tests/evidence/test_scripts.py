"""The quick form of each script in benchmarks/evidence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10 import CifarResNet
from limits import HANG
from mmdet.models.backbones import MobileNetV2
from PIL import Image

from psbn_mmdet.collapse import find_norms
from psbn_mmdet.configs.model import model_of_config
from psbn_mmdet.configs.reading import load_config

pytest.importorskip('sklearn')

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'benchmarks/evidence'


def run(name: str, work_dir: Path, *options: str | Path) -> subprocess.CompletedProcess:
    """Run the quick form of a script."""
    result = subprocess.run(
        [sys.executable, FOLDER / f'{name}.py', '--quick', '--work-dir', work_dir, *options],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert result.returncode == 0, result.stderr
    return result


def rows_of(table: dict) -> list[dict]:
    return [dict(zip(table['columns'], row)) for row in table['rows']]


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('evidence')


@pytest.fixture(scope='module')
def cells(coco_root, tmp_path_factory) -> Path:
    """The drawn set under the names and in the folders of the photographs of cells."""
    folder = tmp_path_factory.mktemp('cells')
    (folder / 'annotations').mkdir()
    (folder / 'images').mkdir()
    for split in ('train', 'val'):
        (folder / 'images' / split).symlink_to(coco_root / split)
        content = json.loads((coco_root / f'annotations/{split}.json').read_text())
        for image in content['images']:
            image['file_name'] = f'{split}/{image["file_name"]}'
        for category, name in zip(content['categories'], ('RBC', 'WBC', 'Platelets', 'none')):
            category['name'] = name
        (folder / f'annotations/{split}.json').write_text(json.dumps(content))
    shutil.copy(folder / 'annotations/val.json', folder / 'annotations/test.json')
    return folder


def result_of(name: str, work_dir: Path) -> dict:
    result = json.loads((work_dir / f'{name}.json').read_text())
    assert result['command'] == f'python benchmarks/evidence/{name}.py --quick'
    assert result['hardware']
    assert result['versions']['torch'] == torch.__version__
    assert str(ROOT) not in json.dumps(result)
    assert (work_dir / f'evidence_{name}.png').stat().st_size < 150_000
    return result


def test_law(work_dir):
    run('law', work_dir)
    result = result_of('law', work_dir)
    assert result['law']['no_drift_at_e'] == pytest.approx(1.556, abs=1e-3)
    slope, low, high = result['slopes']['drift over lr']['slope']
    assert low < slope < high
    assert slope == pytest.approx(2, abs=0.2)
    assert {row['steps'] for row in rows_of(result['walk'])} == {4, 16, 64}


@pytest.fixture(scope='module')
def public(tmp_path_factory) -> tuple[Path, Path]:
    """A ResNet-20 with three dead filters, and noise in place of photographs of cells."""
    checkpoints, images = (tmp_path_factory.mktemp(name) for name in ('checkpoints', 'images'))
    torch.manual_seed(0)
    network = CifarResNet(3)
    with torch.no_grad():
        network.bn1.weight[:3], network.bn1.bias[:3] = 1e-4, -1e-3
    torch.save({'state_dict': network.state_dict()}, checkpoints / 'resnet20-12fca82f.th')
    (images / 'images').mkdir()
    (images / 'annotations').mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(images / 'images/0.png')
    boxes = [{'image_id': 0, 'category_id': 1 + i % 3, 'bbox': [i, i, 20, 20]} for i in range(24)]
    content = {'images': [{'id': 0, 'file_name': '0.png'}], 'annotations': boxes}
    for split in ('train', 'val'):
        (images / f'annotations/{split}.json').write_text(json.dumps(content))
    return checkpoints, images


def test_networks(work_dir, public, bomb, tmp_path):
    torch.save(bomb, tmp_path / 'mobilenet_v2-b0353104.pth')
    result = run('networks', work_dir, '--checkpoints', public[0], '--packages', tmp_path)
    assert 'no craft_mlt_25k.pth' in result.stdout
    found = result_of('networks', work_dir)
    (network,) = rows_of(found['networks'])
    assert network['network'] == 'ResNet-20'
    assert network['filters'] == 688
    assert network['vanished'] == network['dead'] == network['collapsed'] == 3
    assert network['most_in'] == 'bn1'
    (refused,) = found['refused']
    assert refused['why'].startswith('mobilenet_v2-b0353104.pth is not loaded since it asks for')


def test_when(work_dir):
    run('when', work_dir)
    result = result_of('when', work_dir)
    runs, cells = rows_of(result['runs']), rows_of(result['cells'])
    assert {(row['norm'], row['seed']) for row in runs} == {
        (norm, seed) for norm in ('BN', 'psBN') for seed in (0, 1)
    }
    for cell in cells:
        chosen = [r['collapsed'] for r in runs if r['lr'] == cell['lr'] and r['norm'] == 'BN']
        assert cell['collapsed: BN'] == pytest.approx(np.mean(chosen))
    assert max(row['collapsed'] for row in runs) > 0
    (worst,) = result['worst_that_work']
    assert worst in cells


def test_recovery(work_dir, public):
    run('recovery', work_dir, '--checkpoints', public[0], '--images', public[1])
    result = result_of('recovery', work_dir)
    cells = {(row['network'], row['arm']): row for row in rows_of(result['summary'])}
    assert {network for network, _ in cells} == {'vgg', 'resnet20'}
    for network in ('vgg', 'resnet20'):
        plain, psbn, revived = (cells[network, arm] for arm in ('BN', 'psBN', 'psBN, revive'))
        assert plain['closed'] == psbn['closed'] == revived['closed'] > 0
        assert plain['opened'] <= psbn['opened'] <= revived['opened']
    assert cells['resnet20', 'psBN, revive']['opened_at'] == [0, 0, 0]
    median = cells['vgg', 'psBN']['opened_by_predicted'][1]
    assert median == pytest.approx(1, abs=0.4)
    filters = rows_of(result['filters'])
    assert len(filters) == sum(row['closed'] for row in cells.values())


def test_recovery_without_public_data_says_what_it_skips(work_dir, public):
    """After the whole run, of which it needs the digits alone."""
    result = run('recovery', work_dir, '--checkpoints', 'nowhere', '--images', public[1])
    assert 'nowhere does not exist: the public ResNets are skipped' in result.stdout
    assert {row['network'] for row in rows_of(result_of('recovery', work_dir)['summary'])} == {
        'vgg'
    }


def test_detection(work_dir, coco_root, cells):
    run('detection', work_dir, '--drawn', coco_root, '--images', cells)
    result = result_of('detection', work_dir)
    (pretrained,) = rows_of(result['pretrained'])
    assert pretrained['detector'] == 'retinanet'
    runs = rows_of(result['runs'])
    arms = ['BN', 'psBN', 'psBN, recovery', 'psBN, decay', 'psBN, revived']
    assert [row['arm'] for row in runs] == arms
    assert all(0 <= row['AP'] <= row['AP50'] <= 1 for row in runs)
    assert not list((work_dir / 'detection').glob('*/*.pth'))


def test_imagenet(work_dir, cells, tmp_path, torchvisions):
    torch.manual_seed(0)
    torch.save(torchvisions(MobileNetV2().state_dict()), tmp_path / 'mobilenet_v2-b0353104.pth')
    run('imagenet', work_dir, '--packages', tmp_path, '--images', cells)
    result = result_of('imagenet', work_dir)
    (row,) = rows_of(result['runs'])
    assert (row['arm'], row['norm_eval'], row['times']) == ('psBN, recovery', True, 4)
    assert 0 <= row['AP'] <= row['AP50'] <= 1
    courses = rows_of(result['courses'])
    last = max(step['iter'] for step in courses)
    assert sum(s['collapsed'] for s in courses if s['iter'] == last) == row['collapsed']
    assert {s['stage'] for s in courses} >= {'backbone.conv1', 'neck', 'bbox_head'}


def test_finetuning(work_dir, coco_root, cells):
    run('finetuning', work_dir, '--drawn', coco_root, '--images', cells)
    result = result_of('finetuning', work_dir)
    (row,) = rows_of(result['runs'])
    assert row['arm'] == 'psBN, recovery'
    assert all(0 <= row[key] <= 1 for key in ('AP', 'pruned', 'without_recovered'))
    assert [c['contrast'] for c in rows_of(result['contrasts'])] == [
        'whole over without the recovered filters',
        'whole over without as many others',
    ]
    assert '| psBN, recovery | 1 | 0.' in (work_dir / 'finetuning.md').read_text()


def test_decay(work_dir, coco_root):
    run('decay', work_dir, '--drawn', coco_root)
    result = result_of('decay', work_dir)
    arms = ['BN x 20', 'psBN x 20', 'psBN x 20, without them']
    assert [row['arm'] for row in rows_of(result['cells'])] == arms
    assert all(0 <= row['AP'] <= row['AP50'] <= 1 for row in rows_of(result['runs']))
    gain, worth = rows_of(result['contrasts'])
    assert worth['contrast'].startswith('what the filters are worth')
    assert gain['verdict'] == worth['verdict'] == 'one seed: open'
    told = (work_dir / 'decay.md').read_text()
    assert all(f'| {arm} | 1 | 0.' in told for arm in arms) and worth['contrast'] in told


def test_scratch(work_dir, coco_root, cells):
    run('scratch', work_dir, '--drawn', coco_root, '--images', cells)
    result = result_of('scratch', work_dir)
    arms = ['BN x 20, starts at 0.1', 'psBN x 20']
    assert [row['arm'] for row in rows_of(result['runs'])] == arms
    (contrast,) = rows_of(result['contrasts'])
    assert contrast['contrast'] == (
        'RetinaNet, photographs, steps x 3: psBN x 20 over BN x 20 that starts at 0.1'
    )
    told = (work_dir / 'scratch.md').read_text()
    assert all(f'| RetinaNet, photographs, steps x 3 | {arm} | 1 | 0.' in told for arm in arms)


def test_cifar(work_dir, cifar):
    run('cifar', work_dir, '--cifar', cifar)
    result = result_of('cifar', work_dir)
    arms = ['BN', 'psBN, recovery', 'psBN, recovery, without them']
    assert [row['arm'] for row in rows_of(result['cells'])] == arms
    assert all(0 <= row['accuracy'] <= 1 for row in rows_of(result['runs']))
    assert [row['contrast'].split(': ')[1] for row in rows_of(result['contrasts'])] == [
        'what the filters are worth',
        'psBN with recovery over BN',
        'whole over without the recovered filters',
        'whole over without as many others',
    ]
    told = (work_dir / 'cifar.md').read_text()
    assert all(f'| half | SGD 0.5 | {arm} |' in told for arm in arms)
    result = run('cifar', work_dir, '--cifar', 'nowhere')
    assert 'nowhere has no train.zip: skipped' in result.stdout


def test_shrink(work_dir, coco_root, cells, tmp_path):
    model = model_of_config(load_config(str(ROOT / 'demo/faster-rcnn_r18_fpn_bn_demo.py')))
    with torch.no_grad():
        for norm in find_norms(model.backbone).values():
            norm.bias[: norm.num_features // 2] = -9.0
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'start.pth')
    options = ('--drawn', coco_root, '--images', cells, '--start', tmp_path / 'start.pth')
    run('shrink', work_dir, *options)
    (cell,) = rows_of(result_of('shrink', work_dir)['cells'])
    assert cell['arm'] == '`--shrink 0.9`, 1 epochs' and 0 < cell['backbone'] < 0.4
    assert cell['AP pruned'] == cell['AP'] and cell['multiply-adds'] < 1


def test_costs(work_dir):
    """From the kept results of the other scripts, in points."""
    run('costs', work_dir)
    rows = rows_of(result_of('costs', work_dir)['networks'])
    decay = json.loads((ROOT / 'benchmarks/results/evidence/decay.json').read_text())
    of_decay = {row['contrast']: row['mean'] for row in rows_of(decay['contrasts'])}
    worth, gain = rows[:2]
    assert (worth['kind'], gain['kind']) == ('worth', 'gain')
    assert worth['mean'] == pytest.approx(100 * of_decay[worth['contrast']])
    assert gain['mean'] == pytest.approx(100 * of_decay['psBN x 20 over BN x 20'])
    (bn,) = (cell for cell in rows_of(decay['cells']) if cell['arm'] == 'BN x 20')
    assert worth['lost'] == bn['collapsed'] > 0


def test_alpha(work_dir):
    run('alpha', work_dir)
    result = result_of('alpha', work_dir)
    assert [row['shift'] for row in rows_of(result['scratch'])] == [0, 0.02, 0.5]
    slow, fast = rows_of(result['recovery'])
    assert slow['shift'] < fast['shift']
    assert slow['predicted_at'][1] > fast['predicted_at'][1]
