"""The forecast of a training, from the weights that it starts with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..collapse import Census
from ..layers import PostShiftedBatchNorm
from .course import Course, Part


@dataclass(frozen=True)
class Forecast:
    """Which closed filters of psBN layers open in a training, and when.

    Attributes:
        parts (list[Part]): Layers that are treated alike.
        unknown (int): Closed filters in layers whose optimiser decays in a way that is not known.
        begin (int): Number of the first iteration to come, from 0.
        recovery (tuple[int, int], optional): ``steps`` and ``window`` of the RecoveryHook.
        norm_decay_mult (float): As the config has it.
        before_relu (int): Number of psBN layers right before a ReLU.
    """

    parts: list[Part]
    unknown: int
    begin: int
    recovery: tuple[int, int] | None
    norm_decay_mult: float
    before_relu: int

    @property
    def iterations(self) -> int:
        """Of the training to come."""
        return self.parts[0].iterations if self.parts else 0

    @property
    def closed(self) -> int:
        """Number of closed filters of which something can be said."""
        return sum(len(part.beta) for part in self.parts)

    def text(self) -> str:
        """What to tell the user, in one to three sentences."""
        if not self.before_relu:
            return (
                'no psBN layer stands right before a ReLU. LeakyReLU, SiLU, GELU and the like let '
                'a gradient through everywhere: no filter is closed for good, psBN can do no more '
                'than BN, and what is counted here is vanished filters.'
            )
        if not self.parts:
            return 'no forecast: it is not known how this optimiser decays gamma and beta.'
        unknown = ''
        if self.unknown:
            unknown = f' Of {self.unknown} more it is not known how their optimiser decays.'
        return self._of_known() + unknown

    def _of_known(self) -> str:
        end = self.begin + self.iterations
        bound = _span([part.least_bias() for part in self.parts])
        by_decay = self._opened(None)
        number = f'{len(by_decay)} ' if self.closed else ''
        those = f'none by iteration {end}'
        if bound != '0':
            those = f'{number}by iteration {end} (those with b > {bound})'
        if self.recovery:
            name = f'RecoveryHook(steps={self.recovery[0]})'
            if not self.closed:
                return (
                    f'no filter before a ReLU is closed at the start; {name} opens one that closes '
                    f'later at b = -1 in {sum(self.recovery)} steps.'
                )
            opened = self._opened(self.recovery)
            last = f', the last at iteration {self.begin + opened.max()}' if len(opened) else ''
            return (
                f'of {self.closed} closed filters {name} opens {len(opened)} by iteration {end}'
                f'{last}. Weight decay alone would open {those}.'
            )
        if not self.closed:
            return (
                'no filter before a ReLU is closed at the start. Of those that close later weight '
                f"decay opens {those}; dict(type='RecoveryHook') in "
                'custom_hooks opens all in the steps that it is given.'
            )
        deepest = min(float((part.beta + part.shift).min(initial=0)) for part in self.parts)
        first = (
            f' The first opens at iteration {self.begin + by_decay.min()}.' if len(by_decay) else ''
        )
        text = (
            f'of {self.closed} closed filters, the deepest at b = {deepest:.2g}, weight decay '
            f'opens {those}.{first}'
        )
        advice = self.advice()
        if len(by_decay) < 0.9 * self.closed and advice:
            text += f' All would be open {" or ".join(advice)}.'
        return text

    def advice(self) -> list[str]:
        """What would open all filters within a quarter, or half, of the training."""
        total, advice = self.iterations, []
        found = [part.steps_to_open_all_by(total // 4, window=10) for part in self.parts]
        steps = [value for value in found if value is not None]
        if steps:
            value = min(500, _round_down(min(steps)))
            advice.append(
                f"by iteration {self.begin + total // 4} with dict(type='RecoveryHook', "
                f'steps={value}) in custom_hooks'
            )
        held = [part for part in self.parts if len(part.beta)]
        times = [part.decay_to_open_all_by(total // 2) for part in held]
        if times and all(value is not None for value in times) and self.norm_decay_mult > 0:
            mult = self.norm_decay_mult * max(value for value in times if value is not None)
            advice.append(
                f'by iteration {self.begin + total // 2} with optim_wrapper.paramwise_cfg.'
                f'norm_decay_mult={-_round_down(-mult)}, which decays open filters, too, '
                'and can cost accuracy'
            )
        return advice

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part: its layers and filters, and the iterations at which they open."""
        rows = []
        for part in self.parts:
            row: dict[str, Any] = {
                'layers': len(part.layers),
                'first_layer': part.layers[0],
                'weight_decay': part.beta_course.weight_decay,
                'closed': len(part.beta),
                'opens_above_b': part.least_bias(),
            }
            for name, recovery in (('weight decay', None), ('RecoveryHook', self.recovery)):
                if name == 'weight decay' or recovery:
                    opened = part.opened_at(recovery)
                    row[name] = self.begin + opened[opened >= 0]
            rows.append(row)
        return rows

    def _opened(self, recovery: tuple[int, int] | None) -> np.ndarray:
        times = [part.opened_at(recovery) for part in self.parts]
        return np.concatenate([opened[opened >= 0] for opened in times])


def make_forecast(
    census: Census,
    norms: Mapping[str, nn.Module],
    courses: Mapping[nn.Parameter, Course | None],
    begin: int,
    recovery: tuple[int, int] | None,
    norm_decay_mult: float,
) -> Forecast | None:
    """Forecast a training.

    Args:
        census (Census): Of the weights at the start, judged by what follows the layers.
        norms (Mapping[str, nn.Module]): The network's layers, by the census's names; BN and
            frozen ones are passed over.
        courses (Mapping[nn.Parameter, Course | None]): What becomes of their parameters, see
            :func:`.courses`.
        begin (int): Number of the first iteration to come, from 0.
        recovery (tuple[int, int], optional): ``steps`` and ``window`` of the RecoveryHook.
        norm_decay_mult (float): As the config has it.

    Returns:
        Forecast, optional: None if no psBN layer is trained.
    """
    groups: dict[tuple, list] = {}
    unknown = before_relu = 0
    for layer in census.layers:
        norm = norms.get(layer.name)
        if not isinstance(norm, PostShiftedBatchNorm):
            continue
        gamma, bias = norm.weight, norm.bias
        if bias not in courses or gamma not in courses:
            continue
        before_relu += layer.rectifier == 'relu'
        closed = layer.dead if layer.dead is not None and layer.rectifier == 'relu' else None
        if courses[bias] is None or courses[gamma] is None:
            unknown += 0 if closed is None else int(closed.sum())
            continue
        key = (norm.shift, id(courses[gamma]), id(courses[bias]))
        groups.setdefault(key, []).append((layer, closed, courses[gamma], courses[bias]))
    if not groups and not unknown:
        return None
    parts = []
    for (shift, *_), members in groups.items():
        empty = np.zeros(0, np.float32)
        kept = [(x.gamma[c], x.bias[c] - shift) for x, c, *_ in members if c is not None]
        gamma_course, beta_course = members[0][2:]
        parts.append(
            Part(
                [layer.name for layer, *_ in members],
                np.concatenate([empty, *(gamma for gamma, _ in kept)]),
                np.concatenate([empty, *(beta for _, beta in kept)]),
                shift,
                gamma_course,
                beta_course,
                census.k,
            )
        )
    return Forecast(parts, unknown, begin, recovery, norm_decay_mult, before_relu)


def _span(values: list[float]) -> str:
    """One number, or the least and the largest."""
    low, high = f'{min(values):.2g}', f'{max(values):.2g}'
    return low if low == high else f'{low} to {high}, by parameter group,'


def _round_down(value: float) -> int:
    """To two digits."""
    step = 10 ** max(0, math.floor(math.log10(abs(value))) - 1) if abs(value) >= 1 else 1
    return int(math.floor(value / step) * step)
