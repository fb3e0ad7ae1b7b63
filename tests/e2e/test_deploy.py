"""Whole psBN detectors, deployed in each way that docs/deploy.md names, beside their BN twins."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_export
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
from psbn_mmdet.layers import PostShiftedBatchNorm, psbn_to_bn

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


class Raw(nn.Module):
    """What a detector computes before post-processing, which MMDetection cannot export."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple:
        if hasattr(self.detector, 'rpn_head'):
            return self.detector.extract_feat(images)
        classes, boxes = self.detector(images, mode='tensor')
        return *classes, *boxes


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


# Fusing, conversion, compiling


def test_psbn_detects_what_its_bn_twin_detects(twins, images):
    assert_same_detections(detect(twins.psbn, images), detect(twins.bn, images))


def test_the_fused_detector_detects_the_same(twins, images):
    fused = fuse_conv_bn(copy.deepcopy(twins.psbn))
    assert not norms_in(fused)
    assert_same_detections(detect(fused, images), detect(twins.psbn, images))


def test_the_converted_detector_detects_the_same_fused_or_not(twins, images):
    converted = psbn_to_bn(copy.deepcopy(twins.psbn))
    assert {type(norm) for norm in norms_in(converted)} == {nn.BatchNorm2d}
    expected = detect(twins.psbn, images)
    assert_same_detections(detect(converted, images), expected)
    assert_same_detections(detect(fuse_conv_bn(converted), images), expected)


def test_torch_compile_takes_backbone_and_neck_as_one_graph(twins, images):
    compiled = copy.deepcopy(twins.psbn)
    compiled.extract_feat = torch.compile(
        compiled.extract_feat, backend='aot_eager', fullgraph=True
    )
    assert_same_detections(detect(compiled, images), detect(twins.psbn, images))


# DetInferencer


def test_det_inferencer_finds_the_same_with_psbn_and_with_bn(twins, coco_root, tmp_path):
    paths = [str(path) for path in sorted((coco_root / 'val').glob('*.jpg'))[:2]]
    converted = psbn_to_bn(copy.deepcopy(twins.psbn))
    found = {}
    for norm, detector in (('psbn', twins.psbn), ('bn', converted)):
        weights = str(tmp_path / f'{norm}.pth')
        meta = dict(dataset_meta=dict(classes=CLASSES))
        torch.save(dict(meta=meta, state_dict=detector.state_dict()), weights)
        inferencer = DetInferencer(load(twins.name, norm), weights, 'cpu', show_progress=False)
        samples = inferencer(paths, no_save_vis=True, return_datasamples=True)['predictions']
        found[norm] = [sample.pred_instances for sample in samples]
    assert_same_detections(found['bn'], found['psbn'])


# ONNX


class Exported(NamedTuple):
    """An ONNX file: its nodes by type, those onnxruntime makes of them, and what they compute."""

    nodes: Counter
    nodes_at_run_time: Counter
    outputs: list[np.ndarray]


@pytest.fixture
def export(images, tmp_path) -> Callable[..., Exported]:
    onnx = pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    path, optimized = str(tmp_path / 'model.onnx'), str(tmp_path / 'optimized.onnx')

    def count(path: str) -> Counter:
        graph = onnx.load(path).graph
        counts = Counter(node.op_type for node in graph.node)
        return counts + Counter(initializer=len(graph.initializer))

    def export(detector: nn.Module, **kwargs) -> Exported:
        onnx_export.export(Raw(detector).eval(), (images,), path, **kwargs)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = optimized
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return Exported(count(path), count(optimized), outputs)

    return export


def assert_close_outputs(outputs: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(outputs) == len(expected) >= 4
    for a, b in zip(outputs, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


EXPORTERS = pytest.mark.parametrize('dynamo', [False, True], ids=['torchscript', 'dynamo'])


@EXPORTERS
def test_onnx_runs_as_many_nodes_as_bn_and_computes_the_same(twins, images, export, dynamo):
    bn, psbn = (export(detector, dynamo=dynamo) for detector in (twins.bn, twins.psbn))
    for kind in ('Add', 'Constant'):
        assert psbn.nodes[kind] == bn.nodes[kind]
    assert psbn.nodes_at_run_time == bn.nodes_at_run_time
    if dynamo:
        assert psbn.nodes == bn.nodes
    assert psbn.nodes_at_run_time['Conv'] > 20
    assert psbn.nodes_at_run_time['BatchNormalization'] == 0
    with torch.no_grad():
        expected = [output.numpy() for output in Raw(twins.psbn)(images)]
    assert_close_outputs(psbn.outputs, expected)
    assert_close_outputs(psbn.outputs, bn.outputs)


UNFOLDED = {
    'torchscript': dict(
        dynamo=False, do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE
    ),
    'dynamo': dict(dynamo=True, optimize=False),
}


@pytest.mark.parametrize('kwargs', UNFOLDED.values(), ids=UNFOLDED)
def test_without_folding_each_psbn_adds_its_shift_unless_converted(twins, export, kwargs):
    bn, psbn = (export(detector, **kwargs) for detector in (twins.bn, twins.psbn))
    num_norms = len(norms_in(twins.psbn))
    assert psbn.nodes['BatchNormalization'] == bn.nodes['BatchNormalization'] == num_norms
    assert psbn.nodes['Add'] == bn.nodes['Add'] + num_norms
    assert psbn.nodes['Constant'] == bn.nodes['Constant']
    assert psbn.nodes_at_run_time == bn.nodes_at_run_time
    converted = export(psbn_to_bn(copy.deepcopy(twins.psbn)), **kwargs)
    assert converted.nodes == bn.nodes
    assert_close_outputs(converted.outputs, psbn.outputs)


def test_converted_the_torchscript_exporter_fuses_all_norms(twins, export):
    bn, converted = twins.bn, psbn_to_bn(copy.deepcopy(twins.psbn))
    nodes = export(converted, dynamo=False).nodes
    assert nodes == export(bn, dynamo=False).nodes
    assert nodes['BatchNormalization'] == 0
