"""Changing the norms of a built model that has not been trained, wherever they come from.

A config says the norms of some parts; others are defaults of constructors, or written out in a
class. Once the model is built all of them are layers, and can be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .layer_conversion import bn_to_psbn, psbn_to_bn, replace_layers
from .psbn import PostShiftedBatchNorm

NORMS = ('psBN', 'BN')
SWITCHED = 'SwitchNorms'  # the type of a model that is built by build_switched


def in_scope(path: str, scope: str | None) -> bool:
    """Whether a dotted path leads into a part, such as 'student.backbone.bn1' into 'backbone'."""
    return scope is None or f'.{scope}.' in f'.{path}.'


def switch_norms(model: nn.Module, norm: str, scope: str | None = None) -> dict[str, str]:
    """Make psBN of all BN layers of a new model, or BN of all its psBN layers, in place.

    Layers that are as their constructor left them, with all biases 0, become such layers of the
    other kind: psBN then starts at b = shift, as by ``norm_cfg``. Others, such as those of a
    backbone that has loaded its weights, keep their function. All other settings are kept.

    Args:
        model (nn.Module): The model, before its ``init_weights``.
        norm (str): 'psBN' or 'BN'.
        scope (str, optional): Only layers inside modules of this name. Defaults to None, all.

    Returns:
        dict[str, str]: Layers that were left, and why.
    """
    left: dict[str, str] = {}

    def convert(name: str, layer: nn.Module) -> nn.Module | None:
        if not in_scope(name, scope):
            return None
        new = (_new_psbn if norm == 'psBN' else _new_bn)(layer)
        if isinstance(new, str):
            left[name] = new
            return None
        return new

    replace_layers(model, convert)
    return left


@torch.no_grad()
def _new_psbn(layer: nn.Module) -> nn.Module | str | None:
    """The psBN to put in a layer's place, why there is none, or None where there is no BN."""
    if isinstance(layer, PostShiftedBatchNorm) or not _is_bn(layer):
        return None
    if layer.weight is None or layer.bias is None:
        return 'without gamma or bias'
    bias = cast(Tensor, layer.bias).clone()
    psbn = bn_to_psbn(_of_torch(layer))
    if not isinstance(psbn, PostShiftedBatchNorm):
        return f'{type(layer).__name__} is a class of its own, which may compute something else'
    if not bias.any():
        cast(Tensor, psbn.beta).zero_()
    return psbn


@torch.no_grad()
def _new_bn(layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, PostShiftedBatchNorm):
        return None
    is_new = layer.beta is not None and not bool(layer.beta.any())
    bn = psbn_to_bn(layer)
    if is_new:
        cast(Tensor, bn.bias).zero_()
    return bn


def _is_bn(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or _is_mm_sync_bn(layer)


def _is_mm_sync_bn(layer: nn.Module) -> bool:
    """Of mmcv: MMSyncBN, which is no subclass of torch's."""
    return (type(layer).__module__, type(layer).__name__) == ('mmcv.ops.sync_bn', 'SyncBatchNorm')


def _of_torch(layer: Any) -> nn.Module:
    """MMSyncBN as torch's SyncBN, any other layer as it is."""
    if not _is_mm_sync_bn(layer):
        return layer
    new = nn.SyncBatchNorm(layer.num_features, layer.eps, layer.momentum)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.num_batches_tracked = layer.num_batches_tracked
    return new.train(layer.training)


@MODELS.register_module(SWITCHED)
def build_switched(
    model_type: str | Callable, norm: str, norm_scope: str | None = None, **settings: Any
) -> nn.Module:
    """Build a model of another type, and switch its norms.

    What a config with ``model=dict(type='SwitchNorms', model_type='YOLOV3', norm='psBN', ...)``
    builds, all other settings being those of the model. ``tools/train.py --norm psBN`` writes it
    where ``norm_cfg`` does not reach all norms.

    Args:
        model_type (str | Callable): The ``type`` that the config had.
        norm (str): See :func:`switch_norms`.
        norm_scope (str, optional): See :func:`switch_norms`. Defaults to None.
        **settings: Of the model.

    Returns:
        nn.Module: The model itself.

    Raises:
        ValueError: If ``norm`` is neither 'psBN' nor 'BN'.
    """
    if norm not in NORMS:
        raise ValueError(f'SwitchNorms: norm must be one of {", ".join(NORMS)}, got {norm!r}')
    model = MODELS.build({'type': model_type, **settings})
    switch_norms(model, norm, norm_scope)
    return model


def kinds_of_norms(model: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Go through the norms of a model.

    Args:
        model (nn.Module): The model.

    Yields:
        tuple[str, str, bool]: Name, 'psBN', 'BN' or the class of another norm, and whether any of
        its parameters is trained.
    """
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, PostShiftedBatchNorm):
            kind = 'psBN'
        elif _is_bn(layer):
            kind = 'BN'
        elif not isinstance(layer, (nn.GroupNorm, nn.LayerNorm, _InstanceNorm)):
            continue
        yield name, kind, any(p.requires_grad for p in layer.parameters())
