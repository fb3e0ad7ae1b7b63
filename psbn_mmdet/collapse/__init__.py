"""What collapse is: the census of a network, rectifiers, gradients, and the record of a run."""

from .census import (
    ASSUMED,
    KINDS,
    Census,
    LayerCensus,
    census_of_model,
    census_of_state_dict,
    check_thresholds,
    compare,
    find_norms,
    stage_of,
)
from .gradients import GradientWatch
from .leak import leak_share
from .records import (
    RECORD_FILE,
    Records,
    RecordWriter,
    format_ranges,
    parse_ranges,
    read_records,
    stream_json,
    stream_records,
)
from .snapshots import copy_snapshots, find_snapshots, read_snapshot, write_snapshot
from .trace import RectifierTrace, StepTrace, trace_rectifiers, what_follows

__all__ = [
    'ASSUMED',
    'KINDS',
    'RECORD_FILE',
    'Census',
    'GradientWatch',
    'LayerCensus',
    'RecordWriter',
    'Records',
    'RectifierTrace',
    'StepTrace',
    'census_of_model',
    'census_of_state_dict',
    'check_thresholds',
    'compare',
    'copy_snapshots',
    'find_norms',
    'find_snapshots',
    'format_ranges',
    'leak_share',
    'parse_ranges',
    'read_records',
    'read_snapshot',
    'stage_of',
    'stream_json',
    'stream_records',
    'trace_rectifiers',
    'what_follows',
    'write_snapshot',
]
