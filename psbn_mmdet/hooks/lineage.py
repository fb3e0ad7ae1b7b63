"""Which record a resumed run continues: the one whose identity its checkpoint carries.

MMEngine saves the message hub's runtime information in every checkpoint, and gives it back to the
run that resumes it. There the hook keeps the ``id`` and the folder of its record, and the filters
that have not begun.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import MessageHub
from mmengine.runner import Runner

from ..collapse import Census
from ..records import (
    RECORD_FILE,
    RECORD_INFO,
    UNSTARTED_INFO,
    Records,
    format_ranges,
    parse_ranges,
    read_records,
)


def remember_record(hub: MessageHub, record: Path, identity: str) -> None:
    """Have checkpoints carry a record's identity from now on."""
    folder = record.resolve().parent
    hub.update_info(RECORD_INFO, {'id': identity, 'name': folder.name, 'folder': str(folder)})


def remember_unstarted(hub: MessageHub, unstarted: Mapping[str, np.ndarray]) -> None:
    """Have checkpoints carry the filters that have not begun, by layer."""
    hub.update_info(
        UNSTARTED_INFO,
        {name: format_ranges(mask) for name, mask in unstarted.items() if mask.any()},
    )


def recall_unstarted(hub: MessageHub, start: Census) -> Census:
    """The census of a resumed run's start, with the filters that had not begun in the earlier.

    Raises:
        ValueError: If what the checkpoint says of them is not of this network.
    """
    ranges = hub.get_info(UNSTARTED_INFO)
    if ranges is None:  # saved without the hook
        return start
    if not isinstance(ranges, dict):
        raise ValueError(f'{reprlib.repr(ranges)} is no dict of ranges by layer')
    return start.judged(
        unstarted={
            layer.name: parse_ranges(str(ranges.get(layer.name, '')), layer.channels)
            for layer in start.layers
        }
    )


def find_earlier(runner: Runner, start: Census) -> tuple[Path, Records] | None:
    """Find the record that a resumed run continues; where it cannot, the log says why.

    Args:
        runner (Runner): That has resumed a checkpoint.
        start (Census): Of its network.

    Returns:
        tuple[Path, Records], optional: The record, its header and its last report up to the
        iteration that is resumed at.
    """
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
            records = read_records(path, last_of=runner.iter)
        except ValueError as error:
            runner.logger.warning(f'CollapseHook: {error}. Its reports are not continued.')
            return None
        if records.header.get('id') != named['id']:
            continue
        layers = [(layer['name'], layer['channels']) for layer in records.header['layers']]
        if layers != [(layer.name, layer.channels) for layer in start.layers]:
            runner.logger.warning(
                f'CollapseHook: {path} is of a network with other BN layers. Its reports are not '
                'continued.'
            )
            return None
        return path, records
    runner.logger.warning(
        f'CollapseHook: the record that the checkpoint names, {named["folder"]}/{RECORD_FILE}, is '
        'gone: a new one is begun. To continue it, put it back and resume again.'
    )
    return None
