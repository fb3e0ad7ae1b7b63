"""The numbers of a report in the log line, in every visualizer backend, and in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmengine.logging import MessageHub
from mmengine.runner import Runner

from ..collapse import CollapseMonitor, Report
from ..records import RECOVERED

PREFIX = 'train/collapse/'  # of the scalars in the message hub
# Past values that the message hub keeps of each: it copies all of them at each new one.
KEPT = 1000


def log_scalars(hub: MessageHub, report: Report, names: Sequence[str], by_stage: bool) -> None:
    """Put counts into the message hub, from where the LoggerHook takes them.

    Args:
        hub (MessageHub): The run's.
        report (Report): Of this iteration.
        names (Sequence[str]): Which kinds; *broken* is there, too, whenever it is not 0, and
            *recovered* with RecoveryHook.
        by_stage (bool): Whether each stage's number of collapsed filters is there, too.
    """
    total = report.total
    scalars = {name: total[name] for name in names}
    if RECOVERED in total:
        scalars[RECOVERED] = total[RECOVERED]
    if 'broken' not in scalars:
        scalars['broken'] = total['broken'] or None
    if by_stage:
        scalars.update(report.by_stage('collapsed'))
    for name, value in scalars.items():
        if value is None:
            # The log processor repeats old values; an absent one is not taken for 0.
            hub.log_scalars.pop(PREFIX + name, None)
        else:
            hub.update_scalar(PREFIX + name, value)
            hub.log_scalars[PREFIX + name].max_length = KEPT


def drop_scalars(hub: MessageHub) -> None:
    """Let no log line repeat the last numbers."""
    for key in [key for key in hub.log_scalars if key.startswith(PREFIX)]:
        del hub.log_scalars[key]


def draw_stages(runner: Runner, monitor: CollapseMonitor) -> None:
    """Give TensorBoard, if it is a backend, each stage's curve and histograms."""
    backend = runner.visualizer.get_backend('TensorboardVisBackend')
    if backend is None:
        return
    for stage, part in monitor.census().stages().items():
        masks = [monitor.collapsed.get(layer.name, layer.collapsed) for layer in part.layers]
        backend.add_scalar(f'collapsed/{stage}', int(sum(m.sum() for m in masks)), runner.iter)
        for what in ('gamma', 'bias'):
            values = part.values(what)
            values = values[np.isfinite(values)]
            if len(values):  # TensorBoard refuses a histogram of nothing
                backend.experiment.add_histogram(f'{what}/{stage}', values, runner.iter)
