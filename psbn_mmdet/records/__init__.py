"""What a run writes down of its collapse: the record and the snapshots. Needs NumPy only."""

from .names import KINDS, RECORD_INFO, STATE_INFO, stage_of
from .record import (
    ENDED_FILE,
    MOST_BYTES,
    MOST_CHANNELS,
    RECORD_FILE,
    NoReportError,
    Records,
    RecordWriter,
    format_ranges,
    parse_ranges,
    read_records,
    stream_json,
    stream_records,
)
from .snapshots import (
    claim_folder,
    copy_snapshots,
    find_snapshots,
    read_snapshot,
    write_snapshot,
)

__all__ = [
    'ENDED_FILE',
    'KINDS',
    'MOST_BYTES',
    'MOST_CHANNELS',
    'RECORD_FILE',
    'RECORD_INFO',
    'STATE_INFO',
    'NoReportError',
    'RecordWriter',
    'Records',
    'claim_folder',
    'copy_snapshots',
    'find_snapshots',
    'format_ranges',
    'parse_ranges',
    'read_records',
    'read_snapshot',
    'stage_of',
    'stream_json',
    'stream_records',
    'write_snapshot',
]
