"""The command lines for those without a checkout: ``python -m psbn_mmdet audit CHECKPOINT``."""

import os
import sys
from importlib import import_module

# As in the scripts of tools/: no pickle runs code.
os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
COMMANDS = ('audit', 'prune', 'report', 'revive')


def main() -> int:
    """Run the command that is asked for."""
    name = sys.argv[1] if len(sys.argv) > 1 else ''
    if name not in COMMANDS:
        print(f'usage: python -m psbn_mmdet {{{",".join(COMMANDS)}}} ...', file=sys.stderr)
        return 0 if name in ('-h', '--help') else 2
    sys.argv[0] = f'python -m psbn_mmdet {name}'
    del sys.argv[1]
    return import_module(f'.commands.{name}', __package__).main()


if __name__ == '__main__':
    sys.exit(main())
