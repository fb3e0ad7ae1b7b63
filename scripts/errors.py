"""Write docs/errors.md: every error of the package, read from its code.

Where code raises, or collects to raise, an error with a text, the text is one row, with … for what
is filled in. What stands after its last colon is what to do.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/errors.md'
INSIDE = ('safe_globals.py',)  # raised to torch.load, which has its own words
PREFIXES = ('psBN', 'psSyncBN', 'CollapseHook', 'RecoveryHook', 'SwitchNorms', 'draw_channels')
INTRODUCTION = """# Errors

Made by `make docs` from the code: every error that this package raises, with … for what is filled
in, such as what is wrong with one entry of a state dict or of an annotation file. The second column
is … where it depends on the case, and empty where the first says what must be. The tools print the
sentence and end with exit code 1, or 2 where options alone are wrong; in Python it is the exception
in the last column. What hooks warn of stands in the log and never ends a training.
"""
HEAD = ['', '| wrong | what to do | in Python |', '|---|---|---|']
TITLES = {
    '': 'Importing',
    'layers': 'Layers and conversion',
    'hooks': 'Hooks, before training begins',
    'checks': '`tools/train.py` and `tools/test.py`, before a run',
    'checkpoints': 'Checkpoint files',
    'collapse': 'Counting and reviving',
    'records': 'Records and snapshots',
    'report': 'The report',
    'pruning': 'Pruning',
    'commands': 'Command lines',
}


def text_of(node: ast.AST | None) -> str:
    """A message as it is written, with … for what is filled in; '' if it has no words."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return ''.join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body) or text_of(node.orelse)
    return '…'


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Text and class of each error in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
            found = text_of(call.args[0]) if call.args else ''
            name = ast.unparse(call.func)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('.error'):
            found, name = text_of(node.args[0]), 'SystemExit'
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'error_msgs.append':
            found, name = text_of(node.args[0]), 'RuntimeError'
        else:
            continue
        if re.search(r'[a-z]{3}', found):
            yield found, name


def row(text: str, kind: str) -> str:
    """What was wrong, what to do, the class."""
    text = re.sub(r'(… ?)+', '… ', text).replace('|', '\\|')
    text = re.sub(r'… (?=[,.:;)\'"\]/]|$)', '…', text)
    prefix = next((p for p in PREFIXES if text.startswith(f'{p}: ')), '')
    body = text[len(prefix) + 2 :] if prefix else text
    outside = re.sub(r'\([^()]*\)', lambda found: '.' * len(found[0]), body)
    colon = outside.rfind(': ')
    wrong, mend = (body[:colon], body[colon + 2 :]) if colon >= 0 else (body, '')
    wrong = f'{prefix}: {wrong}' if prefix else wrong
    return f'| {wrong.strip()} | {mend.strip()} | `{kind}` |'


def page() -> str:
    """The whole text."""
    groups: dict[str, list[str]] = {name: [] for name in TITLES}
    for path in sorted((ROOT / 'psbn_mmdet').rglob('*.py')):
        if path.name in INSIDE:
            continue
        inside = path.relative_to(ROOT / 'psbn_mmdet').parts
        group = inside[0] if len(inside) > 1 else '' if inside[0] == '__init__.py' else 'checks'
        groups[group] += [row(*found) for found in messages(path)]
    lines = [INTRODUCTION]
    for name, rows in groups.items():
        if rows:
            lines += [
                f'## {TITLES[name]}',
                '',
                '| wrong | what to do | in Python |',
                '|---|---|---|',
            ]
            lines += [*dict.fromkeys(rows), '']
    return '\n'.join(lines)


def main() -> int:
    """Write the page, or with --check say whether it is up to date."""
    if sys.argv[1:] == ['--check']:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == '__main__':
    sys.exit(main())
