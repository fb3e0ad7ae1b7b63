"""What follows each BN of a checkpoint, from the config of its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from psbn_mmdet.checkpoints import CheckpointError
from psbn_mmdet.configs.model import structure_of_config
from psbn_mmdet.configs.reading import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/psbn'


@pytest.mark.parametrize('detector', ['faster-rcnn', 'retinanet'])
def test_the_layers_of_a_detector(detector):
    cfg = Config.fromfile(CONFIGS / f'{detector}_r50_fpn_psbn_1x_coco.py')
    cfg.model.backbone.update(depth=50, base_channels=8)
    cfg.model.neck.update(in_channels=[32, 64, 128, 256], norm_cfg=dict(type='BN'))
    if detector == 'faster-rcnn':  # BN that runs for proposals only
        cfg.model.roi_head.bbox_head.update(
            type='Shared4Conv1FCBBoxHead', conv_out_channels=16, norm_cfg=dict(type='psBN')
        )
    names = ['backbone.bn1', 'backbone.layer2.1.bn2', 'backbone.layer2.1.bn3', 'not.there']
    names += ['neck.fpn_convs.0.bn', 'roi_head.bbox_head.shared_convs.3.bn']
    found = structure_of_config(cfg, names)
    of = found.rectifiers
    assert {name: of[name] for name in names if name in of} == {
        'backbone.bn1': 'relu',
        'backbone.layer2.1.bn2': 'relu',
        'backbone.layer2.1.bn3': 'other',
        'neck.fpn_convs.0.bn': 'other',
        **({names[-1]: 'relu'} if detector == 'faster-rcnn' else {}),
    }
    assert found.producers['backbone.layer2.1.bn2'] == 'backbone.layer2.1.conv2'
    assert found.consumers['backbone.layer2.1.bn2'] == ['backbone.layer2.1.conv3']


def test_a_checkpoint_of_the_backbone_alone():
    cfg = Config.fromfile(CONFIGS / 'retinanet_r50_fpn_psbn_1x_coco.py')
    found = structure_of_config(cfg, ['bn1', 'layer1.0.bn3', 'fc'])
    assert found.rectifiers['bn1'] == 'relu'
    assert found.rectifiers['layer1.0.bn3'] == 'other'
    assert found.producers['layer1.0.bn2'] == 'layer1.0.conv2'


@MODELS.register_module(force=True)
class Pose(nn.Module):
    """As the models of MMPose: data samples are asked for, though nothing needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, inputs: Tensor, data_samples: list | None, mode: str = 'tensor') -> Tensor:
        return self.bn(self.conv(inputs)).relu()


@MODELS.register_module(force=True)
class Video(nn.Module):
    """As the recognizers of MMAction2: frames in place of an image."""

    def __init__(self, is_3d: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3) if is_3d else nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm3d(4) if is_3d else nn.BatchNorm2d(4)

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = '') -> Tensor:
        if inputs.dim() < 5:
            raise ValueError('no frames')
        return self.bn(self.conv(inputs.flatten(0, 1))).relu()


@pytest.mark.parametrize(
    'model', [dict(type='Pose'), dict(type='Video', is_3d=False), dict(type='Video', is_3d=True)]
)
def test_models_of_other_libraries_run_on_what_they_take(model):
    assert structure_of_config(Config(dict(model=model)), ['bn']).rectifiers == {'bn': 'relu'}


def test_a_model_that_cannot_be_built_is_named():
    cfg = Config.fromfile(CONFIGS / 'retinanet_r50_fpn_psbn_1x_coco.py')
    cfg.model.type = 'NoDetector'
    with pytest.raises(ConfigError, match=r'the model of the config cannot be built \(KeyError'):
        structure_of_config(cfg, ['features.1'])


def test_another_models_config_is_named():
    cfg = Config.fromfile(CONFIGS / 'retinanet_r50_fpn_psbn_1x_coco.py')
    with pytest.raises(CheckpointError, match=r'retinanet_r50.* no BN layer named .* features\.1'):
        structure_of_config(cfg, ['features.1'])
