"""What `make demo` does after the set-up, on a copy of the repository and cut short."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from limits import HANG

from psbn_mmdet.records import read_records

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_base_ = './faster-rcnn_r18_fpn_psbn_demo.py'
train_cfg = dict(max_epochs=2, val_interval=1)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=16))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=8))
custom_hooks = [
    dict(type='CollapseHook', interval=2, window=2), dict(type='RecoveryHook', steps=4, window=2)
]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1), logger=dict(interval=2))
"""


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp('checkout')
    for folder in ('demo', 'psbn_mmdet', 'scripts', 'tools'):
        shutil.copytree(ROOT / folder, root / folder)
    (root / 'demo/short.py').write_text(CONFIG)
    return root


def demo(checkout) -> str:
    command = [sys.executable, 'scripts/demo.py', '--config', 'demo/short.py']
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope='module')
def first(checkout):
    return demo(checkout)


def test_it_trains_and_shows_ap_table_and_report(checkout, first):
    assert re.search(r'AP 0\.\d+, AP50 0\.\d+', first)
    assert 'Filters at iteration 8, and in the whole training' in first
    assert re.search(
        r'\d+ filters collapsed in the training, \d+ of them were revived; \d+ are collapsed '
        r'at its end\. RecoveryHook opened \d+ closed ones\.',
        first,
    )
    assert first.endswith('The report is in work_dirs/demo/report.html\n')
    page = (checkout / 'work_dirs/demo/report.html').read_text()
    assert page.count('data:image/svg+xml;base64,') >= 4
    for name in ('counts', 'channels', 'scores'):
        picture = cv2.imread(str(checkout / f'work_dirs/demo/report_figures/{name}.png'))
        assert picture.std() > 10, name
    (log,) = checkout.glob('work_dirs/demo/*/*.log')
    assert re.search(
        r'Epoch\(train\).*collapse/collapsed: \d+ .*collapse/revived: \d+', log.read_text()
    )
    (scalars,) = checkout.glob('work_dirs/demo/*/vis_data/2*.json')
    assert 'collapse/trapped' in json.loads(scalars.read_text().splitlines()[0])


def test_run_again_it_trains_nothing_and_shows_the_same(checkout, first):
    again = demo(checkout)
    assert 'nothing to train' in again
    title = 'Filters at iteration'
    assert again[again.rindex(title) :] == first[first.rindex(title) :]


def test_an_interrupted_run_goes_on(checkout, first):
    work_dir = checkout / 'work_dirs/demo'
    (work_dir / 'finished').unlink()
    (work_dir / 'epoch_2.pth').unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    assert 'resumed epoch: 1, iter: 4' in demo(checkout)
    newest = max(work_dir.glob('*/collapse.jsonl'))
    assert [report['iter'] for report in read_records(newest).reports] == [2, 4, 6, 8]


def test_another_config_is_trained_anew(checkout, first):
    with open(checkout / 'demo/short.py', 'a') as file:
        file.write('train_cfg = dict(max_epochs=1, val_interval=9)\n')
    assert 'resumed' not in demo(checkout)
