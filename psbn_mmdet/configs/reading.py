"""Reading configs: files and zoo names, and their contents."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from ..layers import PostShiftedBatchNorm

PSBN_CLASSES = {
    name: cls
    for name, cls in MODELS.module_dict.items()
    if isinstance(cls, type) and issubclass(cls, PostShiftedBatchNorm)
}
PSBN_TYPES = {*PSBN_CLASSES, *(cls.__name__ for cls in PSBN_CLASSES.values())}


class ConfigError(ValueError):
    """What must be changed before a run can start, in one sentence."""


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Load a config file as MMDetection's scripts do.

    Args:
        path (str): The config file; or one that an installed package brings, such as
            ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``, or its bare name in MMDetection.
        options (dict, optional): What ``--cfg-options`` gave. Defaults to None.

    Returns:
        Config: The config with the options merged in.

    Raises:
        ConfigError: If the file, one of its bases or one of its imports cannot be read, or the
            options do not fit the config.
    """
    file = _config_file(path)
    try:
        cfg = Config.fromfile(file)
        dict(cfg.items())  # triggers lazy imports
    except Exception as error:  # a config is Python, and fails in as many ways
        raise ConfigError(
            f'config file {path} cannot be loaded ({named(error)}): correct it or what it imports, '
            'if it is a config of MMDetection'
        ) from error
    try:
        cfg.merge_from_dict(options or {})
    except Exception as error:  # a type for each way not to fit
        raise ConfigError(
            f'one of --cfg-options {", ".join(options or {})} does not fit the config: give the '
            f'whole value that it is a part of ({named(error)})'
        ) from error
    text_of(cfg.get('default_scope'), 'default_scope', "a library's name, such as 'mmdet'")
    return cfg


def _config_file(path: str) -> str:
    """The file that a path or a name of the zoo means."""
    package, is_of_package, inside = path.rpartition('::')
    if os.path.isfile(path):
        return path
    if not is_of_package and ('/' in path or os.sep in path):
        raise ConfigError(f'config file {shown(path)} does not exist: check the path')
    package = package or 'mmdet'
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a part of something that is not there; no such name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'config {path}: there is no package {package}: install it')
    root = Path(next(iter(spec.submodule_search_locations)))
    # A development install has links in `.mim`, a bare checkout the folder beside the package.
    folders = [f for f in (root / '.mim/configs', root.parent / 'configs') if f.is_dir()]
    names = [inside, f'{inside}.py']
    for folder in folders:
        if is_of_package:
            found = [folder / name for name in names if (folder / name).is_file()]
        else:
            found = [p for name in names for p in sorted(folder.rglob(glob.escape(name)))]
        if found:
            return str(found[0])
    known = {p.stem for folder in folders for p in folder.rglob('*.py') if p.stem[:1] != '_'}
    stem = PurePosixPath(inside).name.removesuffix('.py')
    near = difflib.get_close_matches(stem, known, 1)
    raise ConfigError(
        f'config file {shown(path)} does not exist, and {package} has none of that name: check '
        'the path' + (f', or did you mean {near[0]}?' if near else '')
    )


def datasets_of(dataset: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Go through wrappers (ConcatDataset, RepeatDataset, ...) down to what reads files."""
    if isinstance(dataset, (list, tuple)):
        for index, part in enumerate(dataset):
            yield from datasets_of(part, f'{path}.{index}')
    elif isinstance(dataset, dict):
        wrapped = [key for key in ('dataset', 'datasets') if key in dataset]
        for key in wrapped:
            yield from datasets_of(dataset[key], f'{path}.{key}')
        if not wrapped:
            yield path, dataset


def psbn_of_config(cfg: Config) -> list[tuple[str, dict]]:
    """The parts of a config that make psBN layers, with their paths."""
    return [
        (path, part)
        for path, part in dicts(cfg.get('model'), 'model')
        if type_name(part) in PSBN_TYPES or part.get('norm') == 'psBN'  # of SwitchNorms
    ]


def type_name(cfg: Any) -> str:
    """``type`` without the scope, which may be given as a class; the class of what is built."""
    kind = cfg.get('type') if isinstance(cfg, dict) else type(cfg)
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def is_pretrained(init_cfg: Any) -> bool:
    """Whether an ``init_cfg`` loads weights from a file."""
    return type_name(init_cfg) in ('Pretrained', 'PretrainedInit')


def dicts(value: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Every dict in ``value`` with its path, in the notation of ``--cfg-options``."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        yield path, value
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    for key, child in children:
        yield from dicts(child, f'{path}.{key}')


def text_of(value: Any, setting: str, meant: str) -> str:
    """A setting that is a text or a path, '' if it is not set."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f'{setting} is {reprlib.repr(value)}, no text: set it to {meant}')
    return os.fspath(value or '')


def shown(path: str) -> str:
    """A path for an error: with the current folder, if it is relative to it."""
    return path if os.path.isabs(path) else f'{path} (in {Path.cwd()})'


def named(error: BaseException) -> str:
    """Its class, and the first line of its text."""
    name, line = type(error).__name__, one_line(error)
    return name if line == name else f'{name}: {line}'


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or what kind of error it is."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip('.') if lines else type(error).__name__
