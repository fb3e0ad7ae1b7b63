"""The trials of other people's configs, on a few of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(script: str, *options: str) -> str:
    """What a script of benchmarks/ prints."""
    result = subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / script, *options],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ('config', 'found'),
    [
        ('retinanet/retinanet_r18_fpn_1x_coco.py', 'fits'),
        ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 'fits'),
        ('mm_grounding_dino/rtts/', 'fits'),
        ('rpn/rpn_r50_fpn_1x_coco.py', 'fits'),
        ('pascal_voc/ssd300_voc0712.py', 'fits'),
        ('openimages/ssd300_32xb8-36e_openimages.py', 'no data made'),
    ],
)
def test_configs_of_the_zoo_pass_the_checks(config, found):
    assert run('zoo_data.py', '--match', config).startswith(f'1 {found}\n')


def test_the_page_says_what_the_kept_results_say():
    spec = importlib.util.spec_from_file_location('zoo', ROOT / 'benchmarks/zoo.py')
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    kept = json.loads((ROOT / 'benchmarks/results/zoo.json').read_text())
    page = zoo.report(kept['mmdet'], kept['models'])
    assert (ROOT / 'docs/zoo.md').read_text() == page


def test_a_config_of_another_library_trains():
    pytest.importorskip('mmpretrain')
    row = json.loads(run('libraries.py', '--only', 'mmpretrain'))
    assert row['switched'] == ['backbone: 20 BN -> psBN']
    assert row['iterations'] == 6 and row['total']['collapsed'] is not None
