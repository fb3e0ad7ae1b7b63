"""Figures from the collapse records of one or more runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..collapse import RECORD_FILE, Records, read_records

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
PANELS = {
    'collapsed': 'collapsed filters\n(vanished, dead or trapped)',
    'trapped': 'trapped filters\n(no gradient)',
    'vanished': 'vanished filters\n(|gamma| at zero)',
}


def find_record(path: str | os.PathLike) -> Path:
    """Find the collapse record of a run.

    Args:
        path (str | PathLike): A record, or a work dir, of which the latest run is taken.

    Returns:
        Path: The record.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.glob(f'*/{RECORD_FILE}'))
    if not found:
        raise FileNotFoundError(
            f'{path} has no */{RECORD_FILE}: give the work dir of a run with the CollapseHook'
        )
    return found[-1]


def plot_collapse(
    runs: Mapping[str, str | os.PathLike], out: str | os.PathLike, title: str | None = None
) -> Path:
    """Draw collapsed, trapped and vanished filters over iterations, one line per run.

    Args:
        runs (Mapping[str, str | PathLike]): Work dirs, or records, by label.
        out (str | PathLike): The picture to write; its ending tells the format.
        title (str, optional): The title. Defaults to None, which states the outcome.

    Returns:
        Path: ``out``.

    Raises:
        FileNotFoundError: If a work dir has no record.
        ValueError: If a record is damaged or has no report.
    """
    records = {label: read_records(find_record(path)) for label, path in runs.items()}
    for label, path in runs.items():
        if not records[label].reports:
            raise ValueError(
                f'{find_record(path)} has no report yet: train for more than one interval '
                f'({records[label].header["interval"]} iterations)'
            )
    figure = Figure(figsize=(8, 8), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(PANELS) + 1, 1, sharex=True, height_ratios=[3, 2, 2, 1.2])
    for (label, record), colour in zip(records.items(), COLOURS * len(records)):
        for ax, kind in zip(axes, PANELS):
            ax.plot(*record.series(kind), color=colour, label=label, linewidth=1.8)
        axes[-1].plot(*_learning_rate(record), color=colour, linewidth=1.8)
    for ax, text in zip(axes, (*PANELS.values(), 'learning rate')):
        ax.set_ylabel(text)
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        ax.set_ylim(bottom=0)
    for ax in axes[:-1]:
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(top=max(1, ax.get_ylim()[1]))
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel('iteration')
    figure.suptitle(title or _outcome(records))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(out, dpi=130)
    return out


def _learning_rate(record: Records) -> tuple[list[int], list[float]]:
    iterations = [report['iter'] for report in record.reports]
    return iterations, [next(iter(report['lr'].values())) for report in record.reports]


def _outcome(records: Mapping[str, Records]) -> str:
    """What the figure shows, such as 'BN: 12 of 1,856 filters collapsed at the end'."""
    filters = sum(layer['channels'] for layer in next(iter(records.values())).header['layers'])
    ends = ', '.join(
        f'{record.reports[-1]["total"]["collapsed"]} in {label}'
        for label, record in records.items()
    )
    return f'Collapsed at the end, of {filters:,} filters: {ends}'
