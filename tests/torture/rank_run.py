"""A training on ranks over gloo that goes wrong: ``rank_run.py WORK_DIR WHAT``."""

from __future__ import annotations

import os
import signal
import sys

import torch
from mmengine.hooks import Hook
from small_run import Classifier, run
from torch import nn

from psbn_mmdet.layers import PostShiftedBatchNorm2d, PostShiftedSyncBatchNorm

RANK = int(os.environ['RANK'])


class Scale(nn.Module):
    """Has all that a psBN layer has, and is none."""

    def __init__(self):
        super().__init__()
        layer = PostShiftedBatchNorm2d(8)
        for name, value in layer.named_parameters():
            self.register_parameter(name, value)
        for name, value in layer.named_buffers():
            self.register_buffer(name, value)

    def forward(self, x):
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Die(Hook):
    """Rank 1 is killed in the sixth step, while rank 0 waits for its gradients."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if RANK == 1 and runner.iter == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def model_of(what: str) -> nn.Module:
    model = Classifier(PostShiftedBatchNorm2d)
    if RANK == 0 or what == 'dies':
        return model
    if what == 'kind':
        model.stem[1] = PostShiftedSyncBatchNorm(8)
    elif what == 'number':
        model.head[1] = Scale()
    elif what == 'parameters':
        model.head[1] = nn.Identity()
    elif what == 'name':
        model.stem = nn.Sequential(*model.stem[:2], nn.Identity(), model.stem[2])
        model.stem.add_module('norm', model.stem[1])
        model.stem[1] = nn.Identity()
    return model


def main(work_dir: str, what: str) -> None:
    torch.distributed.init_process_group('gloo')
    hooks = [dict(type='CollapseHook', interval=2, window=2), dict(type='RecoveryHook')]
    if what == 'kind':
        hooks = hooks[:1]  # one of them is enough
    run(
        work_dir,
        model_of(what),
        epochs=4,
        launcher='pytorch',
        custom_hooks=[*hooks, *([Die()] if what == 'dies' else [])],
        experiment_name='ranks',
        cfg=dict(
            model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None),
            env_cfg=dict(dist_cfg=dict(backend='gloo')),
        ),
    )
    torch.distributed.barrier()
    os._exit(0)


if __name__ == '__main__':
    main(*sys.argv[1:])
