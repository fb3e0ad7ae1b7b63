"""Forecast of a training: which closed filters psBN will open, and when.

No gradient reaches a closed filter, so its gamma and beta = b - alpha depend only on the optimizer
and the learning rates. A copy of the optimizer, holding the gammas and betas of the closed filters
instead of the network's parameters, is stepped through the training with gradients of 0, at the
learning rates of the training's own schedulers. A filter opens, as
arXiv 2001.11216 has it for gamma = 0, where

    beta + alpha + k |gamma| > 0,

with k standard deviations of xhat for the largest that a rectifier meets, as in *dead*.
:class:`.Recovery` multiplies both by :func:`.decay_per_step` besides.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from ..collapse import Census, find_norms
from ..configs.model import model_of_config, prefix_in_model
from ..configs.reading import type_name
from ..layers import PostShiftedBatchNorm
from .recovery import decay_per_step

STEPS = 4000  # simulated steps; in a longer training most stand for several
ITERATIONS = 300_000  # of stepping schedulers; the learning rate is constant afterwards
# Negated biases of filters with gamma = 0; the lowest bias that opens is reported.
_PROBES = torch.logspace(-6, 2, 801)


@dataclass(frozen=True)
class Schedule:
    """How an optimizer will update the parameters of some layers in a training.

    Attributes:
        optimizer (Optimizer): In its state at the start.
        settings (list[dict]): Of its parameter groups, one of each kind.
        kinds (dict[nn.Parameter, int]): By parameter, which of them it has.
        rates (list[list[dict]]): By step of the optimizer and kind, what schedulers set: the
            learning rate, and momentum. At most :data:`ITERATIONS` of them.
        iterations (int): Length of the training.
        every (int): Iterations for each step of the optimizer.
    """

    optimizer: Optimizer
    settings: list[dict]
    kinds: dict[nn.Parameter, int]
    rates: list[list[dict]]
    iterations: int
    every: int


class _StandIn:
    """Stands in for an optimizer that schedulers write to."""

    _global_step = 0  # MMEngine warns where an optimizer was not stepped before its scheduler

    def __init__(self, groups: list[dict]) -> None:
        self.param_groups = [{k: v for k, v in g.items() if k != 'params'} for g in groups]

    def step(self) -> None:
        """Do nothing."""

    step._with_counter = True  # type: ignore[attr-defined]


def read_schedule(
    wrapper: OptimWrapper,
    schedulers: Sequence[Any],
    params: Collection[nn.Parameter],
    iterations: int,
    epoch_length: int | None,
) -> Schedule:
    """Read how a training will treat parameters.

    Copies of the schedulers are stepped through the iterations. Schedulers that follow a
    metric are ignored.

    Args:
        wrapper (OptimWrapper): With the optimizer, as it is at the start.
        schedulers (Sequence[_ParamScheduler]): Its schedulers, as they are at the start.
        params (Collection[nn.Parameter]): The parameters to look up.
        iterations (int): Of the training to come.
        epoch_length (int, optional): Iterations in an epoch; None if the training has none.

    Returns:
        Schedule: Of the trained parameters that the optimizer has.
    """
    groups = wrapper.optimizer.param_groups
    schedulers = [s for s in schedulers if not getattr(s, 'need_val_args', False)]
    first: dict[tuple, int] = {}  # by settings, the first group that has them
    kinds: dict[nn.Parameter, int] = {}
    # Older MMEngines give the optimizer frozen parameters, too, of which it takes no step.
    wanted = {param for param in params if param.requires_grad}
    for number, group in enumerate(groups):
        own = wanted & set(group['params'])
        if own:
            settings = repr([(k, v) for k, v in sorted(group.items()) if k != 'params'])
            kind = (settings, *(repr(s.base_values[number]) for s in schedulers))
            first.setdefault(kind, number)
            kinds.update(dict.fromkeys(own, list(first).index(kind)))
    chosen = list(first.values())
    stand_in = _StandIn([groups[number] for number in chosen])
    # Without the stand-in, the copies would include all parameters of the optimizer.
    memo = {id(wrapper): stand_in, id(wrapper.optimizer): stand_in}
    copies = [copy.deepcopy(scheduler, memo) for scheduler in schedulers]
    for scheduler in copies:
        scheduler.base_values = [scheduler.base_values[number] for number in chosen]
    copies.sort(key=lambda scheduler: scheduler.by_epoch)  # as ParamSchedulerHook steps them
    settings_at_start = [dict(group) for group in stand_in.param_groups]
    every = getattr(wrapper, '_accumulative_counts', 1)
    rates = []
    for now in range(1, min(iterations, ITERATIONS) + 1):
        if now % every == 0:
            rates.append(
                [
                    {key: float(g[key]) for key in ('lr', 'momentum') if key in g}
                    for g in stand_in.param_groups
                ]
            )
        for scheduler in copies:
            if not scheduler.by_epoch or (epoch_length and now % epoch_length == 0):
                scheduler.step()
    return Schedule(wrapper.optimizer, settings_at_start, kinds, rates, iterations, every)


@dataclass
class Part:
    """Layers whose gammas and betas are treated alike, with their closed filters.

    Attributes:
        layers (list[str]): Names.
        gamma (Tensor): Gammas of the closed filters, shape (N,).
        beta (Tensor): Betas of the closed filters, shape (N,).
        shift (float): The constant alpha.
        kinds (tuple[int, int]): Of gamma and of beta, see :class:`Schedule`.
        opened (dict[str, np.ndarray]): By 'weight decay' and, if it is on, 'RecoveryHook', the
            iterations after which the filters are open, integers of shape (N,); -1 for filters
            that stay closed.
        opens_above_b (float): The bias above which a filter with gamma = 0 opens by weight decay.
    """

    layers: list[str]
    gamma: torch.Tensor
    beta: torch.Tensor
    shift: float
    kinds: tuple[int, int]
    opened: dict[str, np.ndarray]
    opens_above_b: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """Which closed filters of psBN layers open in a training, and when.

    Attributes:
        parts (list[Part]): Layers that are treated alike.
        begin (int): Number of the first iteration to come, from 0.
        iterations (int): Of the training to come.
        recovery (tuple[int, int], optional): ``steps`` and ``window`` of the RecoveryHook.
        before_relu (int): Number of trained psBN layers right before a ReLU.
        weight_decay (list[float]): By part, the weight decay of its betas.
    """

    parts: list[Part]
    begin: int
    iterations: int
    recovery: tuple[int, int] | None
    before_relu: int
    weight_decay: list[float]

    def text(self) -> str:
        """The forecast in one or two sentences."""
        if not self.before_relu:
            return (
                'no psBN layer stands right before a ReLU. LeakyReLU, SiLU, GELU and the like let '
                'a gradient through everywhere: no filter is closed for good, psBN can do no more '
                'than BN, and what is counted here is vanished filters.'
            )
        closed = sum(len(part.beta) for part in self.parts)
        end = self.begin + self.iterations
        if self.recovery:
            name = f'RecoveryHook(steps={self.recovery[0]})'
            if not closed:
                return (
                    f'no filter before a ReLU is closed at the start; {name} opens one that closes '
                    f'later at b = -1 in {sum(self.recovery)} steps.'
                )
            opened = self._opened('RecoveryHook')
            last = f', the last at iteration {self.begin + opened.max()}' if len(opened) else ''
            return (
                f'of {closed} closed filters {name} opens {len(opened)} by iteration {end}{last}.'
            )
        opened = self._opened('weight decay')
        bounds = sorted({f'{part.opens_above_b:.2g}' for part in self.parts}, key=float)
        above = f' (those with b > {" to ".join(dict.fromkeys((bounds[0], bounds[-1])))})'
        those = f'by iteration {end}{above}' if bounds[0] != '0' else f'by iteration {end}'
        advice = (
            "dict(type='RecoveryHook') in custom_hooks opens all in the steps that it is given."
        )
        if not closed:
            some = 'none ' if bounds[0] == '0' else ''
            return (
                'no filter before a ReLU is closed at the start. Of those that close later weight '
                f'decay opens {some}{those}; {advice}'
            )
        deepest = min(
            float((part.beta + part.shift).min()) for part in self.parts if len(part.beta)
        )
        first = f' The first opens at iteration {self.begin + opened.min()}.' if len(opened) else ''
        return (
            f'of {closed} closed filters, the deepest at b = {deepest:.2g}, weight decay opens '
            f'{len(opened)} {those}.{first}' + (f' {advice}' if len(opened) < closed else '')
        )

    def _opened(self, by: str) -> np.ndarray:
        times = [part.opened[by] for part in self.parts]
        return np.concatenate([at[at >= 0] for at in times])

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part: its layers and filters, and the iterations at which they open."""
        return [
            {
                'layers': len(part.layers),
                'first_layer': part.layers[0],
                'weight_decay': decay,
                'closed': len(part.beta),
                'opens_above_b': part.opens_above_b,
                **{by: self.begin + at[at >= 0] for by, at in part.opened.items()},
            }
            for part, decay in zip(self.parts, self.weight_decay)
        ]


def make_forecast(
    census: Census,
    norms: Mapping[str, nn.Module],
    schedule: Schedule,
    begin: int,
    recovery: tuple[int, int] | None,
) -> Forecast | None:
    """Forecast a training.

    Args:
        census (Census): Of the weights at the start, judged by what follows the layers.
        norms (Mapping[str, nn.Module]): The network's layers, by the census's names; BN and
            frozen layers are skipped.
        schedule (Schedule): How their parameters are updated.
        begin (int): Number of the first iteration to come, from 0.
        recovery (tuple[int, int], optional): ``steps`` and ``window`` of the RecoveryHook.

    Returns:
        Forecast, optional: None if no psBN layer is trained.

    Raises:
        ValueError: If the optimizer cannot be stepped without the network.
    """
    parts: dict[tuple, Part] = {}
    before_relu = 0
    for layer in census.layers:
        norm = norms.get(layer.name)
        if not isinstance(norm, PostShiftedBatchNorm):
            continue
        if norm.weight not in schedule.kinds or norm.bias not in schedule.kinds:
            continue
        kinds = schedule.kinds[norm.weight], schedule.kinds[norm.bias]
        empty = torch.zeros(0)
        part = parts.setdefault((norm.shift, *kinds), Part([], empty, empty, norm.shift, kinds, {}))
        part.layers.append(layer.name)
        if layer.rectifier != 'relu':
            continue
        before_relu += 1
        if layer.dead is not None:
            gamma, bias = (torch.from_numpy(x[layer.dead]) for x in (layer.gamma, layer.bias))
            part.gamma = torch.cat([part.gamma, gamma])
            part.beta = torch.cat([part.beta, bias - norm.shift])
    if not parts:
        return None
    found = list(parts.values())
    try:
        for by, settings in (('weight decay', None), ('RecoveryHook', recovery)):
            if settings or by == 'weight decay':
                _follow(schedule, found, census.k, by, settings)
    except Exception as error:  # such as an optimizer that needs a closure
        raise ValueError(
            f'{type(schedule.optimizer).__name__} cannot be stepped without the network '
            f'({type(error).__name__}: {error})'
        ) from error
    decays = [float(schedule.settings[part.kinds[1]].get('weight_decay', 0)) for part in found]
    return Forecast(found, begin, schedule.iterations, recovery, before_relu, decays)


@torch.no_grad()
def _follow(
    schedule: Schedule, parts: list[Part], k: float, by: str, recovery: tuple[int, int] | None
) -> None:
    """Step a copy of the optimizer through the training, and note when filters open."""
    groups = [{**settings, 'params': []} for settings in schedule.settings]
    pairs, opened = [], []
    for part in parts:
        # The probes come after the filters, and show what weight decay can open.
        gamma = nn.Parameter(torch.cat([part.gamma, torch.zeros_like(_PROBES)]))
        beta = nn.Parameter(torch.cat([part.beta, -_PROBES - part.shift]))
        for kind, param in zip(part.kinds, (gamma, beta)):
            param.grad = torch.zeros_like(param)
            groups[kind]['params'].append(param)
        pairs.append((gamma, beta))
        opened.append(torch.full_like(beta, -1, dtype=torch.long))
    for now, several in _stepped(schedule, groups):
        for part, (gamma, beta), at in zip(parts, pairs, opened):
            if recovery and now > recovery[1]:
                factor = decay_per_step(part.shift, recovery[0]) ** min(several, now - recovery[1])
                gamma.mul_(factor)
                beta.mul_(factor)
            is_open = beta + part.shift + k * gamma.abs() > 0
            at[is_open & (at < 0)] = now * schedule.every
    for part, at in zip(parts, opened):
        filters, probes = at.split([len(part.beta), len(_PROBES)])
        part.opened[by] = filters.numpy()
        if recovery is None:
            part.opens_above_b = -float(_PROBES[probes >= 0].max()) if (probes >= 0).any() else 0.0


def _stepped(schedule: Schedule, groups: list[dict]) -> Iterator[tuple[int, int]]:
    """Step a copy of the optimizer, which has these groups: what was made, how much of it now."""
    optimizer = _copy_of(schedule.optimizer, groups)
    made = schedule.iterations // schedule.every
    ends = np.arange(1, made + 1)
    if made > STEPS:
        late = np.geomspace(STEPS // 4, made, STEPS - STEPS // 4)
        ends = np.unique([*ends[: STEPS // 4], *late.round().astype(int)])
    done = 0
    for now in ends.tolist():
        several = now - done
        rates = schedule.rates[done : done + several] or schedule.rates[-1:]
        for kind, group in enumerate(groups):
            group.update(rates[len(rates) // 2][kind])
            group['lr'] = several * sum(step[kind]['lr'] for step in rates) / len(rates)
        optimizer.step()
        done = now
        yield now, several


@torch.no_grad()
def e_foldings(schedule: Schedule) -> float:
    """The smallest number of e-foldings by which an undriven gamma decays in a training.

    Args:
        schedule (Schedule): Of the gammas.

    Returns:
        float: 0 if there is none, or no decay.
    """
    if not schedule.kinds:
        return 0.0
    groups = [{**settings, 'params': []} for settings in schedule.settings]
    gammas = {kind: nn.Parameter(torch.ones(1)) for kind in set(schedule.kinds.values())}
    for kind, gamma in gammas.items():
        gamma.grad = torch.zeros_like(gamma)
        groups[kind]['params'].append(gamma)
    for _ in _stepped(schedule, groups):
        pass
    return min(-float(gamma.abs().clamp(min=1e-30).log()) for gamma in gammas.values())


def _copy_of(optimizer: Optimizer, groups: list[dict]) -> Optimizer:
    """An optimizer with the same settings, other parameters, and no state or hooks."""
    for group in groups:  # these need parameters on an accelerator
        group.update({key: False for key in ('capturable', 'fused') if group.get(key)})
    made = object.__new__(type(optimizer))
    vars(made).update(vars(optimizer))
    vars(made).pop('step', None)  # a wrapper set on the instance
    made.param_groups, made.state = groups, defaultdict(dict)
    made._optimizer_step_pre_hooks = OrderedDict()
    made._optimizer_step_post_hooks = OrderedDict()
    return made


def forecast_of_config(cfg: Config, census: Census) -> Forecast | None:
    """Forecast what a training on one process does to the filters of a checkpoint.

    The data set is read for its length.

    Args:
        cfg (Config): Of the training.
        census (Census): Of the checkpoint that it starts from, judged by the config's model.

    Returns:
        Forecast, optional: None if no psBN layer is trained.

    Raises:
        ValueError: If the config lacks a setting of a training, or its optimizer cannot be
            stepped without the network.
        CheckpointError: If the model cannot be built.
    """
    model = model_of_config(cfg)
    names = [layer.name for layer in census.layers]
    prefix = prefix_in_model(cfg, model, names)
    of_model = find_norms(model)
    norms = {name: of_model[prefix + name] for name in names if prefix + name in of_model}
    params = [param for norm in norms.values() for param in norm.parameters()]
    schedule = schedule_of_config(cfg, model, params)
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if type_name(hook) == 'RecoveryHook']
    given = hooks[0] if hooks and isinstance(hooks[0], dict) else {}
    recovery = (given.get('steps', 500), given.get('window', 10)) if hooks else None
    return make_forecast(census, norms, schedule, begin=0, recovery=recovery)


def schedule_of_config(cfg: Config, model: nn.Module, params: Collection[nn.Parameter]) -> Schedule:
    """How a config's training on one process treats parameters of its model.

    The data set is read for its length.

    Raises:
        ValueError: If the config has not all that a training needs.
    """
    for setting in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(setting):
            raise ValueError(f'the config has no {setting}')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'):
        wrapper = _optim_wrapper(cfg, model)
        epoch_length = len(Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader), seed=0))
        iterations, by_epoch = _iterations(cfg.train_cfg, epoch_length)
        schedulers = _schedulers(cfg, wrapper, iterations, epoch_length)
    length = epoch_length if by_epoch else None
    return read_schedule(wrapper, schedulers, params, iterations, length)


def _optim_wrapper(cfg: Config, model: nn.Module) -> OptimWrapper:
    settings = copy.deepcopy(cfg.optim_wrapper)
    if settings.get('type') == 'AmpOptimWrapper':  # available on accelerators only
        settings['type'] = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fp64'):
            settings.pop(key, None)
    wrapper = build_optim_wrapper(model, settings)
    if isinstance(wrapper, OptimWrapperDict):
        raise ValueError('the config has several optimizers')
    scaling = cfg.get('auto_scale_lr') or {}
    if scaling.get('enable'):  # as Runner.scale_lr does it
        for group in wrapper.optimizer.param_groups:
            group['lr'] *= cfg.train_dataloader['batch_size'] / scaling['base_batch_size']
    return wrapper


def _iterations(train_cfg: dict, epoch_length: int) -> tuple[int, bool]:
    """The length of the training, and whether it has epochs."""
    if train_cfg.get('max_epochs'):
        return train_cfg['max_epochs'] * epoch_length, True
    if train_cfg.get('max_iters'):
        return train_cfg['max_iters'], False
    raise ValueError('train_cfg has neither max_epochs nor max_iters')


def _schedulers(
    cfg: Config, wrapper: OptimWrapper, iterations: int, epoch_length: int
) -> Sequence[Any]:
    settings = cfg.get('param_scheduler') or []
    built = []
    for setting in settings if isinstance(settings, (list, tuple)) else [settings]:
        setting = copy.deepcopy(setting)
        epochs = cfg.train_cfg.get('max_epochs') or iterations
        setting.setdefault('end', epochs if setting.get('by_epoch', True) else iterations)
        defaults = dict(optimizer=wrapper, epoch_length=epoch_length)
        built.append(PARAM_SCHEDULERS.build(setting, default_args=defaults))
    return built
