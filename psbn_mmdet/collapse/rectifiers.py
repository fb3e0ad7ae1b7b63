"""Which BN layers feed a rectifier, found by watching a forward pass.

The order of modules does not tell: rectifiers are called as functions, a residual addition comes
between, one output has several readers. So every operation of one real pass is watched, below
autograd and autocast, where ReLU in all its spellings is one of few operations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from .census import find_norms

# Copies: what they return is still the output of the BN.
_COPIES = {'_to_copy', 'clone', 'contiguous', 'alias', 'lift_fresh'}
# These look at shape and type only.
_META = {'empty_like', 'zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like'}


@dataclass
class _Output:
    """One output of one BN, shared by all tensors that are views of it."""

    layer: str
    unread: int  # elements not yet overwritten in place; the tensor is no BN output beyond that


class RectifierTrace(TorchDispatchMode):
    """Watch the BN layers of a network in the forward passes made inside the ``with`` block.

    The network is left as it was: nothing is computed besides what the pass computes anyway, and
    the forward hooks on the layers are gone at the block's end.

    Args:
        model (nn.Module): The network.

    Attributes:
        rectifiers (dict[str, str]): For each BN layer that ran: 'relu' if all its readers are
            rectifiers that are zero below zero (ReLU, ReLU6, clamp(min=0)), 'leaky_relu' if they
            are rectifiers and at least one is a LeakyReLU, else 'other'.

    Examples:
        >>> with RectifierTrace(model) as trace:
        ...     model(images)
        >>> trace.rectifiers['layer1.0.bn1']
        'relu'
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._norms = find_norms(model)
        self._readers: dict[str, set[str]] = {}
        self._outputs = WeakTensorKeyDictionary()
        self._handles: list = []

    @property
    def rectifiers(self) -> dict[str, str]:
        """What follows each layer that ran."""
        return {layer: what_follows(readers) for layer, readers in self._readers.items()}

    def __enter__(self) -> RectifierTrace:
        for name, norm in self._norms.items():
            self._handles.append(norm.register_forward_hook(self._hook(name)))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._readers.setdefault(name, set())
            self._outputs[output] = _Output(name, output.numel())

        return hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [
            (tensor, self._outputs[tensor])
            for tensor in tree_flatten((args, kwargs))[0]
            if isinstance(tensor, Tensor) and tensor in self._outputs
        ]
        result = func(*args, **kwargs)
        operation = func._schema.name.split('::')[1]
        if not read or operation in _META or operation.startswith('new_'):
            return result
        returns = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        in_place = any(alias.is_write for alias in aliases)
        copied = operation in _COPIES
        if copied or (aliases and not in_place):
            for _, output in read:
                for value in returns:
                    self._outputs[value] = replace(output) if copied else output
            return result
        for tensor, output in read:
            if output.unread > 0:
                reader = _rectifier(operation, args, kwargs) if tensor is args[0] else 'other'
                self._readers[output.layer].add(reader)
            if in_place and tensor is args[0]:
                output.unread -= tensor.numel()
        return result


class ForwardTrace:
    """Watch the forward passes of a network that are made elsewhere, until :meth:`close`.

    Compiled parts of the network run uncompiled meanwhile, where torch can do that.

    Args:
        model (nn.Module): The network whose calls are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trace = RectifierTrace(model)
        self._stack = ExitStack()
        if hasattr(torch.compiler, 'set_stance'):
            self._stack.enter_context(torch.compiler.set_stance('force_eager'))
        for handle in (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._exit, always_call=True),
        ):
            self._stack.callback(handle.remove)

    @property
    def rectifiers(self) -> dict[str, str]:
        """What follows each layer, see :attr:`RectifierTrace.rectifiers`."""
        return self._trace.rectifiers

    def close(self) -> None:
        """Leave the network as it was."""
        self._stack.close()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._trace.__enter__()

    def _exit(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._trace.__exit__(None, None, None)


def what_follows(readers: set[str]) -> str:
    """What follows a layer, from what each reader of its output is.

    Args:
        readers (set[str]): Of 'relu', 'leaky_relu' and 'other'.

    Returns:
        str: 'relu' if all readers are, 'leaky_relu' if they are rectifiers of either kind, else,
        and if there is no reader, 'other'.
    """
    if readers == {'relu'}:
        return 'relu'
    return 'leaky_relu' if readers and readers <= {'relu', 'leaky_relu'} else 'other'


def _rectifier(operation: str, args: tuple, kwargs: dict) -> str:
    """'relu', 'leaky_relu' or 'other', from the operation's name and arguments."""
    operation = operation.rstrip('_')

    def argument(position: int, name: str, default: Any = None) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    if operation in ('relu', 'relu6'):
        return 'relu'
    if operation == 'leaky_relu':
        return 'leaky_relu'
    if operation in ('clamp', 'clamp_min') and _is_zero(argument(1, 'min')):
        return 'relu'
    if operation == 'hardtanh' and _is_zero(argument(1, 'min_val', -1)):
        return 'relu'
    if (
        operation == 'threshold'
        and _is_zero(argument(1, 'threshold'))
        and _is_zero(argument(2, 'value'))
    ):
        return 'relu'
    return 'other'


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def trace_rectifiers(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, str]:
    """Find out which BN layers feed a rectifier, by one forward pass without any effect.

    Running statistics and all other buffers, random number generators, hooks, training flags and
    gradients are afterwards what they were, and ``inputs`` are not written to.

    Args:
        model (nn.Module): The network, in the mode it is to be watched in.
        *inputs: Passed to ``model``.
        **kwargs: Passed to ``model``.

    Returns:
        dict[str, str]: See :attr:`RectifierTrace.rectifiers`; layers that did not run are absent.

    Examples:
        >>> rectifiers = trace_rectifiers(resnet, torch.randn(2, 3, 64, 64))
        >>> census(resnet, rectifiers=rectifiers).count('dead')
    """
    inputs, kwargs = tree_map_only(Tensor, torch.clone, (inputs, kwargs))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _random_state_kept(), torch.no_grad(), RectifierTrace(model) as trace:
        try:
            model(*inputs, **kwargs)
        finally:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    return trace.rectifiers


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
