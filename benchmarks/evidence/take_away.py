"""Networks without some of their filters, and a hook that trains a detector so.

Masks (C,) of filters go by the names of their norm layers. State dicts are those of networks with
BN or psBN, whose tensors they share, or of a file; they are changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from psbn_mmdet.collapse import find_norms

Masks = Mapping[str, np.ndarray]


def take_away(state: Mapping[str, Tensor], masks: Masks) -> None:
    """Make filters output 0: gamma and b become 0."""
    make_constant(state, masks)
    for name, mask in masks.items():
        state[f'{name}.bias'][torch.from_numpy(mask)] = 0


def make_constant(state: Mapping[str, Tensor], masks: Masks) -> None:
    """Make filters output their b alone: gamma becomes 0."""
    for name, mask in masks.items():
        state[f'{name}.weight'][torch.from_numpy(mask)] = 0


def as_many_others(masks: Masks, apart_from: Masks) -> dict[str, np.ndarray]:
    """In each layer as many filters, of neither, drawn by a fixed seed."""
    generator = np.random.default_rng(0)
    others = {}
    for name, mask in masks.items():
        free = np.flatnonzero(~mask & ~apart_from.get(name, np.zeros_like(mask)))
        chosen = generator.choice(free, min(len(free), mask.sum()), replace=False)
        others[name] = np.isin(np.arange(len(mask)), chosen)
    return others


@HOOKS.register_module()
class TakeAwayHook(Hook):
    """Train as if filters were not there: before the first step and after each they output 0.

    Args:
        channels (Mapping[str, Sequence[int]]): The filters by the names of their norm layers.
    """

    priority = 'HIGHEST'  # other hooks see the network without them

    def __init__(self, channels: Mapping[str, Sequence[int]]) -> None:
        self.channels = channels

    def before_train(self, runner: Runner) -> None:
        """Find the filters, and take them away."""
        norms = find_norms(runner.model)
        self._masks = {
            name: np.isin(np.arange(norms[name].num_features), chosen)
            for name, chosen in self.channels.items()
        }
        take_away(runner.model.state_dict(), self._masks)

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Take away what the step has brought back."""
        take_away(runner.model.state_dict(), self._masks)
