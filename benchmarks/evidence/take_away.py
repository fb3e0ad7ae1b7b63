"""A hook for the configs of the experiments: a detector without some of its filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from common import take_away
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from psbn_mmdet.collapse import find_norms


@HOOKS.register_module()
class TakeAwayHook(Hook):
    """Train as if filters were not there: before the first step and after each they put out 0.

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
