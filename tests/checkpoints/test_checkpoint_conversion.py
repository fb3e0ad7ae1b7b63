"""Whole checkpoints between BN and psBN: a training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from psbn_mmdet.checkpoints import CheckpointError, convert_checkpoint, read_content, write_content
from psbn_mmdet.collapse import Structure
from psbn_mmdet.layers import PostShiftedBatchNorm
from psbn_mmdet.norm_switch import build_model
from psbn_mmdet.preflight import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def config(shrink) -> Config:
    """A small RetinaNet that trains all its BN, with an average and momentum, without decay."""
    cfg = Config.fromfile(ROOT / 'configs/psbn/retinanet_r50_fpn_bn_1x_coco.py')
    shrink(cfg)
    cfg.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 16,
            'model.backbone.frozen_stages': -1,
            'model.backbone.norm_eval': False,
            'model.neck.in_channels': [16, 32, 64, 128],
            'model.bbox_head.num_classes': 4,
            'optim_wrapper.optimizer.weight_decay': 0.0,
            'optim_wrapper.optimizer.lr': 0.01,
            'optim_wrapper.paramwise_cfg': dict(custom_keys={'bn': dict(lr_mult=100)}),
            'default_hooks.checkpoint.interval': 1,
            'log_level': 'ERROR',
        }
    )
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1))
    cfg.param_scheduler = []
    return cfg


def norm_type(cfg: Config, kind: str) -> Config:
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.norm_cfg = dict(type=kind, requires_grad=True)
    return cfg


def train(cfg: Config, work_dir: Path, epochs: int, resume: Path | None = None) -> list[float]:
    """Train, and return the losses of the last epoch."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict({'work_dir': str(work_dir), 'train_cfg.max_epochs': epochs})
    cfg.visualizer.name = str(work_dir)
    if resume:
        cfg.merge_from_dict({'resume': True, 'load_from': str(resume)})
    Runner.from_cfg(cfg).train()
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line['loss'] for line in lines if line.get('epoch') == epochs and 'loss' in line]
    assert len(losses) == 2
    return losses


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory) -> dict:
    """BN trained for two epochs; after the first it was converted and went on as psBN, too."""
    folder = tmp_path_factory.mktemp('convert')
    train(norm_type(config, 'BN'), folder / 'start', 1)
    start = folder / 'start/epoch_1.pth'
    content, _ = convert_checkpoint(read_content(start), 'psbn')
    write_content(content, folder / 'psbn.pth')
    return {
        'folder': folder,
        'start': start,
        'bn losses': train(norm_type(config, 'BN'), folder / 'bn', 2, start),
        'psbn losses': train(norm_type(config, 'psBN'), folder / 'psbn', 2, folder / 'psbn.pth'),
    }


def test_a_converted_training_goes_on_as_the_original(trained):
    assert trained['psbn losses'] == pytest.approx(trained['bn losses'], abs=1e-4)
    bn = read_content(trained['folder'] / 'bn/epoch_2.pth')
    psbn = read_content(trained['folder'] / 'psbn/epoch_2.pth')
    back, done = convert_checkpoint(psbn, 'bn')
    assert set(done.converted) == {'state_dict', 'ema_state_dict'}
    moved = 0.0
    start = read_content(trained['start'])
    for key in ('state_dict', 'ema_state_dict'):
        assert list(back[key]) == list(bn[key])
        for name, value in bn[key].items():
            assert torch.allclose(back[key][name], value, atol=1e-5), name
            if name.endswith('bn1.bias'):
                moved = max(moved, (value - start[key][name]).abs().max().item())
    assert moved > 1e-3, 'the second epoch has trained something'
    # What has moved the biases: their momentum.
    for index, state in bn['optimizer']['state'].items():
        other = back['optimizer']['state'][index]['momentum_buffer']
        assert torch.allclose(other, state['momentum_buffer'], rtol=1e-3, atol=1e-5), index


def test_conversion_leaves_its_input_alone_and_back_gives_the_original(trained):
    content = read_content(trained['start'])
    before = copy.deepcopy(content['state_dict'])
    psbn, done = convert_checkpoint(content, 'psbn', shift=0.2)
    assert list(content['state_dict']) == list(before)
    layers = done.converted['state_dict']
    assert len(layers) == 20 and 'backbone.layer1.0.bn1' in layers
    assert done.converted['ema_state_dict'] == [f'module.{name}' for name in layers]
    assert not done.left and not done.opened
    back, _ = convert_checkpoint(psbn, 'bn')
    assert back.keys() == content.keys()
    for name, value in before.items():
        assert torch.allclose(back['state_dict'][name], value, atol=1e-7), name
    assert back['meta']['epoch'] == content['meta']['epoch'] == 1


def test_the_config_in_the_checkpoint_is_that_of_the_converted_model(trained):
    content = read_content(trained['start'])
    psbn, done = convert_checkpoint(content, 'psbn', shift=0.2)
    assert done.configs == 2  # in `meta` and in the message hub
    for text in (psbn['meta']['cfg'], psbn['message_hub']['runtime_info']['cfg']):
        cfg = Config.fromstring(text, '.py')
        assert cfg.model.backbone.norm_cfg == dict(type='psBN', requires_grad=True, shift=0.2)
    back, _ = convert_checkpoint(psbn, 'bn')
    cfg = Config.fromstring(back['meta']['cfg'], '.py')
    assert cfg.model == Config.fromstring(content['meta']['cfg'], '.py').model
    assert 'psbn_mmdet' not in back['meta']['cfg']
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']


def test_det_inferencer_needs_nothing_but_the_converted_file(trained):
    folder = trained['folder']
    psbn = folder / 'psbn/epoch_2.pth'
    content, _ = convert_checkpoint(read_content(psbn), 'bn')
    write_content(content, folder / 'bn.pth')
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    found = []
    for weights in (psbn, folder / 'bn.pth'):
        inferencer = DetInferencer(weights=str(weights), device='cpu', show_progress=False)
        inferencer.model.bbox_head.test_cfg.score_thr = 0.0
        has_psbn = any(isinstance(m, PostShiftedBatchNorm) for m in inferencer.model.modules())
        assert has_psbn == (weights == psbn)
        found.append(inferencer(image)['predictions'][0])
        DetLocalVisualizer._instance_dict.clear()
    assert len(found[0]['scores']) == 100
    assert found[0]['labels'] == found[1]['labels']
    assert np.allclose(found[0]['scores'], found[1]['scores'], atol=1e-5)
    assert np.allclose(found[0]['bboxes'], found[1]['bboxes'], atol=1e-2)


def test_det_inferencer_builds_norms_that_no_config_names(tmp_path):
    """A MobileNetV2 of MMDetection: its BN are the default of a constructor."""
    cfg = load_config('yolov3_mobilenetv2_8xb24-320-300e_coco')
    cfg.model.backbone.init_cfg = None
    model = build_model(cfg)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.bias, std=0.1)
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(CLASSES=('a', 'b')))
    content = dict(state_dict=model.state_dict(), meta=meta)
    psbn, done = convert_checkpoint(content, 'psbn')
    assert done.configs == 1
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    found = []
    for name, saved in (('bn', content), ('psbn', psbn)):
        write_content(saved, tmp_path / f'{name}.pth')
        inferencer = DetInferencer(
            weights=str(tmp_path / f'{name}.pth'), device='cpu', show_progress=False
        )
        norms = [m for m in inferencer.model.modules() if isinstance(m, _BatchNorm)]
        are_psbn = [isinstance(norm, PostShiftedBatchNorm) for norm in norms]
        assert are_psbn == [name == 'psbn'] * 72
        inferencer.model.bbox_head.test_cfg.update(score_thr=0.0, conf_thr=0.0)
        found.append(inferencer(image)['predictions'][0])
        DetLocalVisualizer._instance_dict.clear()
    assert len(found[0]['scores']) == 100
    assert np.allclose(found[0]['scores'], found[1]['scores'], atol=1e-5)


def test_an_optimiser_state_that_goes_by_names_is_renamed():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    content = dict(
        state_dict=model.state_dict(),
        optimizer=dict(
            state={name: dict(exp_avg=torch.ones(1)) for name, _ in model.named_parameters()},
            param_groups=[dict(lr=0.1, params=[name for name, _ in model.named_parameters()])],
        ),
    )
    converted, done = convert_checkpoint(content, 'psbn')
    assert list(converted['optimizer']['state']) == ['0.weight', '0.bias', '1.weight', '1.beta']
    assert converted['optimizer']['param_groups'][0]['params'][-1] == '1.beta'
    assert done.renamed == 2
    back, _ = convert_checkpoint(converted, 'bn')
    assert list(back['optimizer']['state']) == list(content['optimizer']['state'])


def test_what_is_revived_and_what_is_left_alone_is_told():
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4, affine=False), torch.nn.BatchNorm2d(4)
    )
    for norm in (model[0], model[2]):
        norm.weight.data[1:3], norm.bias.data[1:3] = 0, -0.01
    content = {f'module.{key}': value for key, value in model.state_dict().items()}
    converted, done = convert_checkpoint(
        content, 'psbn', structure=Structure({'0': 'relu', '2': 'other'}, {}, {})
    )
    assert done.opened == {'module.0': [1, 2]}
    assert done.left == {'module.1': 'no gamma'}
    assert converted['module.0.beta'].tolist() == pytest.approx([-0.1, -0.08, -0.08, -0.1])
    assert converted['module.2.beta'].tolist() == pytest.approx([-0.1, -0.11, -0.11, -0.1])


def test_nothing_to_convert_is_an_error():
    psbn, _ = convert_checkpoint(torch.nn.BatchNorm2d(4).state_dict(), 'psbn')
    with pytest.raises(CheckpointError, match=r'no BN to convert \(psBN is all there is\): give'):
        convert_checkpoint(psbn, 'psbn')
    with pytest.raises(CheckpointError, match=r'no psBN to convert \(no norm layer is all'):
        convert_checkpoint(torch.nn.Linear(2, 2).state_dict(), 'bn')
