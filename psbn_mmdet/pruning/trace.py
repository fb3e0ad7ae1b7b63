"""Which channels of a network belong together, and what is in them, found by watching passes.

Every channel of every tensor has a number. Convolutions and linear layers create new numbers.
Channel-wise operations pass them on, sums and products merge channels, concatenations and
flattenings move them. Any other operation *needs* the channels it reads, so they stay. Sliced and
regrouped channels stay, too, since the code counts their positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..collapse import find_norms
from ..collapse.structure import CONVOLUTIONS, looks_only
from ..layers import PostShiftedBatchNorm

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, PostShiftedBatchNorm)
_RECTIFIERS = {'relu', 'relu6', 'clamp', 'clamp_min', 'hardtanh', 'threshold'}
# In addition to what this torch tags as pointwise.
_POINTWISE = {
    *_RECTIFIERS,
    *('_to_copy', 'contiguous', 'lift_fresh', 'detach'),
    *('leaky_relu', 'prelu', 'elu', 'silu', 'gelu', 'mish', 'hardswish', 'hardsigmoid'),
}
_REDUCE = {'mean', 'sum', 'amax', 'amin'}


@dataclass
class Watched:
    """The values of channels at one place, over all passes; arrays of shape (C,).

    Attributes:
        channels (np.ndarray): Their numbers.
        least (np.ndarray): The smallest values.
        most (np.ndarray): The largest ones.
    """

    channels: np.ndarray
    least: np.ndarray
    most: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    count: int = 0

    @classmethod
    def new(cls, channels: np.ndarray) -> Watched:
        """Before anything was seen."""
        inf, zero = np.full(len(channels), np.inf), np.zeros(len(channels))
        return cls(channels, inf, -inf, zero.copy(), zero.copy())

    def add(self, values: Tensor, dim: int) -> None:
        """Add values, with the channels along a dimension."""
        flat = values.detach().double().movedim(dim, 0).flatten(1)
        if flat.numel() == 0:
            return
        self.least = np.minimum(self.least, flat.amin(1).cpu().numpy())
        self.most = np.maximum(self.most, flat.amax(1).cpu().numpy())
        self.total += flat.sum(1).cpu().numpy()
        self.squares += (flat * flat).sum(1).cpu().numpy()
        self.count += flat.shape[1]

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviations."""
        mean = self.total / max(self.count, 1)
        return np.sqrt(np.maximum(self.squares / max(self.count, 1) - mean**2, 0))


@dataclass
class Layer:
    """A convolution, linear layer or norm.

    Attributes:
        inputs (np.ndarray, optional): Numbers of the channels it reads, one for each column of its
            weight; None if they are unknown, such as the channels of an image.
        outputs (np.ndarray): Numbers of the channels it writes; for a norm and a depthwise
            convolution they are its inputs.
        read (Watched, optional): The values of the inputs.
        readers (set[str]): Layers and operations that read the outputs.
    """

    outputs: np.ndarray
    inputs: np.ndarray | None = None
    read: Watched | None = None
    readers: set[str] = field(default_factory=set)


class ChannelTrace(TorchDispatchMode):
    """Watch a network in the forward passes made inside the ``with`` block.

    The network is not changed; its hooks are removed at the block's end.

    Args:
        model (nn.Module): The network, in evaluation mode.

    Attributes:
        layers (dict[str, Layer]): By name.
        rectified (dict[tuple[str, int], Watched]): The inputs of rectifiers, by the module and
            the number of its call in a pass.
        needed (dict[int, str]): Channels that cannot be cut, with the reason.

    Examples:
        >>> with torch.no_grad(), ChannelTrace(model) as trace:
        ...     model(images)
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = dict(model.named_modules())
        self._known = {
            name: module
            for name, module in self._modules.items()
            if type(module) in (*CONVOLUTIONS, *TRANSPOSED) or is_norm(module)
        }
        norms = find_norms(model)
        owners: dict[Tensor, list[str]] = {}
        for name, module in self._modules.items():
            for param in module._parameters.values():
                if param is not None:
                    owners.setdefault(param, []).append(name)
        self._shared = {n for names in owners.values() if len(names) > 1 for n in names}
        self._owner = {p: names[0] for p, names in owners.items() if names[0] in self._known}
        self._without_gamma = {n for n, m in self._known.items() if is_norm(m) and n not in norms}
        self.layers: dict[str, Layer] = {}
        self.rectified: dict[tuple[str, int], Watched] = {}
        self.needed: dict[int, str] = {}
        self._parents: list[int] = []
        self._united: set[tuple[bytes, bytes]] = set()
        # By tensor, the dimension of its channels, and their numbers.
        self._channels = WeakTensorKeyDictionary()
        self._made = WeakTensorKeyDictionary()  # the convolution whose output a tensor is
        self._views: dict[Any, list[_Axis | None]] = {}
        self._stack: list[str] = []
        self._calls: dict[str, int] = {}
        self._given: list[list[tuple[Tensor, int]]] = []
        self._reads = WeakTensorKeyDictionary()  # how often a tensor was read
        self._handles: list = []

    # Numbers

    def root(self, channel: int) -> int:
        """The number that represents all channels merged with this one."""
        parents = self._parents
        while parents[channel] != channel:
            parents[channel] = parents[parents[channel]]
            channel = parents[channel]
        return channel

    def roots(self, channels: np.ndarray) -> np.ndarray:
        """The same, for an array."""
        return np.array([self.root(c) for c in channels.flatten().tolist()]).reshape(channels.shape)

    def _new(self, count: int) -> np.ndarray:
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _unite(self, one: np.ndarray, other: np.ndarray) -> None:
        if one is other:
            return
        key = one.tobytes(), other.tobytes()
        if key in self._united:
            return
        self._united.add(key)
        for a, b in zip(one.flatten().tolist(), other.flatten().tolist()):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parents[max(a, b)] = min(a, b)

    def _need(self, channels: np.ndarray | None, why: str) -> None:
        if channels is not None:
            for channel in np.unique(channels).tolist():
                self.needed.setdefault(channel, why)

    def _channels_at(self, tensor: Tensor, dim: int) -> np.ndarray | None:
        """Numbers of the channels along a dimension, None if they are not known."""
        axis = self._channels.get(tensor)
        return axis[1] if axis is not None and axis[0] == dim % tensor.dim() else None

    def _need_all(self, tensor: Tensor, why: str) -> None:
        if tensor in self._channels:
            self._need(self._channels[tensor][1], why)

    # Modules

    def __enter__(self) -> ChannelTrace:
        for name, module in self._modules.items():
            self._handles += [
                module.register_forward_pre_hook(self._enters(name)),
                module.register_forward_hook(self._leaves(name), always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        for under_way in (self._handles, self._stack, self._given):
            under_way.clear()
        for seen in (self._channels, self._made, self._reads, self._calls):
            seen.clear()

    def _enters(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if not self._stack:  # a new pass
                self._calls.clear()
            tensors = [t for t in inputs if isinstance(t, Tensor) and t in self._channels]
            is_leaf = next(module.children(), None) is None
            self._given.append([(t, self._reads.get(t, 0)) for t in tensors if is_leaf])
            self._stack.append(name)

        return hook

    def _leaves(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if self._stack:
                self._stack.pop()
            given = self._given.pop() if self._given else []
            if name in self._known and self._is_within_known() is None:
                self._call(name, module, inputs, output)
                return
            returned = [v for v in tree_flatten(output)[0] if isinstance(v, Tensor)]
            for tensor, reads in given:
                # Operators that torch does not dispatch, such as MMCV's, read unseen.
                if self._reads.get(tensor, 0) == reads and not any(v is tensor for v in returned):
                    self._need_all(tensor, f'{type(module).__name__} reads them')
            if not self._stack:  # the whole network's
                for value in returned:
                    self._need_all(value, 'the network returns them')

        return hook

    def _is_within_known(self) -> str | None:
        return next((name for name in self._stack if name in self._known), None)

    def _call(self, name: str, module: Any, inputs: tuple, output: Any) -> None:
        """A convolution, linear layer or norm has run."""
        x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        if x is None or not isinstance(output, Tensor):
            return
        dim = -1 if isinstance(module, nn.Linear) else 1
        channels = self._channels_at(x, dim)
        self._reads[x] = self._reads.get(x, 0) + 1
        if channels is None:
            self._need_all(x, f'{name} reads them along another dimension')
        self._note_reader(x, name)
        if is_norm(module):
            if channels is None or name in self._shared:
                why = f'{name} shares its parameters, or reads others, too'
                self._shared.add(name)
                self._need(channels, why)
                if name in self.layers:
                    self._need(self.layers[name].outputs, why)
                return
            layer = self.layers.setdefault(name, Layer(channels, channels))
            self._unite(layer.outputs, channels)
            if name in self._without_gamma:
                self._need(channels, f'{name} has no gamma')
            self._put(output, channels, 1)
            return
        transposed = isinstance(module, TRANSPOSED)
        groups = getattr(module, 'groups', 1)
        count = module.weight.shape[1] if transposed else module.weight.shape[0]
        is_depthwise = not transposed and 1 < groups == count == x.shape[1]
        if name not in self.layers:
            new = channels if is_depthwise and channels is not None else self._new(count)
            self.layers[name] = Layer(new, channels)
        layer = self.layers[name]
        if channels is None or layer.inputs is None:
            if channels is not layer.inputs:  # sometimes known, sometimes not
                self._need(channels, f'{name} reads others, too')
                self._need(layer.inputs, f'{name} reads others, too')
        elif not is_depthwise:
            self._unite(layer.inputs, channels)
            layer.read = layer.read or Watched.new(layer.inputs)
            layer.read.add(x, dim)
        else:
            self._unite(layer.outputs, channels)
        is_own = isinstance(module._parameters.get('weight'), nn.Parameter)
        if (groups > 1 and not is_depthwise) or name in self._shared or not is_own:
            why = f'{name} is in groups' if groups > 1 else f'the weight of {name} is not its own'
            self._need(layer.inputs, why)
            self._need(layer.outputs, why)
        self._put(output, layer.outputs, dim)
        self._made[output] = name

    def _note_reader(self, tensor: Tensor, reader: str) -> None:
        maker = self._made.get(tensor)
        if maker is not None:
            self.layers[maker].readers.add(reader)

    def _put(self, tensor: Tensor, channels: np.ndarray, dim: int) -> None:
        self._channels[tensor] = dim % tensor.dim(), channels

    # Operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._is_within_known() is not None:
            return func(*args, **kwargs)
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        operation = _name_of(func)
        for name in {self._owner[tensor] for tensor in tensors if tensor in self._owner}:
            # Read by a function; psBN looks at its bias before it runs.
            if not is_norm(self._modules[name]) or 'batch_norm' in operation:
                self._shared.add(name)
                if name in self.layers:
                    self._need(self.layers[name].inputs, f'{name} is read elsewhere')
                    self._need(self.layers[name].outputs, f'{name} is read elsewhere')
        tracked = [tensor for tensor in tensors if tensor in self._channels]
        if not tracked:
            return func(*args, **kwargs)
        before = {id(tensor): self._channels[tensor] for tensor in tracked}
        if operation in _RECTIFIERS and tracked[0] is args[0]:
            self._see_rectified(args[0])
        result = func(*args, **kwargs)
        if looks_only(operation):
            return result
        for tensor in tracked:
            self._reads[tensor] = self._reads.get(tensor, 0) + 1
            self._note_reader(tensor, operation)
        self._pass_on(func, operation, args, kwargs, tensors, before, result)
        return result

    def _see_rectified(self, tensor: Tensor) -> None:
        name = self._stack[-1] if self._stack else ''
        self._calls[name] = self._calls.get(name, 0) + 1
        dim, channels = self._channels[tensor]
        watched = self.rectified.setdefault((name, self._calls[name]), Watched.new(channels))
        if len(watched.channels) == len(channels):
            self._unite(watched.channels, channels)
            watched.add(tensor, dim)
        else:
            self._need(channels, f'a rectifier of {name} reads now these, now others')

    def _pass_on(
        self,
        func: Any,
        operation: str,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        before: dict[int, _Axis],
        result: Any,
    ) -> None:
        returned = [v for v in tree_flatten(result)[0] if isinstance(v, Tensor)]
        found: list[_Axis | None] = []
        if hasattr(func, '_schema') and returned:
            if torch.Tag.pointwise in func.tags or operation in _POINTWISE:
                found = [self._pointwise(tensors, before, returned[0])]
            elif operation == 'cat':
                found = [self._cat(tensors, before, args, kwargs)]
            elif id(args[0]) in before and len(tensors) == 1:
                found = self._alone(func, operation, args, kwargs, before[id(args[0])], returned)
        if not found or found[0] is None:
            where = self._stack[-1] if self._stack else 'the network'
            for _, channels in before.values():
                self._need(channels, f'{operation or "an operator"} in {where} reads them')
            return
        for value, axis in zip(returned, found):
            if axis is not None:
                self._channels[value] = axis

    def _pointwise(
        self, tensors: list[Tensor], before: dict[int, _Axis], result: Tensor
    ) -> _Axis | None:
        """One with the other, from the last dimension on."""
        found: _Axis | None = None
        for tensor in tensors:
            if id(tensor) not in before:
                continue
            dim, channels = before[id(tensor)]
            back = dim - tensor.dim()
            if len(channels) == 1 and result.shape[back] > 1:  # one for all, such as a mask
                self._need(channels, 'one channel stands for many')
            elif found is None:
                found = result.dim() + back, channels
            elif found[0] == result.dim() + back:
                self._unite(found[1], channels)
            else:
                return None
        if found is None:
            return None
        back = found[0] - result.dim()
        others = [tensor for tensor in tensors if id(tensor) not in before]
        is_alike = all(t.dim() < -back or t.shape[back] == 1 for t in others)
        return found if is_alike else None

    def _cat(
        self, tensors: list[Tensor], before: dict[int, _Axis], args: tuple, kwargs: dict
    ) -> _Axis | None:
        axes = [before[id(tensor)] for tensor in tensors if id(tensor) in before]
        dim, numbers = axes[0][0], [channels for _, channels in axes]
        if len(axes) < len(tensors) or any(other != dim for other, _ in axes):
            return None
        along = (args[1] if len(args) > 1 else kwargs.get('dim', 0)) % tensors[0].dim()
        if dim == along:
            return dim, np.concatenate(numbers)
        for channels in numbers[1:]:
            self._unite(numbers[0], channels)
        return dim, numbers[0]

    def _alone(
        self, func: Any, operation: str, args: tuple, kwargs: dict, axis: _Axis, returned: list
    ) -> list[_Axis | None]:
        """Of an operation on one tensor."""
        tensor, (dim, channels) = args[0], axis
        if 'pool' in operation or operation.startswith('upsample'):
            is_spatial = dim == 1 and tensor.dim() == returned[0].dim() > 2
            return [axis] if is_spatial else [None]
        if operation == 'constant_pad_nd':
            return [axis] if len(args[1]) // 2 < tensor.dim() - dim else [None]
        if operation in _REDUCE:
            over = args[1] if len(args) > 1 else kwargs.get('dim')
            over = [d % tensor.dim() for d in ([over] if isinstance(over, int) else over or ())]
            if not over or dim in over:
                return [None]
            gone = sum(d < dim for d in over) if returned[0].dim() < tensor.dim() else 0
            return [(dim - gone, channels)]
        return self._viewed(func, args, kwargs, axis) if _is_view(func) else [None]

    def _viewed(self, func: Any, args: tuple, kwargs: dict, axis: _Axis) -> list[_Axis | None]:
        """The same with the places of the channels, which must all be there, in their order."""
        dim, channels = axis
        key = func, dim, tuple(args[0].shape), repr((args[1:], kwargs))
        if key not in self._views:
            shape = [1] * args[0].dim()
            shape[dim] = -1
            places = torch.arange(len(channels)).view(shape).expand(args[0].shape).contiguous()
            seen = tree_flatten(func(places, *args[1:], **kwargs))[0]
            self._views[key] = [_places(value.numpy(), len(channels)) for value in seen]
        return [found and (found[0], channels[found[1]]) for found in self._views[key]]


_Axis = tuple[int, np.ndarray]


def _places(labels: np.ndarray, count: int) -> _Axis | None:
    """Along which dimension what places stand, None if they were regrouped."""
    for dim in range(labels.ndim):
        other = tuple(d for d in range(labels.ndim) if d != dim)
        along = labels.min(other) if labels.size else np.empty(0)
        times = len(along) // count
        if not times or not (labels == np.expand_dims(along, other)).all():
            continue
        places = np.arange(count)
        if any(
            np.array_equal(along, x) for x in (np.repeat(places, times), np.tile(places, times))
        ):
            return dim, along
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether it is a plain BN, or psBN."""
    return type(module) in _NORMS or isinstance(module, PostShiftedBatchNorm)


def _name_of(func: Any) -> str:
    return func._schema.name.split('::')[1].rstrip('_') if hasattr(func, '_schema') else ''


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    name = func._schema.name.split('::')[1]
    return (bool(aliases) and not any(a.is_write for a in aliases)) or name == '_unsafe_view'
