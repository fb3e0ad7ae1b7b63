"""Collapse on purpose: what --shrink leaves of a detector finetuned on photographs, and its AP.

The tutorial's detector, finetuned with BN on blood cells: for 18 epochs at learning rate 0.02,
plain and with --shrink 0.1 (12 e-foldings of an undriven gamma), and for the tutorial's 6 at 0.005,
where as many are bought by a decay of 0.92. Each is a run of tools/train.py, which cuts its last
checkpoint.

    make demo-compare && python benchmarks/shrink.py    # writes benchmarks/results/shrink.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'benchmarks/results/shrink.json'
CONFIG = 'demo/faster-rcnn_r18_fpn_cells.py'
LONG = [
    'optim_wrapper.optimizer.lr=0.02',
    'train_cfg.max_epochs=18',
    'train_cfg.val_interval=18',
    'param_scheduler.1.milestones=[12,16]',
]
ARMS: dict[str, tuple[list[str], list[str]]] = {
    '18 epochs, plain': (['--watch-collapse'], LONG),
    '18 epochs, --shrink 0.1': (['--shrink', '0.1'], LONG),
    '6 epochs, plain': (['--watch-collapse'], []),
    '6 epochs, --shrink 0.92': (['--shrink', '0.92'], []),
}


def run(arm: str, seed: int, work_dir: Path, start: str) -> dict:
    """What became of one training."""
    options, settings = ARMS[arm]
    folder = work_dir / f'{re.sub(r"[^a-z0-9.]+", "_", arm)}_{seed}'
    log = folder.parent / f'{folder.name}.txt'
    if not log.exists() or 'rc 0' not in log.read_text():
        subprocess.run(['rm', '-rf', folder], check=True)
        command = [sys.executable, ROOT / 'tools/train.py', CONFIG, '--work-dir', folder, *options]
        command += ['--cfg-options', f'randomness.seed={seed}', f'load_from={start}', *settings]
        ended = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log.write_text(f'{ended.stdout}rc {ended.returncode}\n')
    text = log.read_text()
    row: dict = {'arm': arm, 'seed': seed}
    row['AP'] = float(re.findall(r'coco/bbox_mAP: ([\d.]+)', text)[-1])
    counts = [line.split('│') for line in text.splitlines() if line.startswith('│ all ')]
    row['collapsed'] = [int(cells[9]) for cells in counts if len(cells) > 12][-1]
    cut = re.search(r'whole: coco/bbox_mAP ([\d.]+).*pruned: coco/bbox_mAP ([\d.]+)', text)
    if cut:
        row['AP whole'], row['AP pruned'] = map(float, cut.groups())
        table = [line.split('│') for line in text.split('watched on')[-1].splitlines()]
        cells = [line[4:6] for line in table if line[1:] and line[1].startswith(' backbone')]
        row['backbone'], row['backbone pruned'] = (
            sum(int(cell.replace(',', '')) for cell in column) for column in zip(*cells)
        )
        adds = re.search(r'Multiply-adds of an image: ([\d,]+) -> ([\d,]+)', text)
        row['multiply-adds'] = [int(n.replace(',', '')) for n in adds.groups()] if adds else None
        row['time'] = [float(t) for t in re.findall(r'Time of the .*?: ([\d.]+)', text)]
        row['difference'] = float(re.findall(r'differ by ([\d.e+-]+)', text)[-1])
    row['said'] = [
        line
        for line in text.splitlines()
        if line.startswith(('--shrink', '  an undr', '  too few', 'prune:'))
    ]
    return row


def main() -> None:
    """Train, cut, write."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/shrink')
    parser.add_argument('--start', default='work_dirs/compare/bn/epoch_16.pth')
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tasks = [(arm, seed) for arm in ARMS for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as threads:
        rows = list(threads.map(lambda t: run(*t, args.work_dir.resolve(), args.start), tasks))
    OUT.write_text(json.dumps(rows, indent=1) + '\n')
    for row in rows:
        print({k: v for k, v in row.items() if k != 'said'})


if __name__ == '__main__':
    main()
