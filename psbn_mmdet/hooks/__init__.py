"""MMEngine hooks: counting collapsed filters during training."""

from .collapse_hook import CollapseHook

__all__ = ['CollapseHook']
