"""What is done about closed filters: opening them in a training, or at once in a checkpoint."""

from .recovery import Recovery, decay_per_step
from .revive import revive

__all__ = ['Recovery', 'decay_per_step', 'revive']
