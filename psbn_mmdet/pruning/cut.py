"""Cutting channels out of a network: which can be cut, and the network without them.

A channel can be cut if everything that reads it multiplies a constant: 0, or another constant that
the reader's bias can absorb. All its writers and readers lose it, and the network computes the
same.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..records import format_ranges, parse_ranges
from .trace import TRANSPOSED, ChannelTrace, is_norm

MARGIN = 1.0  # standard deviations


@dataclass(frozen=True)
class Cut:
    """What a network keeps, and what it loses.

    Attributes:
        kept (dict[str, dict[str, str]]): By layer, the channels kept of its 'inputs' and
            'outputs', as ranges; a layer or side that is absent is kept whole.
        constants (dict[str, Tensor]): By layer that reads cut channels, what they add to its
            outputs, shape (outputs,).
        left (dict[str, int]): Number of closed channels that stay, by reason.
        gone (set[int]): The channels that are cut, by their numbers in the trace.
        held (int): Number of channels that were never positive, but not by the margin.
    """

    kept: dict[str, dict[str, str]]
    constants: dict[str, Tensor]
    left: dict[str, int]
    gone: set[int]
    held: int


def plan(trace: ChannelTrace, model: nn.Module, margin: float = MARGIN) -> Cut:
    """Decide what is cut.

    Args:
        trace (ChannelTrace): That has watched the model on images.
        model (nn.Module): The model.
        margin (float): By how many of its own standard deviations the largest value before a
            rectifier must lie below 0. Defaults to 1.

    Returns:
        Cut: At least one channel of each layer stays.
    """
    modules = dict(model.named_modules())
    count = len(trace._parents)
    root = trace.roots(np.arange(count))
    is_open = np.zeros(count, bool)  # by root: passes a rectifier at least once
    is_near = np.zeros(count, bool)  # never, but nearly
    for watched in trace.rectified.values():
        constant = watched.least == watched.most
        near = watched.most > -margin * watched.deviation
        is_open[root[watched.channels[(watched.most > 0) & ~constant]]] = True
        is_near[root[watched.channels[(watched.most <= 0) & near & ~constant]]] = True
    is_read, is_varied = np.zeros(count, bool), np.zeros(count, bool)
    why_not: dict[int, str] = {root[c]: why for c, why in trace.needed.items()}
    for name, layer in trace.layers.items():
        if layer.read is None:
            continue
        channels = root[layer.read.channels]
        is_read[channels] = True
        varies = ~(layer.read.least == layer.read.most)
        is_varied[channels[varies]] = True
        constant = ~varies & (layer.read.most != 0)
        if constant.any() and not _can_add(modules, trace, name):
            for channel in channels[constant].tolist():
                why_not.setdefault(channel, 'a constant that its reader cannot absorb')
    needed = np.zeros(count, bool)
    needed[list(why_not)] = True
    closed = is_read & ~is_varied
    goes = closed & ~needed & ~is_open & ~is_near
    for layer in trace.layers.values():  # one stays, since none would not run
        for channels in (layer.inputs, layer.outputs):
            if channels is not None and goes[root[channels]].all():
                goes[root[channels[0]]] = False
    left = Counter(
        why_not[channel]
        for channel in np.flatnonzero(closed & needed & ~is_open).tolist()
        if root[channel] == channel
    )
    kept: dict[str, dict[str, str]] = {}
    constants: dict[str, Tensor] = {}
    for name, layer in trace.layers.items():
        for side, channels in (('inputs', layer.inputs), ('outputs', layer.outputs)):
            if side == 'inputs' and channels is layer.outputs:  # a norm, or depthwise
                continue
            if channels is not None and goes[root[channels]].any():
                kept.setdefault(name, {})[side] = format_ranges(~goes[root[channels]])
        if layer.read is not None:
            mask = goes[root[layer.read.channels]] & (layer.read.most != 0)
            if mask.any():
                values = np.where(mask, layer.read.most, 0)
                constants[name] = _added(modules[name], torch.from_numpy(values))
    is_root = root == np.arange(count)
    held = int((closed & ~needed & ~is_open & is_near & is_root).sum())
    return Cut(kept, constants, dict(left), set(np.flatnonzero(goes & is_root).tolist()), held)


def _can_add(modules: Mapping[str, nn.Module], trace: ChannelTrace, name: str) -> bool:
    """Whether a layer can absorb a constant: it has no padding, and a bias or a norm after it."""
    module: Any = modules[name]
    if isinstance(module, TRANSPOSED):
        return False
    padding = getattr(module, 'padding', 0)
    if isinstance(padding, str) or np.any(np.asarray(padding) != 0):
        return False
    return module.bias is not None or _norm_behind(modules, trace, name) is not None


def _norm_behind(modules: Mapping[str, nn.Module], trace: ChannelTrace, name: str) -> Any:
    """The norm that is the only reader of a convolution's output."""
    readers = trace.layers[name].readers
    norm = modules.get(next(iter(readers))) if len(readers) == 1 else None
    is_fit = norm is not None and is_norm(norm) and norm.running_mean is not None
    return norm if is_fit else None


def _added(module: Any, values: Tensor) -> Tensor:
    weight = module.weight.detach().double()
    weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return weight @ values


@torch.no_grad()
def add_constants(model: nn.Module, trace: ChannelTrace, constants: Mapping[str, Tensor]) -> None:
    """Move what constant channels add into biases, or into the running means of norms, in place."""
    modules: Any = dict(model.named_modules())
    for name, values in constants.items():
        if modules[name].bias is not None:
            modules[name].bias += values.to(modules[name].bias)
        else:
            norm = _norm_behind(modules, trace, name)
            norm.running_mean -= values.to(norm.running_mean)


def cut_out(model: nn.Module, trace: ChannelTrace, cut: Cut) -> nn.Module:
    """A copy of a network without the channels of a cut, which computes the same."""
    pruned = copy.deepcopy(model)
    add_constants(pruned, trace, cut.constants)
    return narrow(pruned, cut.kept)


@torch.no_grad()
def narrow(model: nn.Module, kept: Mapping[str, Mapping[str, str]]) -> nn.Module:
    """Reduce the layers of a network to the channels they keep, in place.

    Args:
        model (nn.Module): The network.
        kept (Mapping[str, Mapping[str, str]]): Of a :class:`Cut`.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: If it has no such layer, or one of another size.
    """
    modules: Any = dict(model.named_modules())
    for name, sides in kept.items():
        if name not in modules:
            raise ValueError(
                f'PrunedModel: the model has no layer {name}: give the config of its own'
            )
        _narrow(modules[name], name, sides)
    return model


def _narrow(module: Any, name: str, sides: Mapping[str, str]) -> None:
    def keep(side: str, size: int) -> Tensor:
        if side not in sides:
            return torch.arange(size)
        try:
            return torch.from_numpy(np.flatnonzero(parse_ranges(sides[side], size)))
        except ValueError as error:
            raise ValueError(f'PrunedModel: {side} of {name}: {error}') from None

    if hasattr(module, 'num_features'):
        index = keep('outputs', module.num_features)
        module.num_features = len(index)
        for values in (module._parameters, module._buffers):
            for key, value in values.items():
                if value is not None and value.dim() == 1:
                    _set(module, key, value, value.index_select(0, index.to(value.device)))
        return
    first, second = (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)
    weight = module.weight
    is_depthwise = getattr(module, 'groups', 1) > 1
    outputs = keep('outputs', weight.shape[first])
    new = weight.index_select(first, outputs.to(weight.device))
    if is_depthwise:
        module.groups = module.in_channels = len(outputs)
    else:
        inputs = keep('inputs', weight.shape[second])
        new = new.index_select(second, inputs.to(weight.device))
    _set(module, 'weight', weight, new)
    if module.bias is not None:
        _set(module, 'bias', module.bias, module.bias.index_select(0, outputs.to(weight.device)))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = new.shape
    else:
        module.out_channels = len(outputs)
        if not is_depthwise:
            module.in_channels = len(inputs)


def _set(module: nn.Module, key: str, old: Tensor, new: Tensor) -> None:
    if isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(new.clone(), requires_grad=old.requires_grad))
    else:
        setattr(module, key, new.clone())


@MODELS.register_module('PrunedModel')
def build_pruned(
    whole_type: str | Callable, kept: Mapping[str, Mapping[str, str]], **settings: Any
) -> nn.Module:
    """Build a model of another type, and reduce it to the channels it keeps.

    ``tools/prune.py`` replaces a config's model by::

        model = dict(type='PrunedModel', whole_type='FasterRCNN', kept={...}, ...)

    Args:
        whole_type (str | Callable): The ``type`` that the config had.
        kept (Mapping[str, Mapping[str, str]]): See :func:`narrow`.
        **settings: Of the model.

    Returns:
        nn.Module: The model itself.

    Raises:
        ValueError: If it has no such layer, or one of another size.
    """
    return narrow(MODELS.build({'type': whole_type, **settings}), kept)
