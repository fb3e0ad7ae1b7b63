"""What a run writes down, and what it takes over from the run that it continues."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.runner import Runner

from ..collapse import Census
from ..records import (
    RECORD_FILE,
    Records,
    RecordWriter,
    claim_folder,
    copy_snapshots,
    write_snapshot,
)
from ..version import __version__
from .history import Report
from .lineage import find_earlier, remember_record
from .parts import Parts


class Journal:
    """Writes the record and the snapshots of a run.

    Args:
        parts (Parts): What runs the reading of an earlier run's files.
        shifts (Mapping[str, float]): The constant alpha of each layer, 0 for BN.
        settings (dict): Of the hook, for the record's header.
    """

    def __init__(self, parts: Parts, shifts: Mapping[str, float], settings: dict[str, Any]) -> None:
        self._parts = parts
        self._shifts = shifts
        self._settings = settings
        self._identity = uuid.uuid4().hex
        self._writer: RecordWriter | None = None
        self._folder: Path | None = None  # where both are written
        self._earlier: Path | None = None  # the record that this run continues
        self._begin = 0

    def begin(self, runner: Runner, start: Census) -> Records | None:
        """Find the record that a resumed run continues, and take over its snapshots.

        Args:
            runner (Runner): The training, about to begin.
            start (Census): Of its network.

        Returns:
            Records, optional: Its header, and its last report up to now.
        """
        self._begin = runner.iter
        if runner.iter == 0:
            return None
        found = self._parts.run('earlier records', find_earlier, runner, start)
        if found is None:
            return None
        self._earlier, records = found
        self._parts.run('snapshots', self._take_over, runner, self._earlier.parent)
        return records

    def write(self, runner: Runner, report: Report, iteration: int, steps: int) -> None:
        """Append the report after an iteration, with the number of steps since the last."""
        if self._writer is None:
            folder = self._own_folder(runner)
            header = self._header(folder, report.census)
            self._writer = RecordWriter(folder / RECORD_FILE, header, self._earlier, self._begin)
        rates = runner.optim_wrapper.get_lr().items()
        self._writer.append(
            {
                'iter': iteration,
                'epoch': max(runner.epoch + (iteration > runner.iter), 1),  # in one, or at the end
                'lr': {name: float(rate[0]) for name, rate in rates},  # may be tensors
                'steps': steps,
                **report.to_json(),
            }
        )
        remember_record(runner.message_hub, self._writer.path, self._identity)

    def keep(self, runner: Runner, now: Census) -> None:
        """Keep a snapshot of all gammas and biases."""
        folder = self._own_folder(runner)
        write_snapshot(folder, runner.iter, now.values('gamma'), now.values('bias'))

    def end(self) -> None:
        """Note that the training has come to its end."""
        if self._writer is not None:
            self._writer.end()

    def _take_over(self, runner: Runner, earlier: Path) -> None:
        copy_snapshots(earlier, self._own_folder(runner), runner.iter)

    def _own_folder(self, runner: Runner) -> Path:
        """The log folder, unless a run that was started in the same second has it."""
        if self._folder is None:
            self._folder = claim_folder(runner.log_dir)
            if self._folder != Path(runner.log_dir):
                runner.logger.warning(
                    f'CollapseHook: another run, started in the same second, keeps its record in '
                    f'{runner.log_dir}: that of this one is in {self._folder}.'
                )
        return self._folder

    def _header(self, folder: Path, now: Census) -> dict[str, Any]:
        earlier = self._earlier
        return {
            'id': self._identity,
            'layers': [
                {
                    'name': layer.name,
                    'channels': layer.channels,
                    'norm': layer.norm,
                    'shift': self._shifts[layer.name],
                    'rectifier': layer.rectifier,
                    'frozen': layer.frozen,
                }
                for layer in now.layers
            ],
            **self._settings,
            'continues': earlier and os.path.relpath(earlier.parent, folder),
            'versions': {
                'psbn_mmdet': __version__,
                'torch': torch.__version__,
                'mmengine': mmengine.__version__,
            },
        }
