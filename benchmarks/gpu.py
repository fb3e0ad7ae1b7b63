"""Everything on one GPU: is it right, what does it cost, and the paper's claim at its own length.

    python benchmarks/gpu.py --minutes 8
    python benchmarks/gpu.py --minutes 3 --device cpu

The second line is the rehearsal: the same code with smaller networks and shorter trainings. Its
times say nothing of a GPU, and what only CUDA has is skipped.

There are three parts, each with a share of the time: `right` (gpu_right.py), `fast` (gpu_fast.py)
and `scale` (gpu_scale.py). The results go to benchmarks/results/gpu_CARD.json after each row, so
that a run that is cut off leaves what it has; those of the rehearsal to work_dirs. Trainings of
`scale` in an earlier result of the same card are kept, and further seeds are added to them. The
exit status is 1 if anything turned out wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# cuBLAS is deterministic with a workspace of its own.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT / name) for name in ('', 'benchmarks/evidence', 'tests', 'demo')]

import gpu_fast  # noqa: E402
import gpu_right  # noqa: E402
import gpu_scale  # noqa: E402
import mmcv_on_gpu  # noqa: E402
from make_dataset import make_dataset  # noqa: E402
from timing import RESULTS, hardware  # noqa: E402

NEW_ENOUGH = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)  # has a fused SGD
# 'name', 'text' for the table, 'ok' where it can be wrong, 'keep' where later runs add to it.
Row = dict


@dataclass
class Context:
    """What a part works with."""

    device: torch.device
    until: float  # of time.monotonic()
    folder: Path  # for files that are not kept
    drawn: Path  # images in the format of COCO
    cifar: Path
    kept: list[Row]  # of the same part in an earlier run

    @property
    def small(self) -> bool:
        """Whether this is the rehearsal."""
        return self.device.type == 'cpu'

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


Part = Callable[[Context], Iterator[tuple[str, Callable[[], Row]]]]
# Each with its share of the time that is left when its turn comes.
PARTS: dict[str, tuple[Part, float]] = {
    'right': (gpu_right.checks, 0.45),
    'fast': (gpu_fast.measurements, 0.5),
    'scale': (gpu_scale.trainings, 1.0),
}


def outcome(name: str, do: Callable[[], Row]) -> Row:
    """A row of the results; whatever fails is one, too."""
    start = time.monotonic()
    try:
        row = do()
    except Exception as error:
        traceback.print_exc()
        row = {'ok': False, 'text': f'{type(error).__name__}: {error}'.split('\n')[0]}
    return {'name': name, **row, 'seconds': round(time.monotonic() - start, 1)}


def verdict(row: Row) -> str:
    """What the table says of it."""
    return {True: 'right', False: '**WRONG**', None: ''}[row.get('ok')]


def table(result: dict) -> str:
    """All rows as Markdown."""
    lines = ['| part | what | | |', '|---|---|---|---|']
    for part in PARTS:
        for row in result.get(part, []):
            lines.append(f'| {part} | {row["name"]} | {verdict(row)} | {row["text"]} |')
    return '\n'.join(lines)


def main() -> int:
    """Do all parts, write after each row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--minutes', type=float, default=8.0, help='of all parts together')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--parts', default=','.join(PARTS), help='with commas')
    parser.add_argument('--cifar', default='../shared/data/cifar10', help='train.zip and test.zip')
    parser.add_argument(
        '--shim',
        action='store_true',
        help="use other forms of MMCV's operators, as on a GPU for which they are not compiled",
    )
    parser.add_argument('--out', help='JSON file')
    args = parser.parse_args()
    parts = args.parts.split(',')
    if not set(parts) <= PARTS.keys():
        parser.error(f'--parts must be of {", ".join(PARTS)}, got {args.parts}')
    if not NEW_ENOUGH:
        parser.error(f'this takes torch 2.4 or newer, and this one is {torch.__version__}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('this torch sees no GPU: --device cpu is the rehearsal')
    begin = time.monotonic()
    device = torch.device(args.device, 0) if args.device == 'cuda' else torch.device('cpu')
    if args.shim or (args.device == 'cuda' and not mmcv_on_gpu.has_operators()):
        mmcv_on_gpu.replace_operators()
    card = re.sub(r'\W+', '_', hardware(device).lower())
    # A rehearsal says nothing that is worth keeping.
    usual = (
        ROOT / 'work_dirs/gpu_cpu.json' if device.type == 'cpu' else RESULTS / f'gpu_{card}.json'
    )
    out = Path(args.out or usual)
    old = json.loads(out.read_text()) if out.exists() else {}
    result = {**old, 'hardware': hardware(device), 'torch': torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = make_dataset(folder / 'drawn', num_train=8, num_val=4, image_size=128)
        for part in parts:
            do, share = PARTS[part]
            now = time.monotonic()
            left = begin + 60 * args.minutes - now
            rows = result[part] = [row for row in old.get(part, []) if row.get('keep')]
            until = now + share * left
            context = Context(device, until, folder, drawn, Path(args.cifar), list(rows))
            for what, row in do(context):
                if context.left() > 0:
                    rows.append(outcome(what, row))
                else:
                    rows.append({'name': what, 'text': 'no time left'})
                print(f'{part}: {what}: {verdict(rows[-1])} {rows[-1]["text"]}', flush=True)
                save(result, out)
    print(f'\n{table(result)}\n\nwritten to {os.path.relpath(out)}')
    return int(any(row.get('ok') is False for part in parts for row in result[part]))


def save(result: dict, out: Path) -> None:
    """Write the file as a whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix('.tmp')
    draft.write_text(json.dumps(result, indent=1) + '\n')
    draft.replace(out)


if __name__ == '__main__':
    sys.exit(main())
