"""docs/errors.md, which is made from the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def errors():
    spec = importlib.util.spec_from_file_location('errors', ROOT / 'scripts/errors.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_code(errors):
    assert errors.PAGE.read_text() == errors.page(), 'run scripts/errors.py'


def test_every_error_with_words_is_found(errors, tmp_path):
    (tmp_path / 'a.py').write_text(
        "raise ValueError(f'a: shift must be {x!r}, ' 'got ' + str(y) + ': set it')\n"
        'raise StopIteration\nraise ValueError(message)\n'
        "parser.error('give one')\nerror_msgs.append(f'{prefix}shift differs')\n"
    )
    assert sorted(errors.messages(tmp_path / 'a.py')) == [
        ('a: shift must be …, got …: set it', 'ValueError'),
        ('give one', 'SystemExit'),
        ('…shift differs', 'RuntimeError'),
    ]


@pytest.mark.parametrize(
    ('text', 'wrong', 'mend'),
    [
        ('CollapseHook: window is …', 'CollapseHook: window is …', ''),
        ('a… … is | bad (b: …): mend it', 'a… is \\| bad (b: …)', 'mend it'),
        ('x is gone: correct it (…: …)', 'x is gone', 'correct it (…: …)'),
    ],
)
def test_a_message_is_split_into_what_was_wrong_and_what_to_do(errors, text, wrong, mend):
    assert errors.row(text, 'ValueError') == f'| {wrong} | {mend} | `ValueError` |'
