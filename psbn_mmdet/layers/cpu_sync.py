"""Batch normalization over several processes on CPUs, which torch's SyncBatchNorm refuses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class _SumOverRanks(Function):
    """The sum of all ranks' tensors; its gradient is the sum of theirs.

    torch's own differentiable collectives are deprecated or private, or have no gradient in the
    oldest supported version.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(gradient, ctx.group), None


def batch_norm_over_ranks(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    factor: float,
    eps: float,
    group: Any,
) -> Tensor:
    """Normalize by the statistics of all ranks' batches together, as if they were one batch.

    Two collectives forward and two backward. Ranks may have batches of different sizes.

    Args:
        x (Tensor): This rank's input, shape (N, C, ...).
        weight (Tensor, optional): gamma, shape (C,).
        bias (Tensor, optional): b, shape (C,).
        running_mean (Tensor, optional): Updated in place, shape (C,).
        running_var (Tensor, optional): Updated in place with the unbiased variance, shape (C,).
        factor (float): Weight of the new statistics in the running ones.
        eps (float): Added to the variance.
        group: The processes, None for all.

    Returns:
        Tensor: Same shape and dtype as ``x``.

    Raises:
        ValueError: If all ranks together have only one value per channel.
    """
    axes = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels = x.size(1)
    sums = torch.cat([wide.sum(axes), wide.new_tensor([x.numel() / channels])])
    total = _SumOverRanks.apply(sums, group)
    count = total[-1].detach()
    if count <= 1:
        raise ValueError(
            'psSyncBN: expected more than 1 value per channel when training, over all ranks, got '
            f'an input of shape {tuple(x.shape)} on this one'
        )
    mean = total[:-1] / count
    centred = wide - mean.view(shape)
    variance = _SumOverRanks.apply(centred.square().sum(axes), group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), factor)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), factor)
    y = centred * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)
