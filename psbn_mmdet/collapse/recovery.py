"""Recovery: decaying gamma and beta = b - alpha of closed filters until psBN's shift opens them.

A filter is *closed* while the ReLU behind its psBN passes nothing: ``gamma * xhat + beta + alpha
<= 0`` for all inputs. Its output is then 0 whatever gamma and beta are, so both may be multiplied
by ``q < 1`` at no cost, as long as it stays closed. With ``m < -alpha`` the maximum of ``gamma *
xhat + beta``, it does until ``q^n m + alpha > 0``: there the output leaves 0, continuously,
gradients reach the filter again, and the decay ends. Weight decay does the same at the rate of the
whole network (arXiv 2001.11216); closed filters of BN stay closed throughout.

Evidence that a filter is closed is that in each of the last steps

- no gradient reached gamma or bias, though the layer had gradients, and
- the layer's output went into ReLUs alone and was never positive, on any rank; or it went into
  sums alone, as at the end of a residual block, these into ReLUs, and they passed nothing. The
  decay then brings the layer's part of the sum nearer to alpha, and the rest is the same.

The first is not enough: the head of a detector gets no gradient where there is no positive sample,
open as it is. The second is looked at only where the first holds, and travels with the gradients:
a rank that has seen the filter open, or cannot tell, adds a number to the gradient of its bias
that is too small to change any sum, but not 0 (:data:`OPEN`). So after the reduction of gradients
all ranks know the same and do the same, without a collective. Before the step these numbers are
taken away.

With the decay begins what :mod:`.restore` does: the convolutions around the filter, if they have
decayed, get their size back while it is closed, so that it responds when it opens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from ..layers import PostShiftedBatchNorm
from .gradients import let_hooks_run
from .restore import restore

# Lost in any gradient that matters, and not yet 0 in float32 after loss scales and averages.
OPEN = 1e-25
# The convolution that feeds a layer, and those that read it.
Around = tuple[Optional[nn.Module], Sequence[nn.Module]]
# State of optimisers that has a parameter's shape and is no average of gradients.
_KEPT = ('ax', 'step_size')


def decay_per_step(shift: float, steps: int) -> float:
    """The factor q by which a filter with beta = -1 and gamma = 0 opens within some steps.

    It opens where ``q^n * (-1) + alpha > 0``; with ``q^steps = alpha / (1 + alpha)`` it has.

    Args:
        shift (float): The constant alpha.
        steps (int): Number of optimiser steps.

    Returns:
        float: Above 0 and below 1.
    """
    return (shift / (1 + shift)) ** (1 / steps)


class Recovery:
    """Decay gamma and b - alpha of closed filters of psBN layers, in a pre-hook of each step.

    Once in ``window`` steps the gradients of all layers are looked at. Filters without any are
    watched from then on: their outputs in each forward pass, their gradients in each step. After
    ``window`` steps without a sign of life they are decayed in each step, until there is one.
    Moments of the optimiser, such as momentum, are set to 0 meanwhile. The convolutions around
    them are restored when it begins.

    Layers take part whose gamma and bias are trained by one optimiser.

    Args:
        optimizers (Sequence[Optimizer]): All optimisers of the training.
        norms (Mapping[str, PostShiftedBatchNorm]): psBN layers by name.
        witness (Callable): Called with a layer's name; the module whose output is positive where a
            filter of the layer is open, as far as is known on this rank, else None (see
            :attr:`.RectifierTrace.witnesses`).
        steps (int): Number of steps in which a filter with beta = -1 opens.
        window (int): Number of steps of evidence.
        around (Callable): Called with a layer's name; the convolution that feeds it, and those that
            read it, as far as they may be restored (see :attr:`.RectifierTrace.producers` and
            :attr:`.RectifierTrace.consumers`). All ranks must be told the same.
        failed (Callable): Called with the exception if something fails in a step; nothing is
            decayed from then on. What it raises goes through the optimiser's step.

    Attributes:
        ended (bool): Whether nothing is decayed any more.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        norms: Mapping[str, PostShiftedBatchNorm],
        witness: Callable[[str], nn.Module | None],
        steps: int,
        window: int,
        around: Callable[[str], Around],
        failed: Callable[[Exception], None],
    ) -> None:
        self._failed = failed
        self.ended = False
        self._groups: list[_Group] = []
        self._handles: list[Any] = []
        for optimizer in optimizers:
            own = {p for group in optimizer.param_groups for p in group['params']}
            layers = [
                _Layer(name, norm, witness, around, decay_per_step(norm.shift, steps))
                for name, norm in norms.items()
                if norm.weight in own and norm.bias is not None and norm.bias in own
            ]
            for device in dict.fromkeys(layer.bias.device for layer in layers):
                group = _Group([x for x in layers if x.bias.device == device], window)
                self._groups.append(group)
                let_hooks_run(optimizer)
                self._handles.append(optimizer.register_step_pre_hook(self._before_step(group)))

    @property
    def layers(self) -> list[str]:
        """Names of the layers that take part."""
        return [layer.name for group in self._groups for layer in group.layers]

    def decayed(self) -> dict[str, Tensor]:
        """Channels that are being decayed, as bool masks of shape (C,) by layer."""
        masks = {}
        for group in self._groups:
            group.put_back()
            for layer in group.layers:
                masks[layer.name] = (layer.proof >= group.window).cpu()
        return masks

    def opened(self) -> dict[str, Tensor]:
        """Channels that were decayed until they gave a sign of life, since the last call."""
        masks = {}
        for group in self._groups:
            group.put_back()
            for layer in group.layers:
                masks[layer.name] = layer.opened.cpu()
                layer.opened = torch.zeros_like(layer.opened)
            group.take()
        return masks

    def state_dict(self) -> list[dict[str, Any]]:
        """What a resumed run goes on from: plain values, and tensors on the CPU."""
        return [group.state_dict() for group in self._groups]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on from there.

        Raises:
            ValueError: If it is of other layers.
        """
        if [list(s['layers']) for s in state] != [g.names for g in self._groups]:
            raise ValueError('it is of other layers')
        for group, own in zip(self._groups, state):
            group.check(own)
        for group, own in zip(self._groups, state):
            group.load_state_dict(own)

    def close(self) -> None:
        """Detach from the optimisers and the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._end()

    def _end(self) -> None:
        self.ended = True
        for group in self._groups:
            for layer in group.layers:
                layer.watch(torch.zeros_like(layer.watched))

    def _before_step(self, group: _Group) -> Callable:
        def hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if self.ended:
                return
            try:
                group.step(optimizer)
            except Exception as error:
                self._end()  # torch goes through the hooks now, and lets none be removed
                self._failed(error)

        return hook


class _Layer:
    """A psBN layer, and what is known of its channels.

    Attributes:
        watched (Tensor): Channels whose outputs are looked at, bool of shape (C,).
        proof (Tensor): For each watched channel the steps since its last sign of life, shape (C,).
        opened (Tensor): Channels that were decayed until they gave one, bool of shape (C,).
        restored (Tensor): Channels whose convolutions have been looked at, bool of shape (C,).
    """

    def __init__(
        self,
        name: str,
        norm: PostShiftedBatchNorm,
        witness: Callable[[str], nn.Module | None],
        around: Callable[[str], Around],
        factor: float,
    ) -> None:
        self.name = name
        self._norm = norm
        self._around = around
        self.gamma, self.bias = norm.weight, norm.bias
        self.shift = norm.shift
        self.factor = factor
        self._witness = witness
        self.watched = torch.zeros_like(self.bias, dtype=torch.bool)
        self.proof = torch.zeros_like(self.bias, dtype=torch.int32)
        self.opened = torch.zeros_like(self.watched)
        self.restored = torch.zeros_like(self.watched)
        self._index = self.watched.nonzero().flatten()
        self._handles: list[Any] = []
        # Of the watched channels, which were open in a forward pass since the last step; None if
        # there was none that could be seen.
        self._open: Tensor | None = None

    def watch(self, channels: Tensor) -> None:
        """Look at the outputs of these channels, and of no others, from now on."""
        self.watched = channels
        self.restored = self.restored & channels
        self._index = channels.nonzero().flatten()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open = None
        if not len(self._index):
            return
        self._handles.append(self.bias.register_hook(self._before_accumulation))
        witness = self._witness(self.name)
        if witness is not None:
            self._handles.append(witness.register_forward_hook(self._after_forward))

    def forget_outputs(self) -> None:
        """Begin a new step."""
        self._open = None

    def restore(self, closed: Tensor) -> None:
        """Restore the convolutions around closed filters, once for each time they close."""
        producer, consumers = self._around(self.name)
        restore(self._norm, producer, consumers, closed & ~self.restored, ~self.watched)

    def _after_forward(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if _get_current_dispatch_mode() is None:
            self._look_at(output.detach())
        else:
            with _disable_current_modes():  # to a RectifierTrace this is no reader
                self._look_at(output.detach())

    def _look_at(self, output: Tensor) -> None:
        seen = output.index_select(1, self._index)
        # What is no number is not closed.
        is_open = ~(seen.amax([d for d in range(seen.dim()) if d != 1]) <= 0)
        self._open = is_open if self._open is None else self._open | is_open

    def _before_accumulation(self, grad: Tensor) -> Tensor:
        is_open = self._open
        # None without a witness, and where its hook was not called, as in a compiled part.
        if is_open is None:
            is_open = torch.ones_like(self._index, dtype=torch.bool)
        signs = is_open.to(grad.dtype) * _sign(grad.dtype)
        return grad.index_add(0, self._index, signs)


class _Group:
    """The layers of one optimiser on one device."""

    def __init__(self, layers: list[_Layer], window: int) -> None:
        self.layers = layers
        self.window = window
        self.names = [layer.name for layer in layers]
        self._calls = 0
        self.take()

    def take(self) -> None:
        """Put what is known of the layers with watched channels into one vector each."""
        self._busy = [layer for layer in self.layers if len(layer._index)]
        if not self._busy:
            return
        self._sizes = [len(layer.bias) for layer in self._busy]
        self._watched = torch.cat([layer.watched for layer in self._busy])
        self._proof = torch.cat([layer.proof for layer in self._busy])
        self._opened = torch.cat([layer.opened for layer in self._busy])
        self._factor = torch.cat(
            [torch.full_like(x.bias, x.factor, dtype=torch.float32) for x in self._busy]
        )

    def put_back(self) -> None:
        """Give each layer its part of the vectors."""
        if not self._busy:
            return
        parts = zip(self._proof.split(self._sizes), self._opened.split(self._sizes))
        for layer, (proof, opened) in zip(self._busy, parts):
            layer.proof, layer.opened = proof, opened

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Decay what is closed; every ``window`` steps choose what is watched."""
        if self._busy:
            self._decay(optimizer)
        if self._calls % self.window == 0:
            self._choose()
        self._calls += 1

    def _decay(self, optimizer: Optimizer) -> None:
        gammas: list[Tensor] = [layer.gamma for layer in self._busy]
        biases: list[Tensor] = [layer.bias for layer in self._busy]
        alive = _alive(self._busy)
        self._take_signs_away(biases)
        found_inf = getattr(optimizer, 'found_inf', None)
        was_closed = self._proof >= self.window
        proof = torch.where(alive | ~self._watched, 0, self._proof + 1)
        closed = proof >= self.window
        if found_inf is not None:  # of a fused optimiser, which skips the step by itself
            skips = found_inf.to(alive.device) != 0
            proof, closed = torch.where(skips, self._proof, proof), closed & ~skips
        self._proof = proof
        self._opened = self._opened | (was_closed & (proof == 0))
        factor = torch.where(closed, self._factor, 1)
        _multiply(gammas, factor.split(self._sizes))
        betas = list(torch._foreach_sub(biases, [layer.shift for layer in self._busy]))
        _multiply(betas, (1 - factor).split(self._sizes))
        torch._foreach_sub_(biases, betas)  # nothing changes where the factor is 1
        moving = (~closed).float().split(self._sizes)
        moments = [
            (state, part)
            for params in (gammas, biases)
            for param, part in zip(params, moving)
            for key, state in optimizer.state.get(param, {}).items()
            if isinstance(state, Tensor) and state.shape == param.shape and key not in _KEPT
        ]
        _multiply([state for state, _ in moments], [part for _, part in moments])
        for layer in self._busy:
            layer.forget_outputs()

    def _take_signs_away(self, biases: list[Tensor]) -> None:
        """Leave only what is to be trained by in the gradients."""
        grads = [torch.zeros_like(b) if b.grad is None else b.grad for b in biases]
        tiny = torch.cat([grad.float() for grad in grads]).abs() <= 1000 * _sign(grads[0].dtype)
        _multiply(grads, (~(tiny & self._watched)).float().split(self._sizes))

    def _choose(self) -> None:
        """Watch the filters without gradient, where the layer has any."""
        self.put_back()
        self._restore()
        lifeless = ~_alive(self.layers)
        for layer, watched in zip(self.layers, lifeless.split([len(x.bias) for x in self.layers])):
            layer.proof = torch.where(watched & layer.watched, layer.proof, 0)
            layer.watch(watched)
        self.take()

    def _restore(self) -> None:
        closed = [layer.proof >= self.window for layer in self._busy]
        if closed:
            new = [(now & ~layer.restored).any() for now, layer in zip(closed, self._busy)]
            for layer, now, is_new in zip(self._busy, closed, torch.stack(new).tolist()):
                if is_new:
                    layer.restore(now)
                layer.restored = now

    def state_dict(self) -> dict[str, Any]:
        self.put_back()
        return {
            'layers': self.names,
            'calls': self._calls,
            'watched': [layer.watched.cpu() for layer in self.layers],
            'proof': [layer.proof.cpu() for layer in self.layers],
            'restored': [layer.restored.cpu() for layer in self.layers],
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse another group's, before any of it is taken over."""
        for kind in ('watched', 'proof', *(['restored'] if 'restored' in state else [])):
            now = [getattr(layer, kind) for layer in self.layers]
            if [(x.shape, x.dtype) for x in state[kind]] != [(x.shape, x.dtype) for x in now]:
                raise ValueError('it is of other channels')
        if not isinstance(state['calls'], int):
            raise ValueError('it has no number of calls')

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._calls = state['calls']
        for layer, watched, proof in zip(self.layers, state['watched'], state['proof']):
            layer.proof = proof.to(layer.proof.device)
            layer.watch(watched.to(layer.watched.device))
        # Checkpoints of earlier versions lack it: theirs are looked at once more.
        for layer, restored in zip(self.layers, state.get('restored', ())):
            layer.restored = restored.to(layer.restored.device)
        self.take()


def _alive(layers: Sequence[_Layer]) -> Tensor:
    """Which channels of some layers give a sign of life, or could not have given one."""

    def moved(grads: Iterable[Tensor | None]) -> Tensor:
        filled = [torch.ones_like(x.bias) if g is None else g for x, g in zip(layers, grads)]
        return torch.cat([grad.float() for grad in filled]) != 0

    return moved(x.gamma.grad for x in layers) | moved(x.bias.grad for x in layers)


def _multiply(tensors: list[Tensor], factors: Iterable[Tensor]) -> None:
    """In place, with few kernels for all of them."""
    if tensors:
        likes = [factor.to(tensor.dtype) for tensor, factor in zip(tensors, factors)]
        torch._foreach_mul_(tensors, likes)


def _sign(dtype: torch.dtype) -> float:
    """The number that says 'open' in a gradient: float16 holds nothing as small as others do."""
    return max(OPEN, torch.finfo(dtype).tiny * 2**-10)
