"""What the reports of a run find: one by one, each compared with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..collapse import Census
from ..records import KINDS, Records, format_ranges

COUNTS = (*KINDS, 'collapsed', 'new', 'revived', 'unstarted')
RECOVERED = 'recovered'  # a kind that there is with RecoveryHook only
BEGUN = 10  # times tau; gammas that start at 0 linger there
REST = 0.25  # times tau; a gamma at rest moves less in two windows


@dataclass(frozen=True)
class Report:
    """The channels of each kind.

    Attributes:
        census (Census): What they were judged by.
        masks (dict[str, list[np.ndarray | None]]): By kind, a bool mask of shape (C,) for each
            layer of the census, None where it is not known.
    """

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
        return {kind: add(counts) for kind, counts in self.counts.items()}

    def by_stage(self, kind: str) -> dict[str, int | None]:
        """The numbers of a kind in the stages of the network."""
        stages: dict[str, list[int | None]] = {}
        for layer, count in zip(self.census.layers, self.counts[kind]):
            stages.setdefault(layer.stage, []).append(count)
        return {stage: add(counts) for stage, counts in stages.items()}

    def to_json(self) -> dict[str, Any]:
        """The counts and channels, as they stand in the record."""
        return {
            'total': self.total,
            'layers': self.counts,
            'channels': {
                kind: {
                    str(index): format_ranges(mask)
                    for index, mask in enumerate(masks)
                    if mask is not None and mask.any()
                }
                for kind, masks in self.masks.items()
            },
        }


def report_of(census: Census) -> Report:
    """What a census tells by itself."""
    kinds = (*KINDS, 'collapsed', 'unstarted')
    return Report(census, {k: [getattr(layer, k) for layer in census.layers] for k in kinds})


class History:
    """What was found so far, by layer.

    Args:
        start (Census): Of the start, with the filters that are unstarted.
        window (int): Half as many iterations as a gamma must be at rest, if it has moved at all.
        records (Records, optional): The record of the run that is continued; its last report is
            where this one goes on. Defaults to None.

    Attributes:
        collapsed (dict[str, np.ndarray]): Collapsed channels at the last report; empty before.
        unstarted (dict[str, np.ndarray]): Channels that have not begun.
        moving (dict[str, np.ndarray]): Channels whose gamma is not at rest.
    """

    def __init__(self, start: Census, window: int, records: Records | None = None) -> None:
        self._start = start
        self._window = window
        # Where each gamma was when it last moved, and at which iteration.
        self._rested: dict[str, np.ndarray] = {layer.name: layer.gamma for layer in start.layers}
        self._moved: dict[str, np.ndarray] = {
            layer.name: np.full(layer.channels, -np.inf) for layer in start.layers
        }
        self.moving: dict[str, np.ndarray] = {}
        self._rectifiers: set[str] = set()  # layers for which they were known at the last report
        self._trapped: dict[str, np.ndarray] = {}  # as last observed
        self.collapsed: dict[str, np.ndarray] = {}
        self.unstarted = {layer.name: layer.unstarted for layer in start.layers}
        if records is not None and records.reports:
            self._restore(records, records.reports[-1])

    def rest(self) -> dict[str, dict[str, list]]:
        """What a resumed run needs to know of the gammas near 0, by layer, as plain values."""
        return {
            layer.name: {
                'channels': near.tolist(),
                'gammas': self._rested[layer.name][near].tolist(),
                'moved': self._moved[layer.name][near].tolist(),
            }
            for layer in self._start.layers
            # What is farther away must move to come near.
            if len(near := np.flatnonzero(np.abs(self._rested[layer.name]) <= 2 * self._start.tau))
        }

    def recall_rest(self, state: Mapping[str, Mapping[str, list]], iteration: int) -> None:
        """Go on from there, in a run that is resumed at an iteration.

        Raises:
            ValueError: If it is not of this network.
            LookupError: Likewise.
            TypeError: Likewise.
        """
        moved = {name: np.full(len(at), float(iteration)) for name, at in self._moved.items()}
        rested = {name: gammas.copy() for name, gammas in self._rested.items()}
        for name, known in state.items():
            moved[name][known['channels']] = known['moved']
            rested[name][known['channels']] = known['gammas']
        self._moved, self._rested = moved, rested

    def add(
        self,
        iteration: int,
        now: Census,
        rectifiers: Mapping[str, str],
        trapped: Mapping[str, np.ndarray],
        reached: Mapping[str, np.ndarray],
        recovered: Mapping[str, np.ndarray] | None = None,
    ) -> Report:
        """Find what is so now, and what has changed.

        Args:
            iteration (int): The number of iterations made.
            now (Census): Of the same layers as at the start.
            rectifiers (Mapping[str, str]): What follows each layer, as far as it is known.
            trapped (Mapping[str, np.ndarray]): Trapped channels of the layers that were observed.
            reached (Mapping[str, np.ndarray]): Channels that a gradient has reached since the
                start.
            recovered (Mapping[str, np.ndarray], optional): Channels that RecoveryHook has opened
                since the last report. Defaults to None: there is no such hook.

        Returns:
            Report: Of all kinds.
        """
        for layer in now.layers:
            name, gamma = layer.name, layer.gamma
            largest = np.maximum(np.abs(gamma), np.abs(self._start[name].gamma))
            begins = reached.get(name, False) & (largest > BEGUN * now.tau)
            self.unstarted[name] = self.unstarted[name] & ~begins
            moves = np.abs(gamma - self._rested[name]) > REST * now.tau
            self._rested[name] = np.where(moves, gamma, self._rested[name])
            self._moved[name] = np.where(moves, iteration, self._moved[name])
            self.moving[name] = iteration - self._moved[name] < 2 * self._window
        now = now.judged(rectifiers, trapped, self.unstarted, self.moving)
        start = self._start.judged(rectifiers)
        report = report_of(now)
        report.masks.update(collapsed=[], new=[], revived=[])
        for layer, first in zip(now.layers, start.layers):
            name = layer.name
            if layer.trapped is not None:
                self._trapped[name] = layer.trapped
            # Where nothing was observed, in a window without steps or a layer that was frozen
            # meanwhile, what was trapped is taken to be so still.
            collapsed = layer.collapsed | (self._trapped.get(name, False) & ~layer.unstarted)
            known = first.broken if layer.folded else first.collapsed
            before = self.collapsed.get(name, known)
            if first.dead is not None and not layer.folded and name not in self._rectifiers:
                before = before | first.dead  # only now it is known
            report.masks['collapsed'].append(collapsed)
            report.masks['new'].append(collapsed & ~before)
            report.masks['revived'].append(~collapsed & before)
            self.collapsed[name] = collapsed
        self._rectifiers = set(rectifiers)
        report.masks['unstarted'] = report.masks.pop('unstarted')  # the last, as in COUNTS
        if recovered is not None:
            report.masks[RECOVERED] = [recovered.get(layer.name) for layer in now.layers]
        return report

    def _restore(self, records: Records, report: dict[str, Any]) -> None:
        for index, layer in enumerate(records.header['layers']):
            name = layer['name']
            self.collapsed[name] = records.mask(report, 'collapsed', index)
            self._trapped[name] = records.mask(report, 'trapped', index)
            if report['layers']['dead'][index] is not None:
                self._rectifiers.add(name)
            if report['layers']['trapped'][index] is None:  # then it is what makes up the rest
                known = [records.mask(report, kind, index) for kind in KINDS if kind != 'trapped']
                self._trapped[name] = self.collapsed[name] & ~np.logical_or.reduce(known)


def add(counts: list[int | None]) -> int | None:
    """Sum of what is known, None if nothing is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
