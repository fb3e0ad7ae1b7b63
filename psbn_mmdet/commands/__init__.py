"""The command lines behind tools/: each module has a ``main`` that returns the exit code."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Print what was found, at once, so that a full disk is an error and not a lost result.

    Raises:
        OSError: If the output cannot be written.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter would try once more at its end, with a message of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(
            f'the output cannot be written ({error.strerror}): make room or give another place'
        ) from error
