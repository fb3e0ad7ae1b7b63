"""Calling what may refuse its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def attempt(function: Callable, *args: Any, error: Any = ValueError, **kwargs: Any):
    """What a function returns, with '', or None and the text of the error that it raises."""
    try:
        return function(*args, **kwargs), ''
    except error as refusal:
        return None, str(refusal) or repr(refusal)
