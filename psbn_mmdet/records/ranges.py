"""Channels as ranges: '0-3,7' for 0, 1, 2, 3 and 7."""

from __future__ import annotations

import re
import reprlib

import numpy as np

MOST_CHANNELS = 10**6  # of all layers; a damaged header could claim any number
_RANGE = re.compile(r'(\d{1,9})(?:-(\d{1,9}))?', re.ASCII)


def format_ranges(mask: np.ndarray) -> str:
    """Write the set channels of a bool mask of shape (C,) as ranges, such as '0-3,7'."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return ','.join(
        f'{start}' if stop == start + 1 else f'{start}-{stop - 1}'
        for start, stop in edges.reshape(-1, 2)
    )


def parse_ranges(ranges: str, channels: int) -> np.ndarray:
    """Read ranges, such as '0-3,7', as a bool mask of shape (channels,).

    Raises:
        ValueError: If a part is no range of these channels, or if there are too many channels.
    """
    if not 0 <= channels <= MOST_CHANNELS:
        raise ValueError(f'{channels} is no number of channels from 0 to {MOST_CHANNELS:,}')
    mask = np.zeros(channels, dtype=bool)
    for part in filter(None, ranges.split(',')):
        match = _RANGE.fullmatch(part)
        start, stop = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not start <= stop < channels:
            raise ValueError(f'{reprlib.repr(part)} is no range of {channels} channels')
        mask[start : stop + 1] = True
    return mask
