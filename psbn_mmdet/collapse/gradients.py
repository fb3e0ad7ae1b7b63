"""Which filters get no gradient, read from the optimiser's final gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .census import trainable_shift


class GradientWatch:
    """Collect, step by step, which BN channels a gradient has reached.

    The gradients are read in a pre-hook of the optimiser's step: accumulated over micro-batches,
    reduced over all processes, unscaled and clipped by then, and without weight decay. A step
    that a gradient scaler skips is not seen. Reading takes a handful of kernels for the whole
    network, no synchronisation with the device and no communication.

    Args:
        optimizers (Sequence[Optimizer]): All optimisers of the training.
        norms (Mapping[str, _BatchNorm]): BN and psBN layers by name.

    Attributes:
        active (bool): Whether steps are looked at. Set it to False to skip some. Defaults to
            True.
    """

    def __init__(self, optimizers: Sequence[Optimizer], norms: Mapping[str, _BatchNorm]) -> None:
        self.active = True
        layer_of = {
            param: name
            for name, norm in norms.items()
            for param in (norm.weight, trainable_shift(norm))
            if param is not None
        }
        self._groups = []
        self._handles = []
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group['params']]
            params = [p for p in params if p in layer_of]
            groups = [
                _ParamGroup([p for p in params if p.device == device], layer_of)
                for device in dict.fromkeys(p.device for p in params)
            ]
            if groups:
                self._groups += groups
                self._handles.append(optimizer.register_step_pre_hook(self._before_step(groups)))

    def _before_step(self, groups: list[_ParamGroup]):
        def hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if self.active:
                for group in groups:
                    group.observe(getattr(optimizer, 'found_inf', None))

        return hook

    @property
    def steps(self) -> int:
        """Number of optimiser steps seen in this window, of the optimiser that made most."""
        return max((group.steps for group in self._groups), default=0)

    def trapped(self) -> dict[str, np.ndarray]:
        """Channels that no gradient has reached in this window.

        Returns:
            dict[str, np.ndarray]: Bool masks of shape (C,) by layer. A layer is absent if it was
            not observed: no step was made, or none in which it had gradients (it is frozen, or
            no part of the graph).
        """
        reached: dict[str, np.ndarray] = {}
        for group in self._groups:
            for name, mask in group.reached():
                reached[name] = reached[name] | mask if name in reached else mask
        return {name: ~mask for name, mask in reached.items()}

    def reset(self) -> None:
        """Start a new window."""
        for group in self._groups:
            group.reset()

    def close(self) -> None:
        """Detach from the optimisers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _ParamGroup:
    """The gammas and betas of one optimiser on one device, flattened into one vector."""

    def __init__(self, params: list[nn.Parameter], layer_of: Mapping[nn.Parameter, str]) -> None:
        self.params = params
        self.layers = [layer_of[p] for p in params]
        self.zeros = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.reset()

    def reset(self) -> None:
        self.largest: Tensor | None = None  # per element, over the window's steps
        self.had_grad = [False] * len(self.params)
        self.calls = 0
        self.skipped: Tensor | float = 0.0  # stays on the device

    @property
    def steps(self) -> int:
        return self.calls - int(self.skipped)

    @torch.no_grad()
    def observe(self, found_inf: Tensor | None) -> None:
        grads = [p.grad for p in self.params]
        if all(grad is None for grad in grads):
            return
        self.calls += 1
        self.had_grad = [had or g is not None for had, g in zip(self.had_grad, grads)]
        flat = torch.cat([z if g is None else g.float() for z, g in zip(self.zeros, grads)]).abs_()
        if found_inf is not None:  # a fused optimiser, which skips the step by itself
            skips = found_inf.to(flat.device) != 0
            self.skipped = self.skipped + skips
            flat.masked_fill_(skips, 0)
        self.largest = flat if self.largest is None else torch.maximum(self.largest, flat)

    def reached(self):
        if self.largest is None or self.steps == 0:
            return
        reached = (self.largest != 0).cpu().numpy()
        ends = np.cumsum([p.numel() for p in self.params])
        for name, had_grad, mask in zip(self.layers, self.had_grad, np.split(reached, ends[:-1])):
            if had_grad:
                yield name, mask
