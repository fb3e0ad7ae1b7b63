"""Recovery: decaying gamma and beta = b - alpha of closed filters until psBN's shift opens them.

A filter is *closed* while the ReLU behind its psBN passes nothing: ``gamma * xhat + beta + alpha
<= 0`` for all inputs. Its output is then 0 for any gamma and beta, so both may be multiplied
by ``q < 1`` at no cost, as long as it stays closed. With ``m < -alpha`` the maximum of ``gamma *
xhat + beta``, it does until ``q^n m + alpha > 0``: there the output leaves 0, continuously,
gradients reach the filter again, and the decay ends. Weight decay does the same at the rate of the
whole network (arXiv 2001.11216); closed filters of BN stay closed throughout.

Closed filters are detected from the last forward passes of their layer, in training and
evaluation, on all ranks. Either the output goes into ReLUs alone and was never positive, or it goes
into sums that go into ReLUs, as at the end of a residual block, and these passed nothing.
(The decay then moves the layer's part of the sum towards alpha.) The bias must also have had no
gradient. A filter that opens only on rare images looks closed if none of them came.

Weights around filters that came closed with the loaded weights have decayed, too, and are restored
once, at the start (:mod:`.restore`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from ..collapse.gradients import let_hooks_run
from ..collapse.structure import Structure, in_backward
from ..layers import PostShiftedBatchNorm
from .restore import restore

# Averages of gradients; 0 for a filter without gradients.
_MOMENTS = {
    *('momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_inf'),
    *('square_avg', 'grad_avg', 'acc_delta', 'sum'),
}
# Other copies of the parameter, moved along with it: of D-Adaptation, schedule-free
# optimizers, ASGD and Lookahead.
_POSITIONS = {'x0', 'z', 'ax', 'slow_buffer', 'slow_param'}


def decay_per_step(shift: float, steps: int) -> float:
    """The factor q by which a filter with beta = -1 and gamma = 0 opens within some steps.

    It opens where ``q^n * (-1) + alpha > 0``; with ``q^steps = alpha / (1 + alpha)`` it has.

    Args:
        shift (float): The constant alpha.
        steps (int): Number of optimizer steps.

    Returns:
        float: Above 0 and below 1.
    """
    return (shift / (1 + shift)) ** (1 / steps)


class Recovery:
    """Decay gamma and b - alpha of closed filters of psBN layers, after optimizer steps.

    Every ``window`` steps the gradients of all biases are read. Filters without any are
    watched from then on: in each forward pass their outputs, in each step their gradients. After
    ``window`` passes without a sign of life they are decayed until one appears. Moments of the
    optimizer, such as momentum, are set to 0 meanwhile.

    To save time, the evidence is judged and gamma and beta are decayed every ``window`` steps, by
    that many factors at once. If ``steps`` is small, this is done in each step.

    A layer takes part if the structure has a witness for it, and one optimizer trains its gamma and
    bias with a learning rate. With several ranks, each judgement takes one reduction, and all ranks
    reach the same result.

    Args:
        network (nn.Module): The network.
        optimizers (Sequence[Optimizer]): All optimizers of the training.
        structure (Structure): What stands around its layers; the same on all ranks.
        steps (int): Number of steps in which a filter with beta = -1 opens.
        window (int): Number of forward passes of evidence.
        failed (Callable): Called with the exception when recovery fails, or None on a rank where
            nothing failed. Recovery then ends on all ranks, and the training continues.
        copies (Callable, optional): Returns the modules, by the network's names, of each averaged
            copy of it, whose weights are restored with the network's. None to restore nothing.
            Defaults to None.

    Attributes:
        ended (bool): Whether nothing is decayed any more.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizers: Sequence[Optimizer],
        structure: Structure,
        steps: int,
        window: int,
        failed: Callable[[Exception | None], None],
        copies: Callable[[], Sequence[Mapping[str, nn.Module]]] | None = None,
    ) -> None:
        self._network = network
        self._structure = structure
        self._failed = failed
        self._copies = copies
        self._error: Exception | None = None
        self.ended = False
        self._groups: list[_Group] = []
        self._handles: list[Any] = []
        modules = dict(network.named_modules())
        self._learning: set[nn.Parameter] = set()
        for optimizer in optimizers:
            rates = {p: group for group in optimizer.param_groups for p in group['params']}
            own = {p for p, g in rates.items() if p.requires_grad and _learns(g, 'initial_lr')}
            self._learning |= own
            layers = [
                _Layer(name, network, modules[witness], steps, rates, self._fail)
                for name, witness in structure.witnesses.items()
                if isinstance(norm := modules.get(name), PostShiftedBatchNorm)
                and norm.weight in own
                and norm.bias in own
            ]
            for device in dict.fromkeys(layer.bias.device for layer in layers):
                of_device = [layer for layer in layers if layer.bias.device == device]
                # Even so, a filter takes at least 50 decays to open.
                every = window if steps >= 50 * window else 1
                group = _Group(of_device, window, every)
                self._groups.append(group)
                let_hooks_run(optimizer)
                self._handles += [
                    optimizer.register_step_pre_hook(self._before_step(group)),
                    optimizer.register_step_post_hook(self._after_step(group)),
                ]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that take part."""
        return [layer.name for group in self._groups for layer in group.layers]

    def decayed(self) -> dict[str, Tensor]:
        """Channels that are being decayed, as bool masks of shape (C,) by layer."""
        return self._masks(lambda group: group.proof >= group.window)

    def opened(self) -> dict[str, Tensor]:
        """Channels decayed until they opened, since the last call."""
        masks = self._masks(lambda group: group.opened)
        for group in self._groups:
            group.opened = torch.zeros_like(group.opened)
        return masks

    def _masks(self, mask: Callable[[_Group], Tensor]) -> dict[str, Tensor]:
        return {
            name: part
            for group in self._groups
            for name, part in zip(group.names, mask(group).cpu().split(group.sizes))
        }

    def state_dict(self) -> list[dict[str, Any]]:
        """The state for a resumed run: plain values, and tensors on the CPU."""
        return [group.state_dict() for group in self._groups]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Load the state of an earlier run.

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
        """Detach from the optimizers and the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._end()

    def _end(self) -> None:
        self.ended = True
        for group in self._groups:
            group.watch(torch.zeros_like(group.watched))

    def _fail(self, error: Exception) -> None:
        """Keep the error; with several ranks, all end together at the next reduction."""
        self._error = self._error or error
        if get_world_size() == 1 and not self.ended:
            self._end()
            self._failed(error)

    def _before_step(self, group: _Group) -> Callable:
        @torch.no_grad()
        def hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if self.ended:
                return
            is_due = group.note_step(self._fail)
            if not is_due:
                return
            # The reductions come first, since no rank may skip them.
            alive, passes = group.exchange_evidence(self._error is not None)
            has_failed = group.exchange_gradients(self._error is not None)
            if has_failed:
                self._end()
                self._failed(self._error)
                return
            try:
                group.judge(alive, passes, getattr(optimizer, 'found_inf', None))
                group.clear_moments(optimizer)
            except Exception as error:
                self._fail(error)

        return hook

    def _after_step(self, group: _Group) -> Callable:
        @torch.no_grad()
        def hook(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            if self.ended or self._error is not None:
                return
            try:
                group.decay()
                if group.chosen == 1:
                    self._restore(group)
                group.choose()
            except Exception as error:
                self._fail(error)

        return hook

    def _restore(self, group: _Group) -> None:
        """Once, when the first filters are known to be closed, and have been since the start."""
        closed = group.proof >= group.window
        if self._copies is None or group.codes is None or not closed.any():
            return
        modules = dict(self._network.named_modules())
        networks = [modules, *self._copies()]

        def learns(name: str | None) -> bool:
            return name is not None and modules[name].weight in self._learning

        parts = zip(group.names, closed.split(group.sizes), group.watched.split(group.sizes))
        for layer, mask, watched in parts:
            if mask.any():
                producer = self._structure.producers.get(layer)
                consumers = self._structure.consumers.get(layer, [])
                restore(
                    networks,
                    layer,
                    producer if learns(producer) else None,
                    [name for name in consumers if learns(name)],
                    mask,
                    ~watched,
                )
        group.follow()


class _Layer:
    """A psBN layer, and the outputs of its watched channels since the last step.

    Attributes:
        index (Tensor): The watched channels.
        most (Tensor, optional): Their largest outputs.
        most_trained (Tensor, optional): The same, in passes of the training alone.
        passes (int): Number of forward passes.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        witness: nn.Module,
        steps: int,
        rates: dict[nn.Parameter, dict],
        failed: Callable[[Exception], None],
    ) -> None:
        norm: Any = network.get_submodule(name)
        self.name = name
        self.gamma, self.bias = norm.weight, norm.bias
        self.shift = norm.shift
        self.factor = decay_per_step(norm.shift, steps)
        self._network = network
        self._rates = [rates[self.gamma], rates[self.bias]]
        self._witness = witness
        self._failed = failed
        self._handle: Any = None
        self.watch(torch.zeros_like(self.bias, dtype=torch.bool))

    @property
    def learns(self) -> bool:
        """Whether gamma and bias are trained now, and have a learning rate."""
        trained = self.gamma.requires_grad and self.bias.requires_grad
        return trained and all(_learns(group, 'lr') for group in self._rates)

    def watch(self, channels: Tensor) -> None:
        """Look at the outputs of these channels, and of no others, from now on."""
        self.index = channels.nonzero().flatten().to(self.bias.device)
        self.forget()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if len(self.index):
            self._handle = self._witness.register_forward_hook(_Look(self))

    def forget(self) -> None:
        """Begin a new step."""
        self.most: Tensor | None = None
        self.most_trained: Tensor | None = None
        self.passes = 0

    def look_at(self, output: Any) -> None:
        """Note the largest outputs of the watched channels."""
        if in_backward():  # checkpointing runs it again
            return
        try:
            if _get_current_dispatch_mode() is None:
                most = self._most_of(output)
            else:
                with _disable_current_modes():  # to a RectifierTrace this is no reader
                    most = self._most_of(output)
            self.most = _larger(self.most, most)
            if self._network.training:
                self.most_trained = _larger(self.most_trained, most)
            self.passes += 1
        except Exception as error:
            self._failed(error)

    def _most_of(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.shape[1:2] != self.bias.shape:
            # Such as a tuple returned by a block: not readable, so taken as open.
            return torch.full_like(self.index, 1, dtype=torch.float)
        seen = output.detach().index_select(1, self.index)
        return seen.amax([d for d in range(seen.dim()) if d != 1]).float()


def _larger(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else torch.maximum(one, other)


class _Look:
    """The forward hook of a layer's witness. In copies of a network it does nothing."""

    def __init__(self, layer: _Layer) -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._layer.look_at(output)

    def __reduce__(self) -> tuple:
        return _look_away, ()


def _look_away() -> Callable:
    return _do_nothing


def _do_nothing(module: nn.Module, inputs: tuple, output: Any) -> None:
    """In place of a :class:`_Look`."""


class _Group:
    """The layers of one optimizer on one device, their channels one after another, (C,) in all.

    Attributes:
        watched (Tensor): Channels whose outputs are looked at, bool.
        proof (Tensor): For each of them the passes since its last sign of life.
        opened (Tensor): Channels that were decayed until they opened, bool.
        kept (Tensor): gamma and beta in float32, of which those of closed channels decay, (2, C).
        codes (Tensor, optional): Once in ``window`` steps what is to be watched: 0 where a bias
            had no gradient, 1 where its layer had none, 2 else.
        chosen (int): How often the watched channels were chosen.
    """

    def __init__(self, layers: list[_Layer], window: int, every: int) -> None:
        self.layers = layers
        self.window, self._every = window, every
        self.names = [layer.name for layer in layers]
        self.sizes = [len(layer.bias) for layer in layers]
        self._params = [[x.gamma for x in layers], [x.bias for x in layers]]
        ones = [torch.ones_like(layer.bias, dtype=torch.float) for layer in layers]
        self._factor = torch.cat([one * layer.factor**every for one, layer in zip(ones, layers)])
        self._shift = torch.cat([one * layer.shift for one, layer in zip(ones, layers)])
        # The number of each channel's layer.
        numbers = torch.arange(len(layers)).repeat_interleave(torch.tensor(self.sizes))
        self._layer = numbers.to(self._shift.device)
        self._zeros = [torch.zeros_like(layer.bias) for layer in layers]
        self.watched = torch.zeros_like(self._shift, dtype=torch.bool)
        self.proof = torch.zeros_like(self._shift, dtype=torch.int32)
        self.opened = torch.zeros_like(self.watched)
        self.codes: Tensor | None = None
        self.chosen = 0
        self._calls = 0
        self._is_watching = False  # the same on all ranks, even where something has failed
        self._closed: Tensor | None = None
        self._moved: Tensor | None = None  # biases with a gradient since it was last judged
        self._positions: list[tuple[int, Tensor]] = []
        self._index = self.watched.nonzero().flatten()
        self.follow()

    def follow(self) -> None:
        """Take gamma and beta from the layers, all of them."""
        gamma, bias = (torch.cat([p.detach().float() for p in params]) for params in self._params)
        self.kept = torch.stack([gamma, bias - self._shift])

    def watch(self, channels: Tensor) -> None:
        """Look at the outputs of these channels, and of no others, from now on."""
        now, before = channels.cpu(), self.watched.cpu()  # one wait for the device, not one a layer
        parts = zip(self.layers, now.split(self.sizes), before.split(self.sizes))
        for layer, mask, old in parts:
            if not torch.equal(mask, old):
                layer.watch(mask)
        self.proof = torch.where(channels & self.watched, self.proof, 0)
        self.watched = channels
        self._index = now.nonzero().flatten().to(channels.device)

    def note_step(self, failed: Callable[[Exception], None]) -> bool:
        """Count a step, note which biases have a gradient, and say whether it is time to judge."""
        self._calls += 1
        try:
            if self._is_watching:
                grads = [layer.bias.grad for layer in self.layers]
                moved = [z if g is None else g for z, g in zip(self._zeros, grads)]
                now = torch.cat(moved) != 0
                self._moved = now if self._moved is None else self._moved | now
        except Exception as error:
            failed(error)
        return (self._calls - 1) % self._every == 0

    def exchange_evidence(self, has_failed: bool) -> tuple[Tensor | None, Any]:
        """What was open in the passes since the last step, and the number of each layer's passes.

        Of each channel 0 if it was closed, 1 if it was open, 2 if so in training; of the layers a
        list or, by channel, a tensor. A failed rank reports all channels as open.
        """
        if not self._is_watching:
            return None, []
        is_open = torch.ones_like(self.watched, dtype=torch.uint8)
        passes = [min(layer.passes, 255) for layer in self.layers]
        if not has_failed:
            is_open = self._evidence()
        if get_world_size() == 1:
            return is_open, passes
        both = torch.cat([is_open, is_open.new_tensor(passes)])
        all_reduce(both, 'max')
        is_open, counts = both[: len(is_open)], both[len(is_open) :].int()
        return is_open, counts.index_select(0, self._layer)

    def _evidence(self) -> Tensor:
        found = torch.zeros_like(self.watched, dtype=torch.uint8)
        if not len(self._index):
            return found
        codes = self._open('most')
        if any(layer.most_trained is not layer.most for layer in self.layers):
            codes = codes + self._open('most_trained')
        else:
            codes = 2 * codes
        return found.index_copy_(0, self._index, codes)

    def _open(self, key: str) -> Tensor:
        most = [_or_zeros(getattr(layer, key), layer.index) for layer in self.layers]
        return (~(torch.cat(most) <= 0)).byte()  # NaN is not closed

    def exchange_gradients(self, has_failed: bool) -> bool:
        """Once in ``window`` steps, which biases have a gradient, and whether a rank has failed."""
        self.codes = None
        if (self._calls - 1) % self.window:
            return False
        grads = [layer.bias.grad for layer in self.layers]
        parts = [
            torch.ones_like(x.bias, dtype=torch.uint8) if g is None else 2 * (g != 0).byte()
            for x, g in zip(self.layers, grads)
        ]
        codes = torch.cat([*parts, torch.full_like(parts[0][:1], has_failed)])
        if get_world_size() > 1:
            all_reduce(codes, 'max')
            has_failed = bool(codes[-1])
        self.codes = codes[:-1]
        again = self._is_watching and bool((self.codes == 1).any())
        self._is_watching = again or bool((self.codes == 0).any())
        return has_failed

    def judge(self, is_open: Tensor | None, passes: Any, found_inf: Tensor | None) -> None:
        """Count the passes since the last sign of life, and find what is closed."""
        if is_open is None:
            return
        self.opened |= (is_open == 2) & (self.proof >= self.window)
        if isinstance(passes, Tensor):
            self.proof += passes
        elif len(set(passes)) == 1:
            self.proof += passes[0]
        else:
            torch._foreach_add_(list(self.proof.split(self.sizes)), passes)
        living = (is_open > 0) | ~self.watched
        living = living if self._moved is None else living | self._moved
        self.proof.masked_fill_(living, 0)
        self._moved = None
        self._closed = self.proof >= self.window
        if not all(layer.learns for layer in self.layers):
            learn = [torch.full_like(z, layer.learns) for z, layer in zip(self._zeros, self.layers)]
            self._closed &= torch.cat(learn) > 0
        if found_inf is not None:  # of a fused optimizer, which skips the step by itself
            self._closed &= found_inf.to(self._closed.device) == 0
        for layer in self.layers:
            layer.forget()

    def clear_moments(self, optimizer: Optimizer) -> None:
        """Set averages of gradients to 0 for what is closed, once in ``window`` steps.

        In between only weight decay adds to them, and gamma and beta do not follow them.
        """
        if self._closed is None or self.codes is None:
            return
        self._positions = [
            (number, state)
            for number, param in enumerate(itertools.chain(*self._params))
            for key, state in optimizer.state.get(param, {}).items()
            if key in _POSITIONS and isinstance(state, Tensor) and state.shape == param.shape
        ]
        moving = (~self._closed).float().split(self.sizes)
        moments = [
            (state, part)
            for params in self._params
            for param, part in zip(params, moving)
            for key, state in optimizer.state.get(param, {}).items()
            if key in _MOMENTS and isinstance(state, Tensor) and state.shape == param.shape
        ]
        if moments:
            states = [state for state, _ in moments]
            torch._foreach_mul_(states, [part.to(state.dtype) for state, part in moments])

    def decay(self) -> None:
        """Set gamma and beta of closed channels to the decayed values, overriding the step."""
        closed, self._closed = self._closed, None
        if closed is None:
            return
        gamma, bias = (torch.cat([p.detach() for p in params]) for params in self._params)
        now = torch.stack([gamma.float(), bias.float() - self._shift])
        self.kept = torch.where(closed, self.kept * self._factor, now)
        moves = []
        for params, old, new in zip(
            self._params, (gamma, bias), (self.kept[0], self.kept[1] + self._shift)
        ):
            new = torch.where(closed, new.to(old.dtype), old)
            torch.split_with_sizes_copy(new, self.sizes, out=[p.detach() for p in params])
            if self._positions:
                moves += (new - old).split(self.sizes)
        for number, state in self._positions:
            state += moves[number]

    def choose(self) -> None:
        """Watch the filters without gradient, if it is time."""
        codes, self.codes = self.codes, None
        if codes is not None:
            self.watch((codes == 0) | (self.watched & (codes == 1)))
            self.chosen += 1
            # gamma and beta were not tracked while nothing was watched.
            kept = self.kept
            self.follow()
            self.kept = torch.where(self.proof >= self.window, kept, self.kept)

    def state_dict(self) -> dict[str, Any]:
        return {
            'layers': self.names,
            'calls': self._calls,
            'chosen': self.chosen,
            'watching': self._is_watching,
            # Since it was last judged.
            'passes': [layer.passes for layer in self.layers],
            'open': self._evidence().cpu(),
            'moved': (~self.watched if self._moved is None else self._moved).cpu(),
            **{key: getattr(self, key).cpu() for key in ('watched', 'proof', 'kept')},
        }

    def check(self, state: dict[str, Any]) -> None:
        """Check that a state fits this group, before any of it is loaded."""
        for key in ('watched', 'proof', 'kept', 'moved'):
            now = self.watched if key == 'moved' else getattr(self, key)
            if (state[key].shape, state[key].dtype) != (now.shape, now.dtype):
                raise ValueError('it is of other channels')
        if not all(isinstance(state[key], int) for key in ('calls', 'chosen', 'watching')):
            raise ValueError('it has no number of calls')

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.proof.device
        self._calls, self.chosen = state['calls'], state['chosen']
        self._is_watching = state['watching']
        self.watch(state['watched'].to(device))
        self.proof, self.kept = state['proof'].to(device), state['kept'].to(device)
        self._moved = state['moved'].to(device)
        parts = zip(self.layers, state['passes'], state['open'].to(device).split(self.sizes))
        for layer, passes, code in parts:
            if passes and len(layer.index):
                layer.passes = passes
                code = code.index_select(0, layer.index)
                layer.most, layer.most_trained = (code > 0).float(), (code == 2).float()


def _or_zeros(most: Tensor | None, index: Tensor) -> Tensor:
    return torch.zeros_like(index, dtype=torch.float) if most is None else most


def _learns(group: dict, key: str) -> bool:
    """Whether a parameter group has a nonzero learning rate; a tensor is taken as nonzero."""
    rate = group.get(key, group['lr'])
    return isinstance(rate, Tensor) or rate != 0
