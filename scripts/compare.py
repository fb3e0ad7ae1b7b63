"""Train the demo's detector with BN and with psBN, and compare them.

Same seed, data and schedule; the psBN run has the RecoveryHook besides. What the report needs of
each run is kept in benchmarks/results/compare/. A finished run is not made again, an interrupted
one is resumed. `make demo-compare` runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.records import find_snapshots
from psbn_mmdet.report import read_run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path('benchmarks/results/compare')
NORMS = {'bn': 'BN', 'psbn': 'psBN'}


def run(*command: object) -> None:
    """Run a script with this interpreter; if it fails, end with its exit code."""
    code = subprocess.call([sys.executable, *map(str, command)])
    if code:
        sys.exit(code)


def keep(work_dir: Path, folder: Path) -> None:
    """Keep of a run what the report shows, as a small work dir, and its scores by epoch."""
    seen = read_run(work_dir, folder.name)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / 'vis_data').mkdir(parents=True)
    shutil.copy(seen.path, folder)
    (folder / 'snapshots').mkdir()
    files = find_snapshots(seen.path.parent)
    for snapshot in seen.snapshots:
        shutil.copy(files[snapshot.iteration], folder / 'snapshots')
    validations = {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            values = json.loads(line)
            if 'coco/bbox_mAP' in values:
                validations[values['step']] = line + '\n'
    (folder / 'vis_data' / 'scalars.json').write_text(''.join(validations.values()))
    (epochs, ap), (_, ap50) = seen.scores['AP'], seen.scores['AP50']
    scores = {epoch: {'AP': a, 'AP50': b} for epoch, a, b in zip(epochs, ap, ap50)}
    (folder / 'scores.json').write_text(json.dumps(scores, indent=1) + '\n')


def main() -> None:
    """Train the missing runs, keep the results, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--work-dir', type=Path, default='work_dirs/compare')
    args = parser.parse_args()
    os.chdir(ROOT)
    run('demo/make_dataset.py', 'data/demo')
    for norm in NORMS:
        config = f'demo/faster-rcnn_r18_fpn_{norm}_demo.py'
        work_dir = args.work_dir / norm
        run('tools/train.py', config, '--work-dir', work_dir, '--resume')
        keep(work_dir, RESULTS / norm)
    kept = [RESULTS / norm for norm in NORMS]
    out = args.work_dir / 'report.html'
    run('tools/report.py', *kept, '--labels', *NORMS.values(), '-o', out)


if __name__ == '__main__':
    main()
