"""What a LeakyReLU's leak carries: the share of each filter's gradient in YOLOv3's Darknet-53.

YOLOv3 (LeakyReLU, slope 0.1) is trained from scratch on the drawn data for some steps. Before and
after, the share of each filter's gradient that comes through the leak is measured on a batch. A
filter open half of the time has slope / (1 + slope) = 0.09, one closed on the whole batch has 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psbn_mmdet.collapse import RectifierTrace, census_of_model, leak_share  # noqa: E402

CONFIG = "_base_ = ['mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py']\n"


def load_config(data_root: str, work_dir: str) -> Config:
    """MMDetection's YOLOv3 on the drawn data, from scratch, at 128 px."""
    path = Path(work_dir) / 'yolov3.py'
    path.write_text(CONFIG)
    cfg = Config.fromfile(path)
    cfg.work_dir = work_dir
    cfg.log_level = 'ERROR'
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = 4
    classes = ('disc', 'square', 'triangle', 'cross')
    dataset = dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(128, 128), keep_ratio=True),
            dict(type='PackDetInputs'),
        ],
    )
    cfg.train_dataloader = dict(
        batch_size=8,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dataset,
    )
    for stage in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg.pop(f'{stage}_{part}', None)
    return cfg


def measure(runner: Runner, batch: dict) -> dict:
    """Shares of all filters before a LeakyReLU, in figures, and the counts of the census."""
    model = runner.model.train()
    data = model.data_preprocessor(batch, True)

    def loss() -> torch.Tensor:
        return model.parse_losses(model(**data, mode='loss'))[0]

    with RectifierTrace(model) as trace:
        loss()
    shares = np.concatenate(list(leak_share(model, loss, trace.structure.rectifiers).values()))
    shares = shares[~np.isnan(shares)]
    found = census_of_model(model, rectifiers=trace.structure.rectifiers)
    return {
        'filters': len(shares),
        'median_share': float(np.median(shares)),
        'quartiles': [float(q) for q in np.percentile(shares, [25, 75])],
        'above_half': int((shares > 0.5).sum()),
        'closed_on_the_batch': int((shares == 1).sum()),
        'dead': found.count('dead'),
        'vanished': found.count('vanished'),
    }


def main() -> None:
    """Train, measure before and after, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-root', default='data/demo/', help='made by demo/make_dataset.py')
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--lr', type=float, default=0.01)
    parser.add_argument('--out', default=str(ROOT / 'benchmarks/results/leak_share.json'))
    args = parser.parse_args()
    set_random_seed(0)
    with tempfile.TemporaryDirectory() as work_dir:
        runner = Runner.from_cfg(load_config(args.data_root.rstrip('/') + '/', work_dir))
        runner.model.init_weights()
        optimizer = torch.optim.SGD(
            runner.model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4
        )
        loader = runner.train_dataloader
        fixed = next(iter(loader))
        result = {'steps': args.steps, 'lr': args.lr, 'torch': torch.__version__}
        result['start'] = measure(runner, fixed)
        model = runner.model.train()
        for batch in tqdm(islice(cycle(loader), args.steps), total=args.steps):
            data = model.data_preprocessor(batch, True)
            loss = model.parse_losses(model(**data, mode='loss'))[0]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
            optimizer.step()
        result['end'] = measure(runner, fixed)
    for when in ('start', 'end'):
        print(f'{when}: {result[when]}')
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + '\n')
    print(f'written to {out}')


if __name__ == '__main__':
    main()
