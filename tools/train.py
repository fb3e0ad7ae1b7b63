"""Train a detector with MMDetection's own script, after checks that stop early.

The options are those of MMDetection's tools/train.py.
"""

import os
import sys
from pathlib import Path

# No pickle in a checkpoint runs code, whatever `weights_only` the libraries pass to torch.load.
os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from psbn_mmdet.launch import run_script
    from psbn_mmdet.preflight import check_train_config
except ImportError as error:
    sys.exit(f'error: {error}')


def check(args, cfg):
    """Check the config as the script will change it by its options."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    check_train_config(cfg)


if __name__ == '__main__':
    run_script('train.py', check)
