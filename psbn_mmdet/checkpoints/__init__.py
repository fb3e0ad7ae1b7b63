"""Checkpoint files: reading them without running code, and converting them as a whole."""

from .convert import Conversion, convert_checkpoint
from .files import CheckpointError, Weights, read_content, read_torch, read_weights, write_content
from .rectifiers import rectifiers_of_config

__all__ = [
    'CheckpointError',
    'Conversion',
    'Weights',
    'convert_checkpoint',
    'read_content',
    'read_torch',
    'read_weights',
    'rectifiers_of_config',
    'write_content',
]
