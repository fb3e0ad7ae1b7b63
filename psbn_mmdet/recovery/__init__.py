"""Opening closed filters, during training or directly in a checkpoint."""

from .recovery import Recovery, decay_per_step
from .revive import revive

__all__ = ['Recovery', 'decay_per_step', 'revive']
