"""Restoring the convolutions around closed filters, which have decayed with them.

In a filter that has been closed for long, gamma and beta are not all that has decayed. No gradient
reaches the weights of its own convolution, or the weights by which the next convolutions read it,
so weight decay has brought them near zero, too. When the filter opens, its response is lost in eps
and its output in the next layers. Its gradients are as small as the product of both, so it hardly
moves (docs/evidence/recovery.md). While it is closed these weights are as free as gamma and beta:

- the weights that *read* it multiply 0;
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

LOST = 0.1  # of the usual norm; below it weights have decayed, above it they only differ


@torch.no_grad()
def restore(
    networks: Sequence[Mapping[str, nn.Module]],
    layer: str,
    producer: str | None,
    consumers: Sequence[str],
    closed: Tensor,
    alive: Tensor,
) -> None:
    """Multiply decayed weights of closed filters, in place, to the usual norm in their layer.

    Weights are decayed if their Euclidean norm is below a tenth of the median over filters that
    are alive.

    Args:
        networks (Sequence[Mapping[str, nn.Module]]): The network's modules by name, and those of
            copies such as its averages, which get the same factors.
        layer (str): The BN or psBN layer, whose output goes into ReLUs alone.
        producer (str, optional): The convolution that feeds it, and nothing else.
        consumers (Sequence[str]): Convolutions that read what the ReLU returns, and nothing else.
        closed (Tensor): The filters that are closed, bool of shape (C,).
        alive (Tensor): Those that are not, bool of shape (C,).
    """
    if producer is not None:
        norm, conv = networks[0][layer], networks[0][producer]
        held = closed & (cast(Tensor, norm.bias) <= 0)
        factor = lost_factor(cast(Tensor, conv.weight), 0, held, alive)
        for modules in (m for m in networks if layer in m and producer in m):
            norm = modules[layer]
            restore_own(norm._parameters | norm._buffers, modules[producer]._parameters, factor)
    for consumer in consumers:
        weight = cast(Tensor, networks[0][consumer].weight)
        dim = reading_dim(weight, len(closed))
        if dim is not None:
            factor = lost_factor(weight, dim, closed, alive)
            for modules in (m for m in networks if consumer in m):
                multiply(cast(Tensor, modules[consumer].weight), dim, factor)


def restore_own(
    norm: Mapping[str, Tensor | None], producer: Mapping[str, Tensor | None], factor: Tensor
) -> None:
    """Multiply a convolution's weights, and adapt the norm so that gamma * xhat does not grow.

    Args:
        norm (Mapping[str, Tensor | None]): Entries of the layer's state dict.
        producer (Mapping[str, Tensor | None]): 'weight' and 'bias' of the convolution.
        factor (Tensor): For each filter, shape (C,).
    """
    multiply(producer['weight'], 0, factor)
    multiply(norm['weight'], 0, 1 / factor)
    mean, var = norm.get('running_mean'), norm.get('running_var')
    for values in (producer.get('bias'), mean, var, var):
        multiply(values, 0, factor)


def reading_dim(weight: Tensor, channels: int) -> int | None:
    """Along which dimension of a convolution's weight (O, I, ...) it reads its input channels.

    0 for a depthwise one, else 1; None if the input is not read channel by channel, as in groups.
    """
    if weight.shape[0] == channels and weight.shape[1] == 1:
        return 0
    return 1 if weight.shape[1] == channels else None


def lost_factor(weight: Tensor, dim: int, closed: Tensor, alive: Tensor) -> Tensor:
    """The factor that restores each part of a weight along a dimension, mostly 1, shape (C,)."""
    sizes = weight.transpose(0, dim).flatten(1).float().norm(dim=1)
    if len(sizes) != len(closed) or not alive.any():
        return torch.ones_like(closed, dtype=torch.float)
    usual = sizes[alive].median()
    lost = closed & (sizes < LOST * usual) & (sizes > 0)
    return torch.where(lost, usual / sizes, 1.0)


def multiply(values: Tensor | None, dim: int, factor: Tensor) -> None:
    """Multiply the parts of a tensor along a dimension, in place."""
    if values is not None:
        shape = [-1 if d == dim else 1 for d in range(values.dim())]
        values.mul_(factor.to(values).view(shape))
