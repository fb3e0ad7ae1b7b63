"""The structure around the BN layers of a network, found by watching a forward pass.

The order of modules is not enough: rectifiers may be functions, a residual addition may come
between, and an output may have several readers. So every operation of a real pass is watched below
autograd and autocast, where all spellings of ReLU are a few operations.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
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
# These read only shape and dtype.
_META = {'empty_like', 'zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like'}
# Convolutions whose weights are what they multiply by; subclasses may do something else.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Structure:
    """The structure around the BN layers of a network, by layer name.

    Attributes:
        rectifiers (dict[str, str]): For each layer that ran: 'relu' if all its readers are
            rectifiers that are zero below zero (ReLU, ReLU6, clamp(min=0)), 'leaky_relu' if they
            are rectifiers and at least one is a LeakyReLU, else 'other'.
        witnesses (dict[str, str]): By layer that feeds ReLUs alone ('relu'), or sums that do, the
            module whose output is positive where the filter is open: the layer itself, or what
            returns the rectified sum, such as a residual block.
        producers (dict[str, str]): By layer that feeds ReLUs alone, the convolution or linear
            layer that feeds it and nothing else; layers that are fed otherwise are absent.
        consumers (dict[str, list[str]]): By layer, the convolutions and linear layers that read
            what a ReLU has made of the layer's output, and nothing else, along its channels.
        kept (list[str]): Convolutions and linear layers that stand so, but whose weight is no
            parameter of their own alone: it is computed, as by weight normalization, or another
            module or function reads it, too.
    """

    rectifiers: dict[str, str] = field(default_factory=dict)
    witnesses: dict[str, str] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    consumers: dict[str, list[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def renamed(self, remove: str, add: str) -> Structure:
        """Replace the prefix of all names.

        Args:
            remove (str): The old prefix; names without it are dropped.
            add (str): The new prefix.
        """

        def new(names: list[str]) -> list[str]:
            return [add + name[len(remove) :] for name in names if name.startswith(remove)]

        def both(pairs: dict[str, str]) -> dict[str, str]:
            return {k: v for key, value in pairs.items() for k in new([key]) for v in new([value])}

        return Structure(
            {k: v for key, v in self.rectifiers.items() for k in new([key])},
            both(self.witnesses),
            both(self.producers),
            {k: new(names) for key, names in self.consumers.items() for k in new([key])},
            new(self.kept),
        )

    def shared(self, others: Sequence[Structure]) -> Structure:
        """The part that several structures share, such as those of all ranks."""

        def same(name: str) -> dict:
            mine = getattr(self, name)
            return {
                k: v for k, v in mine.items() if all(getattr(o, name).get(k) == v for o in others)
            }

        pairs = {name: same(name) for name in ('rectifiers', 'witnesses', 'producers', 'consumers')}
        return Structure(**pairs, kept=self.kept)


@dataclass
class _Output:
    """One output of one BN, shared by all tensors that are views of it."""

    layer: str
    unread: int  # elements not yet overwritten in place; the tensor is no BN output beyond that
    shape: torch.Size
    stride: tuple[int, ...]
    reads: list[str]  # the operations that have read it or a copy, which shares the list

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a tensor is all of the output, with its dimensions in their order."""
        whole = self.unread == tensor.numel()
        return whole and tensor.shape == self.shape and tensor.stride() == self.stride


class RectifierTrace(TorchDispatchMode):
    """Watch the BN layers of a network in the forward passes made inside the ``with`` block.

    The network does not change: nothing extra is computed, and the forward hooks are removed at the
    end of the block. The trace may be entered again and keeps its findings. An error in the
    watching is kept in ``failure`` and ends the watching, but never the pass.

    A layer's output is what torch's batch normalization returns while the layer's ``forward``
    runs. So an activation inside the layer, as in timm's ``BatchNormAct2d``, is seen as well.

    Args:
        model (nn.Module): The network.

    Attributes:
        structure (Structure): What was found.
        unknown (dict[str, str]): Why it is not known what follows the other layers.
        failure (Exception, optional): What ended the watching.

    Examples:
        >>> with RectifierTrace(model) as trace:
        ...     model(images)
        >>> trace.structure.rectifiers['layer1.0.bn1']
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
        # The convolution that has a parameter, None if several modules have it.
        self._owner: dict[Tensor, str | None] = {}
        for name, module in self._modules.items():
            for param in module._parameters.values():
                if param is not None:
                    is_first = param not in self._owner and type(module) in CONVOLUTIONS
                    self._owner[param] = name if is_first else None
        self._within: list[str] = []  # the convolutions whose forward is under way
        self._read_elsewhere: set[str] = set()
        self._given: list[
            list[tuple[_Output, int]]
        ] = []  # to the modules whose forward is under way
        self._handles: list = []

    @property
    def unknown(self) -> dict[str, str]:
        """Why it is not known what follows the other layers."""
        return {
            name: f'{type(norm).__name__} runs no batch normalization of torch'
            if self._calls[name]
            else 'did not run'
            for name, norm in self._norms.items()
            if name not in self._readers
        }

    @property
    def structure(self) -> Structure:
        """What was found so far."""
        rectifiers = {layer: what_follows(readers) for layer, readers in self._readers.items()}
        producers: dict[str, str] = {}
        for layer, convs in self._fed_by.items():
            conv = next(iter(convs)) if len(convs) == 1 else None
            if conv and self._fed[conv] == {layer} and rectifiers[layer] == 'relu':
                producers[layer] = conv
        consumers: dict[str, list[str]] = {}
        for name, layers in self._inputs.items():
            read = next(iter(layers)) if len(layers) == 1 else None
            if read is not None:
                consumers.setdefault(read, []).append(name)
        around = dict.fromkeys([*producers.values(), *itertools.chain(*consumers.values())])
        kept = [name for name in around if not self._has_own_weight(name)]
        return Structure(
            rectifiers,
            self._witnesses(rectifiers),
            {layer: name for layer, name in producers.items() if name not in kept},
            {layer: [n for n in names if n not in kept] for layer, names in consumers.items()},
            kept,
        )

    def _has_own_weight(self, name: str) -> bool:
        module = self._modules[name]
        own = [param for param in module._parameters.values() if param is not None]
        return (
            isinstance(module._parameters.get('weight'), nn.Parameter)
            and all(self._owner[param] == name for param in own)
            and name not in self._read_elsewhere
        )

    def _witnesses(self, rectifiers: dict[str, str]) -> dict[str, str]:
        found = {layer: layer for layer, kind in rectifiers.items() if kind == 'relu'}
        for layer, readers in self._sum_readers.items():
            if self._readers[layer] == {'add'} and readers == {'relu'}:
                # A ReLU module may serve several places; a block has one output.
                calls = self._calls[layer]
                returned = [m for m in self._returned.get(layer, []) if self._calls[m] == calls]
                if returned:
                    found[layer] = returned[0]
        return found

    def __enter__(self) -> RectifierTrace:
        for name, norm in self._norms.items():
            self._handles += [
                norm.register_forward_pre_hook(self._hook(name, enters=True)),
                norm.register_forward_hook(self._hook(name, enters=False), always_call=True),
            ]
        for name, module in self._modules.items():
            self._handles += [
                module.register_forward_pre_hook(self._note_given(name)),
                module.register_forward_hook(self._note_return(name), always_call=True),
            ]
            if type(module) in CONVOLUTIONS:
                self._handles.append(module.register_forward_pre_hook(self._note_input(name)))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        for under_way in (self._handles, self._running, self._within, self._given):
            under_way.clear()
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

    def _note_given(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            watched = next(module.children(), None) is None and not in_backward()
            tensors = [t for t in inputs if watched and isinstance(t, Tensor)]
            given = [self._outputs[tensor] for tensor in tensors if tensor in self._outputs]
            self._given.append([(output, len(output.reads)) for output in given])
            if type(module) in CONVOLUTIONS:
                self._within.append(name)

        return hook

    def _note_return(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            self._calls[name] += 1
            if type(module) in CONVOLUTIONS and self._within:
                self._within.pop()
            # Operators that torch does not dispatch, such as MMCV's, read unseen.
            for given, reads in self._given.pop() if self._given else ():
                returned = [v for v in tree_flatten(output)[0] if isinstance(v, Tensor)]
                passed = any(
                    self._outputs[v].reads is given.reads for v in returned if v in self._outputs
                )
                if len(given.reads) == reads and not passed:
                    self._readers[given.layer].add('other')
            if isinstance(output, Tensor) and not in_backward():
                for layer in self._rectified.get(output, ()):
                    self._returned.setdefault(layer, []).append(name)
                if type(module) in CONVOLUTIONS:
                    self._made[output] = name

        return hook

    def _note_input(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if in_backward():  # checkpointing runs it again
                return
            layer, version = self._activated.get(inputs[0], (None, 0)) if inputs else (None, 0)
            as_it_was = layer is not None and _version(inputs[0]) == version
            if isinstance(module, nn.Linear):  # reads along the last dimension
                as_it_was &= inputs[0].dim() == 2
            self._inputs.setdefault(name, set()).add(layer if as_it_was else None)

        return hook

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Reads in the backward pass say nothing about what follows a layer.
        if self.failure is not None or in_backward():
            return func(*args, **kwargs)
        read: list[tuple[Tensor, _Output]] = []
        summed = False
        try:
            read, summed = self._known_in((args, kwargs))
            self._note_fed(func, args, kwargs)
        except Exception as error:
            self.failure = error
        result = func(*args, **kwargs)
        if self.failure is None:
            try:
                if hasattr(func, '_schema') and 'pool' in func._schema.name:
                    self._note_pool(func, args, result)
                if not (read or summed or self._running):
                    return result
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
            if not isinstance(tensor, Tensor) or looks_only(operation):
                continue
            if tensor in self._made:
                reader = layer if tensor is args[0] else None
                self._fed.setdefault(self._made[tensor], set()).add(reader)
            # The optimizer's step runs outside all forwards.
            owner = self._owner.get(tensor) if self._given else None
            if owner is not None and self._within[-1:] != [owner]:
                self._read_elsewhere.add(owner)

    def _note_pool(self, func: Any, args: tuple, result: Any) -> None:
        """Follow pooling, which keeps a channel of zeros unless it pools over channels."""
        if not args or not isinstance(args[0], Tensor):
            return
        layer, version = self._activated.get(args[0], (None, 0))
        over = next((n for n in (1, 2, 3) if f'{n}d' in func._schema.name), None)
        if layer is not None and _version(args[0]) == version and over == args[0].dim() - 2:
            pooled = result[0] if isinstance(result, tuple) else result
            self._activated[pooled] = layer, _version(pooled)

    def _note_sum(self, operation: str, args: tuple, kwargs: dict, read: list, result: Any) -> None:
        """Follow sums of outputs until an operation other than addition reads them."""
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        layers = {layer for tensor in tensors for layer in self._sums.get(tensor, ())}
        for tensor in tensors:
            if operation.endswith('_') and tensor is args[0]:
                self._sums.pop(tensor, None)
                self._rectified.pop(tensor, None)
        if _adds_up(operation, kwargs, tensors, result):
            layers |= {output.layer for tensor, output in read if output.is_whole(tensor)}
            if layers:
                self._sums[result] = frozenset(layers)
        elif layers and not looks_only(operation):
            kind = _rectifier(operation, args, kwargs)
            for layer in layers:
                self._sum_readers.setdefault(layer, set()).add(kind)
            if kind == 'relu':
                self._rectified[result] = frozenset(layers)

    def _note(self, func: Any, args: tuple, kwargs: dict, read: list, result: Any) -> None:
        """Note the outputs that an operation reads, and those it returns a view or copy of."""
        if not hasattr(func, '_schema'):  # an operator of higher order
            for _, output in read:
                output.reads.append('')
                self._readers[output.layer].add('other')
            return
        operation = func._schema.name.split('::')[1]
        returns = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        if self._running and 'batch_norm' in operation and returns[0].shape == args[0].shape:
            layer = self._running[-1]
            self._readers.setdefault(layer, set())
            y = returns[0]
            self._outputs[y] = _Output(layer, y.numel(), y.shape, y.stride(), [])
        if not read or looks_only(operation):
            return
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        in_place = any(alias.is_write for alias in aliases)
        copied = operation in _COPIES
        if copied or (aliases and not in_place):
            for tensor, output in read:
                for value in returns:
                    # A copy may be laid out differently, of what has its dimensions in order.
                    stride = value.stride() if output.is_whole(tensor) else ()
                    copy = replace(output, stride=stride) if copied else output
                    self._outputs[value] = copy
            return
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        adds = _adds_up(operation, kwargs, tensors, returns[0]) if returns else False
        for tensor, output in read:
            output.reads.append(operation)
            if output.unread > 0:
                reader = _rectifier(operation, args, kwargs) if tensor is args[0] else 'other'
                if adds and output.is_whole(tensor):
                    reader = 'add'
                self._readers[output.layer].add(reader)
                if reader == 'relu' and output.is_whole(tensor):
                    # torch counts a write in place after this.
                    self._activated[returns[0]] = output.layer, _version(tensor) + in_place
            if in_place and tensor is args[0]:
                output.unread -= tensor.numel()


class StepTrace:
    """Watch the first training steps of a network, until each BN layer has run.

    The model's ``train_step``, or ``forward`` if it has none, is replaced meanwhile, on this object
    alone. Every path through the network is seen, and an exception leaves nothing behind. Compiled
    parts of the network run uncompiled in these steps, where torch supports that.
    Use :func:`watch_steps`.

    Args:
        model (nn.Module): What the training calls, such as a DDP wrapper.
        network (nn.Module): What is watched: the model itself, or what it wraps.
        bound (int): The most steps to watch. Defaults to 20.

    Attributes:
        active (bool): Whether steps are still watched.
        structure (Structure): What was found so far.
        unknown (dict[str, str]): See :class:`RectifierTrace`.
        failure (Exception, optional): See :class:`RectifierTrace`.
    """

    def __init__(self, model: nn.Module, network: nn.Module, bound: int = 20) -> None:
        self._trace = RectifierTrace(network)
        self._model = model
        self._method = _method_of(model)
        self._step: Any = getattr(model, self._method)
        self._was_own = self._method in vars(model)  # as where MMEngine has compiled it
        self._steps = 0
        self._bound = bound
        self.active = True
        vars(model)[self._method] = self._watched

    @property
    def structure(self) -> Structure:
        """What was found so far."""
        return self._trace.structure

    @property
    def unknown(self) -> dict[str, str]:
        """Why it is not known what follows the other layers."""
        return {
            name: f'{why} in {self._steps} iterations' if why == 'did not run' else why
            for name, why in self._trace.unknown.items()
        }

    @property
    def failure(self) -> Exception | None:
        """What ended the watching."""
        return self._trace.failure

    def close(self) -> None:
        """Stop watching."""
        if not self.active:
            return
        self.active = False
        if self._was_own:
            vars(self._model)[self._method] = self._step
        else:
            del vars(self._model)[self._method]

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self._step(*args, **kwargs)
        with ExitStack() as stack:
            if hasattr(torch.compiler, 'set_stance'):
                stack.enter_context(torch.compiler.set_stance('force_eager'))
            stack.enter_context(self._trace)
            result = self._step(*args, **kwargs)
        self._steps += 1
        if not self._trace.unknown or self.failure is not None or self._steps >= self._bound:
            self.close()
        return result


def watch_steps(model: nn.Module, network: nn.Module) -> StepTrace:
    """Watch a model's first training steps; callers share one :class:`StepTrace`.

    Args:
        model (nn.Module): What the training calls, such as a DDP wrapper.
        network (nn.Module): What is watched: the model itself, or what it wraps.
    """
    under_way = getattr(vars(model).get(_method_of(model)), '__self__', None)
    return under_way if isinstance(under_way, StepTrace) else StepTrace(model, network)


def _method_of(model: nn.Module) -> str:
    return 'train_step' if hasattr(model, 'train_step') else 'forward'


def _adds_up(operation: str, kwargs: dict, tensors: list[Tensor], result: Any) -> bool:
    """Whether an operation is a plain sum of tensors of one shape."""
    plain = operation.rstrip('_') == 'add' and kwargs.get('alpha', 1) == 1
    return plain and all(tensor.shape == result.shape for tensor in tensors)


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


def in_backward() -> bool:
    """Whether a backward pass is under way, in which checkpointing runs forward passes again."""
    return torch._C._current_graph_task_id() != -1


def _version(tensor: Tensor) -> int:
    """A count of in-place writes, also through views; always 0 in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def looks_only(operation: str) -> bool:
    """Whether an operation reads only shape and dtype of its inputs, not the values."""
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


def trace_rectifiers(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, str]:
    """Find the BN layers that feed a rectifier by one forward pass without side effects.

    Arguments are those of :func:`trace_structure`.

    Returns:
        dict[str, str]: See :class:`Structure`; layers that did not run are absent.

    Examples:
        >>> rectifiers = trace_rectifiers(resnet, torch.randn(2, 3, 64, 64))
        >>> census(resnet, rectifiers=rectifiers).count('dead')
    """
    return trace_structure(model, *inputs, **kwargs).rectifiers


def trace_structure(model: nn.Module, *inputs: Any, **kwargs: Any) -> Structure:
    """Find the structure around the BN layers by one forward pass without side effects.

    Running statistics and all other buffers, random number generators, hooks, training flags and
    gradients are restored, and ``inputs`` are not written to.

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
    return trace.structure


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
