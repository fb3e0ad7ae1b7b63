"""What is left of the gradient where a LeakyReLU is closed.

A LeakyReLU lets the slope's share of the gradient through below zero, so no filter behind it is
ever trapped. What collapse is to ReLU shows there as a filter that lives on the leak alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .census import find_norms


def leak_share(
    model: nn.Module, loss: Callable[[], Tensor], rectifiers: dict[str, str]
) -> dict[str, np.ndarray]:
    """Measure which share of each filter's gradient comes through the leak.

    With y the output of a BN before a LeakyReLU, it is the sum of ``|dL/dy|`` over the positions
    with y < 0, divided by that over all positions. At 1 the filter is closed on the whole batch
    and trains with the slope's share of the gradient only; where nothing flows at all it is NaN.

    Args:
        model (nn.Module): The network. Its gradients are left as they were, running statistics
            are updated where the pass updates them.
        loss (Callable): Runs the network on a batch and returns the loss.
        rectifiers (dict[str, str]): What follows each layer, from :func:`.trace_rectifiers`.

    Returns:
        dict[str, np.ndarray]: For each layer before a LeakyReLU the share of each channel, shape
        (C,).
    """
    leaking: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def watch_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            closed = (output < 0).detach()

            def add(grad: Tensor) -> None:
                dims = [d for d in range(grad.dim()) if d != 1]
                leaking[name] = leaking.get(name, 0) + (grad.abs() * closed).sum(dims)
                total[name] = total.get(name, 0) + grad.abs().sum(dims)

            output.register_hook(add)

        return watch_gradient

    norms = {n: norm for n, norm in find_norms(model).items() if rectifiers.get(n) == 'leaky_relu'}
    handles = [norm.register_forward_hook(hook(name)) for name, norm in norms.items()]
    try:
        params = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(loss(), params, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (leaking[name] / total[name]).cpu().numpy() for name in total}
