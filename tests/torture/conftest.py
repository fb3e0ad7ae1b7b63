"""The table at the end of `make torture`, and how many cases it tries."""

from __future__ import annotations

import os

import cases
import pytest
from hypothesis import HealthCheck, settings

# The suite tries a few of each property, always the same; `make torture` many, others each time.
slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
common = dict(deadline=None, suppress_health_check=slow)
settings.register_profile('suite', max_examples=15, derandomize=True, database=None, **common)
settings.register_profile('torture', max_examples=300, print_blob=True, database=None, **common)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the profile before any test is collected, since @given reads it there."""
    cases.FULL = 'PSBN_TORTURE' in os.environ
    settings.load_profile('torture' if cases.FULL else 'suite')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Keep how many cases a test has counted."""
    cases.CASES.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append(('cases', sum(cases.CASES.values()) or 1))


def pytest_terminal_summary(terminalreporter, config) -> None:
    """One row for each test: cases, failures."""
    if not cases.FULL:
        return
    rows: dict[str, list[int]] = {}
    for outcome in ('passed', 'failed', 'error'):
        for report in terminalreporter.getreports(outcome):
            if report.when != 'call' and outcome == 'passed':
                continue
            name = report.nodeid.split('::', 1)[-1].split('[')[0]
            row = rows.setdefault(name, [0, 0])
            row[0] += dict(report.user_properties).get('cases', 1)
            row[1] += outcome != 'passed'
    terminalreporter.section('torture')
    for name, (tried, failed) in rows.items():
        terminalreporter.line(f'{name:<80} {tried:>8} {failed:>4}')
    total = [sum(column) for column in zip(*rows.values())] or [0, 0]
    terminalreporter.line(f'{"all: cases, failures":<80} {total[0]:>8} {total[1]:>4}')
