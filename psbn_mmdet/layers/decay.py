"""Weight decay of psBN's bias towards alpha: optimizers see beta = b - alpha instead of b.

The parameter of a psBN layer is the bias ``b = beta + alpha``. During an optimizer's
``step`` it is moved by ``-alpha``, and back after it. The optimizer therefore updates beta, as in
arXiv 2001.11216: weight decay pulls beta to 0 and b to alpha.

The move is part of ``step`` itself, in each subclass of :class:`torch.optim.Optimizer`. torch's
step hooks are not enough. Post-hooks are skipped when a step raises, which would leave beta in the
network. Other hooks on the same step, such as weight averaging, would see beta.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PASSES = 1000  # in training without a step, after which a layer warns

_layers: WeakSet[Any] = WeakSet()
_moved: set[int] = set()  # ids of the biases that are beta at this moment
# Runs eagerly in a compiled step, too. The public torch.compiler.disable would import the compiler.
_eagerly = torch._disable_dynamo


def follow(layer: nn.Module) -> None:
    """Have optimizers see ``bias - shift`` of a layer from now on."""
    _layers.add(layer)


def unfollow(layer: nn.Module) -> None:
    """Have optimizers see the bias of a layer as it is."""
    _layers.discard(layer)


def count_pass(layer: Any) -> None:
    """Count a training pass of a layer that no optimizer has stepped, and warn after many.

    Optimizers of flattened or copied parameters (FSDP1, DeepSpeed, Apex O2) and updates written
    by hand change a bias without any step on the parameter itself.
    """
    layer.passes += 1
    if layer.passes == PASSES:
        warnings.warn(
            f'psBN: no torch.optim.Optimizer has stepped a trained bias in {PASSES} training '
            'passes. Where it is updated in another way (flattened or copied parameters, an '
            'update written by hand), weight decay pulls it to 0, as in BN, and not to the shift.',
            stacklevel=3,
        )


class _Biases(NamedTuple):
    """Biases of one type, device and alpha that have been moved, by their ids."""

    params: dict[int, Any]
    alpha: float
    b: Tensor
    beta: Tensor


@_eagerly
@torch.no_grad()
def _move(optimizer: Optimizer) -> list[_Biases]:
    """Replace b by beta in the psBN biases that an optimizer steps."""
    # Wrappers (ZeroRedundancyOptimizer, Lookahead) leave the move to the optimizer they hold.
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return []
    own = {param for group in optimizer.param_groups for param in group['params']}
    groups: dict[tuple, dict[int, Any]] = {}
    for layer in _layers:
        bias = layer._parameters.get('bias')
        if bias in own and id(bias) not in _moved:
            own.remove(bias)  # layers may share it
            groups.setdefault((bias.device, bias.dtype, layer.shift), {})[id(bias)] = bias
            if layer.passes >= 0:  # its first step
                layer.start()
                layer.fresh, layer.passes = False, -1
    moved = []
    for (_, dtype, shift), params in groups.items():
        # Rounded to the dtype, so that b = alpha gives exactly beta = 0.
        alpha = torch.tensor(shift, dtype=dtype, device='cpu').item()
        b = torch.cat(_local(params))
        beta = b - alpha
        _write(params, beta)
        _moved.update(params)
        moved.append(_Biases(params, alpha, b, beta))
    return moved


@_eagerly
@torch.no_grad()
def _put_back(moved: list[_Biases]) -> None:
    """Replace the updated beta by b."""
    for params, alpha, b, beta in moved:
        now = torch.cat(_local(params))
        # (b - alpha) + alpha may differ from b by rounding: keep b where beta is unchanged.
        _write(params, torch.where(now == beta, b, now + alpha))
        _moved.difference_update(params)


def _write(params: dict[int, Any], values: Tensor) -> None:
    local = _local(params)
    torch.split_with_sizes_copy(values, [part.numel() for part in local], out=local)


def _local(params: dict[int, Any]) -> list[Tensor]:
    """The values on this rank: the local shard of FSDP2's DTensors."""
    return [p.to_local() if hasattr(p, 'to_local') else p for p in params.values()]


def _on_beta(method: Callable) -> Callable:
    """Wrap an optimizer method to move the biases while it runs."""

    @functools.wraps(method)
    def moving(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        moved = _move(self) if _layers else []
        if not moved:
            return method(self, *args, **kwargs)

        def outside(value: Any) -> Any:
            """A closure runs the network, which must have b."""
            if not callable(value):
                return value

            @functools.wraps(value)
            def closure(*args: Any, **kwargs: Any) -> Any:
                nonlocal moved
                _put_back(moved)
                moved = []  # if it raises
                result = value(*args, **kwargs)
                moved = _move(self)
                return result

            return closure

        args = tuple(map(outside, args))
        kwargs = {name: outside(value) for name, value in kwargs.items()}
        try:
            return method(self, *args, **kwargs)
        finally:
            _put_back(moved)

    moving._on_beta = True  # type: ignore[attr-defined]
    return moving


def _prepare(optimizer_class: type[Optimizer]) -> None:
    # Schedule-free optimizers exchange parameters and averages in `train` and `eval`.
    for name in ('step', 'train', 'eval'):
        method = vars(optimizer_class).get(name)
        if not callable(method) or hasattr(method, '_on_beta'):
            continue
        # Hooks on the step see b, also of an optimizer that was made before this was imported.
        has_hooks = hasattr(method, 'hooked')
        moving = _on_beta(method.__wrapped__ if has_hooks else method)
        if has_hooks:
            moving = Optimizer.profile_hook_step(moving)
            moving.hooked = True  # type: ignore[attr-defined]
        setattr(optimizer_class, name, moving)
    for subclass in optimizer_class.__subclasses__():
        _prepare(subclass)


@classmethod  # type: ignore[misc]
def _init_subclass(cls: type[Optimizer], **kwargs: Any) -> None:
    super(Optimizer, cls).__init_subclass__(**kwargs)
    _prepare(cls)


for _optimizer_class in Optimizer.__subclasses__():
    _prepare(_optimizer_class)
Optimizer.__init_subclass__ = _init_subclass  # type: ignore[assignment]
