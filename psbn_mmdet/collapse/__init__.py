"""Counting collapsed filters: the census, the network's structure, and gradients."""

from .census import (
    ASSUMED,
    FOLDED,
    RECTIFIERS,
    Census,
    LayerCensus,
    census_of_model,
    census_of_state_dict,
    check_thresholds,
    compare,
    find_norms,
    unwrapped,
)
from .gradients import GradientWatch
from .monitor import CollapseMonitor, Report
from .structure import (
    RectifierTrace,
    StepTrace,
    Structure,
    trace_rectifiers,
    trace_structure,
    watch_steps,
    what_follows,
)

__all__ = [
    'ASSUMED',
    'FOLDED',
    'RECTIFIERS',
    'Census',
    'CollapseMonitor',
    'GradientWatch',
    'LayerCensus',
    'RectifierTrace',
    'Report',
    'StepTrace',
    'Structure',
    'census_of_model',
    'census_of_state_dict',
    'check_thresholds',
    'compare',
    'find_norms',
    'trace_rectifiers',
    'trace_structure',
    'unwrapped',
    'watch_steps',
    'what_follows',
]
