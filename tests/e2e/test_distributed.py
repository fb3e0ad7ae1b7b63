"""Two ranks over gloo on one machine, through tools/dist_train.sh."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from psbn_mmdet.records import read_records

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


@pytest.fixture(scope='module')
def work_dir(coco_root, tmp_path_factory):
    """The work dir of a run on two ranks, four iterations with a report every two.

    Of a config of BN, which the switch makes psBN's.
    """
    work_dir = tmp_path_factory.mktemp('two_ranks')
    data = {
        f'{loader}_dataloader.{key}': value
        for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val'))
        for key, value in {
            'num_workers': 0,
            'persistent_workers': False,
            'dataset.data_root': f'{coco_root}/',
            'dataset.ann_file': f'annotations/{split}.json',
            'dataset.data_prefix.img': f'{split}/',
        }.items()
    }
    options = {
        **data,
        'train_dataloader.batch_size': 1,
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 10,
        'val_evaluator.ann_file': f'{coco_root}/annotations/val.json',
        'test_evaluator.ann_file': f'{coco_root}/annotations/val.json',
        'env_cfg.dist_cfg.backend': 'gloo',
        'model_wrapper_cfg.type': 'MMDistributedDataParallel',
        'model_wrapper_cfg.device_ids': 'None',
        'model.backbone.base_channels': 8,
        'model.neck.in_channels': '[8,16,32,64]',
    }
    arguments = [f'{key}={value}' for key, value in options.items()]
    config = work_dir / 'config.py'
    config.write_text(
        f'_base_ = [{str(ROOT / "demo/faster-rcnn_r18_fpn_bn_demo.py")!r}]\n'
        "custom_imports = dict(imports=['psbn_mmdet', 'witness'], allow_failed_imports=False)\n"
        'custom_hooks = [dict(type="CollapseHook", interval=2, window=2), '
        'dict(type="Witness", interval=2)]\n'
    )
    environment = dict(
        os.environ,
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        PYTHONPATH=str(Path(__file__).parent),
        PORT=str(free_port()),
        OMP_NUM_THREADS='1',
    )
    result = subprocess.run(
        ['bash', str(ROOT / 'tools/dist_train.sh'), str(config), '2']
        + ['--work-dir', str(work_dir), '--norm', 'psBN', '--cfg-options', *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    assert result.stdout.count('  backbone: 20 BN -> psBN') == 1
    return work_dir


def witnesses(work_dir):
    return [json.loads((work_dir / f'witness_{rank}.json').read_text()) for rank in (0, 1)]


def test_the_record_is_what_each_rank_alone_would_count(work_dir):
    (path,) = work_dir.glob('*/collapse.jsonl')
    records = read_records(path)
    names = [layer['name'] for layer in records.header['layers']]
    rectifiers = {layer['name']: layer['rectifier'] for layer in records.header['layers']}
    assert rectifiers['backbone.bn1'] == rectifiers['backbone.layer1.0.bn1'] == 'relu'
    assert rectifiers['backbone.layer1.0.bn2'] == 'other'
    first, second = witnesses(work_dir)
    assert first['pid'] != second['pid']
    assert first['reports'] == second['reports']
    assert [r['iter'] for r in records.reports] == [r['iter'] for r in first['reports']] == [2, 4]
    for report, witnessed in zip(records.reports, first['reports']):
        for kind in ('trapped', 'vanished'):
            found = {name: records.mask(report, kind, index) for index, name in enumerate(names)}
            assert {n: m.nonzero()[0].tolist() for n, m in found.items()} == witnessed[kind]


def test_rank_0_alone_writes(work_dir):
    assert len(list(work_dir.glob('**/*.jsonl'))) == 1
    assert all('"iter": 2' not in p.read_text() for p in work_dir.glob('**/*.part'))
    (log,) = work_dir.glob('*/*.log')
    assert log.read_text().count('Collapsed filters at iteration') == 1


def test_all_ranks_train_psbn(work_dir):
    for witness in witnesses(work_dir):
        assert witness['norms'] == ['PostShiftedBatchNorm2d'] * (20 + 8)  # backbone and neck


def test_ranks_tell_each_other_once_in_a_window_what_they_have_seen(work_dir):
    """What stands around the layers, and then, in four steps, once which filters have gradients."""
    made = ['all_gather_object', 'all_reduce']
    assert [witness['collectives'] for witness in witnesses(work_dir)] == [made, made]
