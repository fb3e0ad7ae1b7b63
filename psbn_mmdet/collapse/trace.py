"""Which BN layers feed a rectifier, found by watching a forward pass.

The order of modules does not tell: rectifiers are called as functions, a residual addition comes
between, one output has several readers. So every operation of one real pass is watched, below
autograd and autocast, where ReLU in all its spellings is one of few operations.
"""

from __future__ import annotations

import random
from collections import Counter
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
from .restore import CONVOLUTIONS

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
    the forward hooks on the layers are gone at the block's end. It may be entered again; what was
    seen before is kept. What fails in the watching itself is kept in ``failure`` and ends it,
    never the pass.

    A layer's output is what torch's batch normalisation returns while the layer's ``forward``
    runs. So an activation inside the layer, as in timm's ``BatchNormAct2d``, is seen as well.

    Args:
        model (nn.Module): The network.

    Attributes:
        rectifiers (dict[str, str]): For each BN layer that ran: 'relu' if all its readers are
            rectifiers that are zero below zero (ReLU, ReLU6, clamp(min=0)), 'leaky_relu' if they
            are rectifiers and at least one is a LeakyReLU, else 'other'.
        unknown (dict[str, str]): Why it is not known what follows the other layers.
        witnesses (dict[str, str]): For each layer that feeds ReLUs alone ('relu'), or sums that do,
            the module whose output is positive where the filter is open: the layer itself, or
            what returns the rectified sum, such as a residual block.
        producers (dict[str, str]): By layer that feeds ReLUs alone, the convolution or linear
            layer that feeds it and nothing else; layers that are fed otherwise are absent.
        consumers (dict[str, list[str]]): By layer, the convolutions and linear layers that read
            what a ReLU has made of the layer's output, and nothing else.
        failure (Exception, optional): What ended the watching.

    Examples:
        >>> with RectifierTrace(model) as trace:
        ...     model(images)
        >>> trace.rectifiers['layer1.0.bn1']
        'relu'
    """

    supports_higher_order_operators = True  # such as flex_attention

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self._norms = find_norms(model)
        self._modules = dict(model.named_modules())
        self._calls: Counter[str] = Counter()
        self._readers: dict[str, set[str]] = {}
        self._outputs = WeakTensorKeyDictionary()
        self._sums = WeakTensorKeyDictionary()  # the layers whose outputs were added up
        self._rectified = WeakTensorKeyDictionary()  # the same, for what a ReLU made of sums
        self._sum_readers: dict[str, set[str]] = {}
        self._returned: dict[str, list[str]] = {}  # by layer, what has returned its rectified sum
        self._made = WeakTensorKeyDictionary()  # the convolution that returned a tensor
        self._fed: dict[str, set[str | None]] = {}  # by convolution, the layers; None for others
        self._fed_by: dict[str, set[str | None]] = {}  # by layer, the convolutions
        self._activated = WeakTensorKeyDictionary()  # what a ReLU made of a layer: layer, version
        self._inputs: dict[str, set[str | None]] = {}  # by convolution, of which layers
        self._running: list[str] = []  # the layers whose forward is under way
        self._handles: list = []

    @property
    def rectifiers(self) -> dict[str, str]:
        """What follows each layer that ran."""
        return {layer: what_follows(readers) for layer, readers in self._readers.items()}

    @property
    def unknown(self) -> dict[str, str]:
        """Why it is not known what follows the other layers."""
        return {
            name: f'{type(norm).__name__} runs no batch normalisation of torch'
            if self._calls[name]
            else 'did not run'
            for name, norm in self._norms.items()
            if name not in self._readers
        }

    @property
    def witnesses(self) -> dict[str, str]:
        """The module whose output is positive where a filter of the layer is open."""
        found = {layer: layer for layer, kind in self.rectifiers.items() if kind == 'relu'}
        for layer, readers in self._sum_readers.items():
            if self._readers[layer] == {'add'} and readers == {'relu'}:
                # A ReLU module may serve several places; a block has one output.
                calls = self._calls[layer]
                returned = [m for m in self._returned.get(layer, []) if self._calls[m] == calls]
                if returned:
                    found[layer] = returned[0]
        return found

    @property
    def producers(self) -> dict[str, str]:
        """The convolution that feeds a layer and nothing else."""
        found: dict[str, str] = {}
        for layer, names in self._fed_by.items():
            name = next(iter(names)) if len(names) == 1 else None
            if name is None or self._fed[name] != {layer}:
                continue
            if what_follows(self._readers[layer]) == 'relu':
                found[layer] = name
        return found

    @property
    def consumers(self) -> dict[str, list[str]]:
        """The convolutions that read a layer's rectified output and nothing else."""
        found: dict[str, list[str]] = {}
        for name, layers in self._inputs.items():
            layer = next(iter(layers)) if len(layers) == 1 else None
            if layer is not None:
                found.setdefault(layer, []).append(name)
        return found

    def __enter__(self) -> RectifierTrace:
        for name, norm in self._norms.items():
            self._handles += [
                norm.register_forward_pre_hook(self._hook(name, enters=True)),
                norm.register_forward_hook(self._hook(name, enters=False), always_call=True),
            ]
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._note_return(name)))
            if type(module) in CONVOLUTIONS:
                self._handles.append(module.register_forward_pre_hook(self._note_input(name)))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()
        for tensors in (
            self._outputs,
            self._sums,
            self._rectified,
            self._made,
            self._activated,
        ):
            tensors.clear()

    def _hook(self, name: str, enters: bool) -> Callable:
        def hook(*args: Any) -> None:
            if enters:
                self._running.append(name)
            elif self._running:
                self._running.pop()

        return hook

    def _note_return(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            self._calls[name] += 1
            if isinstance(output, Tensor):
                for layer in self._rectified.get(output, ()):
                    self._returned.setdefault(layer, []).append(name)
                if type(module) in CONVOLUTIONS:
                    self._made[output] = name

        return hook

    def _note_input(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if _in_backward():  # checkpointing runs it again
                return
            layer, version = self._activated.get(inputs[0], (None, 0)) if inputs else (None, 0)
            as_it_was = layer is not None and _version(inputs[0]) == version
            self._inputs.setdefault(name, set()).add(layer if as_it_was else None)

        return hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What the backward pass reads tells nothing of what follows a layer.
        if self.failure is not None or _in_backward():
            return func(*args, **kwargs)
        read: list[tuple[Tensor, _Output]] = []
        summed = False
        try:
            read, summed = self._known_in((args, kwargs))
            self._note_fed(func, args, kwargs)
        except Exception as error:
            self.failure = error
        result = func(*args, **kwargs)
        if self.failure is None and hasattr(func, '_schema') and 'pool' in func._schema.name:
            self._note_pool(args, result)
        if self.failure is None and (read or summed or self._running):
            try:
                if hasattr(func, '_schema'):
                    self._note_sum(func._schema.name.split('::')[1], args, kwargs, read, result)
                self._note(func, args, kwargs, read, result)
            except Exception as error:
                self.failure = error
        return result

    def _known_in(self, values: Any) -> tuple[list[tuple[Tensor, _Output]], bool]:
        """The outputs among the operands, and whether there is a sum of outputs."""
        tensors = [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
        read = [(tensor, self._outputs[tensor]) for tensor in tensors if tensor in self._outputs]
        return read, any(tensor in self._sums or tensor in self._rectified for tensor in tensors)

    def _note_fed(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Note what reads the outputs of convolutions, and what feeds the layers."""
        operation = func._schema.name.split('::')[1] if hasattr(func, '_schema') else ''
        layer = self._running[-1] if self._running and 'batch_norm' in operation else None
        if layer is not None:
            self._fed_by.setdefault(layer, set()).add(self._made.get(args[0]))
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, Tensor) and tensor in self._made and not _looks_only(operation):
                reader = layer if tensor is args[0] else None
                self._fed.setdefault(self._made[tensor], set()).add(reader)

    def _note_pool(self, args: tuple, result: Any) -> None:
        """A channel of zeros is one of zeros after pooling, too."""
        layer, version = self._activated.get(args[0], (None, 0))
        if layer is not None and _version(args[0]) == version:
            pooled = result[0] if isinstance(result, tuple) else result
            self._activated[pooled] = layer, _version(pooled)

    def _note_sum(self, operation: str, args: tuple, kwargs: dict, read: list, result: Any) -> None:
        """Follow sums of outputs until something else than an addition reads them."""
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        layers = {layer for tensor in tensors for layer in self._sums.get(tensor, ())}
        for tensor in tensors:
            if operation.endswith('_') and tensor is args[0]:
                self._sums.pop(tensor, None)
                self._rectified.pop(tensor, None)
        adds = operation.rstrip('_') == 'add' and kwargs.get('alpha', 1) == 1
        if adds and all(tensor.shape == result.shape for tensor in tensors):
            layers |= {output.layer for _, output in read if output.unread > 0}
            if layers:
                self._sums[result] = frozenset(layers)
        elif layers and not _looks_only(operation):
            kind = _rectifier(operation, args, kwargs)
            for layer in layers:
                self._sum_readers.setdefault(layer, set()).add(kind)
            if kind == 'relu':
                self._rectified[result] = frozenset(layers)

    def _note(self, func: Any, args: tuple, kwargs: dict, read: list, result: Any) -> None:
        """Note which outputs an operation has read, and of which it returns a part or a copy."""
        if not hasattr(func, '_schema'):  # an operator of higher order
            for _, output in read:
                self._readers[output.layer].add('other')
            return
        operation = func._schema.name.split('::')[1]
        returns = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        if self._running and 'batch_norm' in operation and returns[0].shape == args[0].shape:
            layer = self._running[-1]
            self._readers.setdefault(layer, set())
            self._outputs[returns[0]] = _Output(layer, returns[0].numel())
        if not read or _looks_only(operation):
            return
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        in_place = any(alias.is_write for alias in aliases)
        copied = operation in _COPIES
        if copied or (aliases and not in_place):
            for _, output in read:
                for value in returns:
                    self._outputs[value] = replace(output) if copied else output
            return
        for tensor, output in read:
            if output.unread > 0:
                reader = _rectifier(operation, args, kwargs) if tensor is args[0] else 'other'
                if operation.rstrip('_') == 'add':
                    reader = 'add'
                self._readers[output.layer].add(reader)
                whole = output.unread == tensor.numel()
                whole &= tensor.shape[1:2] == (self._norms[output.layer].num_features,)
                if reader == 'relu' and whole:
                    # torch counts a write in place after this.
                    self._activated[returns[0]] = output.layer, _version(tensor) + in_place
            if in_place and tensor is args[0]:
                output.unread -= tensor.numel()


class StepTrace:
    """Watch the first training steps of a network, until each BN layer has run.

    The model's ``train_step`` is replaced meanwhile, on this object alone: whatever way it takes
    through the network is seen, and an exception in it leaves nothing behind. Compiled parts of
    the network run uncompiled in these steps, where torch can do that.

    Args:
        model (nn.Module): Whose ``train_step`` is called, such as a DDP wrapper.
        network (nn.Module): What is watched: the model itself, or what it wraps.
        bound (int): The most steps to watch. Defaults to 20.

    Attributes:
        active (bool): Whether steps are still watched.
        rectifiers (dict[str, str]): See :class:`RectifierTrace`.
        unknown (dict[str, str]): See :class:`RectifierTrace`.
        witnesses (dict[str, str]): See :class:`RectifierTrace`.
        producers (dict[str, str]): See :class:`RectifierTrace`.
        consumers (dict[str, list[str]]): See :class:`RectifierTrace`.
        failure (Exception, optional): See :class:`RectifierTrace`.
    """

    def __init__(self, model: nn.Module, network: nn.Module, bound: int = 20) -> None:
        self._trace = RectifierTrace(network)
        self._model = model
        self._train_step: Any = model.train_step
        self._was_own = 'train_step' in vars(model)  # as where MMEngine has compiled it
        self._steps = 0
        self._bound = bound
        self.active = True
        vars(model)['train_step'] = self._watched

    @property
    def rectifiers(self) -> dict[str, str]:
        """What follows each layer that ran."""
        return self._trace.rectifiers

    @property
    def unknown(self) -> dict[str, str]:
        """Why it is not known what follows the other layers."""
        return {
            name: f'{why} in {self._steps} iterations' if why == 'did not run' else why
            for name, why in self._trace.unknown.items()
        }

    @property
    def witnesses(self) -> dict[str, str]:
        """See :class:`RectifierTrace`."""
        return self._trace.witnesses

    @property
    def producers(self) -> dict[str, str]:
        """See :class:`RectifierTrace`."""
        return self._trace.producers

    @property
    def consumers(self) -> dict[str, list[str]]:
        """See :class:`RectifierTrace`."""
        return self._trace.consumers

    @property
    def failure(self) -> Exception | None:
        """What ended the watching."""
        return self._trace.failure

    def close(self) -> None:
        """Watch no more."""
        if not self.active:
            return
        self.active = False
        # One that was started later is left in place, and takes this one away when it ends.
        own = vars(self._model)
        while isinstance(trace := getattr(own.get('train_step'), '__self__', None), StepTrace):
            if trace.active:
                break
            if trace._was_own:
                own['train_step'] = trace._train_step
            else:
                del own['train_step']

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self._train_step(*args, **kwargs)
        with ExitStack() as stack:
            if hasattr(torch.compiler, 'set_stance'):
                stack.enter_context(torch.compiler.set_stance('force_eager'))
            stack.enter_context(self._trace)
            result = self._train_step(*args, **kwargs)
        self._steps += 1
        if not self._trace.unknown or self.failure is not None or self._steps >= self._bound:
            self.close()
        return result


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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _version(tensor: Tensor) -> int:
    """Grows with each write in place, of views too; inference mode counts none."""
    return 0 if tensor.is_inference() else tensor._version


def _looks_only(operation: str) -> bool:
    """Whether an operation looks at shape and type of what it reads, not at the values."""
    return operation in _META or operation.startswith('new_')


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


@dataclass(frozen=True)
class Structure:
    """What stands around the BN layers of a network.

    Attributes:
        rectifiers (dict[str, str]): See :class:`RectifierTrace`.
        producers (dict[str, str]): See :class:`RectifierTrace`.
        consumers (dict[str, list[str]]): See :class:`RectifierTrace`.
    """

    rectifiers: dict[str, str]
    producers: dict[str, str]
    consumers: dict[str, list[str]]

    def renamed(self, remove: str, add: str) -> Structure:
        """With one prefix of all names removed, and another put before them.

        Args:
            remove (str): What has not got it is left out.
            add (str): The other.
        """

        def new(name: str) -> str:
            return add + name[len(remove) :]

        return Structure(
            {new(k): v for k, v in self.rectifiers.items() if k.startswith(remove)},
            {
                new(k): new(v)
                for k, v in self.producers.items()
                if k.startswith(remove) and v.startswith(remove)
            },
            {
                new(k): [new(v) for v in names if v.startswith(remove)]
                for k, names in self.consumers.items()
                if k.startswith(remove)
            },
        )


def trace_rectifiers(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, str]:
    """Find out which BN layers feed a rectifier, by one forward pass without any effect.

    Arguments are those of :func:`trace_structure`.

    Returns:
        dict[str, str]: See :attr:`RectifierTrace.rectifiers`; layers that did not run are absent.

    Examples:
        >>> rectifiers = trace_rectifiers(resnet, torch.randn(2, 3, 64, 64))
        >>> census(resnet, rectifiers=rectifiers).count('dead')
    """
    return trace_structure(model, *inputs, **kwargs).rectifiers


def trace_structure(model: nn.Module, *inputs: Any, **kwargs: Any) -> Structure:
    """Find out what stands around the BN layers, by one forward pass without any effect.

    Running statistics and all other buffers, random number generators, hooks, training flags and
    gradients are afterwards what they were, and ``inputs`` are not written to.

    Args:
        model (nn.Module): The network, in the mode it is to be watched in.
        *inputs: Passed to ``model``.
        **kwargs: Passed to ``model``.

    Returns:
        Structure: Layers that did not run are absent.
    """
    inputs, kwargs = tree_map_only(Tensor, torch.clone, (inputs, kwargs))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _random_state_kept(), torch.no_grad(), RectifierTrace(model) as trace:
        try:
            model(*inputs, **kwargs)
        finally:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    if trace.failure is not None:
        raise trace.failure
    return Structure(trace.rectifiers, trace.producers, trace.consumers)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
