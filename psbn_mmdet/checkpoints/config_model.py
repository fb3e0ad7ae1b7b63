"""What follows each BN layer of a checkpoint, from the config of its model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ..collapse import find_norms, trace_rectifiers
from .formats import CheckpointError

SIDE = 256  # pixels; a multiple of all strides of the detectors


def rectifiers_of_config(cfg: Config, names: Collection[str]) -> dict[str, str]:
    """Find out what follows each BN layer, by one forward pass of a config's model.

    The model has random weights and gets a random image: only its structure counts.

    Args:
        cfg (Config): A config of MMDetection, or of another library on MMEngine.
        names (Collection[str]): The checkpoint's BN and psBN layers. They may be those of the
            model, or of its backbone alone.

    Returns:
        dict[str, str]: See :attr:`psbn_mmdet.collapse.RectifierTrace.rectifiers`, by the
        checkpoint's names; layers that did not run or are not in the model are absent.

    Raises:
        CheckpointError: If the model cannot be run, or shares no layer with the checkpoint.
    """
    scope = cfg.get('default_scope') or 'mmdet'
    with DefaultScope.overwrite_default_scope(scope):
        model = model_of_config(cfg)
        in_model = names_in_model(cfg, model, names)
        try:
            rectifiers = _trace(model.eval() or model)  # some models return None
        except Exception as error:  # whatever a model of somebody's own may raise
            raise CheckpointError(
                f'the model of {cfg.filename} does not run on a random image of {SIDE} px '
                f'({type(error).__name__}: {error}): leave out the config'
            ) from error
    return {name: rectifiers[own] for name, own in in_model.items() if own in rectifiers}


def model_of_config(cfg: Config) -> nn.Module:
    """Build a config's model, with random weights and for one process."""
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def names_in_model(cfg: Config, model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The names in a config's model of a checkpoint's BN and psBN layers.

    Args:
        cfg (Config): The config.
        model (nn.Module): Its model.
        names (Collection[str]): The checkpoint's layers, of the model or of its backbone alone.

    Returns:
        dict[str, str]: By the checkpoint's names; layers that the model has not are absent.

    Raises:
        CheckpointError: If it has none of them.
    """
    known = find_norms(model).keys()
    for prefix in ('', 'backbone.'):
        found = {name: prefix + name for name in names if prefix + name in known}
        if found:
            return found
    raise CheckpointError(
        f'the model of {cfg.filename} has no BN layer named as in the checkpoint, such as '
        f'{next(iter(names))}: give the config that the checkpoint was trained with'
    )


def _trace(model: nn.Module) -> dict[str, str]:
    try:
        from mmdet.models.detectors.base import BaseDetector
        from mmdet.structures import DetDataSample
    except ImportError:  # a project of another library
        return trace_rectifiers(model, torch.randn(1, 3, SIDE, SIDE), mode='tensor')
    if not isinstance(model, BaseDetector):
        return trace_rectifiers(model, torch.randn(1, 3, SIDE, SIDE), mode='tensor')
    shape = (SIDE, SIDE)
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), img_id=0)
    )
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
    return trace_rectifiers(model, **data, mode='predict')
