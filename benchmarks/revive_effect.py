"""What reviving does to a detector's outputs before any training, by the bias that filters get.

A checkpoint with collapsed filters is revived: how many filters are opened, how far the neck's
outputs move (L2 norm of the change by that of the outputs), and what becomes of COCO AP.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import write  # noqa: E402

from psbn_mmdet.checkpoints import read_weights  # noqa: E402
from psbn_mmdet.configs.model import structure_of_config  # noqa: E402
from psbn_mmdet.layers import find_norm_states  # noqa: E402
from psbn_mmdet.recovery import revive  # noqa: E402

BIASES = (0.004, 0.01, 0.02, 0.04, 0.1)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--checkpoint', default='work_dirs/compare/bn/epoch_16.pth')
    parser.add_argument('--config', default='demo/faster-rcnn_r18_fpn_bn_demo.py')
    parser.add_argument('--work-dir', default='work_dirs/examples/revive_effect')
    parser.add_argument('--out', help='JSON file, else benchmarks/results/revive_effect.json')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict({'work_dir': args.work_dir, 'log_level': 'ERROR', 'custom_hooks': []})
    before = read_weights(args.checkpoint).state_dict
    structure = structure_of_config(cfg, find_norm_states(before))
    runner = Runner.from_cfg(cfg)
    model = runner.model
    batch = next(iter(runner.test_dataloader))
    rows = []
    reference: list[Tensor] = []
    for bias in (None, *BIASES):
        after, opened = (before, {}) if bias is None else revive(before, structure, bias)
        model.load_state_dict(after)
        model.eval()
        with torch.no_grad():
            inputs = model.data_preprocessor(batch)['inputs']
            features = [level.flatten() for level in model.extract_feat(inputs)]
        reference = reference or features
        change = torch.cat(features) - torch.cat(reference)
        scores = runner.test()
        rows.append(
            {
                'b': bias,
                'opened': sum(map(len, opened.values())),
                'change': float(change.norm() / torch.cat(reference).norm()),
                'AP': scores['coco/bbox_mAP'],
                'AP50': scores['coco/bbox_mAP_50'],
            }
        )
    print('b       opened   outputs change   AP      AP50')
    for row in rows:
        print(
            f'{row["b"] or "none":<5} {row["opened"]:>8} '
            f'{100 * row["change"]:>14.2f} %   {row["AP"]:.3f}   {row["AP50"]:.3f}'
        )
    result = {'torch': torch.__version__, 'arguments': vars(args), 'rows': rows}
    write(result, 'revive_effect', args.out)


if __name__ == '__main__':
    main()
