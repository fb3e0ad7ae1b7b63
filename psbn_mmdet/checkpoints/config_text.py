"""The config that MMEngine keeps as text in a checkpoint, edited without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ..layers.switch import SWITCHED

TO_PSBN = {name: f'ps{name}' for name in ('BN', 'BN1d', 'BN2d', 'BN3d', 'SyncBN')}
TO_BN = {psbn: bn for bn, psbn in TO_PSBN.items()}
_PACKAGE = 'psbn_mmdet'
_HOOKS = ('CollapseHook', 'RecoveryHook')
_IMPORT = f"custom_imports = dict(imports=['{_PACKAGE}'], allow_failed_imports=False)"


def config_to_psbn(text: str, shift: float) -> str:
    """Make psBN of all BN of the model in a config's text, and import this package.

    What a text does not say, defaults of constructors and norms that a class writes out, can't be
    told from it: the model becomes one that switches whatever is left, as by ``--norm psBN``.

    Raises:
        SyntaxError: If the text is no Python.
    """
    tree = ast.parse(text)
    replaced = _replace_types(tree, TO_PSBN, shift)
    if not _switch(tree) and not replaced:
        return text
    imports = _imports(tree)
    if imports is None:
        tree.body += ast.parse(_IMPORT).body
    elif isinstance(imports, ast.List) and _PACKAGE not in map(_constant, imports.elts):
        imports.elts.append(ast.Constant(_PACKAGE))
    return ast.unparse(ast.fix_missing_locations(tree))


def config_to_bn(text: str) -> str:
    """Make BN of the psBN types in a config's text, so that it works without this package.

    Raises:
        SyntaxError: If the text is no Python.
    """
    tree = ast.parse(text)
    switched = _undo_switch(tree)
    if not _replace_types(tree, TO_BN, None) and not switched:
        return text
    imports = _imports(tree)
    if isinstance(imports, ast.List):
        imports.elts = [item for item in imports.elts if _constant(item) != _PACKAGE]
    hooks = _assigned(tree, 'custom_hooks')
    if isinstance(hooks, ast.List):
        hooks.elts = [h for h in hooks.elts if _constant(_value(h, 'type')) not in _HOOKS]
    return ast.unparse(ast.fix_missing_locations(tree))


def _imports(tree: ast.Module) -> ast.expr | None:
    """What a config imports, as the list that MMEngine makes of a single name, or of none."""
    given = _assigned(tree, 'custom_imports')
    imports = _value(given, 'imports')
    if not isinstance(imports, ast.Constant):
        return imports
    new = ast.List([imports] if imports.value else [], ast.Load())
    if isinstance(given, ast.Call):
        given.keywords = [ast.keyword(k.arg, k.value) for k in given.keywords if k.arg != 'imports']
        given.keywords.append(ast.keyword('imports', new))
    elif isinstance(given, ast.Dict):
        given.values = [new if v is imports else v for v in given.values]
    return new


def _replace_types(tree: ast.AST, new_of_old: Mapping[str, str], shift: float | None) -> bool:
    """Replace the norm types in ``dict(type=...)`` and ``{'type': ...}``; whether there were any.

    Each then has the ``shift``, or none if that is None or the default.
    """
    changed = False
    for node in ast.walk(tree):
        kind = _value(node, 'type')
        new = new_of_old.get(str(_constant(kind)))
        if new is None or not isinstance(kind, ast.Constant):
            continue
        changed = True
        kind.value = new
        _remove(node, 'shift')
        if shift not in (None, 0.1):
            if isinstance(node, ast.Call):
                node.keywords.append(ast.keyword('shift', ast.Constant(shift)))
            elif isinstance(node, ast.Dict):
                node.keys.append(ast.Constant('shift'))
                node.values.append(ast.Constant(shift))
    return changed


def _switch(tree: ast.Module) -> bool:
    """Make the model one that ``--norm psBN`` has switched; whether there is one to switch."""
    model = _assigned(tree, 'model')
    own = _constant(_value(model, 'type'))
    if own == SWITCHED:
        own = _constant(_value(model, 'model_type'))
    if own is None:
        return False
    new = {'type': SWITCHED, 'model_type': own, 'norm': 'psBN'}
    _remove(model, *new, 'norm_scope')
    if isinstance(model, ast.Call):
        model.keywords[:0] = [ast.keyword(key, ast.Constant(value)) for key, value in new.items()]
    elif isinstance(model, ast.Dict):
        model.keys[:0] = map(ast.Constant, new)
        model.values[:0] = map(ast.Constant, new.values())
    return True


def _undo_switch(tree: ast.AST) -> bool:
    """Give models that ``--norm psBN`` has switched their own type; whether there were any."""
    changed = False
    for node in ast.walk(tree):
        kind, own = _value(node, 'type'), _value(node, 'model_type')
        if _constant(kind) != SWITCHED or _constant(own) is None:
            continue
        if _constant(_value(node, 'norm')) == 'BN':
            continue
        changed = True
        cast(ast.Constant, kind).value = _constant(own)
        _remove(node, 'model_type', 'norm', 'norm_scope')
    return changed


def _remove(node: ast.AST | None, *names: str) -> None:
    """Take items out of ``dict(a=1)`` or ``{'a': 1}``."""
    if isinstance(node, ast.Call):
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in names]
    elif isinstance(node, ast.Dict):
        items = [(k, v) for k, v in zip(node.keys, node.values) if _constant(k) not in names]
        node.keys, node.values = [k for k, _ in items], [v for _, v in items]


def _items(node: ast.AST | None) -> Iterator[tuple[Any, ast.expr]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        for keyword in node.keywords:
            yield keyword.arg, keyword.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values):
            yield _constant(key), value


def _value(node: ast.AST | None, wanted: str) -> ast.expr | None:
    return next((value for key, value in _items(node) if key == wanted), None)


def _constant(node: ast.AST | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _assigned(tree: ast.Module, name: str) -> ast.expr | None:
    for node in reversed(tree.body):  # the last one stands
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            return node.value
    return None
