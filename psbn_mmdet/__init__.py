"""psBN for MMDetection: importing this package registers its layers and hooks."""

from .version import __version__

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        'psbn_mmdet needs MMEngine, MMCV and MMDetection: run `make setup` in a checkout of '
        'psbn_mmdet, or install them beside your torch there with '
        "`pip install --no-build-isolation -e '.[onedl]'`, or "
        "`pip install --no-build-isolation -e '.[openmmlab]'` for the original packages"
    ) from error

from . import hooks, layers, pruning  # noqa: F401
from .checkpoints.safe_globals import allow_mmengine_checkpoints

__all__ = ['__version__']

allow_mmengine_checkpoints()
