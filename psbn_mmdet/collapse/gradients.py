"""Which filters get no gradient, read from the optimiser's final gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .census import trainable_bias


class GradientWatch:
    """Note, step by step, when a gradient last reached each BN channel.

    The gradients are read in a pre-hook of the optimiser's step: accumulated over micro-batches,
    reduced over all processes, unscaled and clipped by then, and without weight decay. A step
    that a gradient scaler skips is not seen. Reading takes a handful of kernels for the whole
    network, no synchronisation with the device and no communication. What fails in it is kept in
    ``failure`` and ends the watching, never the step.

    Args:
        optimizers (Sequence[Optimizer]): All optimisers of the training.
        norms (Mapping[str, _BatchNorm]): BN and psBN layers by name.

    Attributes:
        active (bool): Whether steps are looked at. Set it to False to skip some. Defaults to
            True.
        now (int): The time that is noted, such as the number of the iteration, 0 or more.
            Defaults to 0.
        failure (Exception, optional): What ended the watching.
    """

    def __init__(self, optimizers: Sequence[Optimizer], norms: Mapping[str, _BatchNorm]) -> None:
        self.active = True
        self.now = 0
        self.failure: Exception | None = None
        layer_of = {
            param: name
            for name, norm in norms.items()
            for param in (norm.weight, trainable_bias(norm))
            if param is not None
        }
        self._groups: list[_ParamGroup] = []
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
                let_hooks_run(optimizer)
                self._handles.append(optimizer.register_step_pre_hook(self._before_step(groups)))

    def _before_step(self, groups: list[_ParamGroup]) -> Callable:
        def hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if not self.active or self.failure is not None:
                return
            try:
                for group in groups:
                    group.observe(self.now, getattr(optimizer, 'found_inf', None))
            except Exception as error:  # the training goes on without us
                self.failure = error

        return hook

    @property
    def steps(self) -> int:
        """Number of optimiser steps seen, of the optimiser that made most."""
        return max((group.steps for group in self._groups), default=0)

    def trapped(self, since: int = 0) -> dict[str, np.ndarray]:
        """Channels that no gradient has reached in a window.

        Args:
            since (int): The window is from this time, see ``now``, on. Defaults to 0.

        Returns:
            dict[str, np.ndarray]: Bool masks of shape (C,) by layer. A layer is absent if it was
            not observed: no step was made, or none in which it had gradients (it is frozen, or
            no part of the graph).
        """
        return {name: ~mask for name, mask in self.reached(since).items()}

    def reached(self, since: int = 0) -> dict[str, np.ndarray]:
        """Channels that a gradient has reached in a window; as :meth:`trapped`."""
        reached: dict[str, np.ndarray] = {}
        for group in self._groups:
            for name, mask in group.reached(since):
                reached[name] = reached[name] | mask if name in reached else mask
        return reached

    def close(self) -> None:
        """Detach from the optimisers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def let_hooks_run(optimizer: Optimizer) -> None:
    """Give an optimiser's step back its hooks, which torch.compile of torch 2.1 takes away."""
    step = optimizer.step
    part: Any = step.__func__ if isinstance(step, MethodType) else step
    while part is not None:
        if getattr(part, '__code__', None) is _RUNS_HOOKS:
            return
        part = getattr(part, '__wrapped__', None)

    def step_of(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    vars(optimizer)['step'] = MethodType(Optimizer.profile_hook_step(step_of), optimizer)


_RUNS_HOOKS = Optimizer.profile_hook_step(lambda: None).__code__  # what torch wraps steps in


class _ParamGroup:
    """The gammas and betas of one optimiser on one device, flattened into one vector."""

    def __init__(self, params: list[nn.Parameter], layer_of: Mapping[nn.Parameter, str]) -> None:
        self.params = params
        self.layers = [layer_of[p] for p in params]
        self.zeros = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.last: Tensor | None = None  # time of the last gradient, per element; -1: none yet
        self.had_grad = [-1] * len(params)  # time of the last step with a gradient tensor
        self.calls = 0
        self.skipped: Tensor | float = 0.0  # stays on the device

    @property
    def steps(self) -> int:
        return self.calls - int(self.skipped)

    @torch.no_grad()
    def observe(self, now: int, found_inf: Tensor | None) -> None:
        grads = [p.grad for p in self.params]
        if all(grad is None for grad in grads):
            return
        self.calls += 1
        self.had_grad = [old if g is None else now for old, g in zip(self.had_grad, grads)]
        flat = torch.cat([z if g is None else g.float() for z, g in zip(self.zeros, grads)])
        reached = flat != 0
        if found_inf is not None:  # a fused optimiser, which skips the step by itself
            skips = found_inf.to(flat.device) != 0
            self.skipped = self.skipped + skips
            reached = reached & ~skips
        if self.last is None:
            self.last = torch.full_like(flat, -1, dtype=torch.int64)
        self.last.masked_fill_(reached, now)

    def reached(self, since: int) -> Iterator[tuple[str, np.ndarray]]:
        if self.last is None or self.steps == 0:
            return
        reached = (self.last >= max(since, 0)).cpu().numpy()
        ends = np.cumsum([p.numel() for p in self.params])
        for name, had_grad, mask in zip(self.layers, self.had_grad, np.split(reached, ends[:-1])):
            if had_grad >= max(since, 0):
                yield name, mask
