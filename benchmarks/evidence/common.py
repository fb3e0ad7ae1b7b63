"""What the experiments share: resumable runs, results with their origin, statistics, figures."""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image
from scipy import stats
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import psbn_mmdet  # noqa: E402
from psbn_mmdet.configs.reading import load_config  # noqa: E402

_READING = Lock()

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
PINK, SKY, GREY = '#CC79A7', '#56B4E9', '#8C8C8C'

# Public data, of which what is absent is skipped: flag, default, help.
CHECKPOINTS = ('--checkpoints', '../shared/data/checkpoints', 'folder of public checkpoints')
IMAGES = ('--images', '../shared/data/bccd', 'folder of photographs of cells, in COCO format')


class Experiment:
    """The command line, the finished runs and the outputs of one script.

    A finished run is one line in ``<work-dir>/<name>.jsonl``, keyed by its settings, so that a
    script that was killed goes on where it was. The results go to ``benchmarks/results/evidence``,
    with a copy of the finished runs, and ``docs/images``; those of ``--quick`` stay in the work
    dir, which is another one.

    Args:
        name (str): Of the experiment.
        description (str): The script's docstring.
        options (Sequence[tuple[str, str, str]]): Further options: flag, default, help.
    """

    def __init__(
        self, name: str, description: str | None, options: Sequence[tuple[str, str, str]] = ()
    ) -> None:
        parser = argparse.ArgumentParser(description=(description or '').split('\n')[0])
        parser.add_argument('--quick', action='store_true', help='a smoke run of seconds')
        parser.add_argument('--work-dir', type=Path, help='where finished runs are kept')
        parser.add_argument(
            '--finished', action='store_true', help='run nothing, write what has been run'
        )
        for flag, default, text in options:
            parser.add_argument(flag, default=default, help=f'{text} (default: {default})')
        self.args = parser.parse_args()
        self.name = name
        self.quick: bool = self.args.quick
        self._finished: list[dict] = []
        folder = 'work_dirs/evidence_quick' if self.quick else 'work_dirs/evidence'
        self.work_dir: Path = self.args.work_dir or ROOT / folder
        self.work_dir.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    def run(
        self, settings: Sequence[dict], do: Callable[..., list[dict]], jobs: int = 1
    ) -> list[tuple[dict, list[dict]]]:
        """Do what is not done yet.

        Args:
            settings (Sequence[dict]): Of each run, plain values.
            do (Callable): Called with a run's settings as keywords, returns its rows.
            jobs (int): Runs at a time, in threads: for what works in processes of its own.
                Defaults to 1.

        Returns:
            list[tuple[dict, list[dict]]]: Settings and rows of each run.
        """
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
        return [(line['setting'], line['rows']) for line in finished]

    def write(self, **content: Any) -> None:
        """Write the results with the command, the versions and the hardware class."""
        options = ' --quick' if self.quick else ''
        result = {
            'command': f'python benchmarks/evidence/{self.name}.py{options}',
            'versions': versions(),
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
        """Put tables and verdicts where docs/evidence.md has the comments of this experiment."""
        if self.quick:
            (self.work_dir / f'{self.name}.md').write_text(markdown)
            return
        page = ROOT / 'docs/evidence.md'
        begin, end = f'<!-- {self.name} -->\n', f'<!-- end of {self.name} -->'
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
        # 128 colours are enough for these, and take a third of the room.
        picture = Image.open(drawn).convert('RGB').quantize(128)
        picture.save(folder / f'evidence_{self.name}.png', optimize=True)


def take_away(state: Mapping[str, Tensor], masks: Mapping[str, np.ndarray]) -> None:
    """Let filters put out nothing, in place: gamma and b become 0.

    Args:
        state (Mapping[str, Tensor]): The state dict of a network with BN or psBN, or that of a
            file; a network's shares its tensors.
        masks (Mapping[str, np.ndarray]): The filters (C,) by the names of their norm layers.
    """
    make_constant(state, masks)
    for name, mask in masks.items():
        state[f'{name}.bias'][torch.from_numpy(mask)] = 0


def make_constant(state: Mapping[str, Tensor], masks: Mapping[str, np.ndarray]) -> None:
    """Let filters put out their b alone, in place: gamma becomes 0."""
    for name, mask in masks.items():
        state[f'{name}.weight'][torch.from_numpy(mask)] = 0


def as_many_others(
    masks: Mapping[str, np.ndarray], apart_from: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """For comparison: in each layer as many filters, of neither, drawn by a fixed seed."""
    generator = np.random.default_rng(0)
    others = {}
    for name, mask in masks.items():
        free = np.flatnonzero(~mask & ~apart_from.get(name, np.zeros_like(mask)))
        chosen = generator.choice(free, min(len(free), mask.sum()), replace=False)
        others[name] = np.isin(np.arange(len(mask)), chosen)
    return others


def read_config(path: Path) -> Config:
    """Read a config, in one thread at a time: older MMEngines reload a module for that."""
    with _READING:
        return load_config(str(path))


def in_process(do: Callable[..., Any], **setting: Any) -> Any:
    """Do it in a process of its own, so that threads can do two at a time."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(do, **setting).result()


def _timed(do: Callable[..., list[dict]], setting: dict) -> dict:
    start = time.perf_counter()
    rows = do(**setting)
    return {'setting': setting, 'seconds': round(time.perf_counter() - start, 2), 'rows': rows}


def versions() -> dict[str, str]:
    """What took part in the numbers."""
    import scipy
    import sklearn

    return {
        'python': platform.python_version(),
        'torch': torch.__version__,
        'numpy': np.__version__,
        'scipy': scipy.__version__,
        'scikit-learn': sklearn.__version__,
        'psbn_mmdet': psbn_mmdet.__version__,
    }


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


def table(rows: Sequence[dict]) -> dict:
    """Rows of one kind as a table, which takes less room than a dict for each."""
    columns = list(rows[0]) if rows else []
    return {'columns': columns, 'rows': [[_short(row[name]) for name in columns] for row in rows]}


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


def mean_ci(values: Sequence[float]) -> list[float]:
    """Mean and Student's 95 % confidence interval, None for a single value."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return [_short(mean), None, None]
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [_short(v) for v in (mean, float(mean - half), float(mean + half))]


def contrast(name: str, larger: Mapping[int, float], smaller: Mapping[int, float]) -> dict:
    """The difference of two arms, paired by the seeds that both have, and what follows from it.

    ``detectable`` is the true difference that such a comparison finds 4 times in 5: (t(0.975) +
    t(0.8)) standard errors.
    """
    seeds = sorted(larger.keys() & smaller.keys())
    values = [larger[seed] - smaller[seed] for seed in seeds]
    mean, low, high = mean_ci(values)
    row = {'contrast': name, 'seeds': len(seeds), 'mean': mean, 'low': low, 'high': high}
    if low is None:
        return {**row, 'detectable': None, 'verdict': 'one seed: open'}
    free = len(seeds) - 1
    factor = 1 + stats.t.ppf(0.8, free) / stats.t.ppf(0.975, free)
    row['detectable'] = _short(float(factor * (high - low) / 2))
    kind = 'no difference seen' if low <= 0 <= high else 'higher' if low > 0 else 'lower'
    return {**row, 'verdict': kind}


def cell_of(
    rows: Sequence[dict], score: str, counts: Sequence[str], factor: float = 1
) -> tuple[dict, dict[int, float]]:
    """What the runs of one arm have in the mean, and their scores by seed.

    Args:
        rows (Sequence[dict]): A row for each seed.
        score (str): The name of the score, whose mean has its interval, *low* and *high*.
        counts (Sequence[str]): Names of what has its mean alone, 0 where a row lacks it.
        factor (float): Of the score. Defaults to 1.
    """
    scores = {row['seed']: factor * row[score] for row in rows}
    mean, low, high = mean_ci(list(scores.values()))
    cell = {'seeds': len(rows), score: mean, 'low': low, 'high': high}
    cell |= {name: float(np.mean([row.get(name) or 0 for row in rows])) for name in counts}
    return cell, scores


def contrasts_of(
    scores: Mapping[str, Mapping[int, float]],
    pairs: Mapping[str, tuple[str, str]],
    before: str = '',
) -> list[dict]:
    """The contrasts of those pairs of arms that both were run, named with ``before`` in front."""
    return [
        contrast(before + name, scores[larger], scores[smaller])
        for name, (larger, smaller) in pairs.items()
        if scores.get(larger) and scores.get(smaller)
    ]


def best_pair(means: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """The arms of psBN and of BN with the best mean as a pair, if both have any."""
    kinds = [[arm for arm in means if arm.startswith(norm)] for norm in ('psBN', 'BN')]
    if not all(kinds):
        return {}
    psbn, bn = (max(kind, key=means.__getitem__) for kind in kinds)
    return {f'the best psBN ({psbn}) over the best BN ({bn})': (psbn, bn)}


def plot_arms(ax: Axes, scores: Mapping[str, Sequence[float]]) -> None:
    """A line for each arm: dots for its runs, a bar for their mean; nothing where none was run."""
    for y, (arm, found) in enumerate(scores.items()):
        if found:
            ax.plot(found, [y] * len(found), 'o', color=GREY, ms=4)
            ax.plot(np.mean(found), y, '|', color=RED if arm.startswith('BN') else BLUE, ms=18)
    ax.set_yticks(range(len(scores)), list(scores))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, its first column to the left."""
    lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


def cells_table(cells: Sequence[dict], names: Sequence[str], counts: Mapping[str, str]) -> str:
    """What arms of detectors have in the mean, as Markdown.

    Args:
        cells (Sequence[dict]): Of :func:`cell_of`, with the score AP.
        names (Sequence[str]): The keys of what a cell is known by.
        counts (Mapping[str, str]): The keys of its counts, and their headings.
    """
    return markdown_table(
        [*[''] * len(names), 'seeds', 'AP', *counts.values()],
        [
            [*(cell[name] for name in names), cell['seeds'], f'{cell["AP"]:.3f}']
            + [f'{cell[count]:.0f}' for count in counts]
            for cell in cells
        ],
    )


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


def share_ci(count: int, total: int) -> list[float]:
    """A share and Wilson's 95 % confidence interval."""
    interval = stats.binomtest(int(count), int(total)).proportion_ci(method='wilson')
    return [_short(float(v)) for v in (count / total, interval.low, interval.high)]


def slope_ci(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Slope of log y over log x by least squares, and its 95 % confidence interval."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr if len(x) > 2 else math.inf
    return [_short(float(v)) for v in (fit.slope, fit.slope - half, fit.slope + half)]


def local_slopes(
    x: Sequence[float], y: Sequence[float], standard_error: Sequence[float]
) -> list[list[float]]:
    """Slopes of log y over log x from each point to the next: x between, slope, interval."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    relative = np.asarray(standard_error, float) / np.exp(y)
    slope = np.diff(y) / np.diff(x)
    half = 1.96 * np.hypot(relative[1:], relative[:-1]) / np.abs(np.diff(x))
    rows = zip(np.exp((x[1:] + x[:-1]) / 2), slope, slope - half, slope + half)
    return [[_short(float(v)) for v in row] for row in rows]


def revival_steps(
    b: float,
    shift: float,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    gamma: float = 0.0,
    reach: float = 0.0,
) -> float:
    """Steps of SGD after which a closed filter of psBN opens, by weight decay alone.

    gamma and beta = b - shift shrink by ``lr * weight_decay / (1 - momentum)`` of themselves in a
    step; the filter opens where ``beta + shift + reach * |gamma| > 0``.

    Args:
        b (float): Bias at the start, ``beta + shift``.
        shift (float): The constant alpha.
        lr (float): Learning rate.
        weight_decay (float): Coefficient of the L2 penalty.
        momentum (float): Defaults to 0.
        gamma (float): Scale at the start. Defaults to 0.
        reach (float): The largest xhat met. Defaults to 0.

    Returns:
        float: 0 if it is open from the start, infinity if nothing decays.
    """
    closed = -(b - shift) - reach * abs(gamma)  # how far beta and gamma hold it down
    if closed < shift:
        return 0.0
    decay = lr * weight_decay / (1 - momentum)
    return math.log(shift / closed) / math.log1p(-decay) if decay > 0 else math.inf
