"""A real Runner of MMEngine on a small classifier, and what a user reads of its run."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import psbn_mmdet  # noqa: F401
from psbn_mmdet.records import parse_ranges, read_records

KILLED = {'stem.1': [0, 3, 4], 'head.1': [7]}


class Images(Dataset):
    """48 random images with the class that their mean tells."""

    METAINFO = {}

    def __len__(self):
        return 48

    def __getitem__(self, index):
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return image, int(image.mean() > 0)


class Classifier(BaseModel):
    """Two blocks of convolution, norm and ReLU, and a linear layer."""

    def __init__(self, norm=nn.BatchNorm2d, killed=KILLED, frozen_head=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), norm(8), nn.ReLU())
        self.linear = nn.Linear(8, 2)
        for name, channels in killed.items():
            layer = self.get_submodule(name)
            with torch.no_grad():
                layer.weight[channels] = 0.01
                layer.bias[channels] = getattr(layer, 'shift', 0.0) - 1.0  # beta = -1
        if frozen_head:
            self.head.requires_grad_(False)

    def forward(self, images, labels, mode='tensor'):
        logits = self.linear(self.head(self.stem(torch.stack(images))).mean((2, 3)))
        labels = torch.as_tensor(labels, device=logits.device)
        return dict(loss=nn.functional.cross_entropy(logits, labels))


def collate(batch):
    return dict(images=[image for image, _ in batch], labels=[label for _, label in batch])


def run(work_dir, model, *, hook=None, epochs=2, weight_decay=0.0, lr=0.01, **kwargs):
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=lr, weight_decay=weight_decay))
    settings = dict(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4,
            dataset=Images(),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=collate,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=optim_wrapper,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=4)),
        custom_hooks=[dict(type='CollapseHook', **(dict(interval=4, window=4) | (hook or {})))],
        randomness=dict(seed=0),
        experiment_name=f'test_{uuid.uuid4().hex}',
    )
    settings.update(kwargs)
    runner = Runner(**settings)
    runner.train()
    return runner


def texts(work_dir) -> str:
    return '\n'.join(path.read_text() for path in sorted(Path(work_dir).glob('*/*.log')))


def records_of(runner):
    return read_records(Path(runner.log_dir) / 'collapse.jsonl')


def channels_of(records, report, kind) -> dict:
    return {
        layer['name']: parse_ranges(ranges, 8).nonzero()[0].tolist()
        for layer, ranges in zip(records.header['layers'], report['channels'][kind])
        if ranges
    }
