"""Every error of the package, read from its code, names the value or the fix."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'psbn_mmdet'
# Their texts are parts of other errors, or of warnings, which name the file and the fix.
REASONS = {
    'recovery/recovery.py',
    'recovery/forecast.py',
    'collapse/monitor.py',
    'records/ranges.py',
    'records/reader.py',
    'records/snapshots.py',
    'report/events.py',
    'checkpoints/safe_globals.py',
}


def text_of(node: ast.AST) -> str:
    """A message as it is written, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return '…'


def messages(source: str) -> Iterator[str]:
    """The texts of the errors that a module raises."""
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else node
        raised = isinstance(node, ast.Raise) and 'LookupError' not in ast.unparse(node)
        if isinstance(call, ast.Call) and (raised or ast.unparse(call.func).endswith('.error')):
            text = text_of(call.args[0]) if call.args else ''
            if re.search('[a-z]{3}', text):
                yield text


def is_helpful(text: str) -> bool:
    """Whether a message says what to do after a colon, or what must be and what is."""
    outside = re.sub(r'^\S+: |\([^()]*\)', '', text)  # without a name such as 'psBN: '
    return bool(re.search(r'.: \S', outside) or re.search(r'(must|expected).*got .*…', text))


@pytest.mark.parametrize(
    ('code', 'text', 'helpful'),
    [
        ("raise ValueError(f'{a}: b is {c!r}: set it')", '…: b is …: set it', True),
        ("raise ValueError(f'b must be 1, ' 'got ' + str(c))", 'b must be 1, got …', True),
        ("raise ValueError(f'shift is {c} (x: y)')", 'shift is … (x: y)', False),
        ("parser.error(f'shift: it must be 1')", 'shift: it must be 1', False),
    ],
)
def test_messages_are_found_and_judged(code, text, helpful):
    assert list(messages(code)) == [text]
    assert is_helpful(text) == helpful


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: path.stem)
def test_every_error_names_the_value_and_the_fix(path):
    if path.relative_to(PACKAGE).as_posix() not in REASONS:
        assert [text for text in messages(path.read_text()) if not is_helpful(text)] == []
