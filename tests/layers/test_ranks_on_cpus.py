"""psSyncBN over two gloo ranks, against one process that has the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sync_rank import SETTINGS, SHAPES, made, result

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('ranks')
    script = ROOT / 'tests/sync_rank.py'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, script, str(index), folder], env=environment)
        for index in (0, 1)
    ]
    assert [process.wait(100) for process in processes] == [0, 0]
    return [torch.load(folder / f'{index}.pt') for index in (0, 1)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', SETTINGS)
def test_two_ranks_compute_what_one_process_does(ranks, name, shape):
    whole = result(*made(name, shape))
    first, second = (found[name, shape] for found in ranks)
    assert first.keys() == second.keys() == whole.keys()
    for key, expected in whole.items():
        if key in ('y', 'dx'):
            joined = torch.cat([first[key], second[key]])
        elif key.startswith('d'):  # a parameter's, which DDP sums
            joined = first[key] + second[key]
        else:
            assert torch.equal(first[key], second[key]), key
            joined = first[key]
        torch.testing.assert_close(joined, expected, rtol=1e-6, atol=1e-6)


def test_half_precision_is_computed_in_full_and_evaluation_needs_no_other_rank(ranks):
    layer, x, gradient = made('plain', SHAPES[0])
    whole = result(layer, x.bfloat16(), gradient.bfloat16())
    joined = torch.cat([found['half']['y'] for found in ranks])
    assert joined.dtype == torch.bfloat16
    torch.testing.assert_close(joined, whole['y'], rtol=0.02, atol=0.02)
    torch.testing.assert_close(ranks[0]['half']['running_var'], whole['running_var'])
    expected = layer.eval()(x.bfloat16().float()).detach()
    torch.testing.assert_close(torch.cat([found['eval'] for found in ranks]), expected)


def test_one_value_per_channel_on_all_ranks_is_refused(ranks):
    for found in ranks:
        assert 'expected more than 1 value per channel when training' in found['refused']
