"""Cutting closed filters out of a network, which computes the same without them."""

from .cut import MARGIN, Cut, add_constants, build_pruned, narrow, plan
from .shrink import shrink_config
from .trace import ChannelTrace, Watched

__all__ = [
    'MARGIN',
    'ChannelTrace',
    'Cut',
    'Watched',
    'add_constants',
    'build_pruned',
    'narrow',
    'plan',
    'shrink_config',
]
