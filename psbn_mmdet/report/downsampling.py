"""Fewer numbers than a screen has pixels, with the extremes kept."""

from __future__ import annotations

import numpy as np


def downsample(x: np.ndarray, y: np.ndarray, limit: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to what can be drawn.

    Of each of ``limit / 4`` stretches of the curve the first, last, lowest and highest point are
    kept. A stretch without any number keeps one NaN, so that the gap is seen.

    Args:
        x (np.ndarray): Shape (N,).
        y (np.ndarray): Shape (N,), NaN where nothing is known.
        limit (int): The most points to keep. Defaults to 2000.

    Returns:
        tuple[np.ndarray, np.ndarray]: x and y of the kept points, in their order.
    """
    if len(x) <= limit:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), limit // 4):
        known = stretch[~np.isnan(y[stretch])]
        if len(known):
            lowest, highest = known[y[known].argmin()], known[y[known].argmax()]
            kept.extend(sorted({known[0], known[-1], lowest, highest}))
        else:
            kept.append(stretch[0])
    return x[kept], y[kept]


class HeatMapColumns:
    """Rows of counts that arrive one by one, as a bounded number of columns.

    Neighbouring columns are merged in pairs whenever there are twice as many as wanted. The larger
    count of a pair is kept.

    Args:
        rows (int): Number of counts L that each arrival has.
        limit (int): There are at most 2 * limit columns. Defaults to 400.
    """

    def __init__(self, rows: int, limit: int = 400) -> None:
        self._values = np.zeros((2 * limit, rows), np.int32)
        self._ends = np.zeros(2 * limit)
        self._used = 0  # columns
        self._stride = 1  # arrivals in a whole column
        self._fill = 0  # arrivals in the last column

    def add(self, end: float, counts: np.ndarray | list[int]) -> None:
        """Take the counts, shape (L,), of the arrival that ends at ``end``."""
        if self._fill == 0:
            self._used += 1
            self._values[self._used - 1] = 0
        column = self._used - 1
        self._values[column] = np.maximum(self._values[column], counts)
        self._ends[column] = end
        self._fill = (self._fill + 1) % self._stride
        if self._fill == 0 and self._used == len(self._ends):
            half = self._used // 2
            self._values[:half] = np.maximum(self._values[::2], self._values[1::2])
            self._ends[:half] = self._ends[1::2]
            self._used = half
            self._stride *= 2

    @property
    def values(self) -> np.ndarray:
        """The largest count of each row in each column, shape (L, columns)."""
        return self._values[: self._used].T

    @property
    def ends(self) -> np.ndarray:
        """Where each column ends, shape (columns,)."""
        return self._ends[: self._used]
