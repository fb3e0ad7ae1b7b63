"""Figures from the collapse records of training runs."""

from .channels import draw_channels
from .plots import find_record, plot_collapse

__all__ = ['draw_channels', 'find_record', 'plot_collapse']
