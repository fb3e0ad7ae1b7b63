"""The learning rates that a training will have, from MMEngine's own schedulers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from mmengine.optim import OptimWrapper
from torch import nn

from .course import Course, course_of


class _StandIn:
    """What a scheduler writes to in an optimiser's place."""

    _global_step = 0  # MMEngine warns where an optimiser was not stepped before its scheduler

    def __init__(self, groups: list[dict]) -> None:
        self.param_groups = [{k: v for k, v in g.items() if k != 'params'} for g in groups]

    def step(self) -> None:
        """Do nothing."""

    step._with_counter = True  # type: ignore[attr-defined]


def courses(
    wrapper: OptimWrapper,
    schedulers: Sequence[Any],
    params: Collection[nn.Parameter],
    iterations: int,
    epoch_length: int | None,
) -> dict[nn.Parameter, Course | None]:
    """What a training does to parameters that no gradient reaches.

    Copies of the schedulers are stepped through the iterations, with one parameter group of each
    kind. Those that follow a metric leave the learning rate as it is.

    Args:
        wrapper (OptimWrapper): With the optimiser, as it is at the start.
        schedulers (Sequence[_ParamScheduler]): Its schedulers, as they are at the start.
        params (Collection[nn.Parameter]): Those that are asked for.
        iterations (int): Of the training to come.
        epoch_length (int, optional): Iterations in an epoch; None if the training has none.

    Returns:
        dict[nn.Parameter, Course | None]: Of those that the optimiser has and that are trained;
        None where it is not known how the optimiser decays.
    """
    groups = wrapper.optimizer.param_groups
    kinds: dict[tuple, int] = {}  # by settings, the first group that has them
    kind_of: dict[nn.Parameter, tuple] = {}
    # Older MMEngines give the optimiser frozen parameters, too, of which it takes no step.
    wanted = {param for param in params if param.requires_grad}
    for number, group in enumerate(groups):
        own = wanted & set(group['params'])
        if own:
            settings = repr([(k, v) for k, v in sorted(group.items()) if k != 'params'])
            kind = (settings, *(repr(s.base_values[number]) for s in schedulers))
            kinds.setdefault(kind, number)
            kind_of.update(dict.fromkeys(own, kind))
    chosen = list(kinds.values())
    stand_in = _StandIn([groups[number] for number in chosen])
    # With the optimiser they would copy all of its parameters.
    memo = {id(wrapper): stand_in, id(wrapper.optimizer): stand_in}
    copies = [copy.deepcopy(s, memo) for s in schedulers if not getattr(s, 'need_val_args', False)]
    for scheduler in copies:
        scheduler.base_values = [scheduler.base_values[number] for number in chosen]
    rates = np.empty((2, len(chosen), iterations))
    copies.sort(key=lambda scheduler: scheduler.by_epoch)  # as ParamSchedulerHook steps them
    for now in range(iterations):
        for row, group in enumerate(stand_in.param_groups):
            rates[:, row, now] = group['lr'], group.get('momentum') or 0.0
        ends_epoch = epoch_length is not None and (now + 1) % epoch_length == 0
        for scheduler in copies:
            if ends_epoch or not scheduler.by_epoch:
                scheduler.step()
    every = getattr(wrapper, '_accumulative_counts', 1)
    made = [
        course_of(wrapper.optimizer, groups[number], lr, momentum, every)
        for number, lr, momentum in zip(chosen, *rates)
    ]
    return {param: made[list(kinds).index(kind)] for param, kind in kind_of.items()}
