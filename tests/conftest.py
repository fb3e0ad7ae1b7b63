"""What many tests share: a tiny COCO-format set, and a clean MMEngine for each test."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path

# Tiny tensors gain nothing by threads, and lose much where other processes want the cores, too.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the fast tests first; those of whole runs are slow."""
    for item in items:
        if item.path.parent.name == 'e2e':
            item.add_marker('slow')
    items.sort(key=lambda item: item.get_closest_marker('slow') is not None)


@pytest.fixture(scope='session')
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set of 8 images to train on and 4 to validate: ``annotations``, ``train``, ``val``.

    Its classes are ``disc, square, triangle, cross``. Read only: all tests share it.
    """
    spec = importlib.util.spec_from_file_location('make_dataset', ROOT / 'demo/make_dataset.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out_dir = tmp_path_factory.mktemp('data') / 'coco'
    return module.make_dataset(out_dir, num_train=8, num_val=4, image_size=96, seed=0)


@pytest.fixture(scope='session')
def shrink(coco_root: Path) -> Callable[[Config], None]:
    """A function that cuts a COCO config of MMDetection down to two quick steps per epoch."""

    def shrink(cfg: Config) -> None:
        classes = ('disc', 'square', 'triangle', 'cross')
        ann_file = f'{coco_root}/annotations/val.json'
        options: dict = {
            'randomness.seed': 0,
            'model.backbone.init_cfg': None,
            'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.indices': 4,
            'train_dataloader.dataset.pipeline.2.scale': (96, 96),
            'val_dataloader.dataset.pipeline.1.scale': (96, 96),
            'test_dataloader.dataset.pipeline.1.scale': (96, 96),
            'val_evaluator.ann_file': ann_file,
            'test_evaluator.ann_file': ann_file,
            'default_hooks.logger.interval': 1,
            'custom_hooks.0.interval': 1,
            'custom_hooks.0.window': 1,
        }
        for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
            options.update(
                {
                    f'{loader}_dataloader.num_workers': 0,
                    f'{loader}_dataloader.persistent_workers': False,
                    f'{loader}_dataloader.dataset.data_root': f'{coco_root}/',
                    f'{loader}_dataloader.dataset.ann_file': f'annotations/{split}.json',
                    f'{loader}_dataloader.dataset.data_prefix.img': f'{split}/',
                    f'{loader}_dataloader.dataset.metainfo': dict(classes=classes),
                }
            )
        if 'roi_head' in cfg.model:
            options.update(
                {
                    'model.train_cfg.rpn_proposal.max_per_img': 50,
                    'model.train_cfg.rcnn.sampler.num': 32,
                    'model.test_cfg.rpn.max_per_img': 50,
                }
            )
        head = 'model.roi_head.bbox_head' if 'roi_head' in cfg.model else 'model.bbox_head'
        options[f'{head}.num_classes'] = len(classes)
        cfg.merge_from_dict(options)

    return shrink


@pytest.fixture(scope='session')
def second_device() -> torch.device:
    """A device beside the CPU that every machine has: torch's lazy tensors, which it computes."""
    ts_backend = pytest.importorskip('torch._lazy.ts_backend')
    ts_backend.init()
    return torch.device('lazy')


class Bomb:
    """Pickles as a call that creates the folder ``path``."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    """What creates the folder ``touched`` in ``tmp_path`` when its pickle is loaded."""
    return Bomb(tmp_path / 'touched')


@pytest.fixture(autouse=True)
def _no_singletons_left():
    """Forget MMEngine's named instances after each test, as its own RunnerTestCase does.

    Otherwise a test's logger, visualizer, message hub or default scope becomes the next one's.
    """
    yield
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    logging.shutdown()
    classes = [ManagerMixin]
    while classes:
        cls = classes.pop()
        cls._instance_dict.clear()
        classes.extend(cls.__subclasses__())
