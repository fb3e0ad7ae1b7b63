"""What collapse costs, and what a cure gains, network by network, from the other studies' results.

The worth of the filters that BN loses is how much less a psBN network scores without them: without
as many (decay.py, cifar.py) or the same (imagenet.py) from the first step on, or, in a finetuning,
without those that recovery has opened, taken away at the end (finetuning.py). It is an upper bound
on what a cure can gain by keeping filters.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from matplotlib.figure import Figure
from study import ROOT, Study, contrasts_table, forest, rows_of, table

STUDY = Study('costs', __doc__)
WORTH = 'what the filters are worth: psBN over psBN without them'


class Source(NamedTuple):
    """Where a result has worth and gain: the ends of its contrasts' names, and BN's arm."""

    result: str
    network: str
    worth: str = WORTH
    gain: str = 'psBN over BN'
    bn: str = 'BN'
    factor: float = 100  # to points


SOURCES = (
    Source(
        'decay', 'the demo, from scratch, decay x 20', gain='psBN x 20 over BN x 20', bn='BN x 20'
    ),
    Source('imagenet', 'SSDLite from ImageNet, {}'),
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


def gather() -> list[dict]:
    """Worth and gain in each network, in points of AP or accuracy, and what BN loses there."""
    found = []
    for source in SOURCES:
        path = ROOT / f'benchmarks/results/evidence/{source.result}.json'
        result = json.loads(path.read_text())
        contrasts = {row['contrast']: row for row in rows_of(result['contrasts'])}
        groups = [n.removesuffix(source.worth) for n in contrasts if n.endswith(source.worth)]
        for group in groups:
            (lost,) = (
                cell['collapsed']
                for cell in rows_of(result['cells'])
                if cell['arm'] == source.bn
                and all(str(cell.get(k, '')) in group for k in ('setting', 'network', 'regime'))
            )
            for kind, end in (('worth', source.worth), ('gain', source.gain)):
                row = dict(contrasts[group + end])
                for key in ('mean', 'low', 'high', 'detectable'):
                    row[key] = None if row[key] is None else source.factor * row[key]
                title = source.network.format(group.removesuffix(': '))
                found.append({'network': title, 'kind': kind, 'lost': lost, **row, 'contrast': end})
    return found


def tell(rows: list[dict]) -> str:
    """The table of the page."""
    named = [{**row, 'contrast': f'{row["network"]}: {row["contrast"]}'} for row in rows]
    return contrasts_table(named, 'points')


def draw(rows: list[dict]) -> Figure:
    """Worth and gain of each network, and how many filters BN loses."""
    arms = {'worth': 'BN loses filters: their worth', 'gain': 'psBN: the whole gain'}
    cells = [
        {'network': row['network'], 'arm': arms[row['kind']], 'seeds': row['seeds']}
        | {'points': row['mean'], 'low': row['low'], 'high': row['high'], 'collapsed': row['lost']}
        for row in rows
    ]
    return forest(cells, [], 'points')


def main() -> None:
    """Gather, write."""
    STUDY.start()
    rows = gather()
    STUDY.publish({'networks': table(rows)}, tell(rows), draw(rows))


if __name__ == '__main__':
    main()
