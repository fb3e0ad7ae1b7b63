"""Killed at any moment and resumed, a training is the same training."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cases
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import IterBasedTrainLoop

from psbn_mmdet.collapse import find_norms
from psbn_mmdet.records import find_snapshots, read_records
from psbn_mmdet.report import read_run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = """
_base_ = [{demo!r}]
custom_imports = dict(imports=['psbn_mmdet', 'killable'], allow_failed_imports=False)
custom_hooks = [
    dict(type='CollapseHook', interval=2, window=2),
    dict(type='RecoveryHook', steps=6, window=2),
    dict(type='SeedEachStep'),
]
randomness = dict(seed=0, deterministic=True)
load_from = {weights!r}
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
    ),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root={data!r},
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(96, 96), keep_ratio=True),
            dict(type='PackDetInputs'),
        ],
    ),
)
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10)]
"""
LOOPS = {
    # Reports and snapshots between checkpoints, each of which is at a report.
    'epochs': """
train_cfg = dict(max_epochs=4)
default_hooks = dict(
    logger=dict(interval=2), checkpoint=dict(interval=1, save_best=None, max_keep_ckpts=-1))
""",
    # Checkpoints between reports.
    'iterations': """
train_dataloader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=16, val_interval=1000)
default_hooks = dict(
    logger=dict(interval=2),
    checkpoint=dict(by_epoch=False, interval=3, save_best=None, max_keep_ckpts=-1),
)
""",
}
STEPS = 16
TOLD = ('trapped', 'collapsed', 'new', 'revived')  # take a full window after a resume


@dataclass
class Trainer:
    """Starts trainings one after the other."""

    server: subprocess.Popen
    folder: Path

    def run(self, config: str, work_dir: Path, resume: str | bool = False, kill=None) -> dict:
        """How one has ended, and what it has said."""
        arguments = [str(self.folder / f'{config}.py'), '--work-dir', str(work_dir)]
        if resume:
            arguments += ['--resume', *([resume] if isinstance(resume, str) else [])]
        output = self.folder / 'output.txt'
        job = dict(arguments=arguments, output=str(output), kill=kill)
        self.server.stdin.write(json.dumps(job) + '\n')
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline()) | dict(text=output.read_text())


@pytest.fixture(scope='module')
def trainer(coco_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('kill')
    demo = str(ROOT / 'demo/faster-rcnn_r18_fpn_psbn_demo.py')
    weights = folder / 'weights.pth'
    for name, loop in LOOPS.items():
        text = CONFIG.format(demo=demo, weights=str(weights), data=f'{coco_root}/')
        (folder / f'{name}.py').write_text(text + loop)
    closed_weights(folder / 'epochs.py', weights)
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(HERE), os.environ.get('PYTHONPATH', '')]),
        OMP_NUM_THREADS='1',
        TORCH_FORCE_WEIGHTS_ONLY_LOAD='1',  # as the tool sets it before it imports torch
    )
    server = subprocess.Popen(
        [sys.executable, str(HERE / 'killable.py')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield Trainer(server, folder)
    server.stdin.close()
    server.wait(60)


def closed_weights(config: Path, path: Path) -> None:
    """Weights with filters that are closed, some of whose convolutions have decayed, too."""
    sys.path.insert(0, str(HERE))
    try:
        cfg = Config.fromfile(config)
    finally:
        sys.path.remove(str(HERE))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    norms = find_norms(model)
    with torch.no_grad():
        for name in ('backbone.bn1', 'backbone.layer1.0.bn1', 'backbone.layer2.0.bn1'):
            norms[name].weight[::3], norms[name].bias[::3] = 0.01, -0.9
        norms['backbone.layer4.1.bn1'].bias[::3] = -30.0  # still being decayed at the end
        model.backbone.layer1[0].conv1.weight[::3] *= 0.01
    torch.save(dict(state_dict=model.state_dict()), path)


@pytest.fixture(scope='module', params=LOOPS)
def whole(trainer, request):
    """A training that nobody kills: its config and work dir, and how long it takes."""
    goes_on = 'Advance dataloader' in inspect.getsource(IterBasedTrainLoop)
    if request.param == 'iterations' and not goes_on:
        pytest.skip('this MMEngine feeds a resumed run of iterations from the first batch on')
    work_dir = trainer.folder / f'whole_{request.param}'
    result = trainer.run(request.param, work_dir)
    assert result['code'] == 0, result['text'][-3000:]
    records = read_records(read_run(work_dir, 'whole').path)
    assert sum(report['total']['recovered'] for report in records.reports) > 5
    return request.param, work_dir, result['seconds']


def last_checkpoint(work_dir: Path) -> Path:
    files = work_dir.glob('*_*.pth')
    return max(files, key=lambda path: int(path.stem.split('_')[1]))


def assert_same(found, wanted, path='') -> None:
    """Bit for bit."""
    assert type(found) is type(wanted), path
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        for key in wanted:
            assert_same(found[key], wanted[key], f'{path}/{key}')
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), path
        for index, (a, b) in enumerate(zip(found, wanted)):
            assert_same(a, b, f'{path}/{index}')
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), path
    else:
        assert found == wanted, path


def assert_same_training(work_dir: Path, other: Path, config: str) -> None:
    """Weights, optimizer, recovery, reports and snapshots, and the report's page reads them."""
    files = last_checkpoint(work_dir), last_checkpoint(other)
    assert files[0].name == files[1].name
    found, wanted = (torch.load(file, weights_only=False) for file in files)
    for part in ('state_dict', 'optimizer', 'param_schedulers', 'psbn_recovery'):
        assert_same(found[part], wanted[part], part)
    runs = [read_run(folder, 'run') for folder in (work_dir, other)]
    mine, theirs = (read_records(run.path).reports for run in runs)
    assert [report['iter'] for report in mine] == [*range(2, STEPS + 1, 2)]
    for report, expected in zip(mine, theirs):
        if config == 'iterations':
            for r in (report, expected):
                del r['steps']  # since the resume
                for kind in TOLD:
                    for part in ('total', 'layers', 'channels'):
                        del r[part][kind]
        assert_same(report, expected, f'report {report["iter"]}')
    snapshots, expected = (find_snapshots(run.path.parent) for run in runs)
    # A run that dies between its last checkpoint and its end has no report left to write.
    assert expected.keys() - snapshots.keys() <= {STEPS}
    extra = snapshots.keys() - expected.keys()  # one of each start
    assert extra <= (set(range(3, STEPS, 3)) if config == 'iterations' else set())
    for iteration in snapshots.keys() & expected.keys():
        assert snapshots[iteration].read_bytes() == expected[iteration].read_bytes(), iteration
    assert runs[0].ever_recovered == runs[1].ever_recovered


def survive(trainer: Trainer, config: str, work_dir: Path, kills: list[dict]) -> None:
    """Kill a training again and again, resume it each time, let it end."""
    for number, kill in enumerate([*kills, None]):
        result = trainer.run(config, work_dir, number > 0, kill)
        if result['code'] > 0:  # refused: the sentence says what to do
            lines = result['text'].strip().splitlines()
            (error,) = [line for line in lines if line.startswith('error: ')]
            assert 'Traceback' not in result['text'], result['text'][-3000:]
            assert 'last_checkpoint' in error, error
            named = re.search(r'give --resume (\S+), the newest', error)
            if named:
                assert named[1] == str(last_checkpoint(work_dir))
            else:
                assert error.endswith('train without --resume')
            result = trainer.run(config, work_dir, bool(named) and named[1], kill)
        if result['code'] == 0:
            return
        assert result['code'] == -9, result['text'][-3000:]
        cases.count('kills')
    raise AssertionError(result)


def a_chain(seed: int, seconds: float) -> list[dict]:
    """Three kills, each at a random time of its kind."""
    rng = random.Random(seed)
    most = dict(
        step=8, stepped=8, recovery=8, restoring=3, save=3, saved=3, naming=3, record=4,
        recorded=4, file=6,
    )  # fmt: skip
    kills = []
    for _ in range(3):
        point = rng.choice([*most, 'time'])
        if point == 'time':
            kills.append(dict(point=point, n=1, share=rng.uniform(0.1, seconds)))
        else:
            n = rng.randint(1, most[point])
            kills.append(dict(point=point, n=n, share=rng.choice([0, rng.random(), 1])))
    return kills


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(8 if cases.FULL else 2))
def test_killed_three_times_it_is_the_same_training(trainer, whole, tmp_path, seed):
    config, work_dir, seconds = whole
    kills = a_chain(seed + 100 * (config == 'epochs'), seconds)
    print(kills)
    survive(trainer, config, tmp_path, kills)
    assert_same_training(tmp_path, work_dir, config)
