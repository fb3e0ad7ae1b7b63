"""Figures from the collapse records of training runs."""

from .plots import find_record, plot_collapse

__all__ = ['find_record', 'plot_collapse']
