"""Finding the record of a run, and the runs that it continues."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..records import RECORD_FILE
from ..records.reader import MOST_BYTES


def find_record(path: str | os.PathLike) -> Path:
    """Find the collapse record of a run.

    Args:
        path (str | PathLike): A record, the folder that it lies in, or a work dir, of which the
            latest run is taken.

    Returns:
        Path: The record.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / RECORD_FILE).is_file():
        return path / RECORD_FILE
    found = [found for found in path.glob(f'*/{RECORD_FILE}') if found.is_file()]
    if not found:
        raise FileNotFoundError(
            f'{path} has no */{RECORD_FILE}: give the work dir of a run with the CollapseHook'
        )
    return max(found, key=_age)


def _age(record: Path) -> list[str | int]:
    """What orders records by their folders, named by the second, then numbered: ..._2, ..., _10."""
    parts = re.split(r'(\d+)', record.parent.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def run_folders(record: Path) -> list[Path]:
    """The folders of the earlier runs in its work dir that a run continues, then its own."""
    folders = [record.parent.resolve()]
    work_dir = folders[0].parent
    while (folders[0] / RECORD_FILE).is_file():  # not a pipe, which would be waited for
        try:
            with open(folders[0] / RECORD_FILE, 'rb') as file:
                header = json.loads(file.readline(MOST_BYTES))
            earlier = (folders[0] / header['continues']).resolve()
            # A record may come from anyone: what it names elsewhere is not read.
            if earlier in folders or work_dir not in earlier.parents or not earlier.is_dir():
                return folders
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return folders
        folders.insert(0, earlier)
    return folders
