"""Opening closed filters at once, in a state dict, before a training starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layers import entry_key, find_norm_states, rectifier_closed
from ..layers.psbn import at_least_float32
from .restore import restore_own, restore_reader
from .trace import Structure

# Of the shift, to which b is set. Nearer to 0 half of the filters close again in the first steps,
# and a larger one changes more of what the network computes (docs/checkpoints.md).
OPEN = 0.2


@torch.no_grad()
def revive(
    state_dict: Mapping[str, Any], structure: Structure
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Open the closed filters of psBN layers, so that gradient reaches them in the first step.

    Closed are those with ``b + 3 * |gamma| <= 0`` before a ReLU. Their b is set to a fifth of the
    shift, and decayed weights around them are restored (:mod:`.restore`). The network then
    computes something else, by as much as these filters put out, which is about that b.

    Args:
        state_dict (Mapping[str, Tensor]): Of a network with psBN; not changed.
        structure (Structure): What stands around its layers, by the state dict's names.

    Returns:
        tuple[dict[str, Tensor], dict[str, list[int]]]: The new state dict, and the opened channels
        by layer.

    Examples:
        >>> structure = trace_structure(model, torch.randn(2, 3, 64, 64))
        >>> bn_to_psbn(model)
        >>> model.load_state_dict(revive(model.state_dict(), structure)[0])
    """
    new: Any = copy.copy(state_dict)  # with torch's versions of the modules
    opened: dict[str, list[int]] = {}

    def entries(layer: str, *names: str) -> dict[str, Tensor]:
        """Copies, which take the place of what was there."""
        found = {}
        for name in names:
            key = entry_key(layer, name)
            if isinstance(new.get(key), Tensor):
                found[name] = new[key] = new[key].clone()
        return found

    for name, kind in find_norm_states(state_dict).items():
        if kind != 'psBN' or structure.rectifiers.get(name) != 'relu':
            continue
        gamma, beta, shift = (
            at_least_float32(state_dict[entry_key(name, entry)])
            for entry in ('weight', 'beta', 'shift')
        )
        closed = rectifier_closed(gamma, beta + shift)
        if not closed.any():
            continue
        opened[name] = closed.nonzero().flatten().tolist()
        norm = entries(name, 'weight', 'beta', 'running_mean', 'running_var')
        norm['beta'][closed] = ((OPEN - 1) * shift).to(norm['beta'].dtype)
        if name in structure.producers:
            producer = entries(structure.producers[name], 'weight', 'bias')
            if 'weight' in producer:
                restore_own(norm, producer, closed, ~closed)
        for consumer in structure.consumers.get(name, []):
            reader = entries(consumer, 'weight')
            if reader:
                restore_reader(reader['weight'], closed, ~closed)
    return new, opened
