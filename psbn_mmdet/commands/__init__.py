"""The command lines behind tools/: the ``main`` of each module returns the exit code."""

from __future__ import annotations

import os
import sys

from ..report.style import printable


def say(text: str) -> None:
    """Print what was found, at once, so that a full disk is an error and not a lost result.

    Names in files may hold what steers a terminal: it is replaced.

    Raises:
        OSError: If the output cannot be written.
    """
    try:
        print('\n'.join(map(printable, text.split('\n'))), flush=True)
    except OSError as error:
        # The interpreter would try once more at its end, with a message of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(
            f'the output cannot be written ({error.strerror}): make room or give another place'
        ) from error


def complain(tool: str, error: Exception) -> int:
    """Print why a tool stops, on one line of its standard error, and return the exit code."""
    print(f'{tool}: {printable(str(error))}', file=sys.stderr)
    return 1
