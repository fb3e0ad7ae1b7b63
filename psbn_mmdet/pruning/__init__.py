"""Cutting closed filters out of a network, which computes the same without them."""

from .cut import MARGIN, Cut, build_pruned, cut_out, narrow, plan
from .shrink import shrink_config
from .trace import ChannelTrace, Watched

__all__ = [
    'MARGIN',
    'ChannelTrace',
    'Cut',
    'Watched',
    'build_pruned',
    'cut_out',
    'narrow',
    'plan',
    'shrink_config',
]
