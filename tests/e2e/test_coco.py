"""The shipped COCO configs on files of COCO 2017 itself, from random weights."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

import psbn_mmdet  # noqa: F401
from psbn_mmdet.records import read_records

ROOT = Path(__file__).resolve().parents[2]
COCO = ROOT.parent / 'shared/data/coco_tiny'


@pytest.mark.skipif(not COCO.is_dir(), reason='needs a part of COCO 2017 in shared/data/coco_tiny')
@pytest.mark.parametrize(
    'name', ['faster-rcnn_r50_fpn_psbn_1x_coco', 'retinanet_r50_fpn_psbn_1x_coco']
)
def test_a_detector_that_has_not_begun_has_no_collapsed_filter(tmp_path, monkeypatch, name):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/coco').symlink_to(COCO)
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / f'configs/psbn/{name}.py')
    options = {
        'work_dir': str(tmp_path / 'run'),
        'randomness.seed': 0,
        'model.backbone.init_cfg': None,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.dataset.indices': 4,
        'train_dataloader.dataset.pipeline.2.scale': (160, 96),
        'train_cfg.max_epochs': 2,
        'val_cfg': None,
        'val_dataloader': None,
        'val_evaluator': None,
        'default_hooks.checkpoint': None,
        'custom_hooks.0.interval': 1,
        'custom_hooks.0.window': 1,
    }
    cfg.merge_from_dict(options)
    runner = Runner.from_cfg(cfg)
    runner.train()
    reports = read_records(Path(runner.log_dir) / 'collapse.jsonl').reports
    assert len(reports) >= 3
    first = reports[0]['total']
    # MMDetection starts the last gamma of every block at 0: 15,104 filters.
    assert first['unstarted'] > 15104 and first['collapsed'] == 0
    for report in reports:
        assert report['total']['vanished'] == report['total']['dead'] == 0
