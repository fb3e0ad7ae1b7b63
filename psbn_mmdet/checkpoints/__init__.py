"""Checkpoint files: reading them without running code, and converting them as a whole."""

from .checkpoint_conversion import Conversion, convert_checkpoint
from .config_model import structure_of_config
from .formats import CheckpointError, Weights, read_content, read_torch, read_weights, write_content

__all__ = [
    'CheckpointError',
    'Conversion',
    'Weights',
    'convert_checkpoint',
    'read_content',
    'read_torch',
    'read_weights',
    'structure_of_config',
    'write_content',
]
