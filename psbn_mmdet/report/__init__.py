"""What people look at: the report of training runs, the audit of checkpoints."""

from .audit_tables import Audit, audit_to_csv, audit_to_dict, audit_to_text, plot_audit
from .channels import draw_channels
from .page import write_report
from .runs import Run, find_record, read_run

__all__ = [
    'Audit',
    'Run',
    'audit_to_csv',
    'audit_to_dict',
    'audit_to_text',
    'draw_channels',
    'find_record',
    'plot_audit',
    'read_run',
    'write_report',
]
