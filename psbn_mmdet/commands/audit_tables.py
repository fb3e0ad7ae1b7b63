"""The audit of one checkpoint, or of two: as JSON, CSV and text."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..collapse import FOLDED, Census, LayerCensus, compare
from ..records import format_ranges
from ..records.atomic import replacing
from ..recovery.forecast import Forecast
from ..report.channels import BLUE, draw_channels
from ..report.style import STYLE, printable, shorten

AUDIT_KINDS = ('unstarted', 'vanished', 'dead', 'broken', 'collapsed')
WIDTH = 120  # characters of a table


@dataclass(frozen=True)
class Audit:
    """What was found in a checkpoint.

    Attributes:
        source (str): The file, and where in it the parameters stand.
        census (Census): Its filters.
        before (Census, optional): Those of an earlier checkpoint to compare with.
        forecast (Forecast, optional): What psBN will do in the training of a config.
        no_forecast (str): Why there is none; '' if none was asked for.
        switched (bool): Whether it is of the config with ``--norm psBN``.
    """

    source: str
    census: Census
    before: Census | None = None
    forecast: Forecast | None = None
    no_forecast: str = ''
    switched: bool = False

    @property
    def percent(self) -> float:
        """Collapsed filters, in percent of all."""
        return 100 * (self.census.count('collapsed') or 0) / self.census.channels

    def rows(self) -> list[tuple[LayerCensus, dict[str, np.ndarray]]]:
        """Each layer with its masks by kind, all False where a kind is not known."""
        changes = compare(self.before, self.census) if self.before else {}
        rows = []
        for layer in self.census.layers:
            none = np.zeros(layer.channels, bool)
            known = {kind: getattr(layer, kind) for kind in AUDIT_KINDS}
            masks = {kind: none if mask is None else mask for kind, mask in known.items()}
            if self.before:
                masks['new'], masks['revived'] = changes.get(layer.name, (none, none))
            rows.append((layer, masks))
        return rows

    def unmatched(self) -> list[str]:
        """Layers that only one of two checkpoints has, or has with another number of channels."""
        if self.before is None:
            return []
        both = compare(self.before, self.census)
        names = [layer.name for layer in (*self.before.layers, *self.census.layers)]
        return [name for name in dict.fromkeys(names) if name not in both]


def audit_to_dict(audit: Audit) -> dict[str, Any]:
    """An audit as plain data for JSON.

    Returns:
        dict: 'total' has the counts, 'layers' those of each layer, None where they are not known,
        with ``rectified`` (True, False or, where it is not known, None) and ``which``, the channels
        of each kind.
    """
    layers = [
        {
            'name': layer.name,
            'channels': layer.channels,
            **{kind: _count(layer, kind, mask) for kind, mask in masks.items()},
            'rectified': layer.rectified,
            'which': {kind: np.flatnonzero(mask).tolist() for kind, mask in masks.items()},
        }
        for layer, masks in audit.rows()
    ]
    kinds = audit.rows()[0][1]
    return {
        'source': audit.source,
        'tau': audit.census.tau,
        'k': audit.census.k,
        'total': {
            'channels': audit.census.channels,
            **{kind: sum(layer[kind] or 0 for layer in layers) for kind in kinds},
        },
        'layers': layers,
        **({'forecast': _forecast_to_dict(audit.forecast)} if audit.forecast else {}),
        **({'unmatched': audit.unmatched()} if audit.before else {}),
    }


def audit_to_csv(audit: Audit) -> str:
    """An audit as CSV: a line per layer, and one for the total."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    rows = audit.rows()
    kinds = list(rows[0][1])
    writer.writerow(['layer', 'rectified', 'channels', *kinds, 'which_collapsed'])
    for layer, masks in rows:
        rectified = {True: 'yes', False: 'no', None: ''}[layer.rectified]
        counts = [_count(layer, kind, masks[kind]) for kind in kinds]
        which = format_ranges(masks['collapsed']).replace(',', ' ')
        writer.writerow([printable(layer.name), rectified, layer.channels, *counts, which])
    totals = [sum(int(masks[kind].sum()) for _, masks in rows) for kind in kinds]
    writer.writerow(['total', '', audit.census.channels, *totals, ''])
    return text.getvalue()


def audit_to_text(audit: Audit) -> str:
    """An audit as a table of the layers with something to tell, with what it cannot know."""
    rows = audit.rows()
    shown = [
        (layer, masks)
        for layer, masks in rows
        if masks['collapsed'].any() or ('new' in masks and (masks['new'] | masks['revived']).any())
    ]
    kinds = [kind for kind in rows[0][1] if kind != 'unstarted']
    if not audit.census.count('broken'):
        kinds.remove('broken')
    table = Table()
    table.add_column('layer', no_wrap=True)
    table.add_column('rectified')
    for name in ('filters', *kinds):
        table.add_column(name, justify='right')
    table.add_column('which', overflow='fold')
    for layer, masks in shown:
        rectified = {True: 'yes', False: 'no', None: '?'}[layer.rectified]
        counts = [str(int(masks[kind].sum())) for kind in kinds]
        texts = [printable(layer.name), rectified, str(layer.channels), *counts, _why(masks)]
        table.add_row(*map(Text, texts))
    totals = [str(sum(int(masks[kind].sum()) for _, masks in rows)) for kind in kinds]
    table.add_section()
    table.add_row('all', '', str(audit.census.channels), *totals, f'{audit.percent:.2f} %')
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    lines = [printable(audit.source), text.getvalue().rstrip()]
    hidden = len(rows) - len(shown)
    if hidden:
        lines.append(f'{hidden} of {len(rows)} layers have none and are not shown.')
    if audit.census.count('unstarted'):
        lines.append(
            f'{audit.census.count("unstarted")} filters are unstarted: their layers are as '
            'initialized, or the run that saved them says so. They have lost nothing.'
        )
    if audit.census.count('broken'):
        lines.append('Broken filters have a gamma or bias that is not a finite number.')
    folded = [layer.name for layer, _ in rows if layer.folded]
    if folded:
        lines.append(
            f'Vanished and dead filters are not known in {len(folded)} layers: {FOLDED}: '
            f'{printable(", ".join(folded))}.'
        )
    unknown = sum(layer.rectified is None for layer, _ in rows)
    if unknown:
        lines.append(
            f'Of {unknown} layers marked ? it is not known whether a rectifier follows: a filter '
            f'counts as dead there if b + {audit.census.k:g} |gamma| <= 0, but passes everything '
            'if none does. The config of the model tells: --config.'
        )
    if audit.unmatched():
        names = printable(', '.join(audit.unmatched()))
        lines.append(f'Not compared, since not alike in both: {names}.')
    if audit.forecast:
        lines += ['', 'In the training of the config, on one process:']
        of = ' with --norm psBN' if audit.switched else ''
        lines += [_forecast_table(audit.forecast), f'Forecast{of}: {audit.forecast.text()}']
    elif audit.no_forecast:
        lines.append(f'No forecast of a training with psBN: {audit.no_forecast}.')
    return '\n'.join(lines)


def _count(layer: LayerCensus, kind: str, mask: np.ndarray) -> int | None:
    return None if layer.folded and kind in ('vanished', 'dead') else int(mask.sum())


def _forecast_to_dict(forecast: Forecast) -> dict[str, Any]:
    rows = forecast.rows()
    for row in rows:
        for how in ('weight decay', 'RecoveryHook'):
            if how in row:
                row[how] = sorted(row[how].tolist())
    return {'iterations': forecast.iterations, 'parts': rows}


def _forecast_table(forecast: Forecast) -> str:
    """A row for each part and what opens its filters: how many, and at which iterations."""
    table = Table()
    table.add_column('psBN layers')
    table.add_column('closed', justify='right')
    table.add_column('opened by')
    for name in ('with b above', 'opened', 'first', 'half', 'last'):
        table.add_column(name, justify='right')
    for row in forecast.rows():
        name = f'{row["layers"]}, from {row["first_layer"]} on'
        by_decay = f'weight decay {row["weight_decay"]:g}'
        for how, label, bound in (
            ('weight decay', by_decay, f'{row["opens_above_b"]:.3g}'),
            ('RecoveryHook', 'RecoveryHook', ''),
        ):
            if how in row:
                at = np.sort(row[how])
                times = [str(at[i]) for i in (0, (len(at) - 1) // 2, -1)] if len(at) else [''] * 3
                cells = [name, str(row['closed']), label, bound, str(len(at)), *times]
                table.add_row(*map(Text, cells))
                name = ''
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    return text.getvalue().rstrip()


def plot_audit(audit: Audit, out: str | os.PathLike) -> Path:
    """Draw gamma against bias, and the share of collapsed filters by layer.

    Args:
        audit (Audit): What was found.
        out (str | PathLike): The picture to write; its ending tells the format.

    Returns:
        Path: ``out``.
    """
    with matplotlib.rc_context(STYLE), replacing(out) as part:
        figure = _draw(audit)
        FigureCanvasAgg(figure).print_figure(part, format=Path(out).suffix[1:] or 'png', dpi=130)
    return Path(out)


def _draw(audit: Audit) -> Figure:
    layers = audit.census.layers
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    gamma, bias, collapsed = (
        np.concatenate([getattr(layer, what) for layer in layers])
        for what in ('gamma', 'bias', 'collapsed')
    )
    draw_channels(left, gamma, bias, collapsed, audit.census.k)
    left.legend(loc='upper left', fontsize=8, frameon=False)
    left.set_title('filters', loc='left')
    shares = [100 * layer.collapsed.mean() for layer in layers]
    right.bar(range(len(layers)), shares, width=0.9, color=BLUE)
    right.set_ylabel('collapsed filters (% of the layer)')
    right.set_xlabel('layer')
    right.set_title('layers, in the order of the network', loc='left')
    names = [layer.name for layer in layers]

    def name_of(position: float, _: int | None = None) -> str:
        index = round(position)
        exact = abs(position - index) < 1e-6 and 0 <= index < len(names)
        return shorten(names[index]) if exact else ''

    right.xaxis.set_major_locator(MaxNLocator(24, integer=True))
    right.xaxis.set_major_formatter(name_of)
    right.tick_params('x', rotation=90, labelsize=7)
    right.set_xlim(-0.6, len(layers) - 0.4)
    right.set_ylim(0, max(1, *right.get_ylim()))
    figure.suptitle(
        f'{int(collapsed.sum()):,} of {len(collapsed):,} filters are collapsed '
        f'({audit.percent:.2f} %)'
    )
    return figure


def _why(masks: dict[str, np.ndarray]) -> str:
    """Channels by what they are, such as 'vanished, dead 1,5; dead 3'."""
    facts = [kind for kind in masks if kind not in ('collapsed', 'unstarted')]
    groups: dict[str, np.ndarray] = {}
    for channel in np.flatnonzero(np.logical_or.reduce([masks[kind] for kind in facts])):
        label = ', '.join(kind for kind in facts if masks[kind][channel])
        mask = groups.setdefault(label, np.zeros_like(masks['collapsed']))
        mask[channel] = True
    return '; '.join(f'{label} {format_ranges(mask)}' for label, mask in groups.items())
