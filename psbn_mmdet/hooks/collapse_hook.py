"""The hook that counts collapsed filters during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..collapse import CollapseMonitor, check_thresholds, find_norms, unwrapped
from ..layers import PostShiftedBatchNorm
from ..records import COUNTS, STATE_INFO
from ..recovery.forecast import Schedule, make_forecast, read_schedule
from .checks import is_count, optimizers_of, refuse_model, will_train
from .epoch_table import EpochTable
from .guard import Guard
from .messages import MonitorMessages, unstepped_warning, weight_decay_warning
from .recorder import Recorder
from .recovery_hook import RecoveryHook
from .scalars import draw_stages, drop_scalars, log_scalars


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
    (:mod:`psbn_mmdet.recovery.forecast`). Gradients are read before each optimizer step. Only the
    main process looks and writes. If a part of this hook fails during the training, it logs one
    warning and skips that part from then on; the training continues.

    Args:
        interval (int): Iterations between reports. Defaults to 50.
        tau (float): Largest ``|gamma|`` of a vanished filter. Defaults to 1e-3.
        k (float): A filter is dead if its rectifier opens only beyond k standard deviations.
            Defaults to 3.
        window (int, optional): Iterations, at least 1, in whose optimizer steps no gradient may
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
        self._monitor: CollapseMonitor | None = None  # None where nothing is watched
        self._recorder: Recorder | None = None
        self._is_tracing = False

    def before_run(self, runner: Runner) -> None:
        """Refuse what psBN or the counting cannot work with, before any training time is spent."""
        if will_train(runner):
            refuse_model(runner)

    def before_train(self, runner: Runner) -> None:
        """Start counting, and warn of settings without recovery."""
        if not is_main_process():
            return
        norms = find_norms(unwrapped(runner.model))
        if not norms:
            runner.logger.warning('CollapseHook: the model has no BN or psBN layer to watch.')
            return
        optimizers = optimizers_of(runner)
        self._guard = Guard(runner)
        self._guard('messages', _warn_of_optimizers, runner, norms, optimizers)
        self._guard('counts', self._start, runner, norms, optimizers)
        if self._guard.is_off('counts'):
            self._detach()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Report every ``interval`` iterations."""
        if self._monitor is None:
            return
        self._guard('counts', self._monitor.step)
        if self._is_tracing and not self._monitor.trace.active:
            self._is_tracing = False
            self._guard('messages', self._log, runner, self._messages.of_trace())
            self._guard('forecasts', self._forecast, runner, self._monitor)
        if self.every_n_train_iters(runner, self.interval):
            self._guard('counts', self._report, runner, self._monitor)
        if self._guard.is_off('counts'):
            self._detach()
            drop_scalars(runner.message_hub)  # no log line repeats the last numbers

    def after_train_epoch(self, runner: Runner) -> None:
        """Keep a snapshot, log the table by stage, draw curves and histograms in TensorBoard."""
        if self._monitor is None:
            return
        self._guard('snapshots', self._keep_snapshot, runner, self._monitor)
        self._guard('tables', self._log_table, runner, self._monitor)
        self._guard('TensorBoard curves', draw_stages, runner, self._monitor)

    def after_train(self, runner: Runner) -> None:
        """Make the last report, keep the last snapshot, detach."""
        monitor = self._monitor
        if monitor is None:
            return
        if monitor.iteration > self._reported:
            self._guard('counts', self._report, runner, monitor)
        self._guard('snapshots', self._keep_snapshot, runner, monitor)
        self._guard('messages', _tell_of_closed, runner, monitor)
        self._detach()

    def _start(
        self, runner: Runner, norms: Mapping[str, _BatchNorm], optimizers: Sequence[Optimizer]
    ) -> None:
        monitor = CollapseMonitor(
            runner.model,
            optimizers,
            tau=self.tau,
            k=self.k,
            window=self.window,
            iteration=runner.iter,
        )
        self._monitor = monitor
        state = runner.message_hub.get_info(STATE_INFO) if runner.iter > 0 else None
        if state is not None:
            self._guard('counts of the earlier run', monitor.load_state_dict, state)
        self._messages = MonitorMessages(monitor)
        self._log(runner, self._messages.at_start())
        self._table = EpochTable()
        self._reported = monitor.begin  # iterations at the last report
        self._is_tracing = True
        settings = dict(interval=self.interval, window=self.window, tau=self.tau, k=self.k)
        shifts = {name: getattr(norm, 'shift', 0.0) for name, norm in norms.items()}
        self._recorder = self._guard('records', Recorder, runner, monitor.start, shifts, settings)
        self._guard('snapshots', self._keep_snapshot, runner, monitor)
        self._schedules = self._guard('forecasts', _read_schedules, runner, norms)
        if runner.cfg.get('compile') and not hasattr(torch.compiler, 'set_stance'):
            monitor.trace.close()
            self._is_tracing = False
            runner.logger.warning(
                'CollapseHook: dead filters are not counted: this torch cannot run the first '
                'iterations of a compiled model uncompiled, so what follows a BN is not seen.'
            )
        if self.window > self.interval:
            runner.logger.info(
                f'CollapseHook: trapped filters are counted from iteration '
                f'{monitor.begin + self.window} on, when {self.window} have been watched.'
            )

    def _report(self, runner: Runner, monitor: CollapseMonitor) -> None:
        recovery = _recovery_hook(runner)
        if recovery is not None:
            monitor.note_reopened(recovery.take_opened())
        report = monitor.report()
        self._reported = report.iteration
        log_scalars(runner.message_hub, report, self.scalars, self.by_stage)
        self._log(runner, self._messages.of_report(report))
        self._table.add(report)
        runner.message_hub.update_info(STATE_INFO, monitor.state_dict())
        if self._recorder is not None:
            self._guard('records', self._recorder.write, runner, report)

    def _forecast(self, runner: Runner, monitor: CollapseMonitor) -> None:
        hook = _recovery_hook(runner)
        recovery = (hook.steps, hook.window) if hook and not runner.cfg.get('compile') else None
        start = monitor.start.judged(monitor.structure.rectifiers)
        norms = find_norms(monitor.network)
        for schedule in self._schedules or []:
            forecast = make_forecast(start, norms, schedule, monitor.begin, recovery)
            if forecast is not None:
                runner.logger.info(f'CollapseHook: {forecast.text()}')

    def _keep_snapshot(self, runner: Runner, monitor: CollapseMonitor) -> None:
        if self._recorder is not None:
            self._recorder.keep(runner, monitor.census())

    def _log_table(self, runner: Runner, monitor: CollapseMonitor) -> None:
        table, self._table = self._table, EpochTable()
        runner.logger.info(table.render(runner.iter, monitor.census()))

    def _log(self, runner: Runner, messages: Iterator[tuple[int, str]]) -> None:
        for level, message in messages:
            runner.logger.log(level, f'CollapseHook: {message}')

    def _detach(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


def _recovery_hook(runner: Runner) -> RecoveryHook | None:
    return next((hook for hook in runner.hooks if isinstance(hook, RecoveryHook)), None)


def _tell_of_closed(runner: Runner, monitor: CollapseMonitor) -> None:
    layers = [layer for layer in monitor.census().layers if layer.norm == 'BN']
    closed = sum(int(layer.dead.sum()) for layer in layers if layer.dead is not None)
    if closed:
        runner.logger.info(
            f'CollapseHook: {closed} filters of BN are closed: they output 0 and can be cut out: '
            'python tools/prune.py CHECKPOINT --config CONFIG -o DIR.'
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
    """What each optimizer does to parameters of psBN layers that no gradient reaches."""
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
