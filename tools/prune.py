"""Cut the closed filters out of a checkpoint's network."""

import os
import sys
from pathlib import Path

# No pickle runs code, in files that the model of a config loads as it is built, either.
os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.commands.prune import main

if __name__ == '__main__':
    sys.exit(main())
