"""MMEngine hooks: counting collapsed filters, recovering closed ones, comparing data and heads."""

from .collapse_hook import CollapseHook
from .data_check_hook import DataCheckHook
from .recovery_hook import RecoveryHook

__all__ = ['CollapseHook', 'DataCheckHook', 'RecoveryHook']
