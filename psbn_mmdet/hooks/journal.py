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
from ..records import RECORD_FILE, Records, RecordWriter, copy_snapshots, write_snapshot
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
        snapshots = (self._earlier.parent, runner.log_dir, runner.iter)
        self._parts.run('snapshots', copy_snapshots, *snapshots)
        return records

    def write(self, runner: Runner, report: Report, steps: int) -> None:
        """Append a report to the record, with the number of optimiser steps since the last."""
        if self._writer is None:
            path = Path(runner.log_dir) / RECORD_FILE
            header = self._header(runner, report.census)
            self._writer = RecordWriter(path, header, self._earlier, self._begin)
        rates = runner.optim_wrapper.get_lr().items()
        self._writer.append(
            {
                'iter': runner.iter + 1,
                'epoch': runner.epoch + 1,
                'lr': {name: float(rate[0]) for name, rate in rates},  # may be tensors
                'steps': steps,
                **report.to_json(),
            }
        )
        remember_record(runner.message_hub, self._writer.path, self._identity)

    def keep(self, runner: Runner, now: Census) -> None:
        """Keep a snapshot of all gammas and biases."""
        write_snapshot(runner.log_dir, runner.iter, now.values('gamma'), now.values('bias'))

    def end(self) -> None:
        """Note that the training has come to its end."""
        if self._writer is not None:
            self._writer.end()

    def _header(self, runner: Runner, now: Census) -> dict[str, Any]:
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
            'continues': earlier and os.path.relpath(earlier.parent, runner.log_dir),
            'versions': {
                'psbn_mmdet': __version__,
                'torch': torch.__version__,
                'mmengine': mmengine.__version__,
            },
        }
