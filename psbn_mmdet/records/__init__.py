"""The files of a run about collapse: the record and the snapshots. Needs NumPy only."""

from .names import (
    COUNTS,
    KINDS,
    RECORD_FILE,
    RECORD_INFO,
    RECOVERED,
    STATE_INFO,
    stage_of,
)
from .ranges import format_ranges, parse_ranges
from .reader import Records, read_records, stream_json, stream_records, sum_known
from .snapshots import (
    claim_folder,
    copy_snapshots,
    find_snapshots,
    read_snapshot,
    write_snapshot,
)
from .writer import RecordWriter

__all__ = [
    'COUNTS',
    'KINDS',
    'RECORD_FILE',
    'RECORD_INFO',
    'RECOVERED',
    'STATE_INFO',
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
    'sum_known',
    'write_snapshot',
]
