"""The psBN layers, their weight decay, and the change of a network from BN to psBN and back."""

from .psbn import (
    PostShiftedBatchNorm,
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
    check_shift,
    rectifier_closed,
)
from .state_dict import entry_key, find_norm_states
from .switch import bn_to_psbn, psbn_to_bn, switch_norms

__all__ = [
    'PostShiftedBatchNorm',
    'PostShiftedBatchNorm1d',
    'PostShiftedBatchNorm2d',
    'PostShiftedBatchNorm3d',
    'PostShiftedSyncBatchNorm',
    'bn_to_psbn',
    'check_shift',
    'entry_key',
    'find_norm_states',
    'psbn_to_bn',
    'rectifier_closed',
    'switch_norms',
]
