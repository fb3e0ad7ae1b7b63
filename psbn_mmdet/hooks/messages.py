"""What the hooks warn of: optimizers that do not suit psBN, and what cannot be counted."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..collapse import FOLDED, CollapseMonitor, Report, find_norms
from ..layers import PostShiftedBatchNorm


def unstepped_warning(
    norms: Mapping[str, _BatchNorm], optimizers: Sequence[Optimizer]
) -> str | None:
    """Say which psBN layers are trained, but have their bias in no optimizer.

    Args:
        norms (Mapping[str, nn.Module]): BN and psBN layers by name.
        optimizers (Sequence[Optimizer]): All optimizers of the training.

    Returns:
        str, optional: One sentence, None if all is well.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    own = {param for group in groups for param in group['params']}
    biases = {
        name: norm.bias for name, norm in norms.items() if isinstance(norm, PostShiftedBatchNorm)
    }
    trained = {name: b for name, b in biases.items() if b is not None and b.requires_grad}
    names = [name for name, bias in trained.items() if bias not in own]
    if not names:
        return None
    return (
        f'psBN: the bias of {len(names)} of {len(trained)} layers, such as {names[0]}, is in no '
        'optimizer: where copies or flattened parameters are stepped in its place (Apex O2, FSDP), '
        'weight decay pulls it to 0, as in BN, and not to the shift.'
    )


def weight_decay_warning(
    norms: Mapping[str, _BatchNorm],
    optimizers: Sequence[Optimizer],
    optim_wrapper_cfg: Mapping[str, Any],
) -> str | None:
    """Say which psBN layers cannot recover, since gamma and bias are not decayed.

    The loss has no gradient in a collapsed filter; only weight decay moves its gamma to 0 and its
    bias to the shift, which opens the rectifier (arXiv 2001.11216).

    Args:
        norms (Mapping[str, nn.Module]): BN and psBN layers by name; BN and frozen ones are
            passed over.
        optimizers (Sequence[Optimizer]): All optimizers of the training.
        optim_wrapper_cfg (Mapping): The config's ``optim_wrapper``, to name the setting.

    Returns:
        str, optional: One sentence, None if all is well.
    """
    decay_of = {
        param: group.get('weight_decay', 0)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group['params']
    }
    trained = {
        name: [p for p in (norm.weight, norm.bias) if p is not None and p.requires_grad]
        for name, norm in norms.items()
        if isinstance(norm, PostShiftedBatchNorm)
    }
    trained = {name: params for name, params in trained.items() if params}
    without = [n for n, params in trained.items() if any(decay_of.get(p) == 0 for p in params)]
    if not without:
        return None
    if not any(optimizer.defaults.get('weight_decay') for optimizer in optimizers):
        cause = 'the cause is optim_wrapper.optimizer.weight_decay=0'
    else:
        settings = _settings(optim_wrapper_cfg) or ["the optimizer's parameter groups"]
        cause = f'the cause is {" and ".join(settings)}'
    return (
        f'Weight decay does not reach gamma and bias of {len(without)} of {len(trained)} psBN '
        f'layers, such as {without[0]} ({cause}): psBN recovers by weight decay and can revive '
        "no filter there. Add dict(type='RecoveryHook') to custom_hooks, or give gamma and bias a "
        'weight decay > 0.'
    )


def _settings(cfg: Mapping[str, Any]) -> list[str]:
    """The settings of an ``optim_wrapper`` that may take weight decay from norm layers."""
    paramwise = cfg.get('paramwise_cfg') or {}
    found = [
        f'optim_wrapper.paramwise_cfg.{name}=0'
        for name in ('norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult')
        if paramwise.get(name, 1) == 0
    ]
    found += [
        f"optim_wrapper.paramwise_cfg.custom_keys['{key}'].decay_mult=0"
        for key, value in (paramwise.get('custom_keys') or {}).items()
        if value.get('decay_mult', 1) == 0
    ]
    if not found and cfg.get('constructor'):
        found = [f'optim_wrapper.constructor={cfg["constructor"]}']
    return found


class MonitorMessages:
    """What a monitor cannot count, and why; each layer is named once.

    Args:
        monitor (CollapseMonitor): At the start.
    """

    def __init__(self, monitor: CollapseMonitor) -> None:
        self._monitor = monitor
        self._told: dict[str, set[str]] = {}

    def at_start(self) -> Iterator[tuple[int, str]]:
        """Levels of logging and messages."""
        trained = [layer.name for layer in self._monitor.start.layers if not layer.frozen]
        unwatched = [name for name in trained if name not in self._monitor.watch.layers]
        if unwatched:
            yield (
                logging.WARNING,
                f'trapped filters are not counted in {len(unwatched)} layers, whose gamma and '
                'bias are in no optimizer, or are shared with another layer: '
                f'{", ".join(unwatched)}.',
            )

    def of_trace(self) -> Iterator[tuple[int, str]]:
        """Likewise, when the first steps have been watched."""
        trace = self._monitor.trace
        if trace.failure is not None:
            yield (
                logging.WARNING,
                'watching what follows each BN has failed, the training continues. Cause: '
                f'{type(trace.failure).__name__}: {trace.failure}',
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in trace.unknown.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            yield (
                logging.WARNING,
                f'dead filters are not counted in {len(names)} layers, since it is unknown what '
                f'follows them ({reason}): {", ".join(names)}.',
            )

    def of_report(self, report: Report) -> Iterator[tuple[int, str]]:
        """Likewise, at a report."""
        monitor, layers = self._monitor, report.census.layers
        trained = [layer.name for layer in layers if not layer.frozen]
        if report.steps == 0 and monitor.watch.layers & set(trained):
            yield (
                logging.WARNING,
                'trapped filters are not counted: no optimizer step since the previous report.',
            )
        broken = {x.name: int(x.broken.sum()) for x in layers if x.broken.any()}
        new = self._new('broken', broken)
        if new:
            where = ', '.join(f'{broken[name]} in {name}' for name in new)
            yield (
                logging.WARNING,
                f'at iteration {report.iteration} gamma or bias of filters is not a finite number: '
                f'{where}.',
            )
        new = self._new('added', find_norms(monitor.network).keys() - {x.name for x in layers})
        if new:
            yield (
                logging.WARNING,
                'layers that were added during the training are not counted: '
                f'{", ".join(sorted(new))}.',
            )
        new = self._new('folded', [layer.name for layer in layers if layer.folded])
        if new:
            yield (
                logging.INFO,
                f'vanished and dead filters are not counted in {len(new)} layers that do not train '
                f'their statistics: {FOLDED}: {", ".join(new)}.',
            )
        idle = monitor.idle() if report.steps else set()
        new = self._new('idle', [name for name in trained if name in idle])
        if new:
            yield (
                logging.WARNING,
                f'trapped filters are not counted in {len(new)} layers without any gradient in '
                f'the last {monitor.window} iterations, such as those of a head without positive '
                'samples, those that are not part of the loss, or those before a layer that is '
                f'closed as a whole: {", ".join(new)}.',
            )

    def _new(self, what: str, names: Collection[str]) -> list[str]:
        told = self._told.setdefault(what, set())
        new = [name for name in names if name not in told]
        told.update(new)
        return new
