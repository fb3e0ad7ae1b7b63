"""Counting collapsed filters during training, in any training loop.

    monitor = CollapseMonitor(model, optimizer)
    for step, (images, labels) in enumerate(loader, start=1):
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
        monitor.step()
        if step % 50 == 0:
            print(monitor.report().total)

:class:`psbn_mmdet.hooks.CollapseHook` does this in MMEngine's Runner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from ..records import COUNTS, KINDS, RECOVERED, format_ranges, parse_ranges, sum_known
from .census import Census, census_of_model, check_thresholds, find_norms, unwrapped
from .gradients import GradientWatch
from .structure import Structure, watch_steps

BEGUN = 10  # times tau; gammas that start at 0 linger there
REST = 0.25  # times tau; a gamma at rest moves less in two windows


@dataclass(frozen=True)
class Report:
    """The channels of each kind.

    Attributes:
        iteration (int): Number of iterations made.
        steps (int): Optimizer steps since the previous report.
        census (Census): What the channels were judged by.
        masks (dict[str, list[np.ndarray | None]]): By kind, a bool mask of shape (C,) for each
            layer of the census, None if unknown.
    """

    iteration: int
    steps: int
    census: Census
    masks: dict[str, list[np.ndarray | None]]

    @property
    def counts(self) -> dict[str, list[int | None]]:
        """By kind, the number in each layer."""
        return {
            kind: [None if mask is None else int(mask.sum()) for mask in masks]
            for kind, masks in self.masks.items()
        }

    @property
    def total(self) -> dict[str, int | None]:
        """By kind, the number in all layers."""
        return {kind: sum_known(counts) for kind, counts in self.counts.items()}

    def by_stage(self, kind: str) -> dict[str, int | None]:
        """The numbers of a kind in the stages of the network."""
        stages: dict[str, list[int | None]] = {}
        for layer, count in zip(self.census.layers, self.counts[kind]):
            stages.setdefault(layer.stage, []).append(count)
        return {stage: sum_known(counts) for stage, counts in stages.items()}


class CollapseMonitor:
    """Count the collapsed filters of the BN and psBN layers of a network while it is trained.

    :mod:`psbn_mmdet.collapse.census` defines *vanished*, *dead*, *trapped*, *broken*, *collapsed*
    and *unstarted*. *New* and *revived* filters have become or ceased to be collapsed since the
    previous report, at the first report since the start. A gamma that passes through 0 has not
    vanished: it must have been at rest for two windows.

    What follows each layer is found by watching the first training steps; gradients are read
    before each optimizer step. The network's outputs do not change.

    Args:
        model (nn.Module): The network, or a wrapper around it such as DistributedDataParallel.
        optimizers (Optimizer | Sequence[Optimizer]): All optimizers of the training.
        tau (float): Largest ``|gamma|`` of a vanished filter. Defaults to 1e-3.
        k (float): A filter is dead if its rectifier opens only beyond k standard deviations.
            Defaults to 3.
        window (int): Iterations without a gradient after which a filter is trapped. Steps in
            which no gradient reaches its layer are left out. Defaults to 50.
        iteration (int): Number of iterations made before. Defaults to 0.

    Attributes:
        network (nn.Module): What is watched.
        start (Census): At the start.
        iteration (int): Number of iterations made.
        trace (StepTrace): The watching of the first steps.
        watch (GradientWatch): The watching of gradients.
        collapsed (dict[str, np.ndarray]): By layer, channels collapsed at the last report, (C,).

    Raises:
        ValueError: If ``tau`` or ``k`` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        tau: float = 1e-3,
        k: float = 3.0,
        window: int = 50,
        iteration: int = 0,
    ) -> None:
        check_thresholds(tau, k)
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        self.network = unwrapped(model)
        self.tau, self.k, self.window = tau, k, window
        self.iteration = self.begin = iteration
        self.start = census_of_model(self.network, tau=tau, k=k)
        self._names = {layer.name for layer in self.start.layers}
        self._steps = 0  # at the last report
        self._rectified: set[str] = set()  # layers with known structure at the last report
        self._trapped: dict[str, np.ndarray] = {}  # as last observed
        self._reopened: dict[str, np.ndarray] | None = None
        self.collapsed: dict[str, np.ndarray] = {}
        self._unstarted = {layer.name: layer.unstarted for layer in self.start.layers}
        # Where each gamma was when it last moved, and at which iteration.
        self._rested: dict[str, np.ndarray] = {
            layer.name: layer.gamma for layer in self.start.layers
        }
        self._moved: dict[str, np.ndarray] = {
            x.name: np.full(x.channels, -np.inf) for x in self.start.layers
        }
        self._moving: dict[str, np.ndarray] = {}
        self.trace = watch_steps(model, self.network)
        try:
            self.watch = GradientWatch(optimizers, find_norms(self.network), iteration)
        except Exception:
            self.trace.close()
            raise

    @property
    def structure(self) -> Structure:
        """The structure around the layers, as far as it is known."""
        return self.trace.structure

    def step(self) -> None:
        """Count an iteration, after its optimizer steps.

        Raises:
            Exception: If reading gradients has failed.
        """
        if self.watch.failure is not None:
            raise self.watch.failure
        self.iteration += 1
        self.watch.now = self.iteration

    def note_reopened(self, channels: Mapping[str, np.ndarray]) -> None:
        """Have the next report count channels, (C,) by layer, that were reopened."""
        known = self._reopened or {}
        self._reopened = {
            **known,
            **{name: known.get(name, False) | mask for name, mask in channels.items()},
        }

    def census(self) -> Census:
        """The current census of the layers that existed at the start.

        Raises:
            LookupError: If one of them is gone.
        """
        known = self._parameters()
        return known.judged(self.structure.rectifiers, None, self._unstarted, self._moving)

    def _parameters(self) -> Census:
        """What the parameters tell by themselves."""
        now = census_of_model(self.network, tau=self.tau, k=self.k)
        kept = [layer for layer in now.layers if layer.name in self._names]
        missing = self._names - {layer.name for layer in kept}
        if missing:
            raise LookupError(f'the network no longer has a layer {min(missing)}')
        return Census(kept, self.tau, self.k)

    def report(self) -> Report:
        """Count what is collapsed now, and what has changed since the previous report.

        Raises:
            LookupError: If a layer is gone.
        """
        steps, self._steps = self.watch.steps - self._steps, self.watch.steps
        trapped = self.watch.trapped(self.window, self.iteration - 1) if steps else {}
        reached = self.watch.reached()
        now = self._parameters()
        for layer in now.layers:
            name, gamma = layer.name, layer.gamma
            largest = np.maximum(np.abs(gamma), np.abs(self.start[name].gamma))
            begins = reached.get(name, False) & (largest > BEGUN * self.tau)
            self._unstarted[name] = self._unstarted[name] & ~begins
            moves = np.abs(gamma - self._rested[name]) > REST * self.tau
            self._rested[name] = np.where(moves, gamma, self._rested[name])
            self._moved[name] = np.where(moves, self.iteration, self._moved[name])
            self._moving[name] = self.iteration - self._moved[name] < 2 * self.window
        rectifiers = self.structure.rectifiers
        now = now.judged(rectifiers, trapped, self._unstarted, self._moving)
        start = self.start.judged(rectifiers)
        kinds = (*KINDS, 'unstarted')
        masks = {kind: [getattr(layer, kind) for layer in now.layers] for kind in kinds}
        masks.update(collapsed=[], new=[], revived=[])
        for layer, first in zip(now.layers, start.layers):
            name = layer.name
            if layer.trapped is not None:
                self._trapped[name] = layer.trapped
            # Without observations (no steps in the window, or a frozen layer), trapped channels
            # stay trapped.
            collapsed = layer.collapsed | (self._trapped.get(name, False) & ~layer.unstarted)
            known = first.broken if layer.folded else first.collapsed
            before = self.collapsed.get(name, known)
            if first.dead is not None and not layer.folded and name not in self._rectified:
                before = before | first.dead  # known only now
            masks['collapsed'].append(collapsed)
            masks['new'].append(collapsed & ~before)
            masks['revived'].append(~collapsed & before)
            self.collapsed[name] = collapsed
        self._rectified = set(rectifiers)
        masks = {kind: masks[kind] for kind in COUNTS}
        if self._reopened is not None:
            masks[RECOVERED] = [self._reopened.get(layer.name) for layer in now.layers]
            self._reopened = {}
        return Report(self.iteration, steps, now, masks)

    def idle(self) -> set[str]:
        """Layers that no gradient has reached in the last window despite steps."""
        is_full = self.iteration - self.begin >= self.window
        return self.watch.idle(self.window, self.iteration - 1) if is_full else set()

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run, as plain values."""
        near = {
            layer.name: np.flatnonzero(np.abs(self._rested[layer.name]) <= 2 * self.tau)
            for layer in self.start.layers  # larger gammas must move first
        }
        return {
            'unstarted': _ranges(self._unstarted),
            'collapsed': _ranges(self.collapsed, of_all=True),
            'trapped': _ranges(self._trapped, of_all=True),
            'rectified': sorted(self._rectified),
            'gammas': {
                name: {
                    'channels': channels.tolist(),
                    'rested': self._rested[name][channels].tolist(),
                    'moved': self._moved[name][channels].tolist(),
                }
                for name, channels in near.items()
                if len(channels)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of an earlier run.

        Raises:
            ValueError: If it is not of this network.
        """
        sizes = {layer.name: layer.channels for layer in self.start.layers}
        moved: dict[str, Any] = {
            name: np.full(size, float(self.iteration)) for name, size in sizes.items()
        }
        rested = {name: np.array(gammas) for name, gammas in self._rested.items()}
        try:
            unstarted = {name: np.zeros(size, bool) for name, size in sizes.items()}
            unstarted |= _masks(state['unstarted'], sizes)
            collapsed, trapped = (_masks(state[key], sizes) for key in ('collapsed', 'trapped'))
            rectified = {str(name) for name in state['rectified']}
            for name, known in state['gammas'].items():
                moved[name][known['channels']] = known['moved']
                rested[name][known['channels']] = known['rested']
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f'the state is of another network or damaged ({error}): count from the start'
            ) from error
        self._unstarted, self.collapsed, self._trapped = unstarted, collapsed, trapped
        self._rectified, self._moved, self._rested = rectified, moved, rested
        self.start = self.start.judged(unstarted=unstarted)

    def close(self) -> None:
        """Detach from the network and the optimizers."""
        self.watch.close()
        self.trace.close()


def _ranges(masks: Mapping[str, np.ndarray], of_all: bool = False) -> dict[str, str]:
    return {name: format_ranges(mask) for name, mask in masks.items() if of_all or mask.any()}


def _masks(ranges: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    return {name: parse_ranges(known, sizes[name]) for name, known in ranges.items()}
