"""The table by stage."""

from __future__ import annotations

import numpy as np

from ..records import KINDS
from .runs import Run

_COUNTED = ('unstarted', *KINDS, 'collapsed')
COLUMNS = ('stage', 'filters', *_COUNTED, 'share', 'ever collapsed', 'ever revived')


def stage_rows(run: Run) -> list[list[str]]:
    """One row per stage in the order of the network, and one for all.

    Args:
        run (Run): A run.

    Returns:
        list[list[str]]: Cells in the order of ``COLUMNS``. '-' means unknown.
    """
    bounds = np.cumsum(run.sizes)[:-1]
    ever = [np.split(mask, bounds) for mask in (run.ever_collapsed, run.ever_revived)]
    rows = []
    for stage, layers in {**run.stages, 'all': list(range(len(run.names)))}.items():
        filters = int(run.sizes[layers].sum())
        counts = [_sum([run.last['layers'][kind][layer] for layer in layers]) for kind in _COUNTED]
        share = (counts[-1] or 0) / max(1, filters)
        evers = [sum(int(masks[layer].sum()) for layer in layers) for masks in ever]
        rows.append([stage, *map(_cell, [filters, *counts, share, *evers])])
    return rows


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _cell(value: float | None) -> str:
    if value is None:
        return '-'
    return f'{value:.1%}' if isinstance(value, float) else f'{value:,}'
