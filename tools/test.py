"""Test a detector with MMDetection's own script, after checks that stop early.

The options are those of MMDetection's tools/test.py.
"""

import os
import sys
from pathlib import Path

# No pickle in a checkpoint runs code, with any `weights_only` the libraries pass to torch.load.
os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from psbn_mmdet.commands.launch import run_script
    from psbn_mmdet.commands.preflight import check_test_config
except ImportError as error:
    sys.exit(f'error: {error}')


def check(args, cfg):
    """Check the config and the checkpoint."""
    check_test_config(cfg, args.checkpoint)


if __name__ == '__main__':
    run_script('test.py', check)
