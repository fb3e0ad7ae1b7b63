"""Conversion between BN and psBN that leaves the network's function as it is."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.model.utils import _BatchNormXd
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .psbn import (
    PostShiftedBatchNorm,
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
    check_shift,
)

_PSBN_OF_BN: dict[type[_BatchNorm], type[PostShiftedBatchNorm]] = {
    nn.BatchNorm1d: PostShiftedBatchNorm1d,
    nn.BatchNorm2d: PostShiftedBatchNorm2d,
    nn.BatchNorm3d: PostShiftedBatchNorm3d,
    nn.SyncBatchNorm: PostShiftedSyncBatchNorm,
    # What MMEngine makes of SyncBN in a run of one process; it takes inputs of any shape.
    _BatchNormXd: PostShiftedSyncBatchNorm,
}
_BN_OF_PSBN = {psbn: bn for bn, psbn in reversed(_PSBN_OF_BN.items())}


def bn_to_psbn(module: nn.Module, shift: float = 0.1) -> nn.Module:
    """Replace BN layers by psBN; outputs stay as they are (beta = bias - shift).

    Replaced are layers of torch's own BN classes with gamma and beta. Subclasses by others are
    left alone, since they may compute something else, and so are layers without gamma or beta,
    which could not make up for the shift.

    Args:
        module (nn.Module): The network, changed in place. The gamma parameters stay the same
            objects, beta are new ones: build the optimiser after the conversion.
        shift (float): The constant alpha of the new layers. Defaults to 0.1.

    Returns:
        nn.Module: ``module``, or the new layer if ``module`` is a BN itself.

    Raises:
        ValueError: If ``shift`` is not a finite number > 0.
    """
    shift = check_shift(shift)

    def convert(layer: nn.Module) -> nn.Module | None:
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
        psbn.beta = nn.Parameter(layer.bias.detach() - shift, layer.bias.requires_grad)
        return _take_over_state(psbn, layer)

    return _replace(module, convert)


def psbn_to_bn(module: nn.Module) -> nn.Module:
    """Replace psBN layers by torch's BN; outputs stay as they are (bias = beta + shift).

    For what knows torch's own classes only: the fusing of torch.fx, the quantisation of torch.ao,
    flops counters, the generic SyncBN converters, or a network that goes to somebody without this
    package.

    Args:
        module (nn.Module): The network, changed in place. The gamma parameters stay the same
            objects, bias are new ones: build the optimiser after the conversion.

    Returns:
        nn.Module: ``module``, or the new layer if ``module`` is a psBN itself.
    """

    def convert(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, PostShiftedBatchNorm):
            return None
        bn_class = _BN_OF_PSBN[type(layer)]
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
        bn.bias = nn.Parameter(layer.bias.detach(), trained)
        return _take_over_state(bn, layer)

    return _replace(module, convert)


def _take_over_state(new: _BatchNorm, old: _BatchNorm) -> nn.Module:
    new.running_mean = old.running_mean
    new.running_var = old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    if hasattr(old, 'process_group') and hasattr(new, 'process_group'):
        new.process_group = old.process_group
    return new.train(old.training)


def _replace(module: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace each submodule, or the root, by what ``convert`` returns unless that is None."""
    new_of_old = {old: convert(old) for old in module.modules()}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and new_of_old[child] is not None:
                parent._modules[name] = new_of_old[child]
    root = new_of_old[module]
    return module if root is None else root
