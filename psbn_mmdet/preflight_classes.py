"""Checks that the classes of the data, the annotation files and the heads are the same ones.

MMDetection drops annotations of classes that it does not know, and trains on what is left.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

LARGEST = 200e6  # bytes of an annotation file that is read for the checks alone
SHOWN = 6  # names in a sentence
_HEADS = ('bbox_head', 'mask_head')
_KEYS = ('images', 'annotations', 'categories')


def class_errors(
    cfg: Config, stage: str, datasets: Sequence[tuple[str, dict]], parts: Sequence[tuple[str, dict]]
) -> Iterator[str]:
    """Find what is wrong with the classes of a stage's data, in one sentence each.

    Args:
        cfg (Config): The config.
        stage (str): 'train', 'val' or 'test'.
        datasets (Sequence[tuple[str, dict]]): The data sets that read files, with their paths.
        parts (Sequence[tuple[str, dict]]): All dicts of the model, with their paths.

    Yields:
        str: The value and the mend.
    """
    for path, dataset in datasets:
        kind = dataset.get('type')
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope') or 'mmdet') as registry:
            cls = registry.get(kind) if isinstance(kind, str) else kind
        if cls is None or 'CocoDataset' not in {base.__name__ for base in cls.__mro__}:
            continue
        metainfo = dataset.get('metainfo') or {}
        if not isinstance(metainfo, dict):
            yield (
                f'{path}.metainfo is {reprlib.repr(metainfo)}, no dict: write '
                "dict(classes=('cat', 'dog')) with the names of yours"
            )
            continue
        given = metainfo.get('classes')
        if isinstance(given, str) and not os.path.isfile(given):
            yield (
                f'{path}.metainfo.classes={given!r} is a text, not a tuple of names: write '
                f'({given!r},) with a comma'
            )
            continue
        if isinstance(given, str):
            with open(given, encoding='utf-8') as file:
                given = file.read().splitlines()
        classes = list(given or getattr(cls, 'METAINFO', {}).get('classes') or ())
        file_name = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
        setting = f'{path}.ann_file'
        error = _file_error(setting, file_name, path, classes, bool(given))
        if error:
            yield error
        elif stage == 'train' and classes:
            yield from _head_errors(path, classes, parts)


def _file_error(
    setting: str, file_name: str, path: str, classes: list[str], given: bool
) -> str | None:
    """What is wrong with an annotation file, or with the names of classes beside its own."""
    if not os.path.isfile(file_name) or os.path.getsize(file_name) > LARGEST:
        return None
    try:
        with open(file_name, encoding='utf-8') as file:
            content: Any = json.load(file)
    except (ValueError, RecursionError) as error:
        return (
            f'{setting}: {file_name} is no JSON ({error}): give annotations in the format of COCO'
        )
    if not isinstance(content, dict):
        return (
            f'{setting}: {file_name} holds a {type(content).__name__}, not an object with '
            f'{", ".join(_KEYS)}: give annotations in the format of COCO'
        )
    missing = [key for key in _KEYS if not isinstance(content.get(key), list)]
    if missing:
        return (
            f'{setting}: {file_name} has no list of {" and of ".join(missing)}: give annotations '
            'in the format of COCO'
        )
    names = [c.get('name') for c in content['categories'] if isinstance(c, dict)]
    unknown = [name for name in classes if name not in names]
    if given and unknown:
        return (
            f'{path}.metainfo.classes has {_listed(unknown)}, not among the categories of '
            f'{file_name} ({_listed(names)}): give the names that stand there'
        )
    if classes and len(unknown) == len(classes):
        return (
            f'{path} has no metainfo.classes, and none of the {len(classes)} default classes is '
            f'among the categories of {file_name} ({_listed(names)}): set '
            f'{path}.metainfo=dict(classes={tuple(names)!r})'
        )
    return None


def _head_errors(path: str, classes: list[str], parts: Sequence[tuple[str, dict]]) -> Iterator[str]:
    for part_path, part in parts:
        names = part_path.split('.')
        name = names[-2] if names[-1].isdigit() else names[-1]
        number = part.get('num_classes')
        if name in _HEADS and isinstance(number, int) and number != len(classes):
            yield (
                f'{part_path}.num_classes={number}, but {path} has {len(classes)} classes '
                f'({_listed(classes)}): set it to {len(classes)}'
            )


def _listed(names: Sequence[Any]) -> str:
    shown = ', '.join(str(name) for name in names[:SHOWN])
    return shown + (f' and {len(names) - SHOWN} more' if len(names) > SHOWN else '')
