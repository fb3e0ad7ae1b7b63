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
    """Finds the channels that became collapsed, or were revived, between two reports.

    The first event of a channel is a collapse, the next one a revival, and so on. What was
    collapsed before the first report is an event one interval earlier.

    Args:
        sizes (Sequence[int]): The layers' numbers of channels.
        interval (int): Iterations between reports.

    Attributes:
        collapsed (np.ndarray): Channels collapsed at the last report, bool, shape (C,).
        recovered (dict[int, list[int]]): Iterations at which RecoveryHook had opened a channel, by
            its index among all channels.
    """

    def __init__(self, sizes: Sequence[int], interval: int) -> None:
        self._sizes = sizes
        self._interval = interval
        self._offsets = np.concatenate(([0], np.cumsum(sizes)))
        self._ranges: list[str] = []  # of the channels collapsed at the last report
        self._iterations, self._channels = array('q'), array('q')  # of each event
        self._openings = 0
        self.collapsed = np.zeros(self._offsets[-1], bool)
        self.recovered: dict[int, list[int]] = {}

    def add(self, report: dict[str, Any]) -> None:
        """Take the next report.

        Raises:
            ValueError: If there are too many events.
        """
        iteration, channels = report['iter'], report['channels']
        before: Sequence[str | None] = self._ranges
        if not before:
            before = [None] * len(self._sizes)
            collapsed, new, revived = (
                np.concatenate(list(map(parse_ranges, channels[kind], self._sizes)))
                for kind in ('collapsed', 'new', 'revived')
            )
            self._change(max(0, iteration - self._interval), 0, (collapsed & ~new) | revived)
        self._ranges = channels['collapsed']
        for layer, ranges in enumerate(self._ranges):
            if ranges != before[layer]:
                mask = parse_ranges(ranges, self._sizes[layer])
                self._change(iteration, self._offsets[layer], mask)
        for layer, ranges in enumerate(channels.get(RECOVERED, ())):
            opened = np.flatnonzero(parse_ranges(ranges or '', self._sizes[layer]))
            self._openings += len(opened)
            for channel in (opened + self._offsets[layer]).tolist():
                self.recovered.setdefault(channel, []).append(iteration)
        if len(self._channels) + self._openings > MOST_EVENTS:
            raise ValueError(f'it has more than {MOST_EVENTS:,} changes of channels')

    def _change(self, iteration: int, offset: int, mask: np.ndarray) -> None:
        """Note which channels, from an offset on, are collapsed now."""
        state = self.collapsed[offset : offset + len(mask)]  # a view
        changed = np.flatnonzero(mask != state) + offset
        self._iterations.extend([iteration] * len(changed))
        self._channels.extend(changed.tolist())
        state[:] = mask

    def counts(self, until: int | None = None) -> np.ndarray:
        """Number of events of each channel up to an iteration, by default the last; (C,)."""
        stop = None
        if until is not None:
            stop = np.searchsorted(np.asarray(self._iterations), until, side='right')
        return np.bincount(np.asarray(self._channels)[:stop], minlength=len(self.collapsed))

    def lives(self, limit: int) -> list[Life]:
        """The lives of channels that ever collapsed, by the time of their first collapse.

        Args:
            limit (int): The most to return: if there are more, evenly chosen ones.
        """
        iterations, channels = np.asarray(self._iterations), np.asarray(self._channels)
        times = iterations[np.argsort(channels, kind='stable')]  # by channel, then by iteration
        ever, numbers = np.unique(channels, return_counts=True)
        stops = np.cumsum(numbers)
        chosen = np.argsort(times[stops - numbers], kind='stable')  # by the first
        if len(chosen) > limit:
            chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
        lives = []
        for index in chosen.tolist():
            channel = int(ever[index])
            mine = times[stops[index] - numbers[index] : stops[index]].tolist()
            layer = int(np.searchsorted(self._offsets, channel, side='right')) - 1
            lives.append(
                Life(
                    layer=layer,
                    channel=channel - int(self._offsets[layer]),
                    spans=list(zip(mine[::2], [*mine[1::2], None])),
                    recovered=self.recovered.get(channel, []),
                )
            )
        return lives
