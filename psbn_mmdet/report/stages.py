"""The table by stage."""

from __future__ import annotations

import numpy as np

from ..records import KINDS
from .runs import Run

COLUMNS = (
    'stage',
    'filters',
    'unstarted',
    *KINDS,
    'collapsed',
    'share',
    'ever collapsed',
    'ever revived',
)


def stage_rows(run: Run) -> list[list[str]]:
    """One row per stage in the order of the network, and one for all.

    Args:
        run (Run): A run.

    Returns:
        list[list[str]]: Cells in the order of ``COLUMNS``. '-' stands for what is not known.
    """
    offsets = np.concatenate(([0], np.cumsum(run.sizes)))
    rows = []
    for stage, layers in {**run.stages, 'all': list(range(len(run.names)))}.items():
        filters = int(run.sizes[layers].sum())
        counts = {kind: _sum(run, kind, layers) for kind in ('unstarted', *KINDS, 'collapsed')}
        ever = [
            sum(int(mask[offsets[layer] : offsets[layer + 1]].sum()) for layer in layers)
            for mask in (run.ever_collapsed, run.ever_revived)
        ]
        cells = [filters, *counts.values(), (counts['collapsed'] or 0) / max(1, filters), *ever]
        rows.append([stage, *map(_cell, cells)])
    return rows


def _sum(run: Run, kind: str, layers: list[int]) -> int | None:
    """The last report's count, of the layers where it is known."""
    counts = [run.last['layers'][kind][layer] for layer in layers]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _cell(value: float | None) -> str:
    if value is None:
        return '-'
    return f'{value:.1%}' if isinstance(value, float) else f'{value:,}'
