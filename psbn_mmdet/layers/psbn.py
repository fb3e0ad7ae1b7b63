"""Post-shifted batch normalisation (psBN).

Batch normalisation computes ``y = gamma * xhat + beta``. psBN adds a fixed constant
``alpha > 0``, here called *shift*, after it (arXiv 2001.11216)::

    y = gamma * xhat + beta + alpha,        b = beta + alpha  (what the rectifier sees)

A filter whose gamma and beta are decayed to zero then outputs ``alpha > 0``: the rectifier
behind it opens and the filter trains again, where plain BN would stay at zero for ever.

How it is built: what is trained is the parameter ``beta``, the constant is the buffer
``shift``, and ``bias`` is a read-only property that returns their sum. ``forward`` is inherited
from torch unchanged, so psBN costs C additions more than BN, and whatever reads ``bias`` from a
BN (fusing, exporting, freezing) sees b and stays exact.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from mmengine.dist import is_distributed
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .cpu_sync import batch_norm_over_ranks
from .state_dict import has_plain_values

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_shift(shift: float, dtype: torch.dtype = torch.float32) -> float:
    """Check the constant alpha of psBN.

    Args:
        shift (float): The constant added after BN.
        dtype (torch.dtype): The type that has to hold it. Defaults to float32.

    Returns:
        float: The same value.

    Raises:
        ValueError: If ``shift`` is not a finite number > 0, or in ``dtype`` is 0, infinite, or so
            large that biases are rounded by more than a tenth.
    """
    is_number = isinstance(shift, (int, float)) and not isinstance(shift, bool)
    if not is_number or not 0 < shift <= sys.float_info.max:  # so is an int beyond all floats
        raise ValueError(f'psBN: shift must be a finite number > 0, got {shift!r}')
    held = _held(shift, dtype)
    if not 0 < held < math.inf:
        raise ValueError(
            f'psBN: shift={shift!r} is {held:g} in {dtype}: give one that this type can hold'
        )
    step = held * torch.finfo(dtype).eps
    if step > 0.1:  # beta + shift would round what is learned away
        raise ValueError(
            f'psBN: shift={shift!r} leaves the bias steps of {step:.1g} in {dtype}: give a '
            'smaller one, such as 0.1'
        )
    return float(shift)


def _held(value: float, dtype: torch.dtype) -> float:
    """A number as a type holds it, whatever the default device is."""
    return float(torch.tensor(float(value), dtype=torch.float64, device='cpu').to(dtype))


def rectifier_closed(gamma: Any, bias: Any, k: float = 3.0) -> Any:
    """Whether a rectifier behind BN opens only beyond k standard deviations.

    With xhat ~ N(0, 1), ``gamma * xhat + b > 0`` for at most Phi(-k) of the inputs, 0.135 % with
    k = 3, if and only if::

        b + k * |gamma| <= 0

    Args:
        gamma (Tensor | np.ndarray): Scale, shape (C,).
        bias (Tensor | np.ndarray): b, shape (C,).
        k (float): Standard deviations. Defaults to 3.

    Returns:
        Tensor | np.ndarray: Bool, shape (C,).
    """
    return bias + k * abs(gamma) <= 0


class PostShiftedBatchNorm(_BatchNorm):
    """Base class of the psBN layers; it is to them what torch's ``_BatchNorm`` is to BN.

    State dicts hold ``weight``, ``beta``, ``shift`` and the running statistics. Loading keeps the
    function of what is loaded: a BN state dict (key ``bias``) gives ``beta = bias - shift``, one
    of psBN with another shift ``beta = b - shift``, ``b`` being its bias.

    With ``affine=False``, or torch's newer ``bias=False``, there is no ``beta`` and the shift
    alone remains.

    Args:
        num_features (int): Number of channels C.
        eps (float): Added to the variance. Defaults to 1e-5.
        momentum (float, optional): Momentum of the running statistics, None for a cumulative
            average. Defaults to 0.1.
        affine (bool): Whether gamma and beta are trained. Defaults to True.
        track_running_stats (bool): Whether running statistics are kept. Defaults to True.
        device (torch.device, optional): Device of the parameters. Defaults to None.
        dtype (torch.dtype, optional): Type of the parameters. Defaults to None.
        bias (bool): Whether beta is trained. Defaults to True.
        shift (float): The constant alpha, a finite number > 0. Defaults to 0.1.

    Attributes:
        read_as_bn (bool): Whether what was loaded last was a BN state dict.

    Raises:
        ValueError: If ``shift`` is not a finite number > 0 in ``dtype``, or ``dtype`` not one of
            real numbers.
    """

    read_as_bn = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        shift: float = 0.1,
    ) -> None:
        if dtype is not None and not getattr(dtype, 'is_floating_point', False):
            raise ValueError(f'psBN: dtype must be a floating-point type, got {dtype!r}')
        shift = check_shift(shift, dtype or torch.get_default_dtype())
        super().__init__(num_features, eps, momentum, False, track_running_stats, device, dtype)
        del self._parameters['bias']
        self.shift_value = shift
        self.shift: Tensor
        self.register_buffer('shift', torch.empty((), device=device, dtype=dtype))
        if affine:
            self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.beta: nn.Parameter | None
        if affine and bias:
            self.beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter('beta', None)
        # Code that copies a BN skips `bias` where `affine` is False. The shift is there with and
        # without trained parameters, so such code must look: it then copies it or fails.
        self.affine = True
        self.reset_parameters()

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """B = beta + alpha, shape (C,). Read-only: write to ``beta``."""
        beta = self.beta
        return self.shift.repeat(self.num_features) if beta is None else beta + self.shift

    def reset_parameters(self) -> None:
        """Set gamma to 1, beta to 0, the running statistics and the shift to their start."""
        self.reset_running_stats()
        if 'shift' not in self._buffers:  # called by the base class, before they exist
            return
        nn.init.constant_(self.shift, self.shift_value)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.beta is not None:
            nn.init.zeros_(self.beta)

    def extra_repr(self) -> str:
        """The layer's settings, for its ``repr``."""
        return (
            f'{self.num_features}, eps={self.eps}, momentum={self.momentum}, '
            f'affine={self.weight is not None}, bias={self.beta is not None}, '
            f'track_running_stats={self.track_running_stats}, shift={self.shift_value:g}'
        )

    def _shift_in(self, dtype: torch.dtype) -> float:
        """The constant alpha as a type holds it."""
        return _held(self.shift_value, dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        # BN and psBN are told apart by their keys: not every loader hands on the version.
        state_dict = dict(state_dict)
        wrong = [f'{prefix}{key} {why}' for key, why in _unreadable(state_dict, prefix)]
        if wrong:
            error_msgs += wrong
            return
        beta, bias, shift = (
            cast(Any, state_dict.get(prefix + key)) for key in ('beta', 'bias', 'shift')
        )
        is_bn = beta is None and bias is not None
        if is_bn or beta is not None:
            self.read_as_bn = is_bn
        # Rounded by any type that it went through, alpha is still the same. What is on the meta
        # device has no value to differ.
        other = None if shift is None or shift.is_meta else float(shift)
        same = other is None or other in map(self._shift_in, _FLOATS)
        source: Any = bias if is_bn else beta
        if source is not None and not source.is_floating_point():
            source = source.float()  # integers cannot hold a beta
        assign = local_metadata.get('assign_to_params_buffers', False)
        if self.beta is None:
            if not same:
                error_msgs.append(
                    f'{prefix}shift is {other:g} in the state dict and {self.shift_value:g} in '
                    'this layer, which has no beta to make up for it: build the layer with '
                    f'shift={other:g}'
                )
        elif is_bn or (beta is not None and not same):
            state_dict.pop(prefix + 'bias', None)
            effective = at_least_float32(source) + (other or 0)
            new_beta = effective - self._shift_in(source.dtype if assign else self.beta.dtype)
            state_dict[prefix + 'beta'] = new_beta.to(source.dtype) if assign else new_beta
        kept = same and (assign or shift is None or shift.dtype == self.shift.dtype)
        if is_bn or not kept:
            like: Any = bias if shift is None else shift
            dtype = like.dtype if assign and like.is_floating_point() else self.shift.dtype
            state_dict[prefix + 'shift'] = like.new_tensor(self.shift_value, dtype=dtype)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision, float8 and integers as float32, all else as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _unreadable(state_dict: dict, prefix: str) -> Iterator[tuple[str, str]]:
    """The entries of a layer that it cannot take over, and why: torch would guess, or crash."""
    for key in ('weight', 'bias', 'beta', 'shift', 'running_mean', 'running_var'):
        value = state_dict.get(prefix + key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            yield key, f'is no tensor in the state dict, but a {type(value).__name__}'
        elif not has_plain_values(value):
            yield key, f'has no plain real numbers in the state dict, but {value.dtype}'
        elif key == 'shift' and value.numel() != 1:
            yield key, f'is no single number in the state dict, but of {tuple(value.shape)}'
        elif key == 'shift' and not value.is_meta and not 0 < float(value) < math.inf:
            yield key, f'must be a finite number > 0, is {float(value):g} in the state dict'


# `_BatchNorm` stands among the bases of each class since MMEngine's weight initialisation looks
# at direct bases only (`init_cfg=dict(type='Constant', layer='_BatchNorm')`).


@MODELS.register_module('psBN1d')
class PostShiftedBatchNorm1d(PostShiftedBatchNorm, nn.BatchNorm1d, _BatchNorm):
    """psBN over a 2D or 3D input: y = gamma * xhat + beta + shift.

    Arguments are those of :class:`PostShiftedBatchNorm`; input and output have the shape (N, C)
    or (N, C, L).
    """


@MODELS.register_module(['psBN', 'psBN2d'])
class PostShiftedBatchNorm2d(PostShiftedBatchNorm, nn.BatchNorm2d, _BatchNorm):
    """psBN over a 4D input: y = gamma * xhat + beta + shift.

    Arguments are those of :class:`PostShiftedBatchNorm`; input and output have the shape
    (N, C, H, W).

    Examples:
        >>> import torch
        >>> from psbn_mmdet.layers import PostShiftedBatchNorm2d
        >>> norm = PostShiftedBatchNorm2d(8, shift=0.1)
        >>> torch.nn.init.zeros_(norm.weight)  # a collapsed filter ...
        >>> norm(torch.randn(2, 8, 4, 4)).mean()  # ... outputs 0.1: its ReLU is open
    """


@MODELS.register_module('psBN3d')
class PostShiftedBatchNorm3d(PostShiftedBatchNorm, nn.BatchNorm3d, _BatchNorm):
    """psBN over a 5D input: y = gamma * xhat + beta + shift.

    Arguments are those of :class:`PostShiftedBatchNorm`; input and output have the shape
    (N, C, D, H, W).
    """


@MODELS.register_module('psSyncBN')
class PostShiftedSyncBatchNorm(PostShiftedBatchNorm, _BatchNorm):
    """psBN with statistics over all processes: y = gamma * xhat + beta + shift.

    In a single process it is psBN over an input of any shape (N, C, ...). With several processes
    on accelerators it computes what ``torch.nn.SyncBatchNorm`` does, by its ``forward``; on CPUs,
    which that refuses, by :func:`.batch_norm_over_ranks`.

    It does not inherit from ``torch.nn.SyncBatchNorm``: MMEngine replaces whatever does, in every
    run of one process, by a BN without the shift, or tries to and logs a failure per layer.

    Args:
        process_group (optional): The processes to synchronise, None for all of them. Stands
            before ``device`` as in torch. Defaults to None.

    The other arguments are those of :class:`PostShiftedBatchNorm`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        shift: float = 0.1,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            shift=shift,
        )
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, shape (N, C, ...)."""
        layer = cast(Any, self)  # torch's methods, of a class that this one is not
        if not (self.training and x.device.type == 'cpu' and is_distributed()):
            return nn.SyncBatchNorm.forward(layer, x)
        layer._check_input_dim(x)
        layer._check_non_zero_input_channels(x)
        factor = 0.0
        running_mean, running_var = None, None
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            running_mean, running_var = self.running_mean, self.running_var
            average = 1 / int(self.num_batches_tracked)
            factor = average if self.momentum is None else self.momentum
        return batch_norm_over_ranks(
            x,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            factor,
            self.eps,
            self.process_group,
        )
