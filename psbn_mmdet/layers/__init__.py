"""The psBN layers, and conversion between them and BN."""

from .convert import bn_to_psbn, psbn_to_bn
from .psbn import (
    PostShiftedBatchNorm,
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
    check_shift,
)

__all__ = [
    'PostShiftedBatchNorm',
    'PostShiftedBatchNorm1d',
    'PostShiftedBatchNorm2d',
    'PostShiftedBatchNorm3d',
    'PostShiftedSyncBatchNorm',
    'bn_to_psbn',
    'check_shift',
    'psbn_to_bn',
]
