"""When channels collapse and are revived, from the reports of a record."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import RECOVERED, parse_ranges

MOST_EVENTS = 2 * 10**7  # so that a damaged record takes no memory without bound


@dataclass(frozen=True)
class Life:
    """When a channel was collapsed.

    Attributes:
        layer (int): Index of its layer in the header.
        channel (int): Its index in the layer.
        spans (list[tuple[int, int | None]]): Iterations of the reports at which it became
            collapsed and was revived, None if it was not.
        recovered (list[int]): Iterations of the reports before which RecoveryHook had opened it.
    """

    layer: int
    channel: int
    spans: list[tuple[int, int | None]]
    recovered: list[int]


class CollapseEvents:
    """Finds which channels changed between two reports.

    Args:
        sizes (Sequence[int]): The layers' numbers of channels.

    Attributes:
        start (np.ndarray): Channels collapsed before the first report, bool, shape (C,).
        collapsed (np.ndarray): Channels collapsed at the last report, bool, shape (C,).
        recovered (dict[int, list[int]]): Iterations at which RecoveryHook had opened a channel, by
            its index among all channels.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._offsets = np.concatenate(([0], np.cumsum(sizes)))
        self.start = np.zeros(self._offsets[-1], bool)
        self.collapsed = self.start.copy()
        self.recovered: dict[int, list[int]] = {}
        self._ranges: list[str] = []  # of collapsed channels at the last report
        # Of each event the iteration, the channel, and whether the channel became collapsed.
        self._iterations, self._channels, self._values = array('q'), array('q'), array('b')
        self._openings = 0

    def add(self, report: dict[str, Any]) -> None:
        """Take the next report.

        Raises:
            ValueError: If there are too many events.
        """
        iteration, channels = report['iter'], report['channels']
        if not self._ranges:
            collapsed, new, revived = (
                np.concatenate(list(map(parse_ranges, channels[kind], self._sizes)))
                for kind in ('collapsed', 'new', 'revived')
            )
            self.start = (collapsed & ~new) | revived
            self.collapsed = self.start.copy()
        before: Sequence[str | None] = self._ranges or [None] * len(self._sizes)
        self._ranges = channels['collapsed']
        for layer, ranges in enumerate(self._ranges):
            if ranges != before[layer]:
                offset = self._offsets[layer]
                mask = parse_ranges(ranges, self._sizes[layer])
                state = self.collapsed[offset : offset + len(mask)]  # a view
                changed = np.flatnonzero(mask != state)
                self._iterations.extend([iteration] * len(changed))
                self._channels.extend((changed + offset).tolist())
                self._values.extend(mask[changed].tolist())
                state[:] = mask
        for layer, ranges in enumerate(channels.get(RECOVERED, ())):
            for channel in np.flatnonzero(parse_ranges(ranges or '', self._sizes[layer])).tolist():
                self.recovered.setdefault(int(self._offsets[layer]) + channel, []).append(iteration)
                self._openings += 1
        if len(self._values) + self._openings > MOST_EVENTS:
            raise ValueError(f'it has more than {MOST_EVENTS:,} changes of channels')

    @property
    def events(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all events the iterations, the channels, and whether they became collapsed."""
        iterations, channels = np.asarray(self._iterations), np.asarray(self._channels)
        return iterations, channels, np.asarray(self._values, bool)

    def ever(self, value: bool) -> np.ndarray:
        """Which channels ever became collapsed, or were revived; bool, shape (C,)."""
        _, channels, values = self.events
        mask = np.zeros(len(self.start), bool)
        mask[channels[values == value]] = True
        return mask

    def collapsed_at(self, iteration: int) -> np.ndarray:
        """Channels collapsed at the last report up to an iteration; bool, shape (C,)."""
        iterations, channels, values = self.events
        state = self.start.copy()
        until = np.searchsorted(iterations, iteration, side='right')
        state[channels[:until]] = values[:until]  # of several values the last one stays
        return state

    def lives(self, limit: int, begin: int) -> list[Life]:
        """The lives of channels that ever collapsed, by the time of their first collapse.

        Args:
            limit (int): The most to return: if there are more, evenly chosen ones.
            begin (int): From where on channels of the start are collapsed, in iterations.
        """
        iterations, channels, values = self.events
        ever = np.flatnonzero(self.start | self.ever(True))
        first = np.full(len(self.start), np.iinfo(np.int64).max)
        np.minimum.at(first, channels, iterations)  # a revival is after the collapse
        first[self.start] = begin
        ever = ever[np.argsort(first[ever], kind='stable')]
        if len(ever) > limit:
            ever = ever[np.linspace(0, len(ever) - 1, limit).round().astype(int)]
        order = np.argsort(channels, kind='stable')
        bounds = np.searchsorted(channels[order], [ever, ever + 1]).T
        lives = []
        for channel, (start, stop) in zip(ever, bounds):
            mine = order[start:stop]
            begins = iterations[mine][values[mine]].tolist()
            ends: list[int | None] = iterations[mine][~values[mine]].tolist()
            if self.start[channel]:
                begins.insert(0, begin)
            layer = int(np.searchsorted(self._offsets, channel, side='right')) - 1
            lives.append(
                Life(
                    layer=layer,
                    channel=int(channel - self._offsets[layer]),
                    spans=list(zip(begins, [*ends, None])),
                    recovered=self.recovered.get(int(channel), []),
                )
            )
        return lives
