"""The hook that lets psBN recover closed filters in the time that a training has."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..collapse import Recovery, StepTrace, find_norms
from ..layers import PostShiftedBatchNorm
from .refusals import is_count, optimizers_of, refuse_model, unwrapped
from .weight_decay import unstepped_warning

STATE = 'psbn_recovery'  # of a checkpoint


@HOOKS.register_module()
class RecoveryHook(Hook):
    """Decay gamma and beta = b - shift of closed filters of psBN layers until the shift opens them.

    psBN recovers a closed filter by weight decay, at the rate of the whole network: tens of
    thousands of steps at MMDetection's settings. While a filter is closed, its gamma and beta have
    no influence, so they may be decayed at any rate; this hook does it in the time that the
    training has. What is closed, how it is known, and why the network computes the same until the
    filter opens is said in :mod:`psbn_mmdet.collapse.recovery`. Filters in layers that feed
    anything but ReLUs are left alone, and so are those that are open without a gradient.

    The convolution that feeds a closed filter, and those that read it, have often decayed as well.
    They get their size back while the filter is closed (:mod:`psbn_mmdet.collapse.restore`).

    It works under any optimiser, with automatic mixed precision, accumulation, gradient
    checkpointing, averages and DistributedDataParallel: all ranks do the same, without a
    collective but for one at the start and one in the first iteration. Its state is in the
    checkpoints: a resumed run goes on where it was.

    Args:
        steps (int): Within how many optimiser steps a filter with beta = -1 opens. One with
            beta = -10 takes twice as many. Defaults to 500.
        window (int): Optimiser steps without a sign of life before a filter is decayed.
            Defaults to 10.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> custom_hooks = [dict(type='CollapseHook'), dict(type='RecoveryHook', steps=500)]
    """

    priority = 'ABOVE_NORMAL'  # its traces in gradients are gone before the CollapseHook reads them

    def __init__(self, steps: int = 500, window: int = 10) -> None:
        for name, value in (('steps', steps), ('window', window)):
            if not is_count(value):
                raise ValueError(f'RecoveryHook: {name} must be an integer >= 1, got {value!r}')
        self.steps = steps
        self.window = window
        self._recovery: Recovery | None = None
        self._trace: StepTrace | None = None
        self._witnesses: dict[str, str] = {}
        # By layer, what all ranks know of the convolution before it and of those behind it.
        self._producers: dict[str, str] = {}
        self._consumers: dict[str, list[str]] = {}
        self._saved: Any = None  # what a checkpoint had
        self._opened: dict[str, Tensor] = {}  # since they were last asked for
        self._count = 0  # opened in this epoch

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work, before time is spent on it."""
        refuse_model(runner)
        norms = find_norms(unwrapped(runner.model)).values()
        if not any(isinstance(norm, PostShiftedBatchNorm) for norm in norms):
            raise RuntimeError(
                'RecoveryHook: the model has no psBN layer, and a closed filter of BN stays closed '
                'all the way to gamma = beta = 0, where it outputs 0 for ever: set '
                "norm_cfg=dict(type='psBN'), without sync_bn, or remove the hook"
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what a run that is resumed had."""
        self._saved = checkpoint.get(STATE)

    def before_train(self, runner: Runner) -> None:
        """Attach to the optimisers, on every rank."""
        if runner.cfg.get('compile'):
            runner.logger.warning(
                'RecoveryHook: no filter is recovered, since what layers put out cannot be seen in '
                'a compiled model: remove compile from the config.'
            )
            return
        model = unwrapped(runner.model)
        norms = {
            name: norm
            for name, norm in find_norms(model).items()
            if isinstance(norm, PostShiftedBatchNorm)
        }

        def failed(error: Exception) -> None:
            if get_world_size() > 1:
                raise error  # ranks that no longer do the same are worse than none
            runner.logger.warning(
                f'RecoveryHook: off from iteration {runner.iter + 1} on, the training goes on. '
                f'Cause: {type(error).__name__}: {error}'
            )

        self._network = model
        self._witnesses, self._producers, self._consumers = {}, {}, {}
        self._agreed = False
        optimizers = optimizers_of(runner)
        self._recovery = Recovery(
            optimizers,
            norms,
            self._witness,
            self.steps,
            self.window,
            self._around,
            failed,
        )
        warning = unstepped_warning(norms, optimizers)
        if warning:
            runner.logger.warning(warning)
        if not self._recovery.layers:
            runner.logger.warning(
                'RecoveryHook: no optimiser trains gamma and bias of a psBN layer: nothing can be '
                'recovered.'
            )
        if runner.iter > 0 and self._saved is not None:
            try:
                self._witnesses = dict(self._saved['witnesses'])
                self._producers = dict(self._saved['producers'])
                self._consumers = dict(self._saved['consumers'])
                self._recovery.load_state_dict(self._saved['channels'])
                self._opened = dict(self._saved.get('opened', {}))  # not in earlier versions'
                self._agreed = True
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                runner.logger.warning(
                    f'RecoveryHook: what the checkpoint has of it is not taken over ({error}): its '
                    'evidence is gathered anew.'
                )
        self._saved = None
        self._trace = StepTrace(runner.model, model)

    def _witness(self, name: str) -> nn.Module | None:
        known = self._witnesses if self._trace is None else self._trace.witnesses
        found = known.get(name) or self._witnesses.get(name)
        return None if found is None else self._network.get_submodule(found)

    def _around(self, name: str) -> tuple[nn.Module | None, list[nn.Module]]:
        producer = self._producers.get(name)
        get = self._network.get_submodule
        consumers = [get(consumer) for consumer in self._consumers.get(name, [])]
        return None if producer is None else get(producer), consumers

    def _agree(self, trace: StepTrace) -> None:
        """Keep what all ranks have seen of the convolutions around the layers."""
        producers = all_gather_object(trace.producers)
        consumers = all_gather_object(trace.consumers)
        self._producers, self._consumers = _shared(producers), _shared(consumers)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """End the watching of what follows the layers, and a recovery that has failed."""
        if self._recovery is not None and self._recovery.ended:
            self._recovery.close()
            self._recovery = None
        if self._trace is not None and not self._agreed:
            self._agree(self._trace)
            self._agreed = True
        if self._trace is not None and not self._trace.active:
            self._witnesses, self._trace = self._trace.witnesses, None

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
            self._opened[name] = self._opened[name] | mask if name in self._opened else mask
            self._count += int(mask.sum())

    def after_train_epoch(self, runner: Runner) -> None:
        """Say what was opened."""
        if self._recovery is None:
            return
        self._gather()
        decayed = sum(int(mask.sum()) for mask in self._recovery.decayed().values())
        if self._count or decayed:
            runner.logger.info(
                f'RecoveryHook: {self._count} closed filters were opened in this epoch, {decayed} '
                'are being decayed.'
            )
        self._count = 0

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let a resumed run go on from here."""
        if self._recovery is not None:
            self._gather()
            checkpoint[STATE] = {
                'witnesses': self._witnesses if self._trace is None else self._trace.witnesses,
                'producers': self._producers,
                'consumers': self._consumers,
                'channels': self._recovery.state_dict(),
                'opened': dict(self._opened),  # that no report has had yet
            }

    def after_train(self, runner: Runner) -> None:
        """Detach."""
        if self._recovery is not None:
            self._recovery.close()
            self._recovery = None
        if self._trace is not None:
            self._trace.close()
            self._trace = None


def _shared(dicts: list[dict[str, Any]]) -> dict[str, Any]:
    """The items that all have."""
    first, *others = dicts
    return {key: v for key, v in first.items() if all(o.get(key) == v for o in others)}
