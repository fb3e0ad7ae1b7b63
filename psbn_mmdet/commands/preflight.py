"""Checks before training or testing, for mistakes that would otherwise show late or never.

Each raises :class:`ConfigError` with one sentence that names the value and the fix.
:func:`psbn_mmdet.commands.launch.run_script` runs them and then MMDetection's own script.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import checkpoint as mmengine_checkpoint

from ..checkpoints import CheckpointError, read_torch
from ..configs.reading import (
    PSBN_CLASSES,
    ConfigError,
    datasets_of,
    dicts,
    is_pretrained,
    one_line,
    psbn_of_config,
    shown,
    text_of,
)
from ..layers import check_shift

URL_TIMEOUT = 5  # seconds
CHECKPOINT_FIX = 'give the path of a checkpoint that exists'

# Of servers that are there but do not answer HEAD requests, or not those for this file.
_STATUS_UNDECIDED = (403, 405, 429, 501)

_OF_2X = ('data', 'runner', 'lr_config', 'optimizer_config', 'total_epochs')
_NORMS = ('BN', 'BN1d', 'BN2d', 'BN3d', 'SyncBN', 'GN', 'LN', 'IN')  # of mmcv


def check_train_config(cfg: Config) -> None:
    """Check what a training run needs, the cheap things first.

    The pretrained weights of every ``init_cfg`` are checked even where those of a checkpoint
    will replace them, since MMEngine loads them all the same.

    Args:
        cfg (Config): The config, with the ``work_dir``, ``resume`` and ``load_from`` of the run.

    Raises:
        ConfigError: If the run would fail, or silently do something else than asked for.
    """
    _check_model(cfg)
    if cfg.get('sync_bn') is not None and psbn_of_config(cfg):
        raise ConfigError(
            f'sync_bn={cfg.sync_bn!r} makes SyncBN of psBN, whose bias decays towards 0: remove '
            "sync_bn and set norm_cfg=dict(type='psSyncBN')"
        )
    for stage in ('train', 'val'):
        _check_data(cfg, stage)
    for path, init_cfg in dicts(cfg.get('model'), 'model'):
        if is_pretrained(init_cfg) and isinstance(init_cfg.get('checkpoint'), str):
            fix = f'set {path}.checkpoint to a local file, or {path}=None for random weights'
            _check_weights(init_cfg['checkpoint'], f'{path}.checkpoint', fix)
    checkpoint = text_of(cfg.get('load_from'), 'load_from', 'the path of a checkpoint')
    last = Path(cfg.get('work_dir') or '', 'last_checkpoint')
    if not checkpoint and cfg.get('resume') and last.is_file():
        checkpoint = last.read_text(errors='replace').strip()
        _check_last(last, checkpoint)
    if checkpoint:
        _check_weights(checkpoint, 'checkpoint', CHECKPOINT_FIX)
        file = os.path.expanduser(checkpoint)
        if cfg.get('resume') and os.path.isfile(file) and _step_of(file) < 0:
            raise ConfigError(
                f'checkpoint {checkpoint} has weights, but no state of a training to resume: give '
                'it to load_from instead (--cfg-options load_from=...)'
            )


def check_test_config(cfg: Config, checkpoint: str) -> None:
    """Check what testing a checkpoint needs, the cheap things first.

    Args:
        cfg (Config): The config.
        checkpoint (str): Path, URL or model-zoo name of the checkpoint to test.

    Raises:
        ConfigError: If the run would fail, or silently do something else than asked for.
    """
    _check_model(cfg)
    _check_data(cfg, 'test')
    _check_weights(checkpoint, 'checkpoint', CHECKPOINT_FIX)


def _check_model(cfg: Config) -> None:
    old = [key for key in _OF_2X if key in cfg]
    if old and not {'train_dataloader', 'test_dataloader'} & cfg.keys():
        raise ConfigError(
            f'the config has {", ".join(old)}, which are of MMDetection 2: write it anew, on one '
            'of the base configs of MMDetection 3'
        )
    if not isinstance(cfg.get('model'), dict):
        raise ConfigError(
            f'model is {reprlib.repr(cfg.get("model"))}, no dict: give a config of MMDetection, '
            "which files of detectron2's and Ultralytics' are not"
        )
    for path, part in dicts(cfg.model, 'model'):
        name = path.split('.')[-1]
        if name == 'norm_cfg':
            _check_type(cfg, path, part.get('type'), 'norm', _NORMS)
        elif name in ('model', 'backbone', 'neck') or name.endswith('_head'):
            _check_type(cfg, path, part.get('type'), name, ())
    for path, psbn_cfg in psbn_of_config(cfg):
        if 'shift' in psbn_cfg:
            try:
                check_shift(psbn_cfg['shift'])
            except ValueError as error:
                raise ConfigError(f'{error} in {path}') from error


def _check_type(cfg: Config, path: str, kind: Any, what: str, usual: tuple[str, ...]) -> None:
    """Whether a name is registered, where it is looked up; MMEngine says 'Cannot find None'."""
    if not isinstance(kind, str) or '.' in kind or kind in usual:
        return
    # A part is built in the scope that the type of the innermost part around it names.
    scope, around = cfg.get('default_scope') or 'mmdet', cfg
    for key in path.split('.')[:-1]:
        around = around[int(key) if isinstance(around, (list, tuple)) else key]
        outer = around.get('type') if isinstance(around, dict) else None
        scope = outer.split('.')[0] if isinstance(outer, str) and '.' in outer else scope
    with MODELS.switch_scope_and_registry(scope) as registry:
        if kind and registry.get(kind) is not None:
            return
        if registry.scope != scope:  # a library that is not there
            return
        names = {*PSBN_CLASSES, *usual} if usual else set(registry.module_dict)
    of_lower = {name.lower(): name for name in sorted(names)}
    near = difflib.get_close_matches(kind.lower(), of_lower, 1)
    fix = f'use one of {", ".join(usual)}' if usual else 'add its module to custom_imports'
    fix = f'did you mean {of_lower[near[0]]!r}? Else {fix}' if near else fix
    raise ConfigError(f'{path}.type: no {what} is named {kind!r}: {fix}')


def _check_data(cfg: Config, stage: str) -> None:
    loader = cfg.get(f'{stage}_dataloader')
    if isinstance(loader, dict):
        for path, dataset in datasets_of(loader.get('dataset'), f'{stage}_dataloader.dataset'):
            _check_dataset(path, dataset)
    for path, metric in dicts(cfg.get(f'{stage}_evaluator'), f'{stage}_evaluator'):
        if not _is_remote(metric):
            _check_file(metric.get('ann_file'), f'{path}.ann_file')


def _check_dataset(path: str, dataset: dict) -> None:
    if _is_remote(dataset):
        return
    root = text_of(dataset.get('data_root'), f'{path}.data_root', 'the folder of the data')
    ann_file = dataset.get('ann_file')
    if isinstance(ann_file, str) and ann_file:
        _check_file(os.path.join(root, ann_file), f'{path}.ann_file', f'{path}.data_root')
    prefixes = dataset.get('data_prefix') or {}
    for key, prefix in prefixes.items() if isinstance(prefixes, dict) else ():
        if isinstance(prefix, str):
            setting = f'{path}.data_prefix.{key}'
            _check_folder(os.path.join(root, prefix), setting, f'{path}.data_root')


def _check_file(file: Any, setting: str, fix: str = '') -> None:
    if not isinstance(file, str) or not file or '://' in file:
        return
    advice = f'put the file there or set {fix or setting}'
    if not os.path.exists(file):
        raise ConfigError(f'{setting}: {shown(file)} does not exist: {advice}')
    if not (os.listdir(file) if os.path.isdir(file) else os.path.getsize(file)):  # a folder of DOTA
        raise ConfigError(f'{setting}: {shown(file)} is empty: {advice}')


def _check_folder(folder: str, setting: str, fix: str) -> None:
    if not folder or '://' in folder:
        return
    advice = f'put the images there or set {fix}'
    if not os.path.isdir(folder):
        raise ConfigError(f'{setting}: the folder {shown(folder)} does not exist: {advice}')
    with os.scandir(folder) as entries:
        if next(entries, None) is None:
            raise ConfigError(f'{setting}: the folder {shown(folder)} is empty: {advice}')


def _is_remote(cfg: dict) -> bool:
    """Whether files are read by another backend than that of the local disk."""
    for _, part in dicts(cfg, ''):
        backend_args = part.get('backend_args')
        if isinstance(backend_args, dict) and backend_args.get('backend') not in ('local', 'disk'):
            return True
    return False


def _check_weights(checkpoint: str, setting: str, fix: str) -> None:
    source = _resolve(checkpoint, setting, fix)
    if source.startswith(('http://', 'https://')):
        file_name = os.path.basename(urlparse(source).path)
        cached = os.path.join(torch.hub.get_dir(), 'checkpoints', file_name)
        if os.path.isfile(cached):
            _check_local_weights(cached, setting)
        else:
            _check_url(source, setting, fix)
    elif '://' not in source:
        source = os.path.expanduser(source)
        if not os.path.isfile(source):
            raise ConfigError(f'{setting} {shown(source)} does not exist: {fix}')
        _check_local_weights(source, setting)


def _resolve(checkpoint: str, setting: str, fix: str) -> str:
    """The URL or path behind a name in MMEngine's tables, or ``checkpoint`` itself."""
    scheme, _, name = checkpoint.partition('://')
    if scheme in ('torchvision', 'modelzoo'):
        try:
            table = mmengine_checkpoint.get_torchvision_models()
        except ImportError as error:
            raise ConfigError(
                f'{setting} {checkpoint} needs torchvision ({one_line(error)}): install it, or '
                f'{fix}'
            ) from error
    elif scheme in ('open-mmlab', 'openmmlab'):
        table = mmengine_checkpoint.get_external_models()
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    elif scheme == 'mmcls':
        table = mmengine_checkpoint.get_mmcls_models()
    else:
        return checkpoint
    if name not in table:
        raise ConfigError(f'{setting} {checkpoint} is not in the table of {scheme}: {fix}')
    if '://' in table[name]:
        return table[name]
    return os.path.join(mmengine_checkpoint._get_mmengine_home(), table[name])


def _check_last(last: Path, checkpoint: str) -> None:
    """A run that is killed in a save can leave this file empty, or what it names torn or gone."""
    if checkpoint and ('://' in checkpoint or _step_of(os.path.expanduser(checkpoint)) >= 0):
        return
    same = last.parent / Path(checkpoint).name  # of a work dir that was copied or moved
    steps = {file: _step_of(file) for file in sorted(last.parent.glob('*.pth'))}
    newest = same if steps.get(same, -1) >= 0 else max(steps, key=steps.__getitem__, default=None)
    if newest is None or steps[newest] < 0:
        if checkpoint:
            return  # what is wrong with it is said by the checks of all checkpoints
        newest = None
    fix = f'give --resume {newest}, the newest that can be' if newest else 'train without --resume'
    what = f'names {checkpoint}, which cannot be resumed' if checkpoint else 'is empty'
    raise ConfigError(f'{last} {what}, perhaps since a run was killed in a save: {fix}')


def _step_of(file: str | Path) -> int:
    """The iteration of a checkpoint that can be resumed, else -1."""
    with suppress(CheckpointError):
        content = read_torch(file)
        if isinstance(content, dict) and {'meta', 'message_hub'} <= content.keys():
            return int(dict(content['meta']).get('iter', 0))
    return -1


def _check_url(url: str, setting: str, fix: str) -> None:
    try:
        request = urllib.request.Request(url, method='HEAD')
        urllib.request.urlopen(request, timeout=URL_TIMEOUT).close()
    except (OSError, HTTPException, ValueError) as error:
        if getattr(error, 'code', None) in _STATUS_UNDECIDED:
            return
        raise ConfigError(
            f'{setting} {url} cannot be downloaded ({one_line(error)}): {fix}'
        ) from error


def _check_local_weights(file: str, setting: str) -> None:
    try:
        content = read_torch(file)
    except CheckpointError as error:
        raise ConfigError(f'{setting} {error}') from error
    state_dict = content.get('state_dict', content) if isinstance(content, dict) else content
    if not isinstance(state_dict, dict):
        raise ConfigError(
            f'{setting} {file} has no state dict, but a {type(state_dict).__name__} in its '
            'place: replace the file'
        )
