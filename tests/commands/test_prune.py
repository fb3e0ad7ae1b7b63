"""tools/prune.py on a detector, and what is done with what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from limits import HANG
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from onnx_export import export
from torch import nn

from psbn_mmdet.checkpoints import read_content, read_weights
from psbn_mmdet.collapse import find_norms
from psbn_mmdet.commands import prune
from psbn_mmdet.configs.norm_switch import switch_config
from psbn_mmdet.configs.reading import load_config
from psbn_mmdet.pruning import compare

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
DETECTORS = {
    'retinanet': 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'faster-rcnn': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
}


@pytest.fixture(scope='module', params=DETECTORS)
def whole(request, shrink, tmp_path_factory) -> Namespace:
    """A detector of which half of the filters are closed: its config and its checkpoint."""
    folder = tmp_path_factory.mktemp('whole')
    cfg = load_config(DETECTORS[request.param])
    cfg.custom_hooks = [dict(type='CollapseHook')]
    shrink(cfg)
    cfg.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 16,
            'model.backbone.zero_init_residual': False,
            'model.neck.in_channels': [16, 32, 64, 128],
            'model.neck.out_channels': 32,
            'train_cfg.max_epochs': 1,
            'optim_wrapper.optimizer.lr': 1e-4,
        }
    )
    for part in ('rpn_head', 'bbox_head'):
        if part in cfg.model:
            cfg.model[part].update(in_channels=32, feat_channels=32)
    if 'roi_head' in cfg.model:
        cfg.model.roi_head.bbox_roi_extractor.out_channels = 32
        cfg.model.roi_head.bbox_head.update(in_channels=32, fc_out_channels=64)
    cfg.work_dir = str(folder / 'work')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        model.init_weights()
    with torch.no_grad():
        for norm in find_norms(model).values():
            norm.bias.uniform_(-0.1, 0.3)
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.weight[: norm.num_features // 2] = 0.01
            norm.bias[: norm.num_features // 2] = -9.0
        if 'bbox_head' in cfg.model:
            model.bbox_head.retina_cls.bias.fill_(-1.0)
    checkpoint = folder / 'whole.pth'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    cfg.dump(folder / 'whole.py')
    return Namespace(config=folder / 'whole.py', checkpoint=checkpoint, folder=folder)


@pytest.fixture(scope='module')
def pruned(whole) -> Namespace:
    """What the tool writes of it."""
    out = whole.folder / 'out'
    arguments = [whole.checkpoint, '--config', whole.config, '-o', out, '--images', 4]
    assert prune.main(list(map(str, arguments))) == 0
    return Namespace(config=out / 'pruned.py', checkpoint=out / 'pruned.pth', folder=out)


def built(files: Namespace) -> nn.Module:
    """The model of a config with the weights of a checkpoint."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(files.config).model)
    model.load_state_dict(read_weights(files.checkpoint).state_dict)
    return model.eval()


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_several_data_sets_and_wrappers_are_watched(whole):
    cfg = Config.fromfile(whole.config)
    one = cfg.train_dataloader.dataset
    repeated = dict(type='RepeatDataset', times=3, dataset=one)
    both = dict(type='ConcatDataset', datasets=[one, repeated])
    balanced = dict(type='ClassBalancedDataset', dataset=both, oversample_thr=0.1)
    for dataset, count in ((one, 1), (both, 2), (balanced, 2)):
        cfg.train_dataloader.dataset = dataset
        with DefaultScope.overwrite_default_scope('mmdet'):
            images = list(compare.images_of(compare.dataset_of(cfg, 'train'), 100))
        assert len(images) == 4 * count and images[0]['inputs'][0].shape == (3, 96, 96)


def test_half_of_the_filters_leave_a_third_of_the_backbone(whole, pruned):
    before, after = built(whole), built(pruned)
    assert size_of(after.backbone) < size_of(before.backbone) / 3
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for one, other in zip(before.extract_feat(x), after.extract_feat(x)):
            assert torch.allclose(one, other, atol=1e-5)
    cfg = Config.fromfile(pruned.config)
    assert cfg.model.type == 'PrunedModel' and cfg.model.whole_type in ('RetinaNet', 'FasterRCNN')
    assert cfg.custom_imports['imports'] == ['psbn_mmdet']


def runner_of(files: Namespace, work_dir: Path) -> Runner:
    cfg = Config.fromfile(files.config)
    cfg.work_dir, cfg.load_from = str(work_dir), str(files.checkpoint)
    return Runner.from_cfg(cfg)


def test_the_scores_are_the_same(whole, pruned, tmp_path):
    before, after = (
        runner_of(files, tmp_path / name).test() for name, files in (('a', whole), ('b', pruned))
    )
    assert before == after and before


def test_it_trains_on_and_is_counted(pruned, tmp_path):
    runner = runner_of(pruned, tmp_path)
    runner.train()
    assert runner.iter == 2
    assert (tmp_path / 'epoch_1.pth').is_file()
    assert list(tmp_path.glob('*/collapse.jsonl'))


def test_it_resumes_with_an_average_and_recovery(pruned, tmp_path):
    cfg = Config.fromfile(pruned.config)
    switch_config(cfg, 'psBN')  # with the RecoveryHook
    cfg.custom_hooks.append(dict(type='EMAHook'))
    cfg.work_dir, cfg.load_from = str(tmp_path), str(pruned.checkpoint)
    Runner.from_cfg(cfg).train()
    for singletons in (MMLogger, MessageHub, Visualizer):
        singletons._instance_dict.clear()
    cfg.train_cfg.max_epochs, cfg.resume = 2, True
    cfg.load_from = str(tmp_path / 'epoch_1.pth')
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 4
    names = {type(hook).__name__ for hook in runner.hooks}
    assert {'EMAHook', 'RecoveryHook', 'CollapseHook'} <= names
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'WARNING - RecoveryHook' not in log and 'WARNING - CollapseHook' not in log
    averaged = read_content(tmp_path / 'epoch_2.pth')['ema_state_dict']
    stem = 'module.backbone.layer1.0.bn1.weight'
    assert averaged[stem].shape == runner.model.backbone.layer1[0].bn1.weight.shape


def test_it_is_switched_to_psbn(pruned):
    cfg = Config.fromfile(pruned.config)
    lines = switch_config(cfg, 'psBN')
    assert '  backbone: 20 BN -> psBN' in lines[1]
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    model.load_state_dict(read_weights(pruned.checkpoint).state_dict)
    assert sum(norm.num_features for norm in find_norms(model).values()) < 700


def test_inference_gives_the_same_boxes(whole, pruned, coco_root):
    image = str(next(iter(sorted((coco_root / 'val').iterdir()))))
    found = [
        DetInferencer(str(files.config), str(files.checkpoint), device='cpu', show_progress=False)(
            image
        )['predictions'][0]
        for files in (whole, pruned)
    ]
    assert found[0]['labels'] == found[1]['labels'] and found[0]['labels']
    boxes = [torch.tensor(one['bboxes']) for one in found]
    assert torch.allclose(*boxes, atol=1e-3)


def test_its_backbone_is_exported(pruned, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    backbone, x = built(pruned).backbone, torch.randn(1, 3, 64, 64)
    export(backbone, (x,), str(tmp_path / 'model.onnx'), dynamo=False)
    session = ort.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        for one, other in zip(found, backbone(x)):
            assert torch.allclose(torch.from_numpy(one), other, atol=1e-4)


def test_a_training_that_shrinks_cuts_at_its_end(whole, tmp_path):
    command = [sys.executable, ROOT / 'tools/train.py', whole.config, '--work-dir', tmp_path]
    options = ['--shrink', '0.5', '--cfg-options', f'load_from={whole.checkpoint}']
    run = subprocess.run(
        list(map(str, [*command, *options])),
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert '--shrink: gamma and beta of 15 BN are decayed by 0.5, 5,000 times' in run.stdout
    assert 'filters of BN are closed: they output 0' in run.stdout + run.stderr
    assert 'Train it on: python tools/train.py' in run.stdout
    cut = Namespace(config=tmp_path / 'pruned_epoch_1/pruned.py')
    cut.checkpoint = cut.config.with_suffix('.pth')
    assert size_of(built(cut).backbone) < size_of(built(whole).backbone) / 3
    assert (
        '--norm psBN keeps them open'
        in subprocess.run(
            list(map(str, [*command, '--shrink', '--norm', 'psBN'])),
            capture_output=True,
            text=True,
            timeout=HANG,
        ).stderr
    )


def test_without_closed_filters_nothing_is_written(whole, tmp_path, capsys):
    if 'roi_head' in whole.config.read_text():
        pytest.skip('its linear layers have closed channels of their own')
    content = deepcopy(torch.load(whole.checkpoint, weights_only=True))
    for key, value in content['state_dict'].items():
        if key.endswith('.bias') and f'{key[:-4]}running_mean' in content['state_dict']:
            value.fill_(3.0)
            content['state_dict'][f'{key[:-4]}weight'].fill_(0.01)
    torch.save(content, tmp_path / 'open.pth')
    arguments = [tmp_path / 'open.pth', '--config', whole.config, '-o', tmp_path / 'out']
    assert prune.main([*map(str, arguments), '--images', '2']) == 0
    assert 'nothing to cut' in capsys.readouterr().out
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (['--images', '0'], '--images must be at least 1'),
        (['--config', ROOT / 'demo/faster-rcnn_r18_fpn_cells.py'], 'give the config that it was'),
    ],
)
def test_bad_input_is_one_sentence(whole, tmp_path, capsys, change, words):
    arguments = [whole.checkpoint, '--config', whole.config, '-o', tmp_path / 'out', *change]
    assert prune.main(list(map(str, arguments))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('prune: ') and words in line
