"""Make the README's picture: the demo detector with BN and with psBN, where filters collapse.

Same seed, data and schedule; weight decay on gamma and beta is 0.01, twenty times that of the demo.
Each run's collapse record and scores are kept in benchmarks/results/compare/; the picture is drawn
from them. A finished run is not made again, an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path('benchmarks/results/compare')
NORMS = {'bn': 'BN', 'psbn': 'psBN'}
OPTIONS = ['optim_wrapper.paramwise_cfg.norm_decay_mult=20']


def run(*command: object) -> None:
    """Run a script with this interpreter; if it fails, end with its exit code."""
    code = subprocess.call([sys.executable, *map(str, command)])
    if code:
        sys.exit(code)


def keep(norm: str, work_dir: Path) -> None:
    """Copy a run's record, and gather its scores."""
    folder = RESULTS / norm
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(max(work_dir.glob('*/collapse.jsonl')), folder)
    scores = {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            values = json.loads(line)
            if 'coco/bbox_mAP' in values:
                scores[values['step']] = {
                    'AP': values['coco/bbox_mAP'],
                    'AP50': values['coco/bbox_mAP_50'],
                }
    (folder / 'scores.json').write_text(json.dumps(scores, indent=1) + '\n')


def main() -> None:
    """Train what is not trained yet, keep the results, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--work-dir', type=Path, default='work_dirs/compare')
    parser.add_argument('--draw-only', action='store_true', help='draw from the kept results')
    args = parser.parse_args()
    os.chdir(ROOT)
    if not args.draw_only:
        run('demo/make_dataset.py', 'data/demo')
        for norm in NORMS:
            config = f'demo/faster-rcnn_r18_fpn_{norm}_demo.py'
            work_dir = args.work_dir / norm
            run(
                'tools/train.py',
                config,
                '--work-dir',
                work_dir,
                '--resume',
                '--cfg-options',
                *OPTIONS,
            )
            keep(norm, work_dir)
    records = [RESULTS / norm / 'collapse.jsonl' for norm in NORMS]
    out = ['-o', 'docs/images/collapse.png']
    run('tools/plot_collapse.py', *records, '--labels', *NORMS.values(), *out)


if __name__ == '__main__':
    main()
