"""The hook that lets psBN recover closed filters in the time that a training has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..collapse import StepTrace, Structure, find_norms, unwrapped, watch_steps
from ..layers import PostShiftedBatchNorm
from ..recovery import Recovery
from .checks import is_count, optimizers_of, refuse_model, will_train
from .messages import unstepped_warning

STATE = 'psbn_recovery'  # of a checkpoint


@HOOKS.register_module()
class RecoveryHook(Hook):
    """Decay gamma and beta = b - shift of closed filters of psBN layers until the shift opens them.

    psBN opens a closed filter by weight decay, which takes tens of thousands of steps at
    MMDetection's settings. A closed filter's gamma and beta do not affect the output, so this hook
    decays them faster. :mod:`psbn_mmdet.recovery.recovery` defines closed filters, and explains how
    they are found and why the output is unchanged until they open. Filters in layers that feed
    anything but ReLUs, and filters without a learning rate, are left alone.

    If a filter is closed in the loaded weights, the convolutions before and after it have often
    decayed too. The hook restores their size once, at the start, in the network and in its averages
    (:mod:`psbn_mmdet.recovery.restore`).

    It works under any optimizer, with automatic mixed precision, accumulation, gradient
    checkpointing, averages and DistributedDataParallel, where all ranks do the same. Its state is
    in the checkpoints: a resumed run continues from there. If the hook fails, it logs one
    warning and turns itself off. The training continues.

    Args:
        steps (int): Optimizer steps in which a filter with beta = -1 opens. A filter with
            beta = -10 takes twice as many. Defaults to 500.
        window (int): Forward passes without a sign of life before a filter is decayed.
            Defaults to 10.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> custom_hooks = [dict(type='CollapseHook'), dict(type='RecoveryHook', steps=500)]
    """

    def __init__(self, steps: int = 500, window: int = 10) -> None:
        for name, value in (('steps', steps), ('window', window)):
            if not is_count(value):
                raise ValueError(f'RecoveryHook: {name} must be an integer >= 1, got {value!r}')
        self.steps = steps
        self.window = window
        self._recovery: Recovery | None = None
        self._trace: StepTrace | None = None
        self._structure = Structure()
        self._saved: Any = None  # state loaded from a checkpoint
        # Opened filters: since they were last asked for, in this epoch, in this training.
        self._opened: dict[str, Tensor] = {}
        self._of_epoch: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work, before time is spent on it."""
        if not will_train(runner):
            return
        refuse_model(runner)
        norms = find_norms(unwrapped(runner.model)).values()
        if not any(isinstance(norm, PostShiftedBatchNorm) for norm in norms):
            raise RuntimeError(
                'RecoveryHook: the model has no psBN layer, and a closed filter of BN stays closed '
                'all the way to gamma = beta = 0, where it outputs 0 for ever: set '
                "norm_cfg=dict(type='psBN'), without sync_bn, or remove the hook"
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the state of the resumed run."""
        self._saved = checkpoint.get(STATE)

    def before_train(self, runner: Runner) -> None:
        """Watch the first steps for what stands around the layers, on every rank."""
        self._recovery, self._structure = None, Structure()
        self._opened, self._of_epoch, self._ever = {}, {}, {}
        if runner.cfg.get('compile'):
            runner.logger.warning(
                'RecoveryHook: no filter is recovered, since what layers put out cannot be seen in '
                'a compiled model: remove compile from the config.'
            )
            return
        self._network = unwrapped(runner.model)
        norms = find_norms(self._network)
        psbn = {name: x for name, x in norms.items() if isinstance(x, PostShiftedBatchNorm)}
        optimizers = optimizers_of(runner)
        warning = unstepped_warning(psbn, optimizers)
        if warning:
            runner.logger.warning(warning)
        own = {p for o in optimizers for group in o.param_groups for p in group['params']}
        if not any(norm.weight in own and norm.bias in own for norm in psbn.values()):
            runner.logger.warning(
                'RecoveryHook: no optimizer trains gamma and bias of a psBN layer: nothing can be '
                'recovered.'
            )
            return
        if runner.iter > 0 and self._saved is not None:
            self._go_on(runner)
        self._saved = None
        if self._recovery is None:
            self._trace = watch_steps(runner.model, self._network)

    def _go_on(self, runner: Runner) -> None:
        """Restore the state from the checkpoint."""
        try:
            structure = Structure(**self._saved['structure'])
            recovery = self._start(runner, structure)
            recovery.load_state_dict(self._saved['channels'])
            self._opened, self._ever = (dict(self._saved[key]) for key in ('opened', 'ever'))
            self._structure, self._recovery = structure, recovery
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            runner.logger.warning(
                f'RecoveryHook: what the checkpoint has of it is not taken over ({error}): its '
                'evidence is gathered anew.'
            )

    def _start(self, runner: Runner, structure: Structure) -> Recovery:
        def failed(error: Exception | None) -> None:
            cause = f'{type(error).__name__}: {error}' if error else 'another rank has failed'
            runner.logger.warning(
                f'RecoveryHook: off from iteration {runner.iter + 1} on, the training goes on. '
                f'Cause: {cause}'
            )

        return Recovery(
            self._network,
            optimizers_of(runner),
            structure,
            self.steps,
            self.window,
            failed,
            lambda: _copies(runner, self._network),
        )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Start when all ranks know what stands around the layers."""
        if self._trace is not None:
            found = all_gather_object((self._trace.active, self._trace.structure))
            if not any(active for active, _ in found):
                (_, first), *others = found
                self._structure = first.shared([structure for _, structure in others])
                self._recovery = self._start(runner, self._structure)
                self._trace = None
                self._tell_of_kept(runner)
        elif self._recovery is not None and self._recovery.ended:
            self._recovery.close()
            self._recovery = None

    def _tell_of_kept(self, runner: Runner) -> None:
        kept = self._structure.kept
        if kept:
            runner.logger.info(
                f'RecoveryHook: {len(kept)} convolutions next to psBN layers keep their weights, '
                'which are computed from others, or used elsewhere, too: '
                f'{", ".join(kept)}.'
            )

    def take_opened(self) -> dict[str, np.ndarray]:
        """Channels that were decayed until they opened, since this was last called.

        Returns:
            dict[str, np.ndarray]: Bool masks of shape (C,) by layer.
        """
        self._gather()
        opened, self._opened = self._opened, {}
        return {name: mask.numpy() for name, mask in opened.items()}

    def _gather(self) -> None:
        if self._recovery is None:
            return
        for name, mask in self._recovery.opened().items():
            for masks in (self._opened, self._of_epoch, self._ever):
                masks[name] = masks[name] | mask if name in masks else mask

    def after_train_epoch(self, runner: Runner) -> None:
        """Say what was opened."""
        if self._recovery is None:
            return
        self._gather()
        decayed = self._recovery.decayed()
        opened, ever = _count(self._of_epoch), _count(self._ever)
        again = sum(int((mask & decayed[name]).sum()) for name, mask in self._ever.items())
        if opened or any(mask.any() for mask in decayed.values()):
            runner.logger.info(
                f'RecoveryHook: {opened} closed filters were opened in this epoch, {ever} so far, '
                f'of which {again} are closed again; {_count(decayed)} are being decayed.'
            )
        self._of_epoch = {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let a resumed run go on from here."""
        if self._recovery is not None:
            self._gather()
            checkpoint[STATE] = {
                'structure': asdict(self._structure),
                'channels': self._recovery.state_dict(),
                'opened': dict(self._opened),  # that no report has had yet
                'ever': dict(self._ever),
            }

    def after_train(self, runner: Runner) -> None:
        """Detach."""
        if self._recovery is not None:
            self._recovery.close()
            self._recovery = None
        if self._trace is not None:
            self._trace.close()
            self._trace = None


def _count(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _copies(runner: Runner, network: nn.Module) -> list[dict[str, nn.Module]]:
    """The averaged copies of a network: their modules by the network's names."""
    averages = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    copies = [dict(x.module.named_modules()) for x in averages if isinstance(x, BaseAveragedModel)]
    student, teacher = (getattr(network, name, None) for name in ('student', 'teacher'))
    if isinstance(student, nn.Module) and isinstance(teacher, nn.Module):
        copies.append({f'student.{name}': x for name, x in teacher.named_modules()})
    return copies
