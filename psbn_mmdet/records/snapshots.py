"""Snapshots of all gammas and biases, which the hook keeps beside its record.

``snapshots/iter_<n>.npy`` in a run's log folder is a float16 array of shape (2, C): gamma and
bias b of all channels after n iterations, layer by layer in the order of the record's
header.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np

from .atomic import replacing

FOLDER = 'snapshots'  # in a run's log folder


def claim_folder(log_folder: str | os.PathLike) -> Path:
    """Claim a folder for the record and snapshots of one run alone.

    Log folders are named by the second, so runs started together would share one.

    Args:
        log_folder (str | PathLike): The run's log folder.

    Returns:
        Path: That folder, or one beside it with ``_2``, ``_3``, ... at the end of its name.
    """
    folder, number = Path(log_folder), 1
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / FOLDER).mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = Path(f'{log_folder}_{number}')


def write_snapshot(
    run: str | os.PathLike, iteration: int, gamma: np.ndarray, bias: np.ndarray
) -> Path:
    """Write the snapshot of an iteration, unless it exists.

    Args:
        run (str | PathLike): The run's log folder.
        iteration (int): Number of iterations done.
        gamma (np.ndarray): Of all channels, shape (C,).
        bias (np.ndarray): Biases b of all channels, shape (C,).

    Returns:
        Path: The file.
    """
    path = Path(run) / FOLDER / f'iter_{iteration}.npy'
    if not path.exists():
        with np.errstate(over='ignore'):  # overflow becomes infinite
            values = np.stack([gamma, bias]).astype(np.float16)
        with replacing(path) as part, open(part, 'wb') as file:
            np.save(file, values)
    return path


def find_snapshots(run: str | os.PathLike) -> dict[int, Path]:
    """Find a run's snapshots.

    Args:
        run (str | PathLike): The run's log folder.

    Returns:
        dict[int, Path]: Files by iteration, the earliest first; empty if there are none.
    """
    found = {}
    for path in (Path(run) / FOLDER).glob('iter_*.npy'):
        match = re.fullmatch(r'iter_(\d+)\.npy', path.name)
        if match and path.is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_snapshot(path: str | os.PathLike, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a snapshot.

    Args:
        path (str | PathLike): An ``iter_<n>.npy`` file.
        channels (int): Number of channels C in the run's record.

    Returns:
        tuple[np.ndarray, np.ndarray]: Gamma and bias, shape (C,) each.

    Raises:
        ValueError: If the file is damaged or of another network.
    """
    try:
        # Memory-mapped: a damaged file may claim any size.
        values = np.load(path, mmap_mode='r', allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind != 'f':
            raise ValueError('no array of floating-point numbers')
        if values.shape != (2, channels):
            raise ValueError(f'shape {values.shape}, the record has {channels} channels')
    except OSError:
        raise
    except Exception as error:  # a damaged header may raise anything
        raise ValueError(f'{path} is no snapshot of this run ({error}): delete it') from None
    return values[0].astype(np.float32), values[1].astype(np.float32)


def copy_snapshots(source: str | os.PathLike, run: str | os.PathLike, last: int) -> None:
    """Copy the snapshots of a run that is continued, up to an iteration.

    Args:
        source (str | PathLike): The earlier run's log folder.
        run (str | PathLike): The log folder of the run that continues it.
        last (int): The iteration at which it continues.
    """
    for iteration, path in find_snapshots(source).items():
        if iteration <= last:
            with replacing(Path(run) / FOLDER / path.name) as part:
                shutil.copyfile(path, part)
