"""What stands around the BN layers of a checkpoint, from the config of its model."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Collection

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ..checkpoints import CheckpointError
from ..collapse import Structure, find_norms, trace_structure
from .reading import ConfigError, dicts, named, type_name

SIDE = 256  # pixels; a multiple of all strides of the detectors
# What models of MMEngine's libraries take, after their data preprocessors: an image, and frames of
# a video for networks in two and in three dimensions.
INPUTS = ((1, 3, SIDE, SIDE), (1, 8, 3, SIDE, SIDE), (1, 1, 3, 8, SIDE, SIDE))


def structure_of_config(cfg: Config, names: Collection[str]) -> Structure:
    """Find out what stands around each BN layer, by one forward pass of a config's model.

    The model has random weights and gets a random image: only its structure counts.

    Args:
        cfg (Config): A config of MMDetection, or of another library on MMEngine.
        names (Collection[str]): The checkpoint's BN layers. They may be those of the
            model, or of its backbone alone.

    Returns:
        Structure: By the checkpoint's names; layers that did not run or are not in the model are
        absent.

    Raises:
        CheckpointError: If the model cannot be run, or shares no layer with the checkpoint.
    """
    scope = cfg.get('default_scope') or 'mmdet'
    with DefaultScope.overwrite_default_scope(scope):
        model = model_of_config(cfg)
        prefix = prefix_in_model(cfg, model, names)
        try:
            structure = _trace(model.eval() or model)  # some models return None
        except Exception as error:  # a custom model may raise anything
            raise CheckpointError(
                f'the model of {cfg.filename} does not run on a random image of {SIDE} px '
                f'({type(error).__name__}: {error}): leave out the config'
            ) from error
    return structure.renamed(prefix, '')


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model, with random weights, on the CPU; the config is not changed.

    Raises:
        ConfigError: If it cannot be built, or loads a file that would run code.
    """
    model = copy.deepcopy(cfg.model)
    for _, part in dicts(model, ''):
        if type_name(part) in ('MMSyncBN', 'SyncBatchNorm'):
            part['type'] = 'SyncBN'  # mmcv's cannot be built before there is a process group
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'):
        try:
            return MODELS.build(model)
        except pickle.UnpicklingError as error:
            raise ConfigError(
                f'the model of {cfg.filename} loads a file that may run any code: name another in '
                'the config'
            ) from error
        except Exception as error:  # a custom model may raise anything
            raise ConfigError(
                f'the model of the config cannot be built ({named(error)}): correct the config'
            ) from error


def model_of_config(cfg: Config) -> nn.Module:
    """The same, for one process: SyncBN, which needs several, becomes BN."""
    return revert_sync_batchnorm(build_model(cfg))


def prefix_in_model(cfg: Config, model: nn.Module, names: Collection[str]) -> str:
    """What a config's model puts before the names of a checkpoint's BN layers.

    Args:
        cfg (Config): The config.
        model (nn.Module): Its model.
        names (Collection[str]): The checkpoint's layers, of the model or of its backbone alone.

    Returns:
        str: '' or 'backbone.'.

    Raises:
        CheckpointError: If it has none of them.
    """
    known = find_norms(model).keys()
    for prefix in ('', 'backbone.'):
        if any(prefix + name in known for name in names):
            return prefix
    raise CheckpointError(
        f'the model of {cfg.filename} has no BN layer named as in the checkpoint, such as '
        f'{next(iter(names))}: give the config that the checkpoint was trained with'
    )


def _trace(model: nn.Module) -> Structure:
    try:
        from mmdet.models.detectors.base import BaseDetector
        from mmdet.structures import DetDataSample
    except ImportError:  # a project of another library
        return _trace_other(model)
    if not isinstance(model, BaseDetector):
        return _trace_other(model)
    shape = (SIDE, SIDE)
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), img_id=0)
    )
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
    return trace_structure(model, **data, mode='predict')


def _trace_other(model: nn.Module) -> Structure:
    """By whichever input the model takes; some want data samples, which count for nothing."""
    first = None
    for shape, more in itertools.product(INPUTS, ((), (None,))):
        try:
            return trace_structure(model, torch.randn(shape), *more, mode='tensor')
        except Exception as error:
            first = first or error
    assert first is not None
    raise first
