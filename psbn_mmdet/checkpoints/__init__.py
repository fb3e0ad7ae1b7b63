"""Checkpoint files: reading them without running code, and writing them whole."""

from .formats import (
    CheckpointError,
    Weights,
    find_state_dicts,
    read_content,
    read_torch,
    read_weights,
    wrapper_of,
    write_content,
)

__all__ = [
    'CheckpointError',
    'Weights',
    'find_state_dicts',
    'read_content',
    'read_torch',
    'read_weights',
    'wrapper_of',
    'write_content',
]
