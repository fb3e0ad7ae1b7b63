"""Conversion of a built network from BN to psBN and back: layers change class, not weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.model.utils import _BatchNormXd
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .decay import follow, unfollow
from .psbn import (
    PostShiftedBatchNorm,
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
    check_shift,
)

NORMS = ('psBN', 'BN')
SWITCHED = 'SwitchNorms'  # the type of a model that is built by build_switched

_PSBN_OF_BN: dict[type[nn.Module], type[PostShiftedBatchNorm]] = {
    nn.BatchNorm1d: PostShiftedBatchNorm1d,
    nn.BatchNorm2d: PostShiftedBatchNorm2d,
    nn.BatchNorm3d: PostShiftedBatchNorm3d,
    nn.SyncBatchNorm: PostShiftedSyncBatchNorm,
    SyncBatchNorm: PostShiftedSyncBatchNorm,  # the SyncBN of configs, which is torch's
    # MMEngine's replacement for SyncBN in a single process; takes inputs of any shape.
    _BatchNormXd: PostShiftedSyncBatchNorm,
}
_BN_OF_PSBN = {psbn: bn for bn, psbn in reversed(_PSBN_OF_BN.items())}


def bn_to_psbn(network: nn.Module, shift: float = 0.1) -> nn.Module:
    """Convert the BN layers of a network to psBN, in place, without changing its outputs.

    Layers of torch's own BN classes change their class and nothing else: parameters, buffers and
    hooks stay the same objects, so an optimizer may have been built. Layers of other classes are
    left alone, since they may compute something else, and so are layers without a bias.

    Args:
        network (nn.Module): A network, or a layer.
        shift (float): The constant alpha of the new layers. Defaults to 0.1.

    Returns:
        nn.Module: ``network``.

    Raises:
        ValueError: If ``shift`` is out of range.
    """
    for layer in network.modules():
        _to_psbn(layer, check_shift(shift))
    return network


def psbn_to_bn(network: nn.Module) -> nn.Module:
    """Convert the psBN layers of a network to BN, in place, without changing its outputs.

    For tools that compare exact classes, such as torch.fx fusion and torch.ao quantization.
    Layers of subclasses of psBN are left alone.

    Args:
        network (nn.Module): A network, or a layer.

    Returns:
        nn.Module: ``network``.
    """
    for layer in network.modules():
        _to_bn(layer)
    return network


def _to_psbn(layer: Any, shift: float = 0.1) -> bool:
    kind = PostShiftedSyncBatchNorm if _is_mm_sync_bn(layer) else _PSBN_OF_BN.get(type(layer))
    if kind is None or layer.weight is None or layer.bias is None:
        return False
    if kind is PostShiftedSyncBatchNorm and not hasattr(layer, 'process_group'):
        layer.process_group = getattr(layer, 'group', None)
    layer.__class__ = kind
    layer.shift, layer.passes = shift, 0
    follow(layer)
    return True


def _to_bn(layer: Any) -> bool:
    kind = _BN_OF_PSBN.get(type(layer))
    if kind is None:
        return False
    unfollow(layer)
    layer.__class__ = kind
    return True


def in_scope(path: str, scope: str | None) -> bool:
    """Whether a dotted path has a part, such as 'backbone' in 'student.backbone.bn1'."""
    return scope is None or f'.{scope}.' in f'.{path}.'


@torch.no_grad()
def switch_norms(model: nn.Module, norm: str, scope: str | None = None) -> dict[str, str]:
    """Convert all BN layers of a new model to psBN, or all psBN layers to BN, in place.

    New layers get the initial bias of their new kind: ``shift`` for psBN, 0 for BN. Others,
    such as those of a backbone that has loaded its weights, keep their function.

    Args:
        model (nn.Module): The model, before its ``init_weights``.
        norm (str): 'psBN' or 'BN'.
        scope (str, optional): Only layers inside modules of this name. Defaults to None, all.

    Returns:
        dict[str, str]: BN layers that were not converted, and why.

    Raises:
        ValueError: If ``norm`` is neither 'psBN' nor 'BN'.
    """
    if norm not in NORMS:
        raise ValueError(f'SwitchNorms: norm must be one of {", ".join(NORMS)}, got {norm!r}')
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not in_scope(name, scope):
            continue
        if norm == 'BN':
            is_new = isinstance(layer, PostShiftedBatchNorm) and layer.fresh
            if _to_bn(layer) and is_new and bool((layer.bias == layer.shift).all()):
                nn.init.zeros_(layer.bias)
        elif _to_psbn(layer):
            layer.fresh = not layer.bias.any()
            layer.start()
        elif _is_bn(layer) and not isinstance(layer, PostShiftedBatchNorm):
            kind = type(layer).__name__
            left[name] = f'{kind} is a class of its own, which may compute something else'
            if layer.weight is None or layer.bias is None:
                left[name] = 'without gamma or bias'
    return left


def _is_bn(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or _is_mm_sync_bn(layer)


def _is_mm_sync_bn(layer: nn.Module) -> bool:
    """Whether a layer is MMCV's MMSyncBN, which does not subclass torch's BN."""
    return (type(layer).__module__, type(layer).__name__) == ('mmcv.ops.sync_bn', 'SyncBatchNorm')


@MODELS.register_module(SWITCHED)
def build_switched(
    model_type: str | Callable, switches: Sequence[Mapping[str, Any]], **settings: Any
) -> nn.Module:
    """Build a model of another type, and switch its norms.

    ``tools/train.py --norm psBN`` rewrites a config's model to::

        model = dict(type='SwitchNorms', model_type='YOLOV3', switches=[dict(norm='psBN')], ...)

    Args:
        model_type (str | Callable): The ``type`` that the config had.
        switches (Sequence[dict]): Arguments of :func:`switch_norms`, one after another.
        **settings: Settings of the model.

    Returns:
        nn.Module: The model itself.

    Raises:
        ValueError: If a ``norm`` is neither 'psBN' nor 'BN'.
    """
    model = MODELS.build({'type': model_type, **settings})
    for switch in switches:
        switch_norms(model, **switch)
    return model


def kinds_of_norms(model: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Iterate over the norms of a model.

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
