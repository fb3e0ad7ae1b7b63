"""Make docs/images again from the kept runs of `make demo-compare`: every figure, and the page.

The page's pictures need Chromium; without it they stay as they are.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser import browser, missing, screenshot

from psbn_mmdet.report import write_report

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path('benchmarks/results/compare')
OUT = Path('docs/images')
PAGES = {
    'page_one_run': {'psBN': KEPT / 'psbn'},
    'page_two_runs': {'BN': KEPT / 'bn', 'psBN': KEPT / 'psbn'},
}


def main() -> None:
    """Write both reports, copy the figures of the second, photograph both."""
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pages = [write_report(runs, Path(folder) / f'{name}.html') for name, runs in PAGES.items()]
        for figure in sorted(Path(folder).glob('page_two_runs_figures/*.png')):
            shutil.copy(figure, OUT)
            print(f'figures: {OUT / figure.name}')
        reason = missing()
        if reason:
            print(f'figures: the pictures of the page stay as they are: {reason}', file=sys.stderr)
            return
        with browser() as driver:
            for page in pages:
                screenshot(driver, page, OUT / f'{page.stem}.png')
                print(f'figures: {OUT / page.stem}.png')


if __name__ == '__main__':
    main()
