"""What a PyTorch file claims, held against its size before memory or time is spent on it.

A few hundred bytes can claim terabytes: compressed zeros, one value spread over a tensor of any
shape, dicts that hold themselves. No checkpoint that anybody trains is like that.
"""

from __future__ import annotations

import os
import zipfile
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import Tensor

from .safe_globals import archived, is_torchscript

MOST_INFLATED = 20  # times the file's size; weights deflate by a third at most
MOST_SHARED = 100  # times the file's size, of all tensors together
MOST_CONTAINERS = 200_000  # each counted as often as it is held
DEEPEST = 100


class ClaimError(ValueError):
    """What is wrong with a file, and what to do, to stand after its name."""


def unpacked_size(path: str | os.PathLike) -> int:
    """How many bytes a PyTorch file has to give.

    Args:
        path (str | PathLike): The file.

    Returns:
        int: Its size, or that of its compressed parts once they are unpacked.

    Raises:
        ClaimError: If it is a program, or unpacks to far more than it is.
    """
    size = os.path.getsize(path)
    parts = archived(path)
    if is_torchscript(parts):
        raise ClaimError('is a TorchScript program: give the checkpoint it was made from')
    inflated = sum(part.file_size for part in parts if part.compress_type != zipfile.ZIP_STORED)
    if inflated > MOST_INFLATED * size:
        raise ClaimError(
            f'has {size:,} bytes and unpacks to {inflated:,}, as no weights do: replace the file'
        )
    return max(size, inflated)


def check_claims(content: Any, size: int) -> None:
    """Refuse what would take far more memory or time than a file has to give.

    Args:
        content (Any): What was read; big tensors are only claimed so far, not filled.
        size (int): What :func:`unpacked_size` returned.

    Raises:
        ClaimError: If a tensor claims more than the file has, or has no values, or if dicts and
            lists hold each other without an end.
    """
    total = containers = 0
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, Tensor) and value.device.type == 'meta':
            raise ClaimError('has a tensor without values: give a checkpoint with its weights')
        claimed = _claimed(value)
        total += claimed
        if claimed > size or total > MOST_SHARED * size:
            raise ClaimError(
                f'has tensors of {total:,} bytes, but only {size:,} to fill them: replace the file'
            )
        children = _children(value)
        containers += bool(children)
        if containers > MOST_CONTAINERS or depth > DEEPEST:
            raise ClaimError('has dicts or lists that hold each other endlessly: replace the file')
        stack.extend((child, depth + 1) for child in children)


def _claimed(value: Any) -> int:
    if isinstance(value, Tensor):
        # A sparse one is as large as what it lists, whatever its shape.
        return 0 if value.is_sparse or value.is_sparse_csr else value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    return len(value) if isinstance(value, bytearray) else 0


def _children(value: Any) -> list[Any]:
    """What a container holds, without the plain values that need no look."""
    held: Any = ()
    if isinstance(value, dict):
        held = value.values()
    elif isinstance(value, HistoryBuffer):
        held = vars(value).values()
    elif isinstance(value, (list, tuple)):
        held = value
    kinds = (Tensor, np.ndarray, bytearray, dict, list, tuple, HistoryBuffer)
    return [child for child in held if isinstance(child, kinds)]
