"""``--shrink`` of tools/train.py: a training in which filters collapse on purpose, to be pruned.

Weight decay on gamma and beta is a pressure: filters whose gradients do not hold them up shrink.
How far is measured in e-foldings, the sum of lr * decay / (1 - momentum). In our measurements,
sixteen or more e-foldings from a long training cost no AP beyond the spread of seeds. Bought by a
larger decay in a short training they cost a third of it (docs/evidence/shrink.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from mmengine.config import Config
from torch import nn

from ..collapse import find_norms
from ..configs.model import model_of_config
from ..configs.norm_switch import add_hook
from ..configs.reading import ConfigError
from ..layers import PostShiftedBatchNorm
from ..recovery.forecast import e_foldings, schedule_of_config

FOLDINGS = 16.0  # after which filters without gradient have vanished
DECAY = 0.1  # the largest decay that cost little AP


def shrink_config(cfg: Config, decay: float | None) -> list[str]:
    """Have a config's training decay gamma and beta until filters collapse.

    Args:
        cfg (Config): The config, changed in place so that it says all that was done.
        decay (float, optional): The weight decay of gamma and beta. None for the least that gives
            sixteen e-foldings, at most 0.1.

    Returns:
        list[str]: What was changed, and whether the training is long enough.

    Raises:
        ConfigError: If nothing could be decayed.
    """
    if decay is not None and not 0 < decay < 1:
        raise ConfigError(f'--shrink {decay}: the weight decay of gamma and beta is from 0 to 1')
    model = model_of_config(cfg)
    norms = find_norms(model)
    trained = {n: x for n, x in norms.items() if x.weight.requires_grad}
    if any(isinstance(norm, PostShiftedBatchNorm) for norm in norms.values()):
        raise ConfigError(
            '--shrink lets filters collapse, and psBN keeps them open: train the model with BN '
            '(--norm BN)'
        )
    if not trained:
        raise ConfigError('--shrink: no BN of the model is trained: set requires_grad=True')
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not isinstance(optimizer, dict) or not optimizer.get('weight_decay'):
        raise ConfigError(
            '--shrink needs a weight_decay of the optimizer, which is multiplied for gamma and '
            'beta: set optim_wrapper.optimizer.weight_decay'
        )
    plain = float(optimizer['weight_decay'])
    has = _foldings_at(cfg, model, trained, DECAY, plain)
    if not has:
        raise ConfigError(
            '--shrink: gamma is not decayed, whatever norm_decay_mult is: take away what '
            'optim_wrapper.paramwise_cfg sets for norms, or its constructor'
        )
    chosen = decay or min(DECAY, DECAY * FOLDINGS / has)
    has *= chosen / DECAY
    _set_decay(cfg, chosen / plain)
    add_hook(cfg, 'CollapseHook')
    frozen = len(norms) - len(trained)
    lines = [
        f'--shrink: gamma and beta of {len(trained)} BN are decayed by {chosen:.3g}, '
        f'{chosen / plain:,.0f} times as much as all else'
        + (f'; {frozen} are frozen, and stay' if frozen else ''),
        f'  a gamma without gradient shrinks by {has:.1f} e-foldings in this training',
    ]
    if has < FOLDINGS - 0.5:
        lines.append(
            f'  too few for filters to vanish: {FOLDINGS:.0f} take {FOLDINGS / has:.1f} times the '
            'iterations or the learning rate. A larger decay costs AP: in 6 epochs of the '
            'tutorial 0.338 fell to 0.207 (docs/pruning.md)'
        )
    return lines


def _set_decay(cfg: Config, times: float) -> None:
    settings = dict(cfg.optim_wrapper.get('paramwise_cfg') or {})
    cfg.optim_wrapper.paramwise_cfg = {**settings, 'norm_decay_mult': times}


def _foldings_at(
    cfg: Config, model: nn.Module, norms: Mapping[str, Any], decay: float, plain: float
) -> float:
    """E-foldings of the whole training at a weight decay of gamma."""
    other = Config(cfg.to_dict())
    _set_decay(other, decay / plain)
    try:
        with redirect_stdout(StringIO()):  # what data sets and optimizers tell
            schedule = schedule_of_config(other, model, [norm.weight for norm in norms.values()])
    except ValueError as error:
        raise ConfigError(f'--shrink: {error}: add it') from error
    return e_foldings(schedule)
