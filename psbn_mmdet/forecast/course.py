"""What psBN can do in a training: which closed filters open in it, and when.

No gradient reaches a closed filter, so what becomes of its gamma and beta = b - alpha follows from
the optimiser's settings alone. Weight decay leaves a share r(t) of both after t iterations,

- of SGD with weight decay w, learning rate l(t), momentum m and buffer v:
  ``v <- m v + w p,  p <- p - l v`` (of AdamW ``p <- (1 - l w) p``, and no more: its moments are 0);
- of :class:`.Recovery` besides ``q^t``, see :func:`.decay_per_step`.

The filter opens, as arXiv 2001.11216 has it for gamma = 0, where

    r beta + alpha + k r |gamma| > 0,

with k standard deviations of xhat for the largest that a rectifier meets, as in *dead*. With
gamma = 0 and a constant rate that is the time ``t = ln(alpha / |beta|) / ln(1 - l w / (1 - m))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MOST_POINTS = 4096  # of a training at which filters are looked at


@dataclass(frozen=True)
class Course:
    """How an optimiser treats gamma and beta of some layers during a training.

    Attributes:
        lr (np.ndarray): Learning rate in each iteration, shape (T,).
        momentum (np.ndarray): Momentum in each iteration, shape (T,); of no use to AdamW.
        weight_decay (float): Coefficient of the weight decay.
        decoupled (bool): Whether the decay is AdamW's.
        nesterov (bool): Whether the momentum is Nesterov's. Defaults to False.
        dampening (float): Of SGD's momentum. Defaults to 0.
        every (int): Iterations for each step of the optimiser. Defaults to 1.
    """

    lr: np.ndarray
    momentum: np.ndarray
    weight_decay: float
    decoupled: bool
    nesterov: bool = False
    dampening: float = 0.0
    every: int = 1

    def left(self) -> np.ndarray:
        """The share that is left of a parameter without gradient after each iteration, (T + 1,)."""
        share, buffer, shares = 1.0, None, [1.0]
        for number, (lr, m) in enumerate(zip(self.lr.tolist(), self.momentum.tolist()), 1):
            if number % self.every == 0:
                decay = self.weight_decay * share
                if not self.decoupled:
                    first = buffer is None
                    buffer = decay if first else m * buffer + (1 - self.dampening) * decay
                    decay = decay + m * buffer if self.nesterov else buffer
                share -= lr * decay
            shares.append(share)
        return np.array(shares)

    def creeps(self, times: float) -> bool:
        """Whether parameters go to 0 without swinging through it, with so many times the decay."""
        most = float(self.lr.max(initial=0)) * self.weight_decay * times
        momentum = 0.0 if self.decoupled else float(self.momentum.max(initial=0))
        return most < (1 - math.sqrt(momentum)) ** 2

    def recovering(self, shift: float, steps: int, window: int) -> np.ndarray:
        """What :class:`.Recovery` leaves of closed filters after each iteration, (T + 1,)."""
        made = np.arange(len(self.lr) + 1) // self.every
        return (shift / (1 + shift)) ** (np.maximum(made - window, 0) / steps)


def course_of(
    optimizer: torch.optim.Optimizer, group: dict, lr: np.ndarray, momentum: np.ndarray, every: int
) -> Course | None:
    """The course of a parameter group.

    Args:
        optimizer (Optimizer): The optimiser.
        group (dict): Its parameter group, or one with the same settings.
        lr (np.ndarray): Learning rate in each iteration, shape (T,).
        momentum (np.ndarray): Momentum in each iteration, shape (T,).
        every (int): Iterations for each step of the optimiser.

    Returns:
        Course, optional: None if it is not known how this optimiser decays.
    """
    decay = group.get('weight_decay', 0)
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get('decoupled_weight_decay')
    if decoupled or not decay:
        return Course(lr, momentum, decay, True, every=every)
    if type(optimizer) is torch.optim.SGD:
        nesterov, dampening = group['nesterov'], group['dampening']
        return Course(lr, momentum, decay, False, nesterov, dampening, every)
    return None


@dataclass(frozen=True)
class Part:
    """Layers whose gammas and betas have the same course, with their closed filters.

    Attributes:
        layers (Sequence[str]): Names.
        gamma (np.ndarray): Of the closed filters, shape (N,).
        beta (np.ndarray): Of the closed filters, shape (N,).
        shift (float): The constant alpha.
        gamma_course (Course): What the training does to gammas.
        beta_course (Course): What it does to betas.
        k (float): The largest xhat that a rectifier meets, in standard deviations.
    """

    layers: Sequence[str]
    gamma: np.ndarray
    beta: np.ndarray
    shift: float
    gamma_course: Course
    beta_course: Course
    k: float

    @property
    def iterations(self) -> int:
        """T, the iterations of the training."""
        return len(self.beta_course.lr)

    def opened_at(self, recovery: tuple[int, int] | None = None) -> np.ndarray:
        """The iterations after which the filters are open.

        Args:
            recovery (tuple[int, int], optional): ``steps`` and ``window`` of :class:`.Recovery`,
                None without it. Defaults to None.

        Returns:
            np.ndarray: Integers, shape (N,); -1 for filters that stay closed.
        """
        when = np.unique(np.linspace(0, self.iterations, MOST_POINTS).astype(int))
        also = np.ones(self.iterations + 1)
        if recovery:
            also = self.beta_course.recovering(self.shift, *recovery)
        betas = (self.beta_course.left() * also)[when][:, None] * self.beta
        gammas = (self.gamma_course.left() * also)[when][:, None] * np.abs(self.gamma)
        is_open = betas + self.shift + self.k * gammas > 0
        return np.where(is_open.any(0), when[is_open.argmax(0)], -1)

    def least_bias(self) -> float:
        """The bias b above which a filter with gamma = 0 opens by weight decay within the training.

        It is ``alpha - alpha / r`` with the least share r on the way; minus infinity where
        parameters reach 0.
        """
        least = float(self.beta_course.left().min())
        return -math.inf if least <= 0 else self.shift - self.shift / least

    def steps_to_open_all_by(self, iteration: int, window: int) -> int | None:
        """:class:`.Recovery`'s ``steps`` that opens all filters by an iteration, None if none does.

        The deepest one takes ``steps * ln(d / alpha) / ln((1 + alpha) / alpha)`` steps, d being
        how far it is held down.
        """
        available = iteration // self.beta_course.every - window
        depth = self._depth()
        if available < 1 or depth <= self.shift:
            return None
        steps = available * math.log((1 + self.shift) / self.shift) / math.log(depth / self.shift)
        return max(1, int(steps))

    def decay_to_open_all_by(self, iteration: int) -> float | None:
        """By how much the weight decay of beta must be multiplied for the same.

        None where there is nothing to multiply, or so much that parameters swing through 0.
        """
        left, depth = float(self.beta_course.left()[iteration]), self._depth()
        if not 0 < left < 1 or depth <= self.shift:
            return None
        times = math.log(self.shift / depth) / math.log(left)
        return times if self.beta_course.creeps(times) else None

    def _depth(self) -> float:
        """How far the deepest filter is held down."""
        return float((-self.beta - self.k * np.abs(self.gamma)).max(initial=0))
