"""Opening closed filters in a state dict, before a training starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..collapse import Structure, census_of_state_dict
from ..layers import entry_key, rectifier_closed
from .restore import lost_factor, multiply, reading_dim, restore_own

# What the bias is set to. Nearer to 0 half of the filters close again in the first steps, and a
# larger one changes more of what the network computes (docs/checkpoints.md).
OPEN = 0.02


@torch.no_grad()
def revive(
    state_dict: Mapping[str, Any], structure: Structure, bias: float = OPEN
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Open the closed filters of BN or psBN layers: gradient reaches them in the first step.

    Closed are those with ``b + 3 * |gamma| <= 0`` before a ReLU. Their bias is set to ``bias``, and
    decayed weights around them are restored (:mod:`.restore`). Folded layers cannot be judged (see
    the census) and are skipped. The network's outputs change: each opened filter now outputs about
    ``bias``.

    Args:
        state_dict (Mapping[str, Tensor]): Of a network with BN or psBN; not changed.
        structure (Structure): What stands around its layers, by the state dict's names.
        bias (float): What the bias of closed filters is set to. Defaults to 0.02.

    Returns:
        tuple[dict[str, Tensor], dict[str, list[int]]]: The new state dict, and the opened channels
        by layer.

    Examples:
        >>> structure = trace_structure(model, torch.randn(2, 3, 64, 64))
        >>> model.load_state_dict(revive(model.state_dict(), structure)[0])
    """
    new: Any = copy.copy(state_dict)  # with torch's versions of the modules
    opened: dict[str, list[int]] = {}

    def entries(layer: str, *names: str) -> dict[str, Tensor]:
        """Replace entries by copies, and return these."""
        found = {}
        for name in names:
            key = entry_key(layer, name)
            if isinstance(new.get(key), Tensor):
                found[name] = new[key] = new[key].clone()
        return found

    for layer in census_of_state_dict(state_dict).layers:
        name = layer.name
        if layer.folded or structure.rectifiers.get(name) != 'relu':
            continue
        gamma, b = (state_dict[entry_key(name, entry)].float() for entry in ('weight', 'bias'))
        closed = rectifier_closed(gamma, b)
        if not closed.any():
            continue
        opened[name] = closed.nonzero().flatten().tolist()
        norm = entries(name, 'weight', 'bias', 'running_mean', 'running_var')
        norm['bias'][closed] = bias
        if name in structure.producers:
            producer = entries(structure.producers[name], 'weight', 'bias')
            if 'weight' in producer:
                restore_own(norm, producer, lost_factor(producer['weight'], 0, closed, ~closed))
        for consumer in structure.consumers.get(name, []):
            reader = entries(consumer, 'weight')
            dim = reading_dim(reader['weight'], len(closed)) if reader else None
            if dim is not None:
                multiply(reader['weight'], dim, lost_factor(reader['weight'], dim, closed, ~closed))
    return new, opened
