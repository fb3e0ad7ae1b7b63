"""What collapse costs, and what a cure gains, network by network, from the other scripts' results.

The worth of the filters that BN loses is how much less a psBN network scores that never had them
(decay.py, cifar.py). It bounds what a cure of collapse can gain by keeping filters.
"""

from __future__ import annotations

import json

from common import BLUE, GREY, ORANGE, ROOT, Experiment, contrasts_table, table
from matplotlib.figure import Figure

WORTH = 'what the filters are worth'
GAINS = ('psBN x 20 over BN x 20', 'psBN with recovery over BN')
RESULTS = ROOT / 'benchmarks/results/evidence'


def rows_of(content: dict) -> list[dict]:
    """A table of a result as rows."""
    return [dict(zip(content['columns'], row)) for row in content['rows']]


def gather() -> list[dict]:
    """Worth and gain in each network, in points of AP or accuracy, and what BN loses there."""
    found = []
    for name, title, bn, factor in (
        ('decay', 'the demo, decay x 20', 'BN x 20', 100),
        ('cifar', 'CIFAR-10, {}', 'BN', 1),
    ):
        path = RESULTS / f'{name}.json'
        result = json.loads(path.read_text()) if path.is_file() else None
        contrasts = rows_of(result['contrasts']) if result else []
        for row in contrasts:
            before, is_worth, _ = row['contrast'].partition(WORTH)
            if not is_worth:
                continue
            (gain,) = (c for c in contrasts if c['contrast'] in {before + gain for gain in GAINS})
            network = before.removesuffix(': ')
            (cell,) = (
                cell
                for cell in rows_of(result['cells'])
                if cell['arm'] == bn
                and network in ('', f'{cell.get("network")}, {cell.get("regime")}')
            )
            for kind, contrast in (('worth', row), ('gain', gain)):
                scaled = {
                    key: None if contrast[key] is None else factor * contrast[key]
                    for key in ('mean', 'low', 'high', 'detectable')
                }
                found.append(
                    {
                        'network': title.format(network),
                        'kind': kind,
                        'lost': cell['collapsed'],
                        **contrast,
                        **scaled,
                    }
                )
    return found


def main() -> None:
    """Gather, write."""
    experiment = Experiment('costs', __doc__)
    rows = gather()
    if not rows:
        print('costs: neither decay.json nor cifar.json has what the filters are worth: skipped')
        return
    experiment.write(networks=table(rows))
    experiment.save(draw(rows))
    experiment.tell(
        contrasts_table(
            [
                {**row, 'contrast': f'{row["network"]}: {row["contrast"].rpartition(": ")[2]}'}
                for row in rows
            ],
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
