"""The forecast of a training that has not begun, from its config."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from ..checkpoints.config_model import model_of_config, prefix_in_model
from ..collapse import Census, find_norms
from ..preflight import type_name
from .forecast import Forecast, make_forecast
from .schedule import courses


def forecast_of_config(cfg: Config, census: Census) -> Forecast | None:
    """Forecast what a training on one process does to the filters of a checkpoint.

    The data set is read for its length.

    Args:
        cfg (Config): Of the training.
        census (Census): Of the checkpoint that it starts from, judged by the config's model.

    Returns:
        Forecast, optional: None if no psBN layer is trained.

    Raises:
        ValueError: If the config has not all that a training needs.
        CheckpointError: If the model cannot be built.
    """
    for setting in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(setting):
            raise ValueError(f'the config has no {setting}')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'):
        model = model_of_config(cfg)
        names = [layer.name for layer in census.layers]
        prefix = prefix_in_model(cfg, model, names)
        wrapper = _optim_wrapper(cfg, model)
        epoch_length = len(Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader), seed=0))
        iterations, by_epoch = _iterations(cfg.train_cfg, epoch_length)
        schedulers = _schedulers(cfg, wrapper, iterations, epoch_length)
    of_model = find_norms(model)
    norms = {name: of_model[prefix + name] for name in names if prefix + name in of_model}
    params = [param for norm in norms.values() for param in norm.parameters()]
    length = epoch_length if by_epoch else None
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if type_name(hook) == 'RecoveryHook']
    given = hooks[0] if hooks and isinstance(hooks[0], dict) else {}
    recovery = (given.get('steps', 500), given.get('window', 10)) if hooks else None
    return make_forecast(
        census,
        norms,
        courses(wrapper, schedulers, params, iterations, length),
        begin=0,
        recovery=recovery,
        norm_decay_mult=norm_decay_mult_of(cfg),
    )


def norm_decay_mult_of(cfg: Config) -> float:
    """``optim_wrapper.paramwise_cfg.norm_decay_mult`` of a config."""
    paramwise = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    return paramwise.get('norm_decay_mult', 1.0)


def _optim_wrapper(cfg: Config, model: nn.Module) -> OptimWrapper:
    settings = copy.deepcopy(cfg.optim_wrapper)
    if settings.get('type') == 'AmpOptimWrapper':  # which there is on accelerators alone
        settings['type'] = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fp64'):
            settings.pop(key, None)
    wrapper = build_optim_wrapper(model, settings)
    if isinstance(wrapper, OptimWrapperDict):
        raise ValueError('the config has several optimisers')
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
