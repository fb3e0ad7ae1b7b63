"""Convert a checkpoint between BN and psBN, without a change of what the network computes.

Weights, averages (EMA), optimiser state and the config in the file are converted; the file is
read without running code, and OUT is written whole or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..checkpoints import (
    Conversion,
    convert_checkpoint,
    read_content,
    read_weights,
    structure_of_config,
    write_content,
)
from ..collapse.revival import OPEN
from ..layers import find_norm_states
from ..preflight import load_config
from . import complain, say


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, convert, say what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('input', metavar='IN', help='a PyTorch or safetensors file')
    parser.add_argument('output', metavar='OUT', help='the file to write, which must not exist')
    parser.add_argument('--to', choices=('psbn', 'bn'), required=True)
    parser.add_argument('--shift', type=float, default=0.1, help='alpha of psBN (%(default)s)')
    parser.add_argument(
        '--revive',
        choices=('none', 'collapsed'),
        default='none',
        help='collapsed: open the filters before a ReLU that pass nothing; needs --config',
    )
    parser.add_argument('--config', help='of the model, for --revive: tells what stands where')
    args = parser.parse_args(argv)
    try:
        for option, given in (('--revive', args.revive != 'none'), ('--config', args.config)):
            if given and args.to == 'bn':
                raise ValueError(f'{option} is for --to psbn: leave it out')
        if args.config and args.revive == 'none':
            raise ValueError('--config is for --revive collapsed: leave it out')
        if args.revive != 'none' and not args.config:
            raise ValueError(
                '--revive needs --config, which tells what follows each layer: add the config of '
                'the model'
            )
        structure = None
        if args.config:
            names = find_norm_states(read_weights(args.input).state_dict)
            structure = structure_of_config(load_config(args.config), names)
        content, done = convert_checkpoint(read_content(args.input), args.to, args.shift, structure)
        write_content(content, args.output)
        say(summary(done, args))
    except (OSError, ValueError) as error:
        return complain('convert_checkpoint', error)
    return 0


def summary(done: Conversion, args: argparse.Namespace) -> str:
    """What was converted, what was left alone, what else was changed."""
    new = f'psBN with shift {args.shift:g}' if args.to == 'psbn' else 'BN'
    lines = [f'{args.output}: {args.input} with {new}']
    for key, names in done.converted.items():
        lines.append(f'  {key or "the file itself"}: {len(names)} layers converted')
    lines += [f'  left alone: {name} ({reason})' for name, reason in done.left.items()]
    if done.configs:
        lines.append(f'  norm types replaced in {done.configs} texts of the config')
    if done.renamed:
        lines.append(f'  {done.renamed} names of parameters replaced in other places')
    if args.revive != 'none':
        opened = sum(map(len, done.opened.values()))
        lines.append(
            f'  {opened} filters with b + 3 |gamma| <= 0 before a ReLU are opened, to b = '
            f'{OPEN * args.shift:g}'
        )
        lines += [
            f'    {name}: {", ".join(map(str, which))}' for name, which in done.opened.items()
        ]
    return '\n'.join(lines)
