"""Counting the cases of a test that makes many, for the table of `make torture`."""

from __future__ import annotations

from collections import Counter

CASES: Counter[str] = Counter()  # of the test that runs
FULL = False  # whether it is `make torture`, or the suite, which takes a few of them


def count(kind: str = 'cases') -> None:
    """One more case of the test that runs."""
    CASES[kind] += 1
