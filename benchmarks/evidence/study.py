"""The framework of the experiments: studies, their runs, comparisons, tables and figures.

An experiment is one script, with a page of the same name in ``docs/evidence``: a :class:`Study`
that says what varies and what is compared, and a function that does one run. A run is known by its
settings. Its results are records, flat dicts of the settings and what was measured, and everything
else is computed from records: cells (means by arm), contrasts (differences of two arms, paired by
seed), tables and figures.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import psbn_mmdet  # noqa: E402

# Okabe and Ito's palette.
RED, BLUE, GREY = '#D55E00', '#0072B2', '#8C8C8C'
PALETTE = (RED, BLUE, '#E69F00', '#009E73', '#CC79A7', '#56B4E9', GREY, '#000000')

# Common options: flag, default, help. Studies skip what public data they do not find.
CHECKPOINTS = ('--checkpoints', '../shared/data/checkpoints', 'folder of public checkpoints')
PACKAGES = ('--packages', 'work_dirs/evidence/packages', 'unpacked packages, see networks.py')
IMAGES = ('--images', '../shared/data/bccd', 'folder of photographs of cells, in COCO format')
SEEDS = ('--seeds', '3', 'seeds of each arm')
JOBS = ('--jobs', '2', 'runs at a time')


@dataclass
class Study:
    """What an experiment varies and compares, its command line, its runs and its outputs.

    A finished run is one line in ``<work-dir>/<name>.jsonl``, so a script that was killed continues
    where it was. Results go to ``benchmarks/results/evidence``, with a copy of the finished runs,
    the tables to ``docs/evidence``, the figure to ``docs/images``. With ``--quick`` everything
    stays in a work dir of its own.

    Args:
        name (str): Name of the script, its results and its page.
        question (str): The script's docstring.
        options (Sequence): Further options: flag, default, help.
        arms (Sequence[str]): The arms, in the order of the tables.
        contrasts (Mapping): By name, the two arms of which the second is subtracted.
        factors (Sequence[str]): Keys of the records, besides arm and seed. Each combination of
            their values is compared by itself. Defaults to none.
        score (str): Key of the score. Defaults to 'AP'.
        factor (float): What scores are multiplied by, 100 for percent. Defaults to 1.
        counts (Mapping): Keys whose means are in the table, with their headings.
        largest (Mapping): Keys of score differences whose maximum is in the table, with headings.
        changed (Sequence[str]): Keys of the scores of a changed network, which can be in contrasts
            as if they were arms.
        best (Sequence[str]): The arms of which the best of psBN and of BN are compared.
    """

    name: str
    question: str | None
    options: Sequence[tuple[str, str, str]] = ()
    arms: Sequence[str] = ()
    contrasts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    factors: Sequence[str] = ()
    score: str = 'AP'
    factor: float = 1
    counts: Mapping[str, str] = field(default_factory=dict)
    largest: Mapping[str, str] = field(default_factory=dict)
    changed: Sequence[str] = ()
    best: Sequence[str] = ()

    def start(self) -> None:
        """Read the command line."""
        parser = argparse.ArgumentParser(description=(self.question or '').split('\n')[0])
        parser.add_argument('--quick', action='store_true', help='a smoke run of seconds')
        parser.add_argument('--work-dir', type=Path, help='where finished runs are kept')
        parser.add_argument(
            '--finished', action='store_true', help='run nothing, write what has been run'
        )
        for flag, default, text in self.options:
            parser.add_argument(flag, default=default, help=f'{text} (default: {default})')
        self.args = parser.parse_args()
        self.quick: bool = self.args.quick
        self._finished: list[dict] = []
        folder = 'work_dirs/evidence_quick' if self.quick else 'work_dirs/evidence'
        self.work_dir: Path = (self.args.work_dir or ROOT / folder).resolve()
        self.folder = self.work_dir / self.name
        self.work_dir.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    def lacks(self, file: Path) -> bool:
        """Whether public data are absent, which is printed."""
        if not file.exists():
            print(f'{self.name}: {file.parent} has no {file.name}: skipped')
        return not file.exists()

    def run(
        self, settings: Iterable[dict], do: Callable[..., list[dict]], jobs: int = 1
    ) -> list[dict]:
        """Do what is not done yet.

        Args:
            settings (Iterable[dict]): Of each run, plain values.
            do (Callable): Called with a run's settings as keywords, returns its rows.
            jobs (int): Runs at a time, in threads: for what works in processes of its own.
                Defaults to 1.

        Returns:
            list[dict]: The rows of all runs, each with its settings.
        """
        settings = list(settings)
        path = self.work_dir / f'{self.name}.jsonl'
        done = read_finished(path)
        if self.args.finished:
            settings = [setting for setting in settings if key_of(setting) in done]
        missing = [setting for setting in settings if key_of(setting) not in done]
        with path.open('a') as file:
            if path.stat().st_size and not path.read_text().endswith('\n'):
                file.write('\n')  # the line that a killed script was writing
            with ThreadPoolExecutor(jobs) as pool:
                mapped = pool.map if jobs > 1 else map
                lines = mapped(partial(_timed, do), missing)
                for line in tqdm(lines, self.name, len(missing), disable=not missing):
                    file.write(json.dumps(line) + '\n')
                    file.flush()
                    done[key_of(line['setting'])] = line
        finished = [done[key_of(setting)] for setting in settings]
        self._finished += finished
        return records_of(finished)

    def compare(self, records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
        """The cells and the contrasts of some records."""
        cells, contrasts = [], []
        for group, of_group in group_by(records, *self.factors).items():
            by_arm = group_by(of_group, 'arm')
            scores, mine = {}, {}
            for arm in self.arms:
                rows = by_arm.get((arm,))
                if not rows:
                    continue
                scores[arm] = {row['seed']: self.factor * row[self.score] for row in rows}
                mean, low, high = mean_ci(list(scores[arm].values()))
                mine[arm] = {
                    **dict(zip(self.factors, group)),
                    'arm': arm,
                    'seeds': len(rows),
                    self.score: mean,
                    'low': low,
                    'high': high,
                    **{key: mean_of([row.get(key) or 0 for row in rows]) for key in self.counts},
                    **{key: self.factor * max(row[key] for row in rows) for key in self.largest},
                }
            for key in self.changed:
                having = [row for row in of_group if row.get(key) is not None]
                scores[key] = {row['seed']: self.factor * row[key] for row in having}
            cells += mine.values()
            pairs = {**self.contrasts, **self._best_pair(scores)}
            contrasts += [
                contrast(': '.join([*_named(group), name]), scores[larger], scores[smaller])
                for name, (larger, smaller) in pairs.items()
                if scores.get(larger) and scores.get(smaller)
            ]
        return cells, contrasts

    def _best_pair(self, scores: Mapping[str, Mapping[int, float]]) -> dict:
        """The arms of psBN and of BN with the best mean, once all arms were run by like seeds."""
        if not self.best or not scores.keys() >= set(self.best):
            return {}
        means = {arm: mean_of(list(scores[arm].values())) for arm in self.best}
        psbn, bn = (
            max((arm for arm in means if arm.startswith(norm)), key=means.__getitem__)
            for norm in ('psBN', 'BN')
        )
        if scores[psbn].keys() != scores[bn].keys():
            return {}
        return {f'the best psBN ({psbn}) over the best BN ({bn})': (psbn, bn)}

    def tables(self, cells: Sequence[dict], contrasts: Sequence[dict]) -> str:
        """Cells and contrasts as Markdown."""
        percent = self.factor == 100
        digits = '.2f' if percent else '.3f'
        names = [*self.factors, 'arm']
        first = markdown_table(
            [*[''] * len(names), 'seeds', f'{self.score}, %' if percent else self.score]
            + [*self.counts.values(), *self.largest.values()],
            [
                [*(cell[name] for name in names), cell['seeds'], f'{cell[self.score]:{digits}}']
                + [f'{cell[key]:.0f}' for key in self.counts]
                + [f'{cell[key]:{digits}}' for key in self.largest]
                for cell in cells
            ],
        )
        return first + '\n' + contrasts_table(contrasts, '%' if percent else self.score)

    def finish(
        self,
        records: Sequence[dict],
        tell: Callable[[list[dict], list[dict]], str] | None = None,
        figure: Figure | None = None,
        **more: Any,
    ) -> None:
        """Compare, and write the results.

        Args:
            records (Sequence[dict]): All runs.
            tell (Callable | None): The page's tables, by default those of :meth:`tables`.
            figure (Figure | None): By default that of :func:`forest`.
            **more (Any): Further tables of the result.
        """
        cells, contrasts = self.compare(records)
        tables = {'cells': table(cells), 'contrasts': table(contrasts), 'runs': table(records)}
        figure = figure or forest(cells, records, self.score, self.factor)
        self.publish({**tables, **more}, (tell or self.tables)(cells, contrasts), figure)

    def publish(self, result: dict, markdown: str, figure: Figure) -> None:
        """Write a result, the page's tables and the figure."""
        self.write(result)
        self.tell(markdown)
        self.save(figure)

    def write(self, content: dict) -> None:
        """Write the results with the command, the versions and the hardware class."""
        options = ' --quick' if self.quick else ''
        result = {
            'command': f'python benchmarks/evidence/{self.name}.py{options}',
            'versions': {
                'python': platform.python_version(),
                **{name: version(name) for name in ('torch', 'numpy', 'scipy', 'scikit-learn')},
                'psbn_mmdet': psbn_mmdet.__version__,
            },
            'hardware': f'{platform.machine()} CPU, {torch.get_num_threads()} thread',
            'seconds': round(sum(line['seconds'] for line in self._finished)),
            **content,
        }
        folder = self.work_dir if self.quick else ROOT / 'benchmarks/results/evidence'
        folder.mkdir(parents=True, exist_ok=True)
        lines = ',\n'.join(f'{json.dumps(key)}: {_dump(value)}' for key, value in result.items())
        (folder / f'{self.name}.json').write_text('{\n' + lines + '\n}\n')
        if self._finished and not self.quick:
            runs = [json.dumps(line) + '\n' for line in self._finished]
            (folder / f'{self.name}.jsonl').write_text(''.join(runs))
        print(f'{self.name}: results in {folder}')

    def tell(self, markdown: str) -> None:
        """Put tables between the comments of the study's page."""
        if self.quick:
            (self.work_dir / f'{self.name}.md').write_text(markdown)
            return
        page = ROOT / f'docs/evidence/{self.name}.md'
        begin, end = f'<!-- {self.name}.py -->\n', f'<!-- end of {self.name}.py -->'
        before, _, rest = page.read_text().partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f'{page.name} has no {begin.strip()} and {end}')
        page.write_text(f'{before}{begin}{markdown}{end}{after}')

    def save(self, figure: Figure) -> None:
        """Write the figure."""
        folder = self.work_dir if self.quick else ROOT / 'docs/images'
        drawn = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(drawn, dpi=120)
        # 128 colours are enough, and take a third of the space.
        picture = Image.open(drawn).convert('RGB').quantize(128)
        picture.save(folder / f'evidence_{self.name}.png', optimize=True)


def _timed(do: Callable[..., list[dict]], setting: dict) -> dict:
    start = time.perf_counter()
    rows = do(**setting)
    return {'setting': setting, 'seconds': round(time.perf_counter() - start, 2), 'rows': rows}


def in_process(do: Callable[..., Any], **setting: Any) -> Any:
    """Do it in a process of its own, so that threads can do two at a time."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(do, **setting).result()


def key_of(setting: dict) -> str:
    """What a run is known by."""
    return json.dumps(setting, sort_keys=True)


def read_finished(path: Path) -> dict[str, dict]:
    """The finished runs of a file by their keys; a torn line is none."""
    done = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        done[key_of(line['setting'])] = line
    return done


def records_of(finished: Iterable[dict]) -> list[dict]:
    """The rows of finished runs, each with its settings."""
    return [{**line['setting'], **row} for line in finished for row in line['rows']]


def group_by(records: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Records by the values of some keys, in the order in which they first occur."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def _named(group: tuple) -> list[str]:
    return [', '.join(map(str, group))] if group else []


def table(rows: Sequence[dict], but: Sequence[str] = ()) -> dict:
    """Rows as a table, which takes less space than a dict for each.

    Args:
        rows (Sequence[dict]): Of plain values; a column with dicts is left out.
        but (Sequence[str]): Further columns to leave out. Defaults to none.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in but))
    columns = [name for name in columns if not any(_nested(row.get(name)) for row in rows)]
    return {'columns': columns, 'rows': [[_short(row.get(c)) for c in columns] for row in rows]}


def rows_of(content: dict) -> list[dict]:
    """The rows of a table."""
    return [dict(zip(content['columns'], row)) for row in content['rows']]


def _nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_nested, value)))


def _short(value: Any) -> Any:
    """Five digits of a float, None for one that is not finite and has no place in JSON."""
    if not isinstance(value, float):
        return value
    return float(f'{value:.5g}') if math.isfinite(value) else None


def _dump(value: Any) -> str:
    """One line, or one for each row of a table."""
    if isinstance(value, dict) and value.keys() == {'columns', 'rows'}:
        rows = ',\n'.join(json.dumps(row) for row in value['rows'])
        return f'{{"columns": {json.dumps(value["columns"])}, "rows": [\n{rows}\n]}}'
    return json.dumps(value)


def mean_of(values: Sequence[float]) -> float:
    """The mean."""
    return float(np.mean(values))


def mean_ci(values: Sequence[float]) -> list[float]:
    """Mean and Student's 95 % confidence interval, None for a single value."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return [_short(mean), None, None]
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [_short(v) for v in (mean, float(mean - half), float(mean + half))]


def quartiles(values: Sequence[float]) -> list[float] | None:
    """Lower quartile, median and upper quartile."""
    if not len(values):
        return None
    return [float(f'{q:.4g}') for q in np.percentile(values, [25, 50, 75])]


def contrast(name: str, larger: Mapping[int, float], smaller: Mapping[int, float]) -> dict:
    """The difference of two arms, paired by the seeds that both have, and what follows from it.

    ``detectable`` is the true difference that such a comparison finds 4 times in 5: (t(0.975) +
    t(0.8)) standard errors.
    """
    seeds = sorted(larger.keys() & smaller.keys())
    mean, low, high = mean_ci([larger[seed] - smaller[seed] for seed in seeds])
    row = {'contrast': name, 'seeds': len(seeds), 'mean': mean, 'low': low, 'high': high}
    if low is None:
        return {**row, 'detectable': None, 'verdict': 'one seed: open'}
    free = len(seeds) - 1
    factor = 1 + stats.t.ppf(0.8, free) / stats.t.ppf(0.975, free)
    row['detectable'] = _short(float(factor * (high - low) / 2))
    kind = 'no difference seen' if low <= 0 <= high else 'higher' if low > 0 else 'lower'
    return {**row, 'verdict': kind}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table, its first column to the left."""
    lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


def contrasts_table(contrasts: Sequence[dict], unit: str) -> str:
    """What :func:`contrast` found, as Markdown."""
    return markdown_table(
        ['', 'pairs', f'{unit}, difference', '95 % interval', 'found 4 times in 5', 'verdict'],
        [
            [c['contrast'], c['seeds'], f'{c["mean"]:+.3f}']
            + (
                ['', '']
                if c['low'] is None
                else [f'{c["low"]:+.3f} to {c["high"]:+.3f}', f'{c["detectable"]:.3f}']
            )
            + [f'**{c["verdict"]}**']
            for c in contrasts
        ],
    )


def forest(cells: Sequence[dict], records: Sequence[dict], score: str, factor: float = 1) -> Figure:
    """A line for each cell: the score of each run, its mean and interval; collapsed filters."""
    figure = Figure(figsize=(10, 1 + 0.24 * len(cells)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    names = list(cells[0])[: list(cells[0]).index('seeds')]
    for y, cell in enumerate(cells):
        mine = [row for row in records if all(row[name] == cell[name] for name in names)]
        colour = BLUE if cell['arm'].startswith('psBN') else RED
        low, high = (cell[score] if cell[end] is None else cell[end] for end in ('low', 'high'))
        left.plot([factor * row[score] for row in mine], [y] * len(mine), 'o', ms=4, color=GREY)
        left.plot([low, high], [y, y], color=colour, lw=1)
        left.plot(cell[score], y, '|', ms=12, mew=2, color=colour)
        right.barh(y, cell['collapsed'], color=colour)
        if y and any(cells[y - 1][name] != cell[name] for name in names[:-1]):
            for ax in (left, right):
                ax.axhline(y - 0.5, color=GREY, lw=0.5)
    left.set_xlabel(f'{score}{", %" * (factor == 100)}: runs, mean, 95 % CI')
    right.set_xlabel('collapsed filters')
    for ax in (left, right):
        ax.grid(alpha=0.3, lw=0.5, axis='x')
    if records:  # an interval of two or three runs can be far wider than all scores
        found = [factor * row[score] for row in records]
        margin = 0.1 * (max(found) - min(found)) or 0.01
        left.set_xlim(min(found) - margin, max(found) + margin)
    left.set_yticks(range(len(cells)), [', '.join(str(c[name]) for name in names) for c in cells])
    left.set_ylim(len(cells) - 0.5, -0.5)
    return figure


def lines(points: Iterable[dict], log: str | Mapping[str, str] = '', columns: int = 3) -> Figure:
    """Lines of points in panels.

    Args:
        points (Iterable[dict]): 'panel' and 'line' are their names, 'x' and 'y' the place, 'y'
            with an interval as [mean, low, high], 'style' that of the line, by default 'o-'.
        log (str | Mapping[str, str]): The axes with a logarithmic scale, such as 'xy', of all
            panels or by panel. Defaults to none.
        columns (int): Panels beside each other. Defaults to 3.
    """
    points = list(points)
    panels = group_by(points, 'panel')
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.8 * columns, 3 * rows + 0.6), layout='constrained')
    names = dict.fromkeys(point['line'] for point in points)
    palette = PALETTE if len(names) <= len(PALETTE) else colormaps['tab20'].colors
    colours = dict(zip(names, palette))
    axes, shown = figure.subplots(rows, columns, squeeze=False), {}
    for ax, ((panel,), of_panel) in zip(axes.flat, panels.items()):
        for (line,), mine in group_by(of_panel, 'line').items():
            y, low, high = np.array([np.broadcast_to(point['y'], 3) for point in mine]).T
            bars = [y - low, high - y] if (low != high).any() else None
            style = dict(fmt=mine[0].get('style', 'o-'), ms=3, lw=1, color=colours[line])
            shown[line] = ax.errorbar([point['x'] for point in mine], y, bars, **style)
        scale = log if isinstance(log, str) else log.get(panel, '')
        ax.set(**{f'{axis}scale': 'log' for axis in scale})
        ax.set_title(panel, fontsize=9)
        ax.grid(alpha=0.3, lw=0.5)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.legend(shown.values(), shown, loc='outside lower center', ncols=4, fontsize=8)
    return figure
