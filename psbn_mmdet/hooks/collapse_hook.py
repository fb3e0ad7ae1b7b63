"""The hook that counts collapsed filters during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..collapse import (
    FOLDED,
    Census,
    GradientWatch,
    StepTrace,
    census_of_model,
    check_thresholds,
    find_norms,
    watch_steps,
)
from ..forecast import Schedule, make_forecast, read_schedule
from ..layers import PostShiftedBatchNorm
from ..records import REST_INFO
from .epoch_table import EpochTable
from .history import COUNTS, History, Report
from .journal import Journal
from .lineage import recall_unstarted, remember_unstarted
from .parts import Parts
from .recovery_hook import RecoveryHook
from .refusals import is_count, optimizers_of, refuse_model, unwrapped, will_train
from .scalars import draw_stages, drop_scalars, log_scalars
from .weight_decay import unstepped_warning, weight_decay_warning


@HOOKS.register_module()
class CollapseHook(Hook):
    """Count the collapsed filters of BN and psBN layers during training.

    Every ``interval`` iterations, and at the end, the counts go to the message hub as
    ``train/collapse/...``, so that the text log, the JSON log and every visualizer backend have
    them. With the channels' numbers they go to ``<work_dir>/<timestamp>/collapse.jsonl``, which a
    resumed run continues in its own folder. All gammas and biases are kept beside it, in
    ``snapshots``, from the start, from each epoch's end and from the end of the training. After
    each epoch a table by stage is logged, and TensorBoard, where it is among the visualizer's
    backends, gets each stage's number of collapsed filters and the histograms of its gammas and
    biases.

    What *vanished*, *dead*, *trapped*, *broken*, *collapsed* and *unstarted* mean is said in
    :mod:`psbn_mmdet.collapse.census`. *New* and *revived* filters have become or ceased to be
    collapsed since the report before; at the first report, since the start.

    Which layers feed a rectifier is found by watching the first training steps; then a forecast is
    logged: which closed filters of psBN will open in this training, and when
    (:mod:`psbn_mmdet.forecast`). Gradients are read before each optimiser step. Only the main
    process looks and writes. Whatever fails in this hook once the training has begun is one
    warning, and that part of it is off; the training goes on.

    Args:
        interval (int): Iterations between reports. Defaults to 50.
        tau (float): Largest ``|gamma|`` of a vanished filter. Defaults to 1e-3.
        k (float): A filter is dead if its rectifier opens only beyond k standard deviations.
            Defaults to 3.
        window (int, optional): Iterations, at least 1, in whose optimiser steps no gradient may
            have reached a filter that is called trapped. Steps in which none reaches its layer
            are left out. Trapped filters are counted from the iteration on at which it is full.
            None for ``interval``, but at least 50. Defaults to None.
        scalars (Sequence[str]): Which counts stand in the log line; the record has all. *new* is
            left out since it follows from the others: it is the growth of *collapsed* plus
            *revived*. *broken* is in the line whenever it is not 0.
            Defaults to ('collapsed', 'vanished', 'dead', 'trapped', 'revived').
        by_stage (bool): Whether the log line also has each stage's number of collapsed filters.
            Defaults to False.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)
        >>> custom_hooks = [dict(type='CollapseHook', interval=50)]
    """

    priority = 'NORMAL'  # before the LoggerHook, which logs what is reported here

    def __init__(
        self,
        interval: int = 50,
        tau: float = 1e-3,
        k: float = 3.0,
        window: int | None = None,
        scalars: Sequence[str] = ('collapsed', 'vanished', 'dead', 'trapped', 'revived'),
        by_stage: bool = False,
    ) -> None:
        if not is_count(interval):
            raise ValueError(f'CollapseHook: interval must be an integer >= 1, got {interval!r}')
        if window is not None and not is_count(window):
            raise ValueError(
                f'CollapseHook: window must be None or an integer >= 1, got {window!r}'
            )
        if not isinstance(scalars, (list, tuple)):
            raise ValueError(f'CollapseHook: scalars must be a list of names, got {scalars!r}')
        for name in scalars:
            if name not in COUNTS:
                raise ValueError(
                    f'CollapseHook: scalars must be among {", ".join(COUNTS)}, got {name!r}'
                )
        if not isinstance(by_stage, bool):
            raise ValueError(f'CollapseHook: by_stage must be True or False, got {by_stage!r}')
        check_thresholds(tau, k)
        self.interval = interval
        self.tau = tau
        self.k = k
        self.window = window or max(interval, 50)
        self.scalars = tuple(scalars)
        self.by_stage = by_stage
        self._watch: GradientWatch | None = None  # None where nothing is watched
        self._trace: StepTrace | None = None  # None where what follows is not watched for

    def before_run(self, runner: Runner) -> None:
        """Refuse what psBN or the counting cannot work with, before time is spent on it."""
        if will_train(runner):
            refuse_model(runner)

    def before_train(self, runner: Runner) -> None:
        """Take the baseline, warn of settings without recovery, attach to the optimisers."""
        if not is_main_process():
            return
        self._model = unwrapped(runner.model)
        norms = find_norms(self._model)
        if not norms:
            runner.logger.warning('CollapseHook: the model has no BN or psBN layer to watch.')
            return
        optimizers = optimizers_of(runner)
        self._parts = Parts(runner)
        self._parts.run('messages on layers', _warn_of_optimizers, runner, norms, optimizers)
        self._parts.run('counts', self._start, runner, norms, optimizers)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Tell the time of the gradients."""
        if self._watch is not None:
            self._watch.now = runner.iter

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Report every ``interval`` iterations."""
        if self._watch is None:
            return
        if self._trace is not None and not self._trace.active:
            self._parts.run('dead filters', self._end_trace, runner, self._trace)
        if self._watch.failure is not None:
            self._parts.fail('counts', self._watch.failure)
        elif self.every_n_train_iters(runner, self.interval):
            self._parts.run('counts', self._report, runner, self._watch, runner.iter + 1)
        if not self._parts.works('counts'):
            self._stop(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Keep a snapshot, log the table by stage, draw curves and histograms in TensorBoard."""
        if self._watch is None:
            return
        self._parts.run('snapshots', self._keep_snapshot, runner)
        self._parts.run('tables', self._log_table, runner)
        self._parts.run('TensorBoard curves', self._draw, runner)

    def after_train(self, runner: Runner) -> None:
        """Make the last report, keep the last snapshot, note the end, detach."""
        if self._watch is not None and runner.iter > self._reported:
            self._parts.run('counts', self._report, runner, self._watch, runner.iter)
        if self._watch is not None:
            self._parts.run('snapshots', self._keep_snapshot, runner)
            self._parts.run('records', self._journal.end)
            self._parts.run('messages on layers', self._tell_of_closed, runner)
            self._detach()

    def _start(
        self, runner: Runner, norms: Mapping[str, _BatchNorm], optimizers: Sequence[Optimizer]
    ) -> None:
        self._begin = runner.iter
        self._watch = GradientWatch(optimizers, norms, self._begin)
        self._steps = 0  # at the last report
        self._reported = self._begin  # its iterations
        self._rectifiers: dict[str, str] = {}
        self._table = EpochTable()
        self._told: set[str] = set()  # layers of which a warning has told
        self._folded: set[str] = set()
        self._idle: set[str] = set()  # likewise, of those without any gradient
        self._names: set[str] = set()
        start = self._census()
        self._names = {layer.name for layer in start.layers}
        if runner.iter > 0:
            recalled = self._parts.run(
                'unstarted filters of the earlier run', recall_unstarted, runner.message_hub, start
            )
            start = recalled or start
        settings = dict(interval=self.interval, window=self.window, tau=self.tau, k=self.k)
        shifts = {name: getattr(norm, 'shift', 0.0) for name, norm in norms.items()}
        self._journal = Journal(self._parts, shifts, settings)
        self._history = History(start, self.window, self._journal.begin(runner, start))
        state = runner.message_hub.get_info(REST_INFO) if runner.iter > 0 else None
        if state is not None:
            self._parts.run(
                'gammas of the earlier run', self._history.recall_rest, state, runner.iter
            )
        self._parts.run('snapshots', self._keep_snapshot, runner)
        self._loaded = start
        self._schedules = self._parts.run('forecasts', _read_schedules, runner, norms)
        if self.window > self.interval:
            runner.logger.info(
                f'CollapseHook: trapped filters are counted from iteration '
                f'{self._begin + self.window} on, when {self.window} have been watched.'
            )
        self._trace = self._parts.run('dead filters', self._start_trace, runner)
        _warn_of_unwatched(runner, start, self._watch.layers)

    def _census(self) -> Census:
        """Of the layers that were there at the start."""
        now = census_of_model(self._model, tau=self.tau, k=self.k)
        if not self._names:
            return now
        kept = [layer for layer in now.layers if layer.name in self._names]
        missing = self._names - {layer.name for layer in kept}
        if missing:
            raise LookupError(f'the network has no layer {min(missing)} any more')
        return Census(kept, self.tau, self.k)

    def _judged(self) -> Census:
        history = self._history
        return self._census().judged(self._rectifiers, None, history.unstarted, history.moving)

    def _start_trace(self, runner: Runner) -> StepTrace | None:
        if runner.cfg.get('compile') and not hasattr(torch.compiler, 'set_stance'):
            runner.logger.warning(
                'CollapseHook: dead filters are not counted: this torch cannot run the first '
                'iterations of a compiled model uncompiled, so what follows a BN is not seen.'
            )
            return None
        return watch_steps(runner.model, self._model)

    def _end_trace(self, runner: Runner, trace: StepTrace) -> None:
        self._trace = None
        self._rectifiers = trace.structure.rectifiers
        if trace.failure is not None:
            runner.logger.warning(
                'CollapseHook: what follows a BN could not be watched to the end, the training '
                f'goes on. Cause: {type(trace.failure).__name__}: {trace.failure}'
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in trace.unknown.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            runner.logger.warning(
                f'CollapseHook: dead filters are not counted in {len(names)} layers, of which it '
                f'is not known what follows ({reason}): {", ".join(names)}.'
            )
        self._parts.run('forecasts', self._forecast, runner)

    def _forecast(self, runner: Runner) -> None:
        hook = _recovery_hook(runner)
        recovery = (hook.steps, hook.window) if hook and not runner.cfg.get('compile') else None
        judged, norms = self._loaded.judged(self._rectifiers), find_norms(self._model)
        for schedule in self._schedules or []:
            forecast = make_forecast(judged, norms, schedule, self._begin, recovery)
            if forecast is not None:
                runner.logger.info(f'CollapseHook: {forecast.text()}')

    def _report(self, runner: Runner, watch: GradientWatch, iteration: int) -> None:
        """Report what is so after a number of iterations."""
        self._reported = iteration
        if self._trace is not None:
            self._rectifiers = self._trace.structure.rectifiers
        steps, self._steps = watch.steps - self._steps, watch.steps
        trapped = watch.trapped(self.window) if steps else {}
        now = self._census()
        recovery = _recovery_hook(runner)
        recovered = None if recovery is None else recovery.take_opened()
        reached = watch.reached()
        report = self._history.add(iteration, now, self._rectifiers, trapped, reached, recovered)
        log_scalars(runner.message_hub, report, self.scalars, self.by_stage)
        self._warn(runner, report, watch.layers, steps, iteration)
        self._tell_of_folded(runner, report)
        if steps and iteration - self._begin >= self.window:
            self._warn_of_idle(runner, report, watch.idle(self.window))
        self._table.add(iteration, report)
        remember_unstarted(runner.message_hub, self._history.unstarted)
        runner.message_hub.update_info(REST_INFO, self._history.rest())
        self._parts.run('records', self._journal.write, runner, report, iteration, steps)

    def _warn(
        self, runner: Runner, report: Report, watched: set[str], steps: int, iteration: int
    ) -> None:
        trained = any(not layer.frozen and layer.name in watched for layer in report.census.layers)
        if steps == 0 and trained:
            runner.logger.warning(
                'CollapseHook: trapped filters not observed: no optimiser step in the last '
                f'{self.interval} iterations.'
            )
        broken = [layer for layer in report.census.layers if layer.broken.any()]
        new = [layer for layer in broken if layer.name not in self._told]
        if new:
            self._told.update(layer.name for layer in new)
            where = ', '.join(f'{int(layer.broken.sum())} in {layer.name}' for layer in new)
            runner.logger.warning(
                f'CollapseHook: at iteration {iteration} gamma or bias of filters is not a '
                f'finite number: {where}.'
            )
        added = find_norms(self._model).keys() - self._names - self._told
        if added:
            self._told.update(added)
            runner.logger.warning(
                'CollapseHook: layers that were added during the training are not counted: '
                f'{", ".join(sorted(added))}.'
            )

    def _tell_of_closed(self, runner: Runner) -> None:
        layers = [layer for layer in self._judged().layers if layer.norm == 'BN']
        closed = sum(int(layer.dead.sum()) for layer in layers if layer.dead is not None)
        if closed:
            runner.logger.info(
                f'CollapseHook: {closed} filters of BN are closed. What they put out is 0, and can '
                'be cut out: python tools/prune.py CHECKPOINT --config CONFIG -o DIR.'
            )

    def _tell_of_folded(self, runner: Runner, report: Report) -> None:
        names = [layer.name for layer in report.census.layers if layer.folded]
        new = [name for name in names if name not in self._folded]
        self._folded.update(new)
        if new:
            runner.logger.info(
                f'CollapseHook: vanished and dead filters are not counted in {len(new)} layers, '
                f'which do not train their statistics: {FOLDED}: {", ".join(new)}.'
            )

    def _warn_of_idle(self, runner: Runner, report: Report, idle: set[str]) -> None:
        trained = [layer.name for layer in report.census.layers if not layer.frozen]
        new = [name for name in trained if name in idle and name not in self._idle]
        self._idle |= idle
        if new:
            runner.logger.warning(
                f'CollapseHook: trapped filters are not observed in {len(new)} layers, of which no '
                f'filter got a gradient in the last {self.window} iterations: a head without '
                'positive samples gets none, nor what is no part of the loss or stands before a '
                f'layer that is closed as a whole: {", ".join(new)}.'
            )

    def _keep_snapshot(self, runner: Runner) -> None:
        self._journal.keep(runner, self._census())

    def _log_table(self, runner: Runner) -> None:
        table, self._table = self._table, EpochTable()
        runner.logger.info(table.render(runner.iter, self._judged()))

    def _draw(self, runner: Runner) -> None:
        draw_stages(runner, self._judged(), self._history.collapsed)

    def _stop(self, runner: Runner) -> None:
        """Count no more, and let no log line repeat the last numbers."""
        self._detach()
        drop_scalars(runner.message_hub)

    def _detach(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._trace is not None:
            self._trace.close()
            self._trace = None


def _recovery_hook(runner: Runner) -> RecoveryHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, RecoveryHook)), None)


def _warn_of_unwatched(runner: Runner, start: Census, watched: set[str]) -> None:
    trained = [layer.name for layer in start.layers if not layer.frozen]
    unwatched = [name for name in trained if name not in watched]
    if unwatched:
        runner.logger.warning(
            f'CollapseHook: trapped filters are not observed in {len(unwatched)} layers, whose '
            'gamma and bias are in no optimiser, or are those of another layer, too: '
            f'{", ".join(unwatched)}.'
        )


def _warn_of_optimizers(
    runner: Runner, norms: Mapping[str, _BatchNorm], optimizers: Sequence[Optimizer]
) -> None:
    if _recovery_hook(runner) is not None:  # which needs no weight decay, and warns by itself
        return
    settings = runner.cfg.get('optim_wrapper') or {}
    for warning in (
        unstepped_warning(norms, optimizers),
        weight_decay_warning(norms, optimizers, settings),
    ):
        if warning:
            runner.logger.warning(warning)


def _read_schedules(runner: Runner, norms: Mapping[str, _BatchNorm]) -> list[Schedule]:
    """What each optimiser does to parameters of psBN layers that no gradient reaches."""
    params = [
        param
        for norm in norms.values()
        if isinstance(norm, PostShiftedBatchNorm)
        for param in norm.parameters()
    ]
    if not params:
        return []
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    length = len(runner.train_dataloader) if by_epoch else None
    iterations = max(runner.max_iters - runner.iter, 0)
    wrappers: Any = runner.optim_wrapper
    if not isinstance(wrappers, OptimWrapperDict):
        return [read_schedule(wrappers, runner.param_schedulers or [], params, iterations, length)]
    schedulers: Any = runner.param_schedulers or {}
    if not isinstance(schedulers, dict):
        schedulers = dict.fromkeys(wrappers.keys(), schedulers)
    return [
        read_schedule(wrapper, schedulers.get(name, []), params, iterations, length)
        for name, wrapper in wrappers.items()
    ]
