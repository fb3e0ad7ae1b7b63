"""Conversion of modules and state dicts between BN and psBN, which keeps their function."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .psbn import (
    PostShiftedBatchNorm,
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
    at_least_float32,
    check_shift,
)
from .state_dict import entry_key, find_norm_states

_PSBN_OF_BN: dict[type[_BatchNorm], type[PostShiftedBatchNorm]] = {
    nn.BatchNorm1d: PostShiftedBatchNorm1d,
    nn.BatchNorm2d: PostShiftedBatchNorm2d,
    nn.BatchNorm3d: PostShiftedBatchNorm3d,
    nn.SyncBatchNorm: PostShiftedSyncBatchNorm,
    SyncBatchNorm: PostShiftedSyncBatchNorm,  # the SyncBN of configs, which is torch's
    # What MMEngine makes of SyncBN in a run of one process; it takes inputs of any shape.
    _BatchNormXd: PostShiftedSyncBatchNorm,
}
_BN_OF_PSBN = {psbn: bn for bn, psbn in reversed(_PSBN_OF_BN.items())}

AnyTensor = TypeVar('AnyTensor', bound=Tensor)
ModuleOrStateDict = TypeVar('ModuleOrStateDict', nn.Module, Mapping[str, Any])


def bn_to_psbn(network: ModuleOrStateDict, shift: float = 0.1) -> ModuleOrStateDict:
    """Replace BN by psBN; outputs stay as they are (beta = bias - shift).

    In a module, layers of torch's own BN classes with gamma and bias are replaced. Subclasses by
    others are left alone, since they may compute something else, and so are layers without gamma
    or bias, which could not make up for the shift. In a state dict, BN is what has a running
    variance, gamma and bias (see :func:`.find_norm_states`).

    Args:
        network (nn.Module | Mapping[str, Tensor]): A network, changed in place, or a state dict,
            which is not changed. A network's gamma parameters stay the same objects, beta are
            new ones: build the optimiser after the conversion.
        shift (float): The constant alpha of the new layers. Defaults to 0.1.

    Returns:
        nn.Module | dict[str, Tensor]: ``network``, or the new layer if it is a BN itself; a new
        dict for a state dict, with float32 for beta where bias is in half precision.

    Raises:
        ValueError: If ``shift`` is not a finite number > 0.
    """
    check_shift(shift)
    tied = _Tied()
    if isinstance(network, nn.Module):
        return replace_layers(network, lambda name, layer: _to_psbn(layer, shift, tied))
    edits = {}
    for name, kind in find_norm_states(network).items():
        if kind == 'BN':
            bias = entry_key(name, 'bias')
            new = tied(network[bias], at_least_float32(network[bias]) - shift)
            edits[bias] = {
                entry_key(name, 'beta'): new,
                entry_key(name, 'shift'): new.new_tensor(shift),
            }
    return _edited(network, edits)


def psbn_to_bn(network: ModuleOrStateDict) -> ModuleOrStateDict:
    """Replace psBN by BN; outputs stay as they are (bias = beta + shift).

    For what knows torch's own classes only: the fusing of torch.fx, the quantisation of torch.ao,
    flops counters, the generic SyncBN converters, or a network that goes to somebody without this
    package.

    Args:
        network (nn.Module | Mapping[str, Tensor]): A network, changed in place, or a state dict,
            which is not changed. A network's gamma parameters stay the same objects, bias are
            new ones: build the optimiser after the conversion.

    Returns:
        nn.Module | dict[str, Tensor]: ``network``, or the new layer if it is a psBN itself; a new
        dict for a state dict.

    Raises:
        ValueError: If a layer is of a subclass of psBN, such as one with parametrisations, or if a
            shift of a state dict is not a finite number > 0.
    """
    tied = _Tied()
    if isinstance(network, nn.Module):
        return replace_layers(network, lambda name, layer: _to_bn(name, layer, tied))
    edits: dict[str, dict[str, Tensor]] = {}
    for name, kind in find_norm_states(network).items():
        if kind == 'psBN':
            beta, shift = entry_key(name, 'beta'), entry_key(name, 'shift')
            value = network[shift]
            if not value.is_meta and not 0 < float(value) < math.inf:
                raise ValueError(
                    f'{name or "psBN"}: shift is {float(value):g} in the state dict, not a finite '
                    'number > 0: give another one'
                )
            bias = at_least_float32(network[beta]) + at_least_float32(value)
            if network[beta].is_floating_point():  # integers cannot hold a bias
                bias = bias.to(network[beta].dtype)
            bias = tied(network[beta], bias.reshape(network[beta].shape))
            edits[beta] = {entry_key(name, 'bias'): bias}
            edits[shift] = {}
    return _edited(network, edits)


class _Tied:
    """Gives what was made of a tensor for each tensor that shares its memory, if it is the same."""

    def __init__(self) -> None:
        self._made: dict[tuple, Any] = {}

    def __call__(self, old: Tensor, new: AnyTensor) -> AnyTensor:
        place = (old.device, old.data_ptr(), old.shape, old.stride(), old.dtype)
        made = self._made.setdefault(place, new) if old.data_ptr() else new
        return made if made is new or torch.equal(made, new) else new


def _to_psbn(layer: nn.Module, shift: float, tied: _Tied) -> nn.Module | None:
    if not isinstance(layer, _BatchNorm) or layer.weight is None or layer.bias is None:
        return None
    psbn_class = _PSBN_OF_BN.get(type(layer))
    if psbn_class is None:
        return None
    psbn = psbn_class(
        layer.num_features,
        layer.eps,
        layer.momentum,
        track_running_stats=layer.track_running_stats,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
        shift=shift,
    )
    psbn.weight = layer.weight
    new_beta = (at_least_float32(layer.bias.detach()) - shift).to(layer.bias.dtype)
    psbn.beta = tied(layer.bias, nn.Parameter(new_beta, layer.bias.requires_grad))
    return _take_over_state(psbn, layer)


def _to_bn(name: str, layer: nn.Module, tied: _Tied) -> nn.Module | None:
    if not isinstance(layer, PostShiftedBatchNorm):
        return None
    bn_class = _BN_OF_PSBN.get(type(layer))
    if bn_class is None:
        mend = 'convert it by hand'
        if is_parametrized(layer):
            mend = 'remove its parametrisations first (torch.nn.utils.parametrize)'
        raise ValueError(
            f'{name or "the layer"} is a {type(layer).__name__}, which may compute something else '
            f'than psBN: {mend}'
        )
    bn = bn_class(
        layer.num_features,
        layer.eps,
        layer.momentum,
        track_running_stats=layer.track_running_stats,
        device=layer.shift.device,
        dtype=layer.shift.dtype,
    )
    if layer.weight is None:
        bn.weight.requires_grad_(False)
    else:
        bn.weight = layer.weight
    trained = layer.beta is not None and layer.beta.requires_grad
    bias = nn.Parameter(layer.bias.detach(), trained)
    bn.bias = bias if layer.beta is None else tied(layer.beta, bias)
    return _take_over_state(bn, layer)


def _take_over_state(new: _BatchNorm, old: _BatchNorm) -> nn.Module:
    new.running_mean = old.running_mean
    new.running_var = old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    if hasattr(old, 'process_group') and hasattr(new, 'process_group'):
        new.process_group = old.process_group
    return new.train(old.training)


def replace_layers(module: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]) -> Any:
    """Replace each submodule, or the root, by what ``convert`` returns unless that is None."""
    new_of_old = {old: convert(name, old) for name, old in module.named_modules()}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and new_of_old[child] is not None:
                parent._modules[name] = new_of_old[child]
    root = new_of_old[module]
    return module if root is None else root


def _edited(state_dict: Mapping[str, Any], edits: Mapping[str, dict[str, Tensor]]) -> Any:
    """A copy of a state dict with each key of ``edits`` replaced, in its place, by other items."""
    edited: Any = OrderedDict()
    made = {key for items in edits.values() for key in items}  # none may come from elsewhere, too
    for key, value in state_dict.items():
        edited.update(edits.get(key, {} if key in made else {key: value}))
    if hasattr(state_dict, '_metadata'):  # torch's versions of the modules
        edited._metadata = state_dict._metadata
    return edited
