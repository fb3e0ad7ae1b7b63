"""What a deployed psBN detector costs beside BN: as it is, converted, fused.

Detectors with ResNet-50 and FPN in evaluation mode, without post-processing, which is the same for
all: RetinaNet with its head, Faster R-CNN's backbone and neck. In each round all forms run once on
the same image, in an order that changes from round to round; each round gives ratios, of which the
median and the quartiles are reported. All forms compute the same function.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import hardware, side_by_side, spread, write  # noqa: E402

from psbn_mmdet.layers import psbn_to_bn  # noqa: E402

RUNS = {
    'retinanet': lambda detector: partial(detector, mode='tensor'),
    'faster-rcnn': lambda detector: detector.extract_feat,
}
PAIRS = (
    ('psBN', 'BN'),
    ('psBN converted', 'BN'),
    ('BN fused', 'BN'),
    ('psBN fused', 'BN'),
    ('psBN fused', 'BN fused'),
)


def build(name: str, norm: str, device: torch.device) -> nn.Module:
    """The ResNet-50 detector of this repository's config, in evaluation mode."""
    cfg = Config.fromfile(ROOT / f'configs/psbn/{name}_r50_fpn_{norm}_1x_coco.py')
    cfg.model.backbone.init_cfg = None
    detector = MODELS.build(cfg.model).to(device)
    detector.eval()
    return detector


def build_forms(name: str, device: torch.device) -> dict[str, nn.Module]:
    """The same detector in all forms."""
    bn, psbn = (build(name, norm, device) for norm in ('bn', 'psbn'))
    psbn.load_state_dict(bn.state_dict())
    return {
        'BN': bn,
        'psBN': psbn,
        'psBN converted': psbn_to_bn(copy.deepcopy(psbn)),
        'BN fused': fuse_conv_bn(copy.deepcopy(bn)),
        'psBN fused': fuse_conv_bn(copy.deepcopy(psbn)),
    }


def main() -> None:
    """Time both detectors, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--image', type=int, default=320, help='side of the input image')
    parser.add_argument('--rounds', type=int, default=50)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', help='JSON file, else benchmarks/results/deploy_speed_DEVICE.json')
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    image = torch.randn(1, 3, args.image, args.image, device=device)
    result: dict = {
        'hardware': hardware(device),
        'torch': torch.__version__,
        'arguments': {k: v for k, v in vars(args).items() if k != 'out'},
        'detectors': {},
    }
    for name, run in RUNS.items():
        forms = build_forms(name, device)
        runs: dict[str, Callable] = {form: partial(run(d), image) for form, d in forms.items()}
        with torch.no_grad():
            times = side_by_side(runs, args.rounds, 1, device)
        row = {
            'ms': {form: 1e3 * float(np.median(values)) for form, values in times.items()},
            'ratio': {f'{a} / {b}': spread(times[a] / times[b]) for a, b in PAIRS},
        }
        result['detectors'][name] = row
        print(name, ', '.join(f'{form} {ms:.1f} ms' for form, ms in row['ms'].items()))
        for pair, ratio in row['ratio'].items():
            print(
                f'  {pair:<22} {ratio["median"]:.4f} [{ratio["q25"]:.4f}, {ratio["q75"]:.4f}]',
                flush=True,
            )
    write(result, f'deploy_speed_{device.type}', args.out)


if __name__ == '__main__':
    main()
