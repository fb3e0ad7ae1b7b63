"""Runs a script as two ranks: ``python SCRIPT RANK FOLDER``, which writes FOLDER/RANK.pt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from limits import HANG

ROOT = Path(__file__).resolve().parents[1]


def two_ranks(script: str, folder: Path) -> list[Any]:
    """What both ranks of a script in ``tests`` have found."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / 'tests' / script, str(index), folder], env=environment
        )
        for index in (0, 1)
    ]
    assert [process.wait(HANG) for process in processes] == [0, 0]
    return [torch.load(folder / f'{index}.pt', weights_only=False) for index in (0, 1)]
