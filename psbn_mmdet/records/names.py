"""The words of a record: the kinds of collapse, and the stages of a network."""

from __future__ import annotations

RECORD_FILE = 'collapse.jsonl'  # in a run's log folder
KINDS = ('vanished', 'dead', 'trapped', 'broken')  # see psbn_mmdet.collapse.census
COUNTS = (*KINDS, 'collapsed', 'new', 'revived', 'unstarted')  # in each report
RECOVERED = 'recovered'  # in reports of a run with RecoveryHook
# Keys of MMEngine's runtime information, which is in each checkpoint of a run.
RECORD_INFO = 'collapse/record'  # the record's identity
STATE_INFO = 'collapse/state'  # of psbn_mmdet.collapse.CollapseMonitor
# Attributes that hold whole networks, such as a teacher and a student.
_WRAPPERS = ('student', 'teacher', 'detector', 'reid', 'module')


def stage_of(name: str) -> str:
    """The part of a network that a layer belongs to, from the layer's name.

    Examples:
        >>> stage_of('backbone.layer1.0.bn1'), stage_of('teacher.neck.fpn_convs.0.bn')
        ('backbone.layer1', 'teacher.neck')
    """
    parts = name.split('.')[:-1]
    if not parts:
        return name
    start = 1 if parts[0] in _WRAPPERS else 0
    return '.'.join(parts[: start + (2 if 'backbone' in parts[start : start + 1] else 1)])
