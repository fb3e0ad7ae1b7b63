"""Running a command as a user does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from limits import HANG

ROOT = Path(__file__).resolve().parents[1]
# The suite itself may run under `make test STACK=...`, which hands its variables down.
ENV = {
    name: value
    for name, value in os.environ.items()
    if name not in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'STACK', 'ARGS')
}


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """The finished process, with its output."""
    return subprocess.run(
        command, cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=HANG
    )
