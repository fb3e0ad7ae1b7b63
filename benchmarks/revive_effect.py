"""What reviving does to a detector's outputs before any training, by the size of the shift.

A BN checkpoint with collapsed filters is converted to psBN and revived: how many filters are opened
and to which b, how far the neck's outputs move (L2 norm of the change by that of the outputs) and
what becomes of COCO AP.
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

from psbn_mmdet.checkpoints import read_weights, structure_of_config  # noqa: E402
from psbn_mmdet.collapse import revive  # noqa: E402
from psbn_mmdet.collapse.revival import OPEN  # noqa: E402
from psbn_mmdet.layers import bn_to_psbn, find_norm_states  # noqa: E402

SHIFTS = (0.02, 0.05, 0.1, 0.2, 0.5)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--checkpoint', default='work_dirs/compare/bn/epoch_16.pth', help='of BN')
    parser.add_argument('--config', default='demo/faster-rcnn_r18_fpn_psbn_demo.py', help='of psBN')
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
    for shift in (None, *SHIFTS):
        after, opened = bn_to_psbn(before, shift or 0.1), {}
        if shift is not None:
            after, opened = revive(after, structure)
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
                'shift': shift,
                'b': None if shift is None else OPEN * shift,
                'opened': sum(map(len, opened.values())),
                'change': float(change.norm() / torch.cat(reference).norm()),
                'AP': scores['coco/bbox_mAP'],
                'AP50': scores['coco/bbox_mAP_50'],
            }
        )
    print('shift   opened   to b    outputs change   AP      AP50')
    for row in rows:
        print(
            f'{row["shift"] or "none":<5} {row["opened"]:>8}   {row["b"] or 0:<6g} '
            f'{100 * row["change"]:>14.2f} %   {row["AP"]:.3f}   {row["AP50"]:.3f}'
        )
    result = {'torch': torch.__version__, 'arguments': vars(args), 'rows': rows}
    write(result, 'revive_effect', args.out)


if __name__ == '__main__':
    main()
