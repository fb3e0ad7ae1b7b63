"""Average precision, from the logs of a run and of the runs that it continues."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records import stream_json
from ..records.reader import check_integer, check_number

SCORE_LOG = Path('vis_data', 'scalars.json')  # in a run's log folder
_METRICS = {'AP': r'(.*/)?(bbox_)?m?AP', 'AP50': r'(.*/)?(bbox_)?m?AP_?50'}
# Regular expressions of metrics' keys. A teacher and its student are both validated.
SCORES = {name: f'(?!teacher/|student/){key}' for name, key in _METRICS.items()} | {
    f'{name} of the {of}': f'{of}/{key}'
    for name, key in _METRICS.items()
    for of in ('teacher', 'student')
}


def read_scores(folders: Sequence[Path]) -> dict[str, tuple[list[int], list[float]]]:
    """Read AP and AP50.

    Args:
        folders (Sequence[Path]): Log folders of a run, after those of the runs it continues.

    Returns:
        dict[str, tuple[list[int], list[float]]]: Steps and values of each of ``SCORES`` that was
        logged. Steps are epochs, or iterations where the training has no epochs.

    Raises:
        ValueError: If a log is damaged.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in SCORES}
    iteration, has_epochs = 0, True  # as the lines so far tell

    def take(number: int, values: dict[str, Any]) -> None:
        nonlocal iteration, has_epochs
        if 'loss' in values:
            iteration = check_integer(values['step'])
        if number == 1:  # a resumed run starts here: later scores of the earlier one are void
            start = values.get('epoch', values.get('step', 0)) if has_epochs else iteration
            for name, scores in found.items():
                found[name] = {step: score for step, score in scores.items() if step < start}
        for key, value in values.items():
            for name, pattern in SCORES.items():
                if re.fullmatch(pattern, key) and math.isfinite(check_number(value)):
                    step = check_integer(values['step'])
                    has_epochs = step > 0  # MMEngine logs 0 where there are none
                    found[name][step or iteration] = float(value)

    for folder in folders:
        log = folder / SCORE_LOG
        if log.is_file():
            with open(log, 'rb') as file:
                for _ in stream_json(file, take):
                    pass
    return {name: (sorted(v), [v[s] for s in sorted(v)]) for name, v in found.items() if v}
