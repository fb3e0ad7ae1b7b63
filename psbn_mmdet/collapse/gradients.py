"""Which filters get no gradient, read from the optimizer's final gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


class GradientWatch:
    """Track when a gradient last reached each BN channel.

    The gradients are read in a pre-hook of the optimizer's step: accumulated over micro-batches,
    reduced over all processes, unscaled and clipped by then, and without weight decay. A step
    that a gradient scaler skips is not seen. Reading takes a handful of kernels for the whole
    network, no synchronization with the device and no communication. An error is kept in
    ``failure`` and ends the watching, but never the step.

    Args:
        optimizers (Sequence[Optimizer]): All optimizers of the training.
        norms (Mapping[str, _BatchNorm]): BN and psBN layers by name.
        now (int): The time at the start, such as the number of the first iteration. Defaults to 0.

    Attributes:
        active (bool): Whether steps are watched. Set it to False to skip steps. Defaults to
            True.
        now (int): The time of the next step.
        failure (Exception, optional): What ended the watching.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], norms: Mapping[str, _BatchNorm], now: int = 0
    ) -> None:
        self.active = True
        self.now = now
        self.failure: Exception | None = None
        layer_of = {
            param: name
            for name, norm in norms.items()
            for param in (norm.weight, norm.bias)
            if param is not None
        }
        self._groups: list[_ParamGroup] = []
        self._handles = []
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group['params']]
            params = [p for p in params if p in layer_of]
            groups = [
                _ParamGroup([p for p in params if p.device == device], layer_of, now)
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
    def layers(self) -> set[str]:
        """Layers with a parameter in an optimizer; of layers that share one, the last."""
        return {name for group in self._groups for name in group.layers}

    @property
    def steps(self) -> int:
        """Number of steps seen, for the optimizer with the most."""
        return max((group.steps for group in self._groups), default=0)

    def trapped(self, window: int | None = None, now: int | None = None) -> dict[str, np.ndarray]:
        """Channels that no gradient has reached in a window.

        A step without a gradient in any channel of a layer is no evidence: a head may have no
        positive sample, or the next layer may be closed. Each layer's window therefore counts only
        the steps in which some gradient reached it.

        Args:
            window (int, optional): In the unit of ``now``. Defaults to None: all that was watched.
            now (int, optional): The window's end. Defaults to the attribute.

        Returns:
            dict[str, np.ndarray]: Bool masks of shape (C,) by layer. A layer is absent if it was
            not observed: its window is not full, or no gradient reached it in the last ``window``
            (no step was made, it is frozen, or no part of the graph).
        """
        trapped: dict[str, np.ndarray] = {}
        for group in self._groups:
            for name, mask in group.trapped(window, self.now if now is None else now):
                trapped[name] = trapped[name] & mask if name in trapped else mask
        return trapped

    def reached(self) -> dict[str, np.ndarray]:
        """Channels that a gradient has reached so far, (C,) by layer with any gradient."""
        reached: dict[str, np.ndarray] = {}
        for group in self._groups:
            for name, mask in group.reached():
                reached[name] = reached[name] | mask if name in reached else mask
        return reached

    def idle(self, window: int, now: int) -> set[str]:
        """Layers without any gradient in a window that ends at ``now``, despite steps."""
        since = now - window + 1
        groups = [group for group in self._groups if group.now >= since]
        names = {name for group in groups for name in group.layers}
        return names - {name for group in groups for name in group.active_since(since)}

    def close(self) -> None:
        """Detach from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def let_hooks_run(optimizer: Optimizer) -> None:
    """Restore the step hooks that torch.compile removes from an optimizer in torch 2.1."""
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
    """The gammas and betas of one optimizer on one device, flattened into one vector.

    Each layer has a clock, which stands still in steps in which no gradient reaches the layer.
    """

    def __init__(
        self, params: list[nn.Parameter], layer_of: Mapping[nn.Parameter, str], now: int
    ) -> None:
        self.params = params
        self.layers = list(dict.fromkeys(layer_of[p] for p in params))
        self.zeros = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        number = {name: i for i, name in enumerate(self.layers)}
        self.numbers = [number[layer_of[p]] for p in params]
        device = params[0].device
        sizes = torch.tensor([p.numel() for p in params])
        # The layer of each element, and when, by its clock, the last gradient came; -1: never.
        self.layer = torch.tensor(self.numbers).repeat_interleave(sizes).to(device)
        self.last = torch.full_like(self.layer, -1)
        self.clock = torch.zeros(len(self.layers), dtype=torch.int64, device=device)
        self.active = torch.full_like(self.clock, -1)  # time of each layer's last gradient
        self.now = self.before = now - 1  # time of the last step, and of the last before that time
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
        flat = torch.cat([z if g is None else g.float() for z, g in zip(self.zeros, grads)])
        reached = flat != 0
        if found_inf is not None:  # a fused optimizer, which skips the step by itself
            skips = found_inf.to(flat.device) != 0
            self.skipped = self.skipped + skips
            reached = reached & ~skips
        if now > self.now:
            self.before, self.now = self.now, now
        active = torch.zeros_like(self.clock).index_add_(0, self.layer, reached.long()) > 0
        # With several steps at one time, only the layer's first one advances its clock.
        self.clock += (active & (self.active < now)) * (now - self.before)
        self.active.masked_fill_(active, now)
        self.last = torch.where(reached, self.clock.index_select(0, self.layer), self.last)

    def active_since(self, since: int) -> list[str]:
        return [name for name, at in zip(self.layers, self.active.tolist()) if at >= max(since, 0)]

    def reached(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._by_layer(self.last >= 0, self.active_since(0))

    def trapped(self, window: int | None, now: int) -> Iterator[tuple[str, np.ndarray]]:
        if window is None:
            yield from self._by_layer(self.last < 0, self.active_since(0))
            return
        # The time since the last step is part of the window, as when gradients accumulate.
        clock = self.clock + (self.active == self.now) * (now - self.now)
        age = clock.index_select(0, self.layer) - self.last.clamp(min=0)
        full = (clock >= window).tolist()
        observed = set(self.active_since(now - window + 1))
        observed &= {name for name, is_full in zip(self.layers, full) if is_full}
        yield from self._by_layer(age >= window, observed)

    def _by_layer(self, mask: Tensor, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        """The parts of a mask: gamma's and bias's of each of these layers."""
        ends = np.cumsum([p.numel() for p in self.params])
        for number, part in zip(self.numbers, np.split(mask.cpu().numpy(), ends[:-1])):
            if self.layers[number] in names:
                yield self.layers[number], part
