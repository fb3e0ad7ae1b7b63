"""Network slimming (Liu et al., arXiv 1708.06519): an L1 penalty on gamma. Imported by configs."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from psbn_mmdet.collapse import find_norms


@HOOKS.register_module()
class SlimmingHook(Hook):
    """Add the penalty's gradient to that of each gamma.

    Args:
        weight (float): Of the penalty.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def before_train(self, runner: Runner) -> None:
        """Before the first step."""

        def penalise(gamma: Tensor) -> None:
            gamma.register_hook(lambda grad: grad + self.weight * gamma.detach().sign())

        for norm in find_norms(runner.model).values():
            if norm.weight.requires_grad:
                penalise(norm.weight)
