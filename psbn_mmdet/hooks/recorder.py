"""The files of a run, ``collapse.jsonl`` and ``snapshots``, and those of the run it resumes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.runner import Runner

from ..collapse import Census, Report
from ..records import (
    RECORD_FILE,
    RECORD_INFO,
    RecordWriter,
    claim_folder,
    copy_snapshots,
    format_ranges,
    read_records,
    write_snapshot,
)
from ..version import __version__


class Recorder:
    """Write the record and the snapshots of a run.

    A resumed run continues the record that its checkpoint names: MMEngine saves the message hub's
    runtime information in every checkpoint, and there are the ``id`` and the folder of the record.

    Args:
        runner (Runner): The training, about to begin.
        start (Census): Of its network.
        shifts (Mapping[str, float]): The constant alpha of each layer, 0 for BN.
        settings (dict): Of the hook, for the record's header.
    """

    def __init__(
        self,
        runner: Runner,
        start: Census,
        shifts: Mapping[str, float],
        settings: dict[str, Any],
    ) -> None:
        self._shifts = shifts
        self._settings = settings
        self._identity = uuid.uuid4().hex
        self._begin = runner.iter
        self._writer: RecordWriter | None = None
        self._folder: Path | None = None  # claimed when the first file is written
        self._earlier = _find_earlier(runner, start) if runner.iter > 0 else None
        if self._earlier is not None:
            copy_snapshots(self._earlier.parent, self._own_folder(runner), runner.iter)

    def write(self, runner: Runner, report: Report) -> None:
        """Append a report."""
        if self._writer is None:
            folder = self._own_folder(runner)
            header = self._header(folder, report.census)
            self._writer = RecordWriter(folder / RECORD_FILE, header, self._earlier, self._begin)
        rates = runner.optim_wrapper.get_lr().items()
        is_within = report.iteration > runner.iter  # an epoch, not at its end
        self._writer.append(
            {
                'iter': report.iteration,
                'epoch': max(runner.epoch + is_within, 1),
                'lr': {name: float(rate[0]) for name, rate in rates},  # may be tensors
                'steps': report.steps,
                'channels': {
                    kind: [None if mask is None else format_ranges(mask) for mask in masks]
                    for kind, masks in report.masks.items()
                },
            }
        )
        folder = self._writer.path.resolve().parent
        info = {'id': self._identity, 'name': folder.name, 'folder': str(folder)}
        runner.message_hub.update_info(RECORD_INFO, info)

    def keep(self, runner: Runner, now: Census) -> None:
        """Keep a snapshot of all gammas and biases."""
        folder = self._own_folder(runner)
        write_snapshot(folder, runner.iter, now.values('gamma'), now.values('bias'))

    def _own_folder(self, runner: Runner) -> Path:
        """The log folder, unless a run that was started in the same second has it."""
        if self._folder is None:
            self._folder = claim_folder(runner.log_dir)
            if self._folder != Path(runner.log_dir):
                runner.logger.warning(
                    f'CollapseHook: another run, started in the same second, keeps its record in '
                    f'{runner.log_dir}: the record of this run is in {self._folder}.'
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


def _find_earlier(runner: Runner, start: Census) -> Path | None:
    """The record that a resumed run continues; if there is none, the log says why."""
    named: dict[str, Any] | None = runner.message_hub.get_info(RECORD_INFO)
    if named is None:
        runner.logger.info(
            'CollapseHook: the checkpoint names no record (it was saved without the hook, or '
            'before its first report): a new one is begun.'
        )
        return None
    for folder in (Path(runner.work_dir) / Path(named['name']).name, Path(named['folder'])):
        path = folder / RECORD_FILE
        if not path.is_file():
            continue
        try:
            header = read_records(path, last_of=runner.iter).header
        except (OSError, ValueError) as error:
            runner.logger.warning(f'CollapseHook: {error}. Its reports are not continued.')
            return None
        if header.get('id') != named['id']:
            continue
        layers = [(layer['name'], layer['channels']) for layer in header['layers']]
        if layers != [(layer.name, layer.channels) for layer in start.layers]:
            runner.logger.warning(
                f'CollapseHook: {path} is of a network with other BN layers. Its reports are not '
                'continued.'
            )
            return None
        return path
    runner.logger.warning(
        f'CollapseHook: the record that the checkpoint names, {named["folder"]}/{RECORD_FILE}, is '
        'gone: a new one is begun. To continue it, put it back and resume again.'
    )
    return None
