"""The words of a record: the kinds of collapse, and the stages of a network."""

from __future__ import annotations

KINDS = ('vanished', 'dead', 'trapped', 'broken')  # see psbn_mmdet.collapse.census
# Keys of MMEngine's runtime information, which is in each checkpoint of a run.
RECORD_INFO = 'collapse/record'  # the record's identity
STATE_INFO = 'collapse/state'  # of psbn_mmdet.collapse.CollapseMonitor
# What has whole networks in it, such as a teacher and a student.
_AROUND = ('student', 'teacher', 'detector', 'reid', 'module')


def stage_of(name: str) -> str:
    """The part of a network that a layer belongs to, from the layer's name.

    Examples:
        >>> stage_of('backbone.layer1.0.bn1'), stage_of('teacher.neck.fpn_convs.0.bn')
        ('backbone.layer1', 'teacher.neck')
    """
    parts = name.split('.')[:-1]
    if not parts:
        return name
    around = 1 if parts[0] in _AROUND else 0
    return '.'.join(parts[: around + (2 if 'backbone' in parts[around : around + 1] else 1)])
