"""What people look at: figures from the records of training runs, the audit of checkpoints."""

from .audit import Audit, audit_to_csv, audit_to_dict, audit_to_text, plot_audit
from .channels import draw_channels
from .plots import find_record, plot_collapse

__all__ = [
    'Audit',
    'audit_to_csv',
    'audit_to_dict',
    'audit_to_text',
    'draw_channels',
    'find_record',
    'plot_audit',
    'plot_collapse',
]
