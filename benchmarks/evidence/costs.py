"""What collapse costs, and what a cure gains, network by network, from the other scripts' results.

The worth of the filters that BN loses is how much less a psBN network scores without them: without
as many (decay.py, cifar.py) or the same (imagenet.py) from the first step on, or, in a finetuning,
without those that recovery has opened, taken away at the end (finetuning.py). It bounds what a cure
can gain by keeping filters.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from common import BLUE, GREY, ORANGE, ROOT, Experiment, contrasts_table, table
from matplotlib.figure import Figure

RESULTS = ROOT / 'benchmarks/results/evidence'


class Source(NamedTuple):
    """Where a result has worth and gain: the ends of its contrasts' names, and BN's arm."""

    result: str
    network: str
    worth: str
    gain: str
    bn: str = 'BN'
    factor: float = 100  # to points


SOURCES = (
    Source(
        'decay',
        'the demo, from scratch, decay x 20',
        'what the filters are worth: psBN over psBN without them',
        'psBN x 20 over BN x 20',
        'BN x 20',
    ),
    Source(
        'imagenet',
        'SSDLite from ImageNet, {}',
        'what the filters are worth: psBN over psBN without them',
        'psBN over BN',
    ),
    Source(
        'finetuning',
        'Faster R-CNN, finetuned on photographs',
        'whole over without the recovered filters',
        'psBN with recovery over BN',
    ),
    Source(
        'cifar',
        'CIFAR-10, {}',
        'what the filters are worth: psBN with recovery over the same without them',
        'psBN with recovery over BN',
        factor=1,
    ),
)


def rows_of(content: dict) -> list[dict]:
    """A table of a result as rows."""
    return [dict(zip(content['columns'], row)) for row in content['rows']]


def gather() -> list[dict]:
    """Worth and gain in each network, in points of AP or accuracy, and what BN loses there."""
    found = []
    for source in SOURCES:
        path = RESULTS / f'{source.result}.json'
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        contrasts = {row['contrast']: row for row in rows_of(result['contrasts'])}
        for name in contrasts:
            if not name.endswith(source.worth):
                continue
            before = name.removesuffix(source.worth)  # of the network, where a result has several
            network = before.removesuffix(': ')
            (lost,) = (
                cell['collapsed']
                for cell in rows_of(result['cells'])
                if cell['arm'] == source.bn
                and network
                in ('', cell.get('setting'), f'{cell.get("network")}, {cell.get("regime")}')
            )
            for kind, end in (('worth', source.worth), ('gain', source.gain)):
                row = dict(contrasts[before + end])
                for key in ('mean', 'low', 'high', 'detectable'):
                    row[key] = None if row[key] is None else source.factor * row[key]
                title = source.network.format(network)
                found.append({'network': title, 'kind': kind, 'lost': lost, **row, 'contrast': end})
    return found


def main() -> None:
    """Gather, write."""
    experiment = Experiment('costs', __doc__)
    rows = gather()
    if not rows:
        print('costs: no result has what the filters are worth: skipped')
        return
    experiment.write(networks=table(rows))
    experiment.save(draw(rows))
    experiment.tell(
        contrasts_table(
            [{**row, 'contrast': f'{row["network"]}: {row["contrast"]}'} for row in rows],
            'points',
        )
    )


def draw(rows: list[dict]) -> Figure:
    """Worth and gain of each network, with intervals."""
    networks = list(dict.fromkeys(row['network'] for row in rows))
    figure = Figure(figsize=(8, 1.2 + 0.8 * len(networks)), layout='constrained')
    ax = figure.subplots()
    labels = {
        'worth': 'the filters that BN loses, kept alive: with them less without them',
        'gain': 'the cure: psBN less BN',
    }
    for kind, colour, offset in (('worth', ORANGE, -0.15), ('gain', BLUE, 0.15)):
        mine = [row for row in rows if row['kind'] == kind]
        for row in mine:
            low, high = (row['mean'] if row[end] is None else row[end] for end in ('low', 'high'))
            ax.errorbar(
                row['mean'],
                networks.index(row['network']) + offset,
                xerr=[[row['mean'] - low], [high - row['mean']]],
                fmt='o',
                color=colour,
                label=labels[kind] if row is mine[0] else None,
            )
    lost = {row['network']: row['lost'] for row in rows}
    ax.axvline(0, color=GREY, lw=1)
    ax.set_yticks(range(len(networks)), [f'{name}\nBN loses {lost[name]:.0f}' for name in networks])
    ax.set_ylim(len(networks) - 0.5, -0.5)
    ax.set_xlabel('points of AP or accuracy (mean, 95 % CI)')
    ax.grid(alpha=0.3, lw=0.5)
    figure.legend(loc='outside lower center')
    return figure


if __name__ == '__main__':
    main()
