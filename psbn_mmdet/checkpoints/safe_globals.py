"""Let MMEngine's checkpoints be read without running the code of a pickle.

They hold the log's history buffers and NumPy arrays beside the weights, which
``torch.load(weights_only=True)``, the default from torch 2.6 on, refuses. Those are plain data, so
torch is told that they are safe, by the names that NumPy 1 and NumPy 2 have written for them. Older
versions of torch cannot be told; :func:`load_plain` then reads by a list of its own, and so does
``torch.load`` where ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` is set.
"""

from __future__ import annotations

import _codecs
import os
import pickle
import zipfile
from collections import Counter
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


_FORCED = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
_torch_load = torch.load


def allow_mmengine_checkpoints() -> None:
    """Let MMEngine's checkpoints be read where weights only are."""
    if TAKES_NAMES:
        # With their names: OneDL's MMEngine takes the bare types off the list after each load.
        torch.serialization.add_safe_globals([(kind, name) for name, kind in _plain().items()])
    elif os.getenv(_FORCED, '0').lower() in ('1', 'y', 'yes', 'true'):  # as torch reads it
        torch.load = _load_restricted


def load_plain(path: str | os.PathLike) -> Any:
    """Read a PyTorch file of tensors, plain values and what MMEngine adds, and nothing else.

    Args:
        path (str | PathLike): The file; it is mapped, not read, where that is possible.

    Returns:
        Any: What is in it, on the CPU.

    Raises:
        pickle.UnpicklingError: If it asks for anything else.
    """
    path = os.fspath(path)  # older versions of torch map no other
    load = _torch_load if TAKES_NAMES else _load_restricted
    parts = archived(path)
    # Mapped as they stand in the file, compressed parts would be read as numbers.
    mmap = bool(parts) and all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    return load(path, map_location='cpu', mmap=mmap, weights_only=True)


def archived(file: Any) -> list[zipfile.ZipInfo]:
    """The parts of a zip file, such as torch writes; none where it is no zip file.

    Raises:
        zipfile.BadZipFile: If it is one, by what torch goes by, but its parts cannot be known.
    """
    begin = file.tell() if hasattr(file, 'tell') else None
    try:
        if not zipfile.is_zipfile(file):
            if _head(file) == b'PK\x03\x04':
                raise zipfile.BadZipFile('its end is damaged')
            return []
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    finally:
        if begin is not None:
            file.seek(begin)


def _head(file: Any) -> bytes:
    if hasattr(file, 'tell'):
        file.seek(0)
        return file.read(4)
    with open(file, 'rb') as opened:
        return opened.read(4)


def is_torchscript(parts: list[zipfile.ZipInfo]) -> bool:
    """Whether a zip file is a TorchScript program, by what torch goes by."""
    return any(part.filename.rpartition('/')[2] == 'constants.pkl' for part in parts)


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


# Plain data that torch's own list has in later versions only.
_LATER = {
    **{f'builtins.{kind.__name__}': kind for kind in (bytearray, complex, set)},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    'collections.Counter': Counter,
    'torch.device': torch.device,
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Python's own, with no way to a name that is not on the list."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            **torch._weights_only_unpickler._get_allowed_globals(),
            **_LATER,
            **_plain(),
        }
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


def _load_restricted(f: Any, map_location: Any = None, *_: Any, **kwargs: Any) -> Any:
    """As torch.load, by our unpickler, which torch refuses while its own is forced."""
    if is_torchscript(archived(f)):  # which torch would hand to torch.jit.load, and that runs it
        raise pickle.UnpicklingError('a TorchScript program is no checkpoint: not loaded')
    kwargs.update(pickle_module=_RESTRICTED, weights_only=False)
    forced = os.environ.pop(_FORCED, None)
    try:
        return _torch_load(f, map_location, **kwargs)
    finally:
        if forced is not None:
            os.environ[_FORCED] = forced


def _statistic(owner: Any, name: str) -> Any:
    """What a history buffer's pickle needs of ``getattr``: its own statistics, by name."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise ValueError(f'a checkpoint asks for attribute {name!r} of {owner!r}: not loaded')
    return getattr(owner, name)
