"""Open the closed filters of a checkpoint, for a training without RecoveryHook.

Filters before a ReLU with b + 3 |gamma| <= 0 get a small bias > 0, and what has decayed around
them is restored. All networks in the file are changed, averages (EMA) too. The file is read
without running code, and OUT is written whole or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..checkpoints import find_state_dicts, read_content, read_weights, wrapper_of, write_content
from ..collapse import FOLDED, census_of_state_dict
from ..configs.model import structure_of_config
from ..configs.reading import load_config
from ..layers import find_norm_states
from ..recovery import revive
from ..recovery.revive import OPEN
from . import complain, say


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, open, say what was opened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a PyTorch or safetensors file')
    parser.add_argument('out', metavar='OUT', help='the file to write, which must not exist')
    parser.add_argument('--config', required=True, help='of the model: tells what stands where')
    args = parser.parse_args(argv)
    try:
        names = find_norm_states(read_weights(args.checkpoint).state_dict)
        structure = structure_of_config(load_config(args.config), names)
        content = read_content(args.checkpoint)
        lines = []
        for key, state_dict in list(find_state_dicts(content)):
            new, opened = revive(state_dict, structure.renamed('', wrapper_of(state_dict)))
            state_dict.update(new)
            total = sum(map(len, opened.values()))
            folded = sum(layer.folded for layer in census_of_state_dict(state_dict).layers)
            lines.append(f'  {key or "the file itself"}: {total} filters opened, to b = {OPEN:g}')
            if folded:
                lines.append(f'    {folded} layers left: {FOLDED}')
            lines += [f'    {name}: {", ".join(map(str, which))}' for name, which in opened.items()]
        write_content(content, args.out)
        say('\n'.join([f'{args.out}: {args.checkpoint}, revived', *lines]))
    except (OSError, ValueError) as error:
        return complain('revive', error)
    return 0
