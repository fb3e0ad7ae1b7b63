"""Each mistake is found before a run, and named in one sentence with its mend."""

from __future__ import annotations

import os
import re
import sys
import threading
from argparse import Namespace
from copy import deepcopy
from functools import reduce
from http.server import BaseHTTPRequestHandler, HTTPServer
from operator import getitem
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import CheckpointLoader
from torch import nn

from psbn_mmdet.commands import launch
from psbn_mmdet.commands.launch import run_script
from psbn_mmdet.commands.preflight import check_test_config, check_train_config
from psbn_mmdet.configs.reading import ConfigError, load_config
from psbn_mmdet.layers import PostShiftedBatchNorm2d

CONFIG_DIR = Path(__file__).resolve().parents[2] / 'configs' / 'psbn'


@pytest.fixture(scope='module')
def loaded_cfg(shrink) -> Config:
    cfg = Config.fromfile(CONFIG_DIR / 'faster-rcnn_r50_fpn_psbn_1x_coco.py')
    shrink(cfg)
    return cfg


@pytest.fixture
def cfg(loaded_cfg, tmp_path) -> Config:
    """A config with which a run can start."""
    cfg = deepcopy(loaded_cfg)
    cfg.work_dir = str(tmp_path)
    return cfg


@pytest.fixture
def bn_cfg(cfg) -> Config:
    cfg.model.backbone.norm_cfg.type = 'BN'
    return cfg


def save(path: Path, *layers: nn.Module) -> str:
    torch.save(dict(state_dict=nn.Sequential(*layers).state_dict()), path)
    return str(path)


@pytest.fixture
def bn_checkpoint(tmp_path) -> str:
    return save(tmp_path / 'bn.pth', nn.BatchNorm2d(4))


@pytest.fixture
def psbn_checkpoint(tmp_path) -> str:
    return save(tmp_path / 'psbn.pth', nn.Conv2d(3, 4, 1), PostShiftedBatchNorm2d(4))


def refusal(check, *arguments) -> str:
    """The one sentence with which ``check`` refuses."""
    with pytest.raises(ConfigError) as info:
        check(*arguments)
    sentence = str(info.value)
    assert '\n' not in sentence and not sentence.endswith('.')
    return sentence


def refused(cfg: Config, **options) -> str:
    """How training is refused once ``options`` are set, ``__`` standing for the dots."""
    for option, value in options.items():
        *parents, key = option.split('__')
        reduce(getitem, parents, cfg)[key] = value
    return refusal(check_train_config, cfg)


def test_a_config_that_can_run_passes(cfg, bn_checkpoint, psbn_checkpoint):
    cfg.load_from = psbn_checkpoint
    check_train_config(cfg)
    check_test_config(cfg, psbn_checkpoint)
    check_test_config(cfg, bn_checkpoint)


# The model


@pytest.mark.parametrize('shift', [-0.1, 0, float('inf'), 'abc'])
def test_invalid_shift(cfg, shift):
    sentence = refused(cfg, model__backbone__norm_cfg__shift=shift)
    assert f'got {shift!r} in model.backbone.norm_cfg' in sentence


def test_invalid_shift_deep_in_a_list_in_a_wrapped_model_and_by_class(cfg):
    norm = dict(type=PostShiftedBatchNorm2d, shift=-1)
    cfg.model = dict(type='SemiBaseDetector', module=dict(heads=[dict(norm_cfg=norm)]))
    assert 'got -1 in model.module.heads.0.norm_cfg' in refusal(check_test_config, cfg, 'x.pth')


def test_sync_bn_with_psbn(cfg):
    sentence = refused(cfg, sync_bn='torch')
    assert "sync_bn='torch'" in sentence
    assert "remove sync_bn and set norm_cfg=dict(type='psSyncBN')" in sentence


def test_sync_bn_passes_with_bn_and_where_psbn_is_only_tested(cfg, bn_cfg, psbn_checkpoint):
    bn_cfg.sync_bn = cfg.sync_bn = 'torch'
    check_train_config(bn_cfg)
    check_test_config(cfg, psbn_checkpoint)


# The data


@pytest.mark.parametrize('stage', ['train', 'val'])
def test_missing_annotation_file(cfg, stage):
    cfg[f'{stage}_dataloader'].dataset.ann_file = 'annotations/nowhere.json'
    sentence = refusal(check_train_config, cfg)
    dataset = cfg[f'{stage}_dataloader'].dataset
    path = os.path.join(dataset.data_root, 'annotations/nowhere.json')
    assert f'{stage}_dataloader.dataset.ann_file: {path} does not exist' in sentence
    assert f'set {stage}_dataloader.dataset.data_root' in sentence


def test_a_relative_path_is_shown_with_where_it_was_looked_for(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = refused(cfg, train_dataloader__dataset__data_root='data/coco/')
    assert f'data/coco/annotations/train.json (in {tmp_path}) does not exist' in sentence


@pytest.mark.parametrize(
    'option',
    ['train_dataloader__dataset__data_root', 'load_from'],
)
def test_what_is_no_text_where_one_is_needed(cfg, option):
    name = option.replace('__', '.')
    assert refused(cfg, **{option: 3}).startswith(f'{name} is 3, no text: ')


def test_a_path_in_place_of_a_text_passes(cfg):
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = Path(dataset.data_root or '')
    check_train_config(cfg)


def test_empty_annotation_file(cfg, tmp_path):
    (tmp_path / 'empty.json').touch()
    # An absolute path takes no part of data_root, as in MMEngine.
    path = str(tmp_path / 'empty.json')
    assert f'{path} is empty' in refused(cfg, train_dataloader__dataset__ann_file=path)


def test_annotations_in_a_folder(cfg, tmp_path):
    """Such as those of DOTA."""
    cfg.train_dataloader.dataset.update(type='OwnDataset', ann_file=str(tmp_path / 'labels'))
    assert 'does not exist' in refusal(check_train_config, cfg)
    (tmp_path / 'labels').mkdir()
    assert 'labels is empty' in refusal(check_train_config, cfg)
    (tmp_path / 'labels/P0001.txt').touch()
    check_train_config(cfg)


@pytest.mark.parametrize('content', ['missing', 'empty', 'file'])
def test_image_folder_that_cannot_be_used(cfg, tmp_path, content):
    folder = tmp_path / 'images'
    if content == 'empty':
        folder.mkdir()
    elif content == 'file':
        folder.touch()
    sentence = refused(cfg, train_dataloader__dataset__data_prefix__img=str(folder))
    assert f'train_dataloader.dataset.data_prefix.img: the folder {folder}' in sentence
    assert ('is empty' if content == 'empty' else 'does not exist') in sentence


@pytest.mark.parametrize(
    ('wrap', 'place'),
    [
        (lambda d: dict(type='RepeatDataset', times=2, dataset=d), 'dataset.dataset'),
        (lambda d: dict(type='ClassBalancedDataset', dataset=d), 'dataset.dataset'),
        (lambda d: dict(type='MultiImageMixDataset', dataset=d, pipeline=[]), 'dataset.dataset'),
        (lambda d: dict(type='ConcatDataset', datasets=[d]), 'dataset.datasets.0'),
        (
            lambda d: dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[d])),
            'dataset.dataset.datasets.0',
        ),
    ],
)
def test_data_of_wrapped_datasets(cfg, wrap, place):
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = wrap(dataset)
    check_train_config(cfg)
    cfg.train_dataloader.dataset = wrap(dict(dataset, ann_file='nowhere.json'))
    assert f'train_dataloader.{place}.ann_file: ' in refusal(check_train_config, cfg)


@pytest.mark.parametrize('as_list', [False, True])
def test_missing_annotation_file_of_an_evaluator(cfg, as_list):
    evaluator = dict(cfg.val_evaluator, ann_file='nowhere.json')
    cfg.val_evaluator = [evaluator] if as_list else evaluator
    place = 'val_evaluator.0.ann_file' if as_list else 'val_evaluator.ann_file'
    assert f'{place}: nowhere.json (in ' in refusal(check_train_config, cfg)


@pytest.mark.parametrize(
    'options',
    [
        {'data_root': 's3://bucket/coco/'},
        {'data_root': '/nowhere/', 'backend_args': dict(backend='petrel')},
        {
            'data_root': '/nowhere/',
            'pipeline': [dict(type='LoadImageFromFile', backend_args=dict(backend='lmdb'))],
        },
    ],
)
def test_data_elsewhere_than_on_the_disk_is_not_looked_for(cfg, options):
    cfg.train_dataloader.dataset.update(options)
    check_train_config(cfg)


def test_testing_looks_at_the_test_data_only(cfg, psbn_checkpoint):
    for stage in ('train', 'val'):
        cfg[f'{stage}_dataloader'].dataset.data_root = '/nowhere/'
        cfg.val_evaluator.ann_file = '/nowhere.json'
    check_test_config(cfg, psbn_checkpoint)
    cfg.test_evaluator.ann_file = '/nowhere.json'
    assert 'test_evaluator.ann_file' in refusal(check_test_config, cfg, psbn_checkpoint)
    cfg.test_dataloader.dataset.data_root = '/nowhere/'
    assert 'test_dataloader' in refusal(check_test_config, cfg, psbn_checkpoint)


def test_training_without_validation_needs_no_validation_data(cfg):
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    check_train_config(cfg)


# Pretrained weights


def pretrained(checkpoint: str) -> dict:
    return dict(type='Pretrained', checkpoint=checkpoint)


def test_pretrained_file_that_is_missing(cfg):
    sentence = refused(cfg, model__backbone__init_cfg=pretrained('/nowhere/r50.pth'))
    assert 'model.backbone.init_cfg.checkpoint /nowhere/r50.pth does not exist' in sentence
    assert 'set model.backbone.init_cfg.checkpoint to a local file' in sentence


def test_pretrained_file_is_checked_even_if_a_checkpoint_follows(cfg, psbn_checkpoint):
    cfg.load_from = psbn_checkpoint
    assert '/nowhere' in refused(cfg, model__backbone__init_cfg=pretrained('/nowhere/r50.pth'))


def test_pretrained_bn_file_passes(cfg, bn_checkpoint):
    cfg.model.backbone.init_cfg = pretrained(bn_checkpoint)
    check_train_config(cfg)


def test_torchvision_weights_without_torchvision(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    sentence = refused(cfg, model__backbone__init_cfg=pretrained('torchvision://resnet50'))
    assert 'torchvision://resnet50 needs torchvision' in sentence
    assert 'install it, or set model.backbone.init_cfg.checkpoint' in sentence


@pytest.mark.parametrize('scheme', ['open-mmlab', 'openmmlab', 'mmcls'])
def test_name_that_is_in_no_table(cfg, scheme):
    name = f'{scheme}://nosuchnet'
    assert f'{name} is not in the table' in refused(cfg, model__backbone__init_cfg=pretrained(name))


@pytest.fixture
def server():
    """A server whose answer to ``/<number>/...`` has that status."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path.split('/')[1]))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')


@pytest.mark.parametrize('status', [200, 403, 405])
def test_url_of_a_server_that_answers_passes(cfg, server, status):
    cfg.model.backbone.init_cfg = pretrained(f'{server}/{status}/r50.pth')
    check_train_config(cfg)


def test_url_that_is_not_there(cfg, server):
    url = f'{server}/404/r50.pth'
    sentence = refused(cfg, model__backbone__init_cfg=pretrained(url))
    assert f'{url} cannot be downloaded' in sentence
    assert '404' in sentence


def test_url_of_no_server(cfg):
    url = 'http://127.0.0.1:9/r50.pth'
    assert f'{url} cannot be downloaded' in refused(cfg, model__backbone__init_cfg=pretrained(url))


def test_url_that_was_downloaded_before_passes(cfg, tmp_path):
    folder = tmp_path / 'cache' / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    save(folder / 'r50.pth', nn.BatchNorm2d(4))
    cfg.model.backbone.init_cfg = pretrained('http://127.0.0.1:9/r50.pth?x=1')
    check_train_config(cfg)


# Checkpoints


def test_checkpoint_of_a_run_passes_also_after_mmengine_has_read_one(cfg, tmp_path):
    hub = MessageHub.get_instance('test')
    hub.update_scalar('train/loss', 0.5)
    path = str(tmp_path / 'epoch_1.pth')
    torch.save(dict(state_dict={}, message_hub=hub.state_dict()), path)
    check_test_config(cfg, path)
    CheckpointLoader.load_checkpoint(path, 'cpu')
    check_test_config(cfg, path)


def test_missing_checkpoint(cfg):
    assert 'checkpoint /nowhere.pth does not exist' in refused(cfg, load_from='/nowhere.pth')
    assert '/nowhere.pth does not exist' in refusal(check_test_config, cfg, '/nowhere.pth')


def test_automatic_resume_from_a_checkpoint_that_is_gone(cfg, tmp_path):
    cfg.resume = True
    check_train_config(cfg)  # nothing to resume from: a new run
    (tmp_path / 'last_checkpoint').write_text('/nowhere/epoch_1.pth')
    assert '/nowhere/epoch_1.pth does not exist' in refusal(check_train_config, cfg)


def test_weights_alone_are_not_resumed(cfg, tmp_path):
    torch.save(dict(state_dict=nn.Conv2d(3, 3, 1).state_dict()), tmp_path / 'weights.pth')
    cfg.load_from = str(tmp_path / 'weights.pth')
    check_train_config(cfg)
    cfg.resume = True
    assert 'weights.pth has weights, but no state of a training' in refusal(check_train_config, cfg)
    (tmp_path / 'last_checkpoint').write_bytes(b'\xff\xfe')
    cfg.load_from = None
    cfg.work_dir = str(tmp_path)
    assert 'does not exist' in refusal(check_train_config, cfg)


def test_automatic_resume_after_a_kill_in_a_save(cfg, tmp_path):
    cfg.resume = True
    whole, torn, last = (
        tmp_path / name for name in ('epoch_1.pth', 'epoch_2.pth', 'last_checkpoint')
    )
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')  # the newest, but no checkpoint
    last.write_text('')
    assert refusal(check_train_config, cfg) == (
        f'{last} is empty, perhaps since a run was killed in a save: train without --resume'
    )
    torch.save(dict(meta=dict(iter=9), message_hub={}, optimizer={}, state_dict={}), whole)
    earlier = tmp_path / 'a_copy.pth'
    torch.save(dict(meta=dict(iter=3), message_hub={}, optimizer={}, state_dict={}), earlier)
    torn.write_bytes(whole.read_bytes()[:-100])
    mend = f'give --resume {whole}, the newest that can be'
    assert refusal(check_train_config, cfg).endswith(f'in a save: {mend}')
    for file in (torn, tmp_path / 'gone.pth'):
        last.write_text(str(file))
        assert f'{last} names {file}, which cannot be resumed' in refusal(check_train_config, cfg)
        assert refusal(check_train_config, cfg).endswith(mend)
    last.write_text('/elsewhere/a_copy.pth')  # the work dir was moved
    assert refusal(check_train_config, cfg).endswith(
        f'give --resume {earlier}, the newest that can be'
    )
    last.write_text(str(whole))
    check_train_config(cfg)
    whole.unlink()
    earlier.unlink()
    last.write_text(str(torn))
    assert 'perhaps since it is incomplete' in refusal(check_train_config, cfg)


def test_weights_of_psbn_are_weights_of_bn(bn_cfg, psbn_checkpoint):
    check_test_config(bn_cfg, psbn_checkpoint)
    bn_cfg.model.backbone.init_cfg = pretrained(psbn_checkpoint)
    check_train_config(bn_cfg)


@pytest.mark.parametrize('zipped', [True, False])
def test_checkpoint_that_would_run_code(cfg, bomb, tmp_path, zipped):
    content = dict(state_dict={}, meta=bomb)
    torch.save(content, tmp_path / 'bad.pth', _use_new_zipfile_serialization=zipped)
    sentence = refusal(check_test_config, cfg, str(tmp_path / 'bad.pth'))
    assert re.search(r'bad\.pth is not loaded since it asks for \w+\.mkdir', sentence)
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize(('content', 'kind'), [(dict(state_dict=None), 'NoneType'), ([1], 'list')])
def test_checkpoint_without_a_state_dict(cfg, tmp_path, content, kind):
    torch.save(content, tmp_path / 'other.pth')
    assert f'other.pth has no state dict, but a {kind} in its place' in refusal(
        check_test_config, cfg, str(tmp_path / 'other.pth')
    )


@pytest.mark.parametrize('damage', ['empty', 'cut', 'text'])
def test_checkpoint_that_cannot_be_read(cfg, tmp_path, bn_checkpoint, damage):
    whole = Path(bn_checkpoint).read_bytes()
    content = dict(empty=b'', cut=whole[: len(whole) // 2], text=b'not a checkpoint')[damage]
    (tmp_path / 'bad.pth').write_bytes(content)
    sentence = refusal(check_test_config, cfg, str(tmp_path / 'bad.pth'))
    assert f'{tmp_path}/bad.pth cannot be read' in sentence


# The config file


@pytest.mark.parametrize(
    ('text', 'part'),
    [
        (None, 'does not exist'),
        ('a = [', 'SyntaxError'),
        ("_base_ = 'nowhere.py'", 'nowhere.py'),
        ("_base_ = 'mmdet::nosuchmodel/nosuchconfig.py'", 'nosuch'),
        ("custom_imports = dict(imports=['nosuchmodule'])", 'nosuchmodule'),
        ('a = nosuchname', "NameError: name 'nosuchname' is not defined"),
        ("_base_ = ['./other.py']\nmodel = dict(neck=dict(type='FPN'))", 'TypeError: neck='),
    ],
)
def test_config_file_that_cannot_be_loaded(tmp_path, text, part):
    path = tmp_path / 'config.py'
    (tmp_path / 'other.py').write_text('model = dict(neck=None)')
    if text is not None:
        path.write_text(text)
    sentence = refusal(load_config, str(path))
    assert str(path) in sentence
    assert part in sentence


def test_scope_that_is_no_name(tmp_path):
    (tmp_path / 'config.py').write_text('default_scope = 3')
    assert refusal(load_config, str(tmp_path / 'config.py')).startswith('default_scope is 3, no')


def test_options_are_merged_into_the_config():
    cfg = load_config(
        str(CONFIG_DIR / 'retinanet_r50_fpn_psbn_1x_coco.py'),
        {'model.backbone.norm_cfg.shift': 0.2},
    )
    assert cfg.model.backbone.norm_cfg == dict(type='psBN', requires_grad=True, shift=0.2)


@pytest.mark.parametrize(
    'options',
    [
        {'model.neck.channels': 64},
        {'custom_hooks.5.interval': 1},
        {'custom_hooks.interval': 1},
        {'model.neck': 3, 'custom_hooks.0': 3},
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options):
    path = tmp_path / 'config.py'
    path.write_text("model = dict(neck=None)\ncustom_hooks = [dict(type='CollapseHook')]")
    sentence = refusal(load_config, str(path), options)
    assert sentence.startswith(f'one of --cfg-options {", ".join(options)} does not fit')


# Running MMDetection's script


def stop_of(monkeypatch, *arguments: str, **environment: str) -> SystemExit:
    """How ``run_script`` stops a training with these arguments."""
    for name in ('LOCAL_RANK', 'SLURM_LOCALID'):
        monkeypatch.setenv(name, environment.get(name, ''))
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    with pytest.raises(SystemExit) as info:
        run_script('train.py', lambda args, cfg: check_train_config(cfg))
    return info.value


def test_the_sentence_is_the_end(monkeypatch):
    assert stop_of(monkeypatch, '/nowhere.py').code == (
        'error: config file /nowhere.py does not exist: check the path'
    )


@pytest.mark.parametrize('name', ['LOCAL_RANK', 'SLURM_LOCALID'])
def test_one_rank_of_a_machine_speaks(monkeypatch, name):
    assert 'error: ' in stop_of(monkeypatch, '/nowhere.py', **{name: '0'}).code
    assert stop_of(monkeypatch, '/nowhere.py', **{name: '1'}).code == 1


def given_to_the_script(monkeypatch, *options: str) -> Config:
    """The config with which MMDetection's script is run."""
    found = []
    config = str(CONFIG_DIR.parents[1] / 'demo/faster-rcnn_r18_fpn_bn_demo.py')

    class Script:
        Config = None

        def parse_args(self) -> Namespace:
            pairs = dict(option.split('=') for option in options)
            return Namespace(config=config, cfg_options=pairs, launcher='none')

        def main(self) -> None:
            found.append(self.Config.fromfile(config))

    monkeypatch.setattr(launch, '_load_script', lambda name: Script())
    run_script('train.py', lambda args, cfg: None)
    return found[0]


def test_what_is_dumped_imports_the_package_and_has_the_checks(monkeypatch):
    """DetInferencer reads the dumped config, which would know no psBN."""
    cfg = given_to_the_script(monkeypatch, 'model.backbone.norm_cfg.type=psBN')
    assert cfg.model.backbone.norm_cfg.type == 'psBN'
    assert cfg.custom_imports['imports'] == ['psbn_mmdet']
    assert [hook['type'] for hook in cfg.custom_hooks][-1] == 'DataCheckHook'


def test_hooks_that_are_a_text(monkeypatch):
    with pytest.raises(SystemExit, match="custom_hooks is 'abc', not a list of hooks"):
        given_to_the_script(monkeypatch, 'custom_hooks=abc')


def test_mmdetection_without_its_scripts(monkeypatch, tmp_path):
    monkeypatch.setattr(mmdet, '__file__', str(tmp_path / 'mmdet' / '__init__.py'))
    sentence = stop_of(monkeypatch, '/nowhere.py').code
    assert f'tools/train.py of MMDetection is neither in {tmp_path}/mmdet/.mim' in sentence


def test_mmdetection_in_a_checkout(monkeypatch, tmp_path):
    scripts = Path(mmdet.__file__).parent / '.mim' / 'tools'
    (tmp_path / 'setup.py').touch()
    (tmp_path / 'tools').symlink_to(scripts, target_is_directory=True)
    monkeypatch.setattr(mmdet, '__file__', str(tmp_path / 'mmdet' / '__init__.py'))
    assert 'config file /nowhere.py' in stop_of(monkeypatch, '/nowhere.py').code


# Names in the model


@pytest.mark.parametrize(
    ('kind', 'meant'),
    [
        ('PSBN', "'psBN'? Else use one of BN"),
        ('psbn2D', "'psBN2d'"),
        ('bn', "'BN'"),
        ('xyz', 'use one of BN'),
        ('', 'use one of BN'),
    ],
)
def test_a_norm_that_there_is_not_and_what_was_meant(cfg, kind, meant):
    sentence = refused(cfg, model__backbone__norm_cfg__type=kind)
    assert f'model.backbone.norm_cfg.type: no norm is named {kind!r}' in sentence
    assert meant in sentence


def test_a_model_that_is_not_registered(cfg):
    sentence = refused(cfg, model__type='OwnDetector')
    assert sentence.startswith("model.type: no model is named 'OwnDetector': ")
    assert 'add its module to custom_imports' in sentence
    cfg.model.type = 'FasterRCNN'
    sentence = refused(cfg, model__backbone__type='Resnet')
    assert "model.backbone.type: no backbone is named 'Resnet': did you mean 'ResNet'?" in sentence


def test_names_are_looked_up_in_the_scope_of_the_part(cfg):
    cfg.model.backbone = dict(type='elsewhere.Net', norm_cfg=dict(type='LN2d'))
    check_train_config(cfg)  # of a library that is not there nothing is known
    cfg.model.backbone = dict(type='mmdet.ResNet', depth=50, norm_cfg=dict(type='LN2d'))
    assert "no norm is named 'LN2d'" in refusal(check_train_config, cfg)


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (dict(model={}, data={}, runner={}, lr_config={}), 'data, runner, lr_config, which are of'),
        (dict(nc=80, backbone=[[-1, 1, 'Conv']]), 'model is None, no dict: give a config of MMDet'),
        (dict(MODEL=dict(META_ARCHITECTURE='RCNN')), 'model is None, no dict'),
    ],
)
def test_configs_of_other_programs(content, words):
    assert words in refusal(check_train_config, Config(content))


def test_a_norm_of_ones_own_is_known_once_it_is_registered(cfg):
    from mmdet.registry import MODELS

    MODELS.register_module('OwnNorm', module=type('OwnNorm', (nn.BatchNorm2d,), {}), force=True)
    cfg.model.backbone.norm_cfg.type = 'OwnNorm'
    check_train_config(cfg)
