"""Whole psBN detectors are deployed as their BN twins are, and detect the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from randomize import randomize
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import psbn_mmdet  # noqa: F401
from psbn_mmdet.layers import PostShiftedBatchNorm

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ('disc', 'square', 'triangle', 'cross')
FASTER_RCNN, RETINANET = 'faster-rcnn', 'retinanet'
SMALL_RETINANET = {
    'model.backbone.depth': 18,
    'model.backbone.base_channels': 8,
    'model.backbone.init_cfg': None,
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 16,
    'model.bbox_head.in_channels': 16,
    'model.bbox_head.feat_channels': 16,
    'model.bbox_head.num_classes': 4,
    'test_dataloader.dataset.pipeline.1.scale': (96, 96),
    'test_dataloader.dataset.metainfo': dict(classes=CLASSES),
}


class Twins(NamedTuple):
    """A detector with BN, and with psBN after loading the former's weights."""

    name: str
    bn: nn.Module
    psbn: nn.Module


def load(name: str, norm: str) -> Config:
    if name == FASTER_RCNN:
        return Config.fromfile(ROOT / f'demo/faster-rcnn_r18_fpn_{norm}_demo.py')
    cfg = Config.fromfile(ROOT / f'configs/psbn/retinanet_r50_fpn_{norm}_1x_coco.py')
    cfg.merge_from_dict(SMALL_RETINANET)
    return cfg


@pytest.fixture(scope='module', params=[FASTER_RCNN, RETINANET])
def twins(request) -> Twins:
    torch.manual_seed(0)
    bn, psbn = (MODELS.build(load(request.param, norm).model) for norm in ('bn', 'psbn'))
    randomize(bn)
    if request.param == RETINANET:  # with torch's own start all scores are 1, and boxes are lines
        for layer in (bn.bbox_head.retina_cls, bn.bbox_head.retina_reg):
            nn.init.normal_(layer.weight, std=0.01)
    psbn.load_state_dict(bn.state_dict())
    assert any(isinstance(m, PostShiftedBatchNorm) for m in psbn.modules())
    bn.eval(), psbn.eval()
    return Twins(request.param, bn, psbn)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def detect(detector: nn.Module, images: Tensor) -> list[InstanceData]:
    shape = tuple(images.shape[-2:])
    meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=meta) for _ in images]
    return [sample.pred_instances for sample in detector(images, samples, mode='predict')]


def assert_same_detections(found: list[InstanceData], expected: list[InstanceData]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert len(a) == len(b) > 0
        # Each has its like in the other: of two scores that are all but equal, either may be first.
        alike = (
            (a.labels[:, None] == b.labels)
            & ((a.scores[:, None] - b.scores).abs() < 1e-4)
            & ((a.bboxes[:, None] - b.bboxes).abs().amax(-1) < 0.02)
        )
        assert alike.any(0).all() and alike.any(1).all()


def norms_in(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def test_psbn_detects_what_its_bn_twin_detects_bit_for_bit(twins, images):
    for a, b in zip(detect(twins.psbn, images), detect(twins.bn, images)):
        assert len(a) > 0
        assert all(torch.equal(a[key], b[key]) for key in ('labels', 'scores', 'bboxes'))


def test_the_fused_detector_detects_the_same(twins, images):
    fused = fuse_conv_bn(copy.deepcopy(twins.psbn))
    assert not norms_in(fused)
    assert_same_detections(detect(fused, images), detect(twins.psbn, images))


def test_det_inferencer_takes_one_file_for_both_configs(twins, coco_root, tmp_path):
    paths = [str(path) for path in sorted((coco_root / 'val').glob('*.jpg'))[:2]]
    weights = str(tmp_path / 'psbn.pth')
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(meta=meta, state_dict=twins.psbn.state_dict()), weights)
    found = {}
    for norm in ('psbn', 'bn'):
        inferencer = DetInferencer(load(twins.name, norm), weights, 'cpu', show_progress=False)
        samples = inferencer(paths, no_save_vis=True, return_datasamples=True)['predictions']
        found[norm] = [sample.pred_instances for sample in samples]
    assert_same_detections(found['bn'], found['psbn'])
