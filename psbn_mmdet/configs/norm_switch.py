"""The switch of tools/train.py: any config of MMDetection with psBN, or back, or only watched."""

from __future__ import annotations

import argparse
import reprlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict

from ..layers.switch import NORMS, SWITCHED, in_scope, kinds_of_norms, switch_norms
from .model import build_model
from .reading import ConfigError, type_name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the switch's options to a parser."""
    parser.add_argument(
        '--norm',
        choices=NORMS,
        help='train with psBN in place of every BN, with recovery and counting; BN takes it back',
    )
    parser.add_argument(
        '--norm-scope', metavar='PART', help='replace it in this part alone, such as backbone'
    )
    parser.add_argument(
        '--shrink',
        nargs='?',
        type=float,
        const=0.0,
        metavar='DECAY',
        help='let filters of BN collapse, and cut them out after the training',
    )
    parser.add_argument(
        '--watch-collapse', action='store_true', help='count collapsed filters, whatever the norm'
    )


def switch_config(
    cfg: Config, norm: str | None, scope: str | None = None, watch: bool = False
) -> list[str]:
    """Change a config as the switch's options say.

    Args:
        cfg (Config): The config, changed in place so that it says all that was done.
        norm (str, optional): Of ``--norm``.
        scope (str, optional): Of ``--norm-scope``. Defaults to None.
        watch (bool): Of ``--watch-collapse``. Defaults to False.

    Returns:
        list[str]: What was changed, part by part, and what was left and why.

    Raises:
        ConfigError: If there is nothing to replace.
    """
    if scope and not norm:
        raise ConfigError('--norm-scope is for --norm: add --norm psBN or leave it out')
    if norm and not isinstance(cfg.get('model'), dict):
        raise ConfigError(
            f'model is {reprlib.repr(cfg.get("model"))}, not a dict, and has no norms to replace: '
            'give a config with a model, or leave out --norm'
        )
    lines = _switch(cfg, norm, scope) if norm else []
    if norm == 'psBN' or watch:
        add_hook(cfg, 'CollapseHook')
    if norm == 'psBN':
        add_hook(cfg, 'RecoveryHook')
    return lines


def _switch(cfg: Config, norm: str, scope: str | None) -> list[str]:
    before = {name: (kind, trained) for name, kind, trained in kinds_of_norms(build_model(cfg))}
    other = 'BN' if norm == 'psBN' else 'psBN'
    inside = {name: kind for name, (kind, _) in before.items() if in_scope(name, scope)}
    if other not in inside.values():
        found = Counter(inside.values())
        has = ', '.join(f'{n} {kind}' for kind, n in found.items()) or 'no norm at all'
        where = '' if scope is None else f'in {scope or repr(scope)} '
        fix = 'leave out --norm'
        if scope is not None and not inside:
            fix = f'give one of {", ".join(_parts(before))} to --norm-scope'
        raise ConfigError(
            f'--norm {norm}: there is no {other} {where}to replace (there is {has}): {fix}'
        )
    own, switches = dict(cfg.model), []
    if own['type'] == SWITCHED:  # by an earlier --norm
        own['type'], switches = own.pop('model_type'), own.pop('switches')
    switches = [*switches, dict(norm=norm, **({'scope': scope} if scope else {}))]
    cfg.model = ConfigDict(own)
    model = build_model(cfg)
    by_config = {name: kind for name, kind, _ in kinds_of_norms(model)}
    left: dict[str, str] = {}
    for switch in switches:
        left = switch_norms(model, **switch)
    after = {name: kind for name, kind, _ in kinds_of_norms(model)}
    if norm == 'psBN' and norm not in after.values():
        raise ConfigError(
            f'--norm {norm}: none of its BN can be replaced ({", ".join(set(left.values()))}): '
            'leave out --norm'
        )
    if after != by_config:
        own.update(type=SWITCHED, model_type=own['type'], switches=switches)
        cfg.model = ConfigDict(own)
    if 'psBN' not in after.values():  # without any, RecoveryHook refuses the model
        cfg.custom_hooks = [hook for hook in _hooks(cfg) if type_name(hook) != 'RecoveryHook']
    return list(_told(norm, scope, before, after, left))


def _told(
    norm: str,
    scope: str | None,
    before: dict[str, tuple[str, bool]],
    after: dict[str, str],
    left: dict[str, str],
) -> Iterator[str]:
    """What was changed, part by part, and what was left and why."""
    other = 'BN' if norm == 'psBN' else 'psBN'
    yield f'--norm {norm}' + (f' --norm-scope {scope}' if scope else '') + ':'
    for part in _parts(before):
        mine = [n for n in before if n.split('.')[0] == part and before[n][0] == other]
        changed = [n for n in mine if after[n] == norm]
        if changed:
            frozen = sum(not before[name][1] for name in changed)
            note = f'; {frozen} of them are frozen, so nothing opens there' if frozen else ''
            yield f'  {part}: {len(changed)} {other} -> {norm}{note}'
        kept = Counter(
            left.get(n, other) if in_scope(n, scope) else 'outside the scope'
            for n in mine
            if n not in changed
        )
        for why, count in kept.items():
            yield f'  {part}: {count} {other} left ({why})'
    others = Counter(kind for kind, _ in before.values() if kind not in NORMS)
    if others:
        yield '  left, which are no BN or fixed ones: ' + ', '.join(
            f'{count} {kind}' for kind, count in others.items()
        )


def _parts(names: dict) -> list[str]:
    return list(dict.fromkeys(name.split('.')[0] for name in names))


def import_package(cfg: Config) -> None:
    """Have a config import this package."""
    given = cfg.get('custom_imports') or {}
    imports = given.get('imports') or [] if isinstance(given, dict) else None
    imports = [imports] if isinstance(imports, str) else imports
    if not isinstance(imports, (list, tuple)):
        raise ConfigError(
            f'custom_imports is {reprlib.repr(given)}, not a dict with a list of imports: set it '
            "in the config, such as custom_imports=dict(imports=['psbn_mmdet'])"
        )
    if 'psbn_mmdet' not in imports:
        settings: dict[str, Any] = {'allow_failed_imports': False, **given}
        cfg.custom_imports = {**settings, 'imports': [*imports, 'psbn_mmdet']}


def _hooks(cfg: Config) -> list:
    """The custom hooks, which MMEngine takes as configs or as objects."""
    hooks = cfg.get('custom_hooks') or []
    if not isinstance(hooks, (list, tuple)):
        raise ConfigError(
            f'custom_hooks is {reprlib.repr(hooks)}, not a list of hooks: set them in the config, '
            "such as custom_hooks=[dict(type='CollapseHook', interval=50)]; --cfg-options "
            'custom_hooks.0.… changes only hooks that are there'
        )
    return list(hooks)


def add_hook(cfg: Config, kind: str) -> None:
    """Add one of our hooks to a config that has none of that kind, and the import of it.

    Raises:
        ConfigError: If ``custom_hooks`` or ``custom_imports`` is not what MMEngine takes.
    """
    import_package(cfg)
    hooks = _hooks(cfg)
    if kind not in map(type_name, hooks):
        cfg.custom_hooks = [*hooks, dict(type=kind)]
