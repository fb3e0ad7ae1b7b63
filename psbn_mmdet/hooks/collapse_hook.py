"""The hook that counts collapsed filters during training."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import mmengine
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from ..collapse import (
    KINDS,
    RECORD_FILE,
    Census,
    ForwardTrace,
    GradientWatch,
    Records,
    RecordWriter,
    census,
    check_thresholds,
    copy_snapshots,
    find_norms,
    format_ranges,
    read_records,
    write_snapshot,
)
from ..layers import PostShiftedBatchNorm
from ..version import __version__
from .weight_decay import weight_decay_warning

SCALARS = (*KINDS, 'collapsed', 'new', 'revived')


@HOOKS.register_module()
class CollapseHook(Hook):
    """Count the collapsed filters of BN and psBN layers during training.

    Every ``interval`` iterations the counts go to the message hub as ``train/collapse/...``, so
    that the text log, the JSON log and every visualizer backend have them. With the channels'
    numbers they go to ``<work_dir>/<timestamp>/collapse.jsonl``, which a resumed run continues in
    its own folder. All gammas and effective shifts are kept beside it, in ``snapshots``, from the
    start, from each epoch's end and from the end of the training. After each epoch a table by
    stage is logged, and TensorBoard, where it is among the visualizer's backends, gets each
    stage's number of collapsed filters and the histograms of its gammas and effective shifts.

    What *vanished*, *dead*, *trapped* and *collapsed* mean is said in
    :mod:`psbn_mmdet.collapse.census`. *New* and *revived* filters have become or ceased to be
    collapsed since the report before; at the first report, since the start.

    Which layers feed a rectifier is found by watching the forward pass of the first iteration;
    gradients are read before each optimiser step. Only the main process looks and writes.

    Args:
        interval (int): Iterations between reports. Defaults to 50.
        tau (float): Largest ``|gamma|`` of a vanished filter. Defaults to 1e-3.
        k (float): A filter is dead if its rectifier opens only beyond k standard deviations.
            Defaults to 3.
        window (int, optional): Iterations before each report in whose optimiser steps gradients
            are looked for, 1 to ``interval``. None for all of them: the strictest evidence that a
            filter is trapped. Defaults to None.
        scalars (Sequence[str]): Which counts stand in the log line; the record has all. *new* is
            left out since it follows from the others: it is the growth of *collapsed* plus
            *revived*. Defaults to ('collapsed', 'vanished', 'dead', 'trapped', 'revived').
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
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'CollapseHook: interval must be an integer >= 1, got {interval!r}')
        if window is not None and not (isinstance(window, int) and 1 <= window <= interval):
            raise ValueError(
                f'CollapseHook: window must be None or an integer from 1 to interval={interval}, '
                f'got {window!r}'
            )
        for name in scalars:
            if name not in SCALARS:
                raise ValueError(
                    f'CollapseHook: scalars must be among {", ".join(SCALARS)}, got {name!r}'
                )
        check_thresholds(tau, k)
        self.interval = interval
        self.tau = tau
        self.k = k
        self.window = window or interval
        self.scalars = tuple(scalars)
        self.by_stage = by_stage
        self._watch: GradientWatch | None = None  # None where nothing is watched

    def before_run(self, runner: Runner) -> None:
        """Refuse what psBN or the counting cannot work with, before time is spent on it."""
        modules = list(runner.model.modules())
        bases = {base.__name__ for module in modules for base in type(module).__mro__}
        if bases & {'FullyShardedDataParallel', 'FSDPModule'}:
            raise RuntimeError(
                'CollapseHook: FSDP hides the gradients of single channels: train with '
                'MMDistributedDataParallel, or remove the hook'
            )
        has_psbn = any(isinstance(m, PostShiftedBatchNorm) for m in modules)
        if has_psbn and runner.cfg.get('efficient_conv_bn_eval'):
            raise RuntimeError(
                'psBN: efficient_conv_bn_eval of the Runner traces the model with torch.fx, which '
                'cannot trace psBN: remove efficient_conv_bn_eval from the config'
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to read psBN weights into BN, which would be off by the shift unnoticed."""
        state_dict = checkpoint.get('state_dict', checkpoint)
        for name, norm in find_norms(_unwrapped(runner.model)).items():
            keys = (f'{name}.beta', f'module.{name}.beta')
            if not isinstance(norm, PostShiftedBatchNorm) and any(k in state_dict for k in keys):
                raise RuntimeError(
                    f'the checkpoint has psBN weights for {name}, which is BN in this model: set '
                    "norm_cfg=dict(type='psBN') or convert the checkpoint with "
                    'tools/convert_checkpoint.py --to bn'
                )

    def before_train(self, runner: Runner) -> None:
        """Take the baseline, warn of settings without recovery, attach to the optimisers."""
        if not is_main_process():
            return
        self._model = _unwrapped(runner.model)
        norms = find_norms(self._model)
        if not norms:
            runner.logger.warning('CollapseHook: the model has no BN or psBN layer to watch.')
            return
        _log_read_as_bn(runner, norms.values())
        optimizers = _optimizers(runner)
        warning = weight_decay_warning(norms, optimizers, runner.cfg.get('optim_wrapper') or {})
        if warning:
            runner.logger.warning(warning)
        self._watch = GradientWatch(optimizers, norms)
        self._rectifiers: dict[str, str] = {}
        self._trapped: dict[str, np.ndarray] = {}  # by layer, as last observed
        self._collapsed: dict[str, np.ndarray] = {}  # by layer, at the last report
        self._epoch = _EpochTable()
        self._writer: RecordWriter | None = None
        self._history: list[dict] = []
        self._continues: str | None = None  # the earlier run's log folder, from this one's
        if runner.iter > 0:
            self._continue_record(runner)
        self._keep_snapshot(runner, self._census({}))
        self._trace = self._start_trace(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Look at gradients only in the window before each report."""
        if self._watch is not None:
            self._watch.active = -(runner.iter + 1) % self.interval < self.window

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Report every ``interval`` iterations."""
        if self._watch is None:
            return
        if self._trace is not None:
            self._trace.close()
            self._rectifiers = self._trace.rectifiers
            self._trace = None
        if not self._collapsed:  # the start: judged once it is known what follows each layer
            self._collapsed = {layer.name: layer.collapsed for layer in self._census({}).layers}
        if self.every_n_train_iters(runner, self.interval):
            self._report(runner, self._watch)
            self._watch.reset()

    def after_train_epoch(self, runner: Runner) -> None:
        """Keep a snapshot, log the table by stage, draw curves and histograms in TensorBoard."""
        if self._watch is None:
            return
        now = self._census({})
        self._keep_snapshot(runner, now)
        runner.logger.info(self._epoch.render(runner.iter, now))
        self._epoch = _EpochTable()
        backend = runner.visualizer.get_backend('TensorboardVisBackend')
        if backend is not None:
            for stage, part in now.stages().items():
                names = [layer.name for layer in part.layers]
                collapsed = sum(int(self._collapsed[name].sum()) for name in names)
                backend.add_scalar(f'collapsed/{stage}', collapsed, runner.iter)
                for what in ('gamma', 'shift'):
                    values = np.concatenate([getattr(layer, what) for layer in part.layers])
                    backend.experiment.add_histogram(f'{what}/{stage}', values, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Keep the last snapshot, detach from the optimisers."""
        if self._watch is not None:
            self._keep_snapshot(runner, self._census({}))
            self._watch.close()
            self._watch = None

    def _start_trace(self, runner: Runner) -> ForwardTrace | None:
        compiled = bool(runner.cfg.get('compile'))
        if compiled and not hasattr(torch.compiler, 'set_stance'):
            runner.logger.warning(
                'CollapseHook: dead filters are not counted: this torch cannot run the first '
                'iteration of a compiled model uncompiled, so what follows a BN is not seen.'
            )
            return None
        return ForwardTrace(self._model)

    def _census(self, trapped: dict[str, np.ndarray]) -> Census:
        return census(
            self._model, tau=self.tau, k=self.k, rectifiers=self._rectifiers, trapped=trapped
        )

    def _keep_snapshot(self, runner: Runner, now: Census) -> None:
        gamma, shift = (
            np.concatenate([getattr(layer, what) for layer in now.layers])
            for what in ('gamma', 'shift')
        )
        write_snapshot(runner.log_dir, runner.iter, gamma, shift)

    def _report(self, runner: Runner, watch: GradientWatch) -> None:
        trapped = watch.trapped()
        now = self._census(trapped)
        # A window without steps tells nothing of what was trapped: it is taken to be so still.
        self._trapped.update(trapped)
        collapsed = {
            layer.name: layer.collapsed
            if layer.frozen
            else layer.collapsed | self._trapped.get(layer.name, False)
            for layer in now.layers
        }
        new = {name: mask & ~self._collapsed[name] for name, mask in collapsed.items()}
        revived = {name: ~mask & self._collapsed[name] for name, mask in collapsed.items()}
        self._collapsed = collapsed

        masks = {kind: [getattr(layer, kind) for layer in now.layers] for kind in KINDS}
        for kind, by_layer in (('collapsed', collapsed), ('new', new), ('revived', revived)):
            masks[kind] = [by_layer[layer.name] for layer in now.layers]
        counts = {kind: [_count(mask) for mask in masks[kind]] for kind in SCALARS}
        total = {kind: _sum(counts[kind]) for kind in SCALARS}
        self._log_scalars(runner, now, total, counts)
        if watch.steps == 0:
            runner.logger.warning(
                'CollapseHook: trapped filters not observed: no optimiser step in the last '
                f'{self.window} iterations.'
            )
        self._epoch.add(runner.iter + 1, now, counts)
        self._write(
            runner,
            now,
            {
                'iter': runner.iter + 1,
                'epoch': runner.epoch + 1,
                'lr': {name: lr[0] for name, lr in runner.optim_wrapper.get_lr().items()},
                'steps': watch.steps,
                'total': total,
                'layers': counts,
                'channels': {
                    kind: {
                        str(index): format_ranges(mask)
                        for index, mask in enumerate(masks[kind])
                        if mask is not None and mask.any()
                    }
                    for kind in SCALARS
                },
            },
        )

    def _log_scalars(
        self, runner: Runner, now: Census, total: dict[str, int | None], counts: dict[str, list]
    ) -> None:
        scalars = {f'train/collapse/{name}': total[name] for name in self.scalars}
        if self.by_stage:
            for stage, collapsed in _by_stage(now, counts['collapsed']).items():
                scalars[f'train/collapse/{stage}'] = collapsed
        for key, value in scalars.items():
            if value is None:
                # The log processor repeats old values; an absent one is not taken for 0.
                runner.message_hub.log_scalars.pop(key, None)
            else:
                runner.message_hub.update_scalar(key, value)

    def _write(self, runner: Runner, now: Census, report: dict[str, Any]) -> None:
        if self._writer is None:
            header = {
                'layers': [
                    {
                        'name': layer.name,
                        'channels': layer.channels,
                        'norm': layer.norm,
                        'shift': getattr(self._model.get_submodule(layer.name), 'shift_value', 0.0),
                        'rectifier': layer.rectifier,
                        'frozen': layer.frozen,
                    }
                    for layer in now.layers
                ],
                'interval': self.interval,
                'window': self.window,
                'tau': self.tau,
                'k': self.k,
                'continues': self._continues,
                'versions': {
                    'psbn_mmdet': __version__,
                    'torch': torch.__version__,
                    'mmengine': mmengine.__version__,
                },
            }
            path = Path(runner.log_dir) / RECORD_FILE
            self._writer = RecordWriter(path, header, self._history)
        self._writer.append(report)

    def _continue_record(self, runner: Runner) -> None:
        """Take over the record of the run that is resumed, up to the iteration it starts at."""
        folder = runner.cfg.get('load_from')
        folder = Path(folder).parent if folder else Path(runner.work_dir)
        names = [(name, norm.num_features) for name, norm in find_norms(self._model).items()]
        for path in sorted(folder.glob(f'*/{RECORD_FILE}'), reverse=True):
            try:
                records = read_records(path)
            except ValueError as error:
                runner.logger.warning(f'CollapseHook: {error}. Its reports are not continued.')
                continue
            layers = [(layer['name'], layer['channels']) for layer in records.header['layers']]
            reports = [report for report in records.reports if report['iter'] <= runner.iter]
            if layers == names and reports:
                self._history = reports
                self._continues = os.path.relpath(path.parent, runner.log_dir)
                copy_snapshots(path.parent, runner.log_dir, last=runner.iter)
                self._restore(records, reports[-1])
                return

    def _restore(self, records: Records, report: dict[str, Any]) -> None:
        for index, layer in enumerate(records.header['layers']):
            name = layer['name']
            self._collapsed[name] = records.mask(report, 'collapsed', index)
            self._trapped[name] = records.mask(report, 'trapped', index)
            if report['layers']['trapped'][index] is None:  # then it is what makes up the rest
                known = (records.mask(report, kind, index) for kind in ('vanished', 'dead'))
                self._trapped[name] = self._collapsed[name] & ~np.logical_or(*known)


class _EpochTable:
    """The table by stage that is logged at an epoch's end."""

    def __init__(self) -> None:
        self.iteration: int | None = None
        self.new: dict[str, int] = {}
        self.revived: dict[str, int] = {}

    def add(self, iteration: int, now: Census, counts: dict[str, list]) -> None:
        """Take the counts of a report: the last ones stand, new and revived add up."""
        self.iteration, self.now, self.counts = iteration, now, counts
        for sums, kind in ((self.new, 'new'), (self.revived, 'revived')):
            for stage, count in _by_stage(now, counts[kind]).items():
                sums[stage] = sums.get(stage, 0) + (count or 0)

    def render(self, iteration: int, parameters: Census) -> str:
        """The table as text.

        Args:
            iteration (int): The iteration it is now.
            parameters (Census): What the parameters tell now, for an epoch without a report.
        """
        if self.iteration is None:
            self.now, self.iteration = parameters, iteration
            self.counts = {
                kind: [_count(getattr(layer, kind)) for layer in parameters.layers]
                for kind in (*KINDS, 'collapsed')
            }
        columns = {kind: _by_stage(self.now, self.counts[kind]) for kind in (*KINDS, 'collapsed')}
        columns |= {'new': dict(self.new), 'revived': dict(self.revived)}
        table = Table(title=f'Collapsed filters at iteration {self.iteration}')
        table.add_column('stage', no_wrap=True)
        for name in ('filters', 'frozen', *columns):
            table.add_column(name, justify='right')
        stages = self.now.stages()
        for stage, part in stages.items():
            counts = [values.get(stage) for values in columns.values()]
            table.add_row(stage, *map(_cell, [part.channels, part.frozen, *counts]))
        table.add_section()
        sums = [_sum([values.get(stage) for stage in stages]) for values in columns.values()]
        table.add_row('all', *map(_cell, [self.now.channels, self.now.frozen, *sums]))
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        return '\n' + text.getvalue().rstrip() + '\nnew, revived: in this epoch; -: not observed'


def _by_stage(now: Census, counts: list[int | None]) -> dict[str, int | None]:
    stages: dict[str, list[int | None]] = {}
    for layer, count in zip(now.layers, counts):
        stages.setdefault(layer.stage, []).append(count)
    return {stage: _sum(values) for stage, values in stages.items()}


def _sum(counts: list[int | None]) -> int | None:
    """Sum of what is known, None if nothing is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _count(mask: np.ndarray | None) -> int | None:
    return None if mask is None else int(mask.sum())


def _cell(count: int | None) -> str:
    return '-' if count is None else str(count)


def _unwrapped(model: nn.Module) -> nn.Module:
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


def _log_read_as_bn(runner: Runner, norms: Iterable[nn.Module]) -> None:
    read = [n.read_as_bn for n in norms if isinstance(n, PostShiftedBatchNorm)]
    if any(read):
        runner.logger.info(
            f'psBN: {sum(read)} of {len(read)} layers were read as BN (beta = bias - shift): the '
            'network computes what it computed with BN.'
        )


def _optimizers(runner: Runner) -> list[Optimizer]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    optimizers = [wrapper.optimizer for wrapper in wrappers]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):  # such as DeepSpeed's
            raise RuntimeError(
                f'CollapseHook: {type(optimizer).__name__} is no torch.optim.Optimizer, its steps '
                'cannot be watched: train with one that is, or remove the hook'
            )
    return optimizers
