"""Let MMEngine's checkpoints be read without running the code of a pickle.

They hold the log's history buffers and NumPy arrays beside the weights, which
``torch.load(weights_only=True)``, the default from torch 2.6 on, refuses. Those are plain data, so
torch is told that they are safe, by the names that NumPy 1 and NumPy 2 have written for them. Older
versions of torch cannot be told; :func:`load_plain` then reads by a list of its own.
"""

from __future__ import annotations

import _codecs
import os
import pickle
import zipfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

DTYPES = [
    'bool',
    'int8',
    'int16',
    'int32',
    'int64',
    'uint8',
    'uint16',
    'uint32',
    'uint64',
    'float16',
    'float32',
    'float64',
]
# Whether torch takes safe globals with the names that files have for them.
TAKES_NAMES = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)


def allow_mmengine_checkpoints() -> None:
    """Add the types in MMEngine's checkpoints to torch's list of safe globals."""
    if TAKES_NAMES:
        # With their names: OneDL's MMEngine takes the bare types off the list after each load.
        torch.serialization.add_safe_globals([(kind, name) for name, kind in _plain().items()])


def load_plain(path: str | os.PathLike) -> Any:
    """Read a PyTorch file of tensors, plain values and what MMEngine adds, and nothing else.

    Args:
        path (str | PathLike): The file; it is mapped, not read, where that is possible.

    Returns:
        Any: What is in it, on the CPU.

    Raises:
        pickle.UnpicklingError: If it asks for anything else.
    """
    how: dict[str, Any] = {'weights_only': True}
    if not TAKES_NAMES:
        how = {'weights_only': False, 'pickle_module': _RESTRICTED}
    return torch.load(path, map_location='cpu', mmap=zipfile.is_zipfile(path), **how)


def _plain() -> dict[str, Any]:
    """What a file may ask for besides what torch allows, by the names that are written."""
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    types = [HistoryBuffer, np.ndarray, np.dtype, *(type(np.dtype(name)) for name in DTYPES)]
    return {
        **{f'{kind.__module__}.{kind.__qualname__}': kind for kind in types},
        **{
            f'{module}.multiarray.{name}': getattr(multiarray, name)
            for module in ('numpy.core', 'numpy._core')
            for name in ('_reconstruct', 'scalar')
        },
        '_codecs.encode': _codecs.encode,  # how bytes are written
        'builtins.getattr': _statistic,
    }


class _RestrictedUnpickler(pickle.Unpickler):
    """Python's own, with no way to a name that is not on the list."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {**torch._weights_only_unpickler._get_allowed_globals(), **_plain()}
        module = {'__builtin__': 'builtins'}.get(module, module)  # as old protocols have it
        try:
            return allowed[f'{module}.{name}']
        except KeyError:
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {module}.{name}') from None


# What torch.load takes for the pickle module.
_RESTRICTED = SimpleNamespace(
    __name__=__name__,
    Unpickler=_RestrictedUnpickler,
    load=lambda file, **kwargs: _RestrictedUnpickler(file, **kwargs).load(),
)


def _statistic(owner: Any, name: str) -> Any:
    """What a history buffer's pickle needs of ``getattr``: its own statistics, by name."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise ValueError(f'a checkpoint asks for attribute {name!r} of {owner!r}: not loaded')
    return getattr(owner, name)
