"""Look up the collapsed filters in a checkpoint, or what changed between two."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.commands.audit import main

if __name__ == '__main__':
    sys.exit(main())
