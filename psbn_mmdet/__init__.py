"""psBN for MMDetection: importing this package registers its layers and hooks."""

import os

from .version import __version__

__all__ = ['__version__']

# tools/report.py, which needs none of them, would spend most of its time on these imports.
if os.environ.get('PSBN_MMDET_REGISTER') != '0':
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
    from .safe_globals import allow_mmengine_checkpoints

    allow_mmengine_checkpoints()
