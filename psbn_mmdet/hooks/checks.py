"""What psBN or the counting cannot work with, refused before time is spent on it."""

from __future__ import annotations

from mmengine.dist import all_gather_object, barrier
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn
from torch.optim import Optimizer

from ..collapse import find_norms, unwrapped
from ..layers import PostShiftedBatchNorm


def is_count(value: object) -> bool:
    """Whether an argument is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def will_train(runner: Runner) -> bool:
    """Whether a run that begins is a training; the others keep its config unbuilt."""
    return isinstance(runner._train_loop, BaseLoop)


def refuse_model(runner: Runner) -> None:
    """Refuse models and settings of the Runner.

    Raises:
        RuntimeError: If the model is under FSDP, if it has psBN and the Runner is to trace it, or
            if ranks have different BN layers.
    """
    modules = list(runner.model.modules())
    bases = {base.__name__ for module in modules for base in type(module).__mro__}
    if bases & {'FullyShardedDataParallel', 'FSDPModule'}:
        raise RuntimeError(
            'FSDP hides the gradients of single channels: train with MMDistributedDataParallel, or '
            'remove CollapseHook and RecoveryHook'
        )
    has_psbn = any(isinstance(m, PostShiftedBatchNorm) for m in modules)
    if has_psbn and runner.cfg.get('efficient_conv_bn_eval'):
        raise RuntimeError(
            'psBN: efficient_conv_bn_eval of the Runner traces the model with torch.fx, which '
            'cannot trace psBN: remove efficient_conv_bn_eval from the config'
        )
    _refuse_unlike_ranks(unwrapped(runner.model))


def _refuse_unlike_ranks(model: nn.Module) -> None:
    """DistributedDataParallel compares the shapes of parameters, not what they are for."""
    own = [
        f'{name} ({type(norm).__name__}, {norm.num_features} channels)'
        for name, norm in find_norms(model).items()
    ]
    first, *others = all_gather_object(own)
    for rank, other in enumerate(others, start=1):
        if other != first:
            unlike = next((x for x in [*other, *first] if (x in other) != (x in first)), first[0])
            barrier()  # a rank that leaves early would have the others end for want of it
            raise RuntimeError(
                f'the ranks have different BN and psBN layers, rank 0 {len(first)} and rank {rank} '
                f'{len(other)}, such as {unlike}: start all of them with the same config'
            )


def optimizers_of(runner: Runner) -> list[Optimizer]:
    """All optimizers of a training.

    Raises:
        RuntimeError: If one is not torch's, since its steps cannot be watched.
    """
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    optimizers = [wrapper.optimizer for wrapper in wrappers]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):  # such as DeepSpeed's
            raise RuntimeError(
                f'{type(optimizer).__name__} is no torch.optim.Optimizer, its steps cannot be '
                'watched: train with one that is, or remove CollapseHook and RecoveryHook'
            )
    return optimizers
