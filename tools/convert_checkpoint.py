"""Convert a checkpoint between BN and psBN, without a change of what the network computes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.commands.convert import main

if __name__ == '__main__':
    sys.exit(main())
