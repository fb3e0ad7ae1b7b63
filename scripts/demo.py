"""Draw a data set, train a small psBN detector on it, show how its filters collapse and revive.

`make demo` runs this. What is finished is not done again, an interrupted training is resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.report import read_run
from psbn_mmdet.report.stage_table import COLUMNS, stage_rows

ROOT = Path(__file__).resolve().parents[1]
DATA = Path('data/demo')
WORK_DIR = Path('work_dirs/demo')
MADE_FROM = WORK_DIR / 'made_from'
FINISHED = WORK_DIR / 'finished'


def run(*command: str | Path) -> None:
    """Run a script with this interpreter; if it fails, end with its exit code."""
    code = subprocess.call([sys.executable, *map(str, command)])
    if code:
        sys.exit(code)


def fingerprint(config: Path) -> str:
    """Hash what the training is made from: the config and the data set's annotations."""
    cfg = Config.fromfile(config, import_custom_modules=False)
    digest = hashlib.sha256(json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode())
    for path in sorted((DATA / 'annotations').glob('*.json')):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def set_aside() -> None:
    """Rename the work dir to the first free name with a number."""
    number = 1
    while (aside := WORK_DIR.with_name(f'{WORK_DIR.name}-{number}')).exists():
        number += 1
    WORK_DIR.rename(aside)
    print(f'demo: {WORK_DIR} is of another config or data set, it is now {aside}.', flush=True)


def train(config: Path) -> None:
    """Train, or resume the training, unless it is finished."""
    made_from = fingerprint(config)
    if WORK_DIR.exists() and not (MADE_FROM.exists() and MADE_FROM.read_text() == made_from):
        set_aside()
    if FINISHED.exists():
        print(f'demo: {WORK_DIR} is finished, nothing to train (remove it to train again).')
        return
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    MADE_FROM.write_text(made_from)
    resume = ['--resume'] if (WORK_DIR / 'last_checkpoint').exists() else []
    run('tools/train.py', config, '--work-dir', WORK_DIR, *resume)
    FINISHED.touch()


def newest_first(pattern: str) -> list[str]:
    """Contents of the logs of the work dir's runs, the last run's first."""
    return [path.read_text(encoding='utf-8') for path in sorted(WORK_DIR.glob(pattern))[::-1]]


def last_scores() -> str:
    """AP and AP50 of the last validation."""
    for log in newest_first('*/vis_data/scalars.json'):
        for line in reversed(log.splitlines()):
            values = json.loads(line)
            if 'coco/bbox_mAP' in values:
                return f'AP {values["coco/bbox_mAP"]:.3f}, AP50 {values["coco/bbox_mAP_50"]:.3f}'
    return 'no AP: there was no validation'


def whole_table() -> str:
    """By stage, what collapsed and was revived in the whole training, and what is at its end."""
    run = read_run(WORK_DIR, 'psBN')
    table = Table(title=f'Filters at iteration {run.last["iter"]}, and in the whole training')
    for name in COLUMNS:
        is_stage = name == 'stage'
        table.add_column(name, justify='left' if is_stage else 'right', no_wrap=is_stage)
    *stages, total = stage_rows(run)
    for cells in stages:
        table.add_row(*cells)
    table.add_section()
    table.add_row(*total)
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    counts = dict(zip(COLUMNS, total))
    return (
        f'{text.getvalue().rstrip()}\n'
        f'{counts["ever collapsed"]} filters collapsed in the training, {counts["ever revived"]} '
        f'of them were revived; {counts["collapsed"]} are collapsed at its end. RecoveryHook '
        f'opened {run.ever_recovered} closed ones.'
    )


def main() -> None:
    """Do each step that is not done yet, then show the results and where they are."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--config',
        type=Path,
        default='demo/faster-rcnn_r18_fpn_psbn_demo.py',
        help='what to train, default: %(default)s',
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    run('demo/make_dataset.py', DATA)
    train(args.config)
    print(
        f'\ndemo: {last_scores()}; logs and checkpoints are in {WORK_DIR}\n{whole_table()}',
        flush=True,
    )
    run('tools/report.py', WORK_DIR, '-o', WORK_DIR / 'report.html')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\ndemo: interrupted, `make demo` goes on from the last checkpoint.')
