"""MMEngine hooks: counting collapsed filters during training, and recovering closed ones."""

from .collapse_hook import CollapseHook
from .recovery_hook import RecoveryHook

__all__ = ['CollapseHook', 'RecoveryHook']
