"""Run the commands in the docs' console blocks again, and update their output.

In a block that begins with ```console, each line from ``$ `` on is a command, the lines up to the
next one are its output. `make docs` runs this after `make demo-compare`, whose checkpoints the
commands read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'(?<=^```console\n).*?(?=^```$)', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r'^\$ ((?:.*\\\n)*.*)$', re.MULTILINE)
NEEDED = Path('work_dirs/compare/bn/epoch_16.pth')
SCRATCH = Path('work_dirs/examples')


def output(command: str) -> str:
    """What a command prints on both streams, and its exit code if that is not 0."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(
        ['bash', '-c', command],
        env={**os.environ, 'PATH': path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = result.stdout.rstrip().splitlines()
    if result.returncode:
        lines.append(f'(exit code {result.returncode})')
    return ''.join(f'{line.rstrip()}\n' for line in lines)


def main() -> None:
    """Go through the docs."""
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('docs', nargs='*', type=Path, default=sorted(Path('docs').glob('*.md')))
    docs = parser.parse_args().docs
    if not NEEDED.is_file():
        sys.exit(f'transcripts: {NEEDED} is missing: run `make demo-compare` first')
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    for path in docs:
        text = path.read_text(encoding='utf-8')
        for block in track(BLOCK.findall(text), description=str(path)):
            commands = COMMAND.findall(block)
            new = ''.join(f'$ {command}\n{output(command)}' for command in commands)
            text = text.replace(f'```console\n{block}```', f'```console\n{new}```')
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
