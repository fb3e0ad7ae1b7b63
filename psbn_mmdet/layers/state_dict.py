"""Which entries of a state dict belong to BN layers. psBN has the same entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOST_CHANNELS = 10**6  # with strides of 0, a tiny file can claim any number


def entry_key(layer: str, entry: str) -> str:
    """The key of a layer's entry in a state dict; the layer '' is itself the network."""
    return f'{layer}.{entry}' if layer else entry


def has_plain_values(tensor: Tensor) -> bool:
    """Whether a tensor is a plain array of real numbers: not complex, quantized or sparse."""
    return not (tensor.is_complex() or tensor.is_quantized) and tensor.layout == torch.strided


def find_norm_states(state_dict: Mapping[str, Any]) -> dict[str, str | None]:
    """Find the BN layers in a state dict by its keys and shapes.

    A layer with a running variance is BN; LayerNorm and GroupNorm have none. An InstanceNorm that
    tracks its statistics has the same entries and cannot be told apart.

    Args:
        state_dict (Mapping[str, Any]): The state dict.

    Returns:
        dict[str, str, optional]: By layer name, in the order of the file, '' for a layer that is
        itself the network: None, or why the layer cannot be judged, such as 'no gamma'.
    """
    found: dict[str, str | None] = {}
    for key in state_dict:
        name, _, entry = str(key).rpartition('.')
        if entry != 'running_var' or not isinstance(state_dict[key], Tensor):
            continue
        entries = {
            entry: value
            for entry in ('weight', 'bias', 'running_var')
            if isinstance(value := state_dict.get(entry_key(name, entry)), Tensor)
        }
        shape = entries['running_var'].shape
        found[name] = None
        if len(shape) != 1 or any(value.shape != shape for value in entries.values()):
            found[name] = 'shapes differ'
        elif not all(map(has_plain_values, entries.values())):
            found[name] = 'no plain real numbers'
        elif not 1 <= shape[0] <= MOST_CHANNELS:
            found[name] = f'not 1 to {MOST_CHANNELS:,} channels'
        elif len(entries) < 3:
            found[name] = 'no gamma' if 'weight' not in entries else 'no bias'
    return found
