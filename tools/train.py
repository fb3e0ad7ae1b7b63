"""Train a detector with MMDetection's own script, after checks that stop early.

The options are those of MMDetection's tools/train.py, and a switch that brings psBN to any config:

    python tools/train.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --norm psBN
"""

import argparse
import os
import sys
from pathlib import Path

# No pickle in a checkpoint runs code, with any `weights_only` the libraries pass to torch.load.
os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from psbn_mmdet.commands import prune
    from psbn_mmdet.commands.launch import run_script
    from psbn_mmdet.commands.preflight import check_train_config
    from psbn_mmdet.configs import norm_switch
    from psbn_mmdet.configs.reading import ConfigError
    from psbn_mmdet.pruning import shrink_config
except ImportError as error:
    sys.exit(f'error: {error}')


def check(args, cfg):
    """Check the config as the script will change it by its options."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    lines = []
    begun = Path(cfg.work_dir, 'last_checkpoint').is_file()
    if args.resume == 'auto' and not begun and cfg.get('load_from'):
        # MMDetection's script would forget load_from, and start from random weights.
        args.resume = None
        lines.append(f'nothing to resume in {cfg.work_dir}: the training starts from load_from')
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.shrink is not None and args.norm == 'psBN':
        raise ConfigError('--shrink lets filters collapse, and --norm psBN keeps them open')
    lines += norm_switch.switch_config(cfg, args.norm, args.norm_scope, args.watch_collapse)
    check_train_config(cfg)
    if args.shrink is not None:
        lines += shrink_config(cfg, args.shrink or None)
    rank = os.getenv('RANK') or os.getenv('SLURM_PROCID') or '0'
    if lines and rank == '0':
        print('\n'.join(lines))


def cut(args, cfg):
    """Cut the collapsed filters out of the last checkpoint, and of the best one."""
    if args.shrink is None or int(os.getenv('RANK') or os.getenv('SLURM_PROCID') or 0) > 0:
        return
    found = [Path(cfg.work_dir, 'last_checkpoint').read_text().strip()]
    found += map(str, sorted(Path(cfg.work_dir).glob('best_*.pth')))
    config = Path(cfg.work_dir, 'shrunk.py')
    cfg.dump(config)
    for checkpoint in found:
        out = Path(cfg.work_dir, f'pruned_{Path(checkpoint).stem}')
        prune.main([checkpoint, '--config', str(config), '-o', str(out)])


if __name__ == '__main__':
    own = argparse.ArgumentParser('train.py', add_help=False, allow_abbrev=False)
    norm_switch.add_options(own)
    run_script('train.py', check, own, cut)
