"""Which entries of a state dict belong to BN and psBN layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

MOST_CHANNELS = 10**6  # a file of a few bytes can claim any number, by strides of 0


def entry_key(layer: str, entry: str) -> str:
    """The key of a layer's entry in a state dict; the layer '' is itself the network."""
    return f'{layer}.{entry}' if layer else entry


def has_plain_values(tensor: Tensor) -> bool:
    """Whether a tensor is a plain array of real numbers: not complex, quantised or sparse."""
    return not (tensor.is_complex() or tensor.is_quantized) and tensor.layout == torch.strided


def find_norm_states(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Find the BN and psBN layers in a state dict, from nothing but its keys and shapes.

    BN is what has a running variance; LayerNorm and GroupNorm have none. An InstanceNorm that
    tracks its statistics has the same entries and cannot be told apart.

    Args:
        state_dict (Mapping[str, Any]): The state dict.

    Returns:
        dict[str, str]: By layer name, in the order of the file, '' for a layer that is itself the
        network: 'BN', 'psBN', or why the layer can be taken for neither, such as 'no gamma'.
    """
    found: dict[str, str] = {}
    for key in state_dict:
        name, _, entry = str(key).rpartition('.')
        if entry not in ('running_var', 'beta') or name in found:
            continue
        entries = {
            entry: state_dict.get(entry_key(name, entry))
            for entry in ('weight', 'bias', 'beta', 'shift', 'running_var')
        }
        has = {entry for entry, value in entries.items() if isinstance(value, Tensor)}
        if not has >= {'beta', 'shift'} and 'running_var' not in has:
            continue
        shapes = {entries[entry].shape for entry in has - {'shift'}}  # type: ignore[union-attr]
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            found[name] = 'shapes differ'
        elif not all(has_plain_values(cast(Tensor, entries[entry])) for entry in has):
            found[name] = 'no plain real numbers'
        elif not 1 <= next(iter(shapes))[0] <= MOST_CHANNELS:
            found[name] = f'not 1 to {MOST_CHANNELS:,} channels'
        elif 'shift' in has and cast(Tensor, entries['shift']).numel() != 1:
            found[name] = 'no single shift'
        elif 'weight' not in has:
            found[name] = 'no gamma'
        elif has >= {'beta', 'shift'}:
            found[name] = 'psBN'
        elif 'shift' in has:
            found[name] = 'no beta'
        else:
            found[name] = 'BN' if 'bias' in has else 'no bias'
    return found
