"""Closed filters of a network that is trained further: when they open, and when they should."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import study  # noqa: F401  # puts the package on the path
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from psbn_mmdet.collapse import GradientWatch, Structure, find_norms, trace_structure
from psbn_mmdet.layers import bn_to_psbn
from psbn_mmdet.recovery import Recovery, revive


def revival_steps(
    b: float,
    shift: float,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    gamma: float = 0.0,
    reach: float = 0.0,
) -> float:
    """Steps of SGD after which a closed filter of psBN opens, by weight decay alone.

    gamma and beta = b - shift shrink by ``lr * weight_decay / (1 - momentum)`` of themselves in a
    step; the filter opens where ``beta + shift + reach * |gamma| > 0``.

    Args:
        b (float): Bias at the start, ``beta + shift``.
        shift (float): The constant alpha.
        lr (float): Learning rate.
        weight_decay (float): Coefficient of the L2 penalty.
        momentum (float): Defaults to 0.
        gamma (float): Scale at the start. Defaults to 0.
        reach (float): The largest xhat met. Defaults to 0.

    Returns:
        float: 0 if it is open from the start, infinity if nothing decays.
    """
    closed = -(b - shift) - reach * abs(gamma)  # how far beta and gamma hold it down
    if closed < shift:
        return 0.0
    decay = lr * weight_decay / (1 - momentum)
    return math.log(shift / closed) / math.log1p(-decay) if decay > 0 else math.inf


class Reach:
    """The largest xhat of each channel met in forward passes, on the side towards opening."""

    def __init__(self, network: nn.Module) -> None:
        self.largest: dict[str, Tensor] = {}
        for name, norm in find_norms(network).items():
            norm.register_forward_hook(self._hook(name))

    def _hook(self, name: str):
        def hook(norm: nn.Module, inputs: tuple, output: Tensor) -> None:
            xhat = F.batch_norm(inputs[0], None, None, training=True, eps=norm.eps)
            largest = (xhat * norm.weight.sign()[:, None, None]).amax((0, 2, 3))
            self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)

        return hook


class Arrivals(GradientWatch):
    """Where filters start, and the step in which a gradient first reached each."""

    def __init__(self, optimizer: Optimizer, network: nn.Module) -> None:
        norms = find_norms(network)
        super().__init__([optimizer], norms)
        self.first = {name: np.full(norm.num_features, -1) for name, norm in norms.items()}
        self._start = {
            name: (norm.weight.detach().clone(), norm.bias.detach().clone())
            for name, norm in norms.items()
        }

    def look(self, step: int) -> None:
        """After an optimiser's step."""
        for name, reached in self.reached().items():
            first = self.first[name]
            first[reached & (first < 0)] = step

    def fate(
        self, name: str, channel: int, reach: Mapping[str, Tensor], shift: float, **sgd: float
    ) -> dict:
        """How a filter starts, when it opens, and when it should by weight decay alone.

        Predicted with its gamma and the largest xhat met, and as for gamma = 0.
        """
        gamma, b = (float(values[channel]) for values in self._start[name])
        largest = float(reach[name][channel])
        steps = revival_steps(b, shift, **sgd, momentum=0.9, gamma=gamma, reach=largest)
        bound = revival_steps(b, shift, **sgd, momentum=0.9)
        return {
            'gamma': gamma,
            'b': b,
            'reach': largest,
            'predicted': steps if math.isfinite(steps) else None,
            'predicted_without_gamma': bound if math.isfinite(bound) else None,
            'first': int(self.first[name][channel]),
        }


def converted(network: nn.Module, arm: str, structure: Structure, shift: float = 0.1) -> nn.Module:
    """A copy of a network with the arm's norms."""
    network = copy.deepcopy(network)
    if arm == 'BN':
        return network
    bn_to_psbn(network, shift)
    if arm == 'psBN, revive':
        network.load_state_dict(revive(network.state_dict(), structure, 0.2 * shift)[0])
    return network


def recover(network: nn.Module, optimizer: Optimizer, steps: int, window: int = 10) -> Recovery:
    """What RecoveryHook does in a Runner, for a network that takes images of 32 px."""
    structure = trace_structure(network.eval(), torch.randn(2, 3, 32, 32))

    def failed(error: Exception | None) -> None:
        if error is not None:
            raise error

    return Recovery(network, [optimizer], structure, steps, window, failed, list)
