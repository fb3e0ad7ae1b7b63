"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """Why a file cannot be written, in one sentence."""


def is_among(path: str | os.PathLike, files: Iterable[str | os.PathLike]) -> bool:
    """Whether a path is one of some files, also through links; none needs to exist."""
    return os.path.exists(path) and any(
        os.path.exists(file) and os.path.samefile(path, file) for file in files
    )


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file beside ``path``, and replace ``path`` by it once it is complete.

    Missing folders are created and links are followed. If the block fails, ``path`` is unchanged
    and the new file is removed.

    Args:
        path (str | PathLike): The file to write or to replace.

    Yields:
        Path: Where to write to.

    Raises:
        WriteError: If the file cannot be written, such as on a full disk, or is a pipe, a device or
            a folder.

    Examples:
        >>> import tempfile
        >>> from psbn_mmdet.records.atomic import replacing
        >>> out = Path(tempfile.mkdtemp()) / 'new' / 'page.html'
        >>> with replacing(out) as part:
        ...     _ = part.write_text('whole')
        >>> out.read_text()
        'whole'
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise WriteError(f'{path} is no regular file: give another place')
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except WriteError:  # of another file, in the block
        raise
    except OSError as error:
        raise WriteError(
            f'{path} cannot be written ({error.strerror or error}): make room or give another place'
        ) from error
