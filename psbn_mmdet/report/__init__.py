"""The report of training runs: an HTML page and its figures."""

from .channels import draw_channels
from .page import write_report
from .runs import Run, read_run
from .work_dirs import find_record

__all__ = ['Run', 'draw_channels', 'find_record', 'read_run', 'write_report']
