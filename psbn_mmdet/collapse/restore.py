"""Restoring the convolutions around closed filters, which have decayed with them.

A filter that has been closed for long has lost more than gamma and beta: no gradient reaches its
own convolution's weights, nor the weights by which the next convolutions read it, so weight decay
has brought all of them near to zero. Once it opens its response is lost in eps, and what comes out
of it is lost in the next layers: gradients are small by the product of these, and the filter hardly
moves (docs/evidence.md, section 3). While it is closed these weights are as free as gamma and beta:

- what *reads* it multiplies 0, whatever its weights are;
- its *own* weights w may be multiplied by s, with the running mean, by s^2 the running variance,
  if gamma is divided by s: ``|gamma * xhat|`` is then no larger than before, for any statistics.
  So with b <= 0 the filter stays closed, for ``t * gamma * xhat + b`` with t from 0 to 1 lies
  between b and what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

# Convolutions whose weights are what they multiply by; subclasses may do something else.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LOST = 0.1  # of the usual norm; below it weights have decayed, above it they only differ


@torch.no_grad()
def restore(
    norm: nn.Module,
    producer: nn.Module | None,
    consumers: Sequence[nn.Module],
    closed: Tensor,
    alive: Tensor,
) -> None:
    """Multiply decayed weights of closed filters, in place, to the usual norm in their layer.

    Weights are decayed if their Euclidean norm is below a tenth of the median over filters that
    are alive. Frozen convolutions are left as they are.

    Args:
        norm (nn.Module): The BN or psBN layer, whose output goes into ReLUs alone.
        producer (nn.Module, optional): The convolution that feeds it, and nothing else.
        consumers (Sequence[nn.Module]): Convolutions that read what the ReLU returns, and nothing
            else.
        closed (Tensor): The filters that are closed, bool of shape (C,).
        alive (Tensor): Those that are not, bool of shape (C,).
    """
    if producer is not None and _trained(producer):
        restore_own(
            norm._parameters | norm._buffers,
            producer._parameters,
            closed & (cast(Tensor, norm.bias) <= 0),
            alive,
        )
    for consumer in consumers:
        if _trained(consumer):
            restore_reader(cast(Tensor, consumer.weight), closed, alive)


def restore_own(
    norm: Mapping[str, Tensor | None],
    producer: Mapping[str, Tensor | None],
    closed: Tensor,
    alive: Tensor,
) -> None:
    """Multiply the weights of closed filters, and what else keeps gamma * xhat from growing.

    Args:
        norm (Mapping[str, Tensor | None]): Entries of the layer's state dict, changed in place.
        producer (Mapping[str, Tensor | None]): 'weight' and 'bias', changed in place.
        closed (Tensor): The filters that are closed, bool of shape (C,).
        alive (Tensor): Those that are not, bool of shape (C,).
    """
    weight, gamma = producer['weight'], norm['weight']
    if weight is None or gamma is None or weight.shape[0] != len(closed):
        return
    factor = _grow(weight, 0, closed, alive)
    gamma.div_(factor)
    mean, var = norm.get('running_mean'), norm.get('running_var')
    for values in (producer.get('bias'), mean, var, var):
        if values is not None:
            values.mul_(factor)


def restore_reader(weight: Tensor, closed: Tensor, alive: Tensor) -> None:
    """Multiply the weights by which a convolution reads closed filters.

    Args:
        weight (Tensor): The convolution's, of shape (O, I, ...), changed in place.
        closed (Tensor): The filters that are closed, bool of shape (C,).
        alive (Tensor): Those that are not, bool of shape (C,).
    """
    # One filter is read by one of a depthwise convolution's, or by a part of all.
    depthwise = weight.shape[0] == len(closed) and weight.shape[1] == 1
    if depthwise or weight.shape[1] == len(closed):
        _grow(weight, 0 if depthwise else 1, closed, alive)


def _trained(module: nn.Module) -> bool:
    return type(module) in CONVOLUTIONS and cast(Tensor, module.weight).requires_grad


def _grow(weight: Tensor, dim: int, closed: Tensor, alive: Tensor) -> Tensor:
    """Multiply the parts of a weight along a dimension, and return by what, shape (C,)."""
    sizes = weight.transpose(0, dim).flatten(1).float().norm(dim=1)
    factor = torch.ones_like(sizes)
    if alive.any():
        usual = sizes[alive].median()
        lost = closed & (sizes < LOST * usual) & (sizes > 0)
        factor = torch.where(lost, usual / sizes, factor)
        shape = [-1 if d == dim else 1 for d in range(weight.dim())]
        weight.mul_(factor.view(shape).to(weight.dtype))
    return factor
