"""Post-shifted batch normalization (psBN).

Batch normalization computes ``y = gamma * xhat + beta``. psBN adds a fixed constant
``alpha > 0``, here called *shift*, after it (arXiv 2001.11216)::

    y = gamma * xhat + beta + alpha = gamma * xhat + b,        b = beta + alpha

That is BN with the bias b, except that weight decay pulls b to alpha instead of 0. A
filter whose gamma and beta have decayed to 0 outputs alpha > 0: the rectifier behind it opens
and the filter trains again.

So psBN is a BN whose bias starts at alpha and decays towards alpha. The parameter ``bias`` is b;
``forward`` and ``state_dict`` are torch's. The decay is in :mod:`.decay`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from mmengine.dist import is_distributed
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .cpu_sync import batch_norm_over_ranks
from .decay import count_pass, follow

# Named differently before torch 2.2.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling
# In float16 a smaller shift loses precision, and a larger one rounds biases away.
LEAST_SHIFT, MOST_SHIFT = 1e-4, 100.0


def check_shift(shift: float) -> float:
    """Check the constant alpha of psBN.

    Raises:
        ValueError: If ``shift`` is not a number from 0.0001 to 100.
    """
    is_number = isinstance(shift, (int, float)) and not isinstance(shift, bool)
    if not is_number or not LEAST_SHIFT <= shift <= MOST_SHIFT:
        raise ValueError(
            f'psBN: shift must be a finite number > 0 (from {LEAST_SHIFT:g} to {MOST_SHIFT:g}), '
            f'got {shift!r}'
        )
    return float(shift)


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
    """Base class of the psBN layers, like torch's ``_BatchNorm`` for BN.

    An initializer that sets the bias of a new layer to 0, as MMCV's ``ConvModule`` and
    MMDetection's ``init_cfg`` do, means beta: until weights are loaded or an optimizer has stepped
    it, a bias of zeros is set to ``shift`` when the layer runs or its state dict is taken.

    Args:
        *args: Passed to torch's BN.
        shift (float): The constant alpha, from 0.0001 to 100. Defaults to 0.1.
        **kwargs: Passed to torch's BN. Without a bias (``affine=False``) there is nothing to
            shift: the layer is BN.

    Attributes:
        shift (float): The constant alpha.

    Raises:
        ValueError: If ``shift`` is out of range.
    """

    fresh = False  # whether an initializer may have set the bias to zeros
    passes = -1  # training passes before the first optimizer step; -1 after it

    def __init__(self, *args: Any, shift: float = 0.1, **kwargs: Any) -> None:
        self.shift = check_shift(shift)
        super().__init__(*args, **kwargs)
        self.passes = 0
        follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        follow(self)  # copies and unpickled layers are not made by __init__

    def reset_parameters(self) -> None:
        """Set gamma to 1, the bias to ``shift`` and the running statistics to their start."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.constant_(self.bias, self.shift)
        self.fresh = True

    @torch.no_grad()
    def start(self) -> None:
        """Set the bias to ``shift`` if an initializer has set it to zeros."""
        bias: Any = self._parameters.get('bias')
        if self.fresh and bias is not None and not bias.is_meta:
            local = bias.to_local() if hasattr(bias, 'to_local') else bias  # FSDP2's DTensor
            if not local.any():
                local.fill_(self.shift)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run torch's ``forward``; until the first optimizer step, check the bias before."""
        if not _is_compiling() and self.passes >= 0:
            self._before_first_step()
        return super().__call__(*args, **kwargs)

    def _before_first_step(self) -> None:
        self.start()
        if self.training and self.bias is not None and self.bias.requires_grad:
            if torch.is_grad_enabled():
                count_pass(self)
        else:
            self.fresh = False

    def extra_repr(self) -> str:
        """The layer's settings, for its ``repr``."""
        return f'{super().extra_repr()}, shift={self.shift:g}'

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.start()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if f'{prefix}bias' in state_dict:
            self.fresh = False
        super()._load_from_state_dict(state_dict, prefix, *args)


# `_BatchNorm` is a direct base of each class because MMEngine's weight initialization looks at
# direct bases only (`init_cfg=dict(type='Constant', layer='_BatchNorm')`).


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
    on accelerators it runs the ``forward`` of ``torch.nn.SyncBatchNorm``. On CPUs, which that class
    does not support, it uses :func:`.batch_norm_over_ranks`.

    It does not inherit from ``torch.nn.SyncBatchNorm``: in a single-process
    run MMEngine converts every subclass to BN.

    Args:
        process_group (optional): The processes to synchronize, None for all of them. Stands
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
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, *args, **kwargs)
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, shape (N, C, ...)."""
        layer = cast(Any, self)  # for torch's methods, which expect a SyncBatchNorm
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
