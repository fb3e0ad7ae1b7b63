"""What a LeakyReLU's leak carries: the share of each filter's gradient in YOLOv3's Darknet-53.

YOLOv3 (LeakyReLU, slope 0.1) is trained from scratch on the drawn data for some steps. Before and
after, the share of each filter's gradient that comes through the leak is measured on a batch. A
filter open half of the time has slope / (1 + slope) = 0.09, one closed on the whole batch has 1.

A LeakyReLU passes the slope's share of the gradient below zero, so no filter behind it is ever
trapped: what collapse is to ReLU shows here as a filter that trains on the leak alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psbn_mmdet.collapse import RectifierTrace, census_of_model, find_norms  # noqa: E402

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


def leak_share(
    model: nn.Module, loss: Callable[[], Tensor], rectifiers: dict[str, str]
) -> dict[str, np.ndarray]:
    """Measure which share of each filter's gradient comes through the leak.

    With y the output of a BN before a LeakyReLU, it is the sum of ``|dL/dy|`` over the positions
    with y < 0, divided by that over all positions. At 1 the filter is closed on the whole batch
    and trains with the slope's share of the gradient only; where nothing flows at all it is NaN.

    Args:
        model (nn.Module): The network. Its gradients are left as they were, running statistics
            are updated where the pass updates them.
        loss (Callable): Runs the network on a batch and returns the loss.
        rectifiers (dict[str, str]): What follows each layer.

    Returns:
        dict[str, np.ndarray]: For each layer before a LeakyReLU the share of each channel, shape
        (C,).
    """
    leaking: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def watch_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            closed = (output < 0).detach()

            def add(grad: Tensor) -> None:
                dims = [d for d in range(grad.dim()) if d != 1]
                leaking[name] = leaking.get(name, 0) + (grad.abs() * closed).sum(dims)
                total[name] = total.get(name, 0) + grad.abs().sum(dims)

            output.register_hook(add)

        return watch_gradient

    norms = {n: norm for n, norm in find_norms(model).items() if rectifiers.get(n) == 'leaky_relu'}
    handles = [norm.register_forward_hook(hook(name)) for name, norm in norms.items()]
    try:
        params = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(loss(), params, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (leaking[name] / total[name]).cpu().numpy() for name in total}


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
