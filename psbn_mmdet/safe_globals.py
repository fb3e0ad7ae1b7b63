"""Let ``torch.load(weights_only=True)`` read MMEngine's checkpoints.

From torch 2.6 on that is the default, and nobody's pickle runs. MMEngine 0.10.7 cannot resume its
own checkpoints then, since they hold the log's history buffers and NumPy arrays. Those are plain
data, so torch is told that they are safe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def allow_mmengine_checkpoints() -> None:
    """Add the types in MMEngine's checkpoints to torch's list of safe globals."""
    if not hasattr(
        torch.serialization, 'safe_globals'
    ):  # torch < 2.5, which does not default to it
        return
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    dtypes = [type(np.dtype(name)) for name in ('float32', 'float64', 'int32', 'int64', 'bool')]
    types = [HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar]
    # With their names: OneDL's MMEngine takes the bare types off the list after each load.
    named = [(kind, f'{kind.__module__}.{kind.__qualname__}') for kind in [*types, *dtypes]]
    torch.serialization.add_safe_globals([*named, (_statistic, 'builtins.getattr')])


def _statistic(owner: Any, name: str) -> Any:
    """What a history buffer's pickle needs of ``getattr``: its own statistics, by name."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise ValueError(f'a checkpoint asks for attribute {name!r} of {owner!r}: not loaded')
    return getattr(owner, name)
