"""A hook for the test of two ranks: each counts for itself, and no collective is made in between.

Imported by the training processes through ``custom_imports``.
"""

import json
import os
import traceback
from pathlib import Path

import numpy as np
import torch.distributed as dist
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from psbn_mmdet.collapse import census_of_model, find_norms

COLLECTIVES = (
    'all_gather',
    'all_gather_object',
    'all_reduce',
    'all_to_all',
    'barrier',
    'broadcast',
    'broadcast_object_list',
    'gather',
    'gather_object',
    'reduce',
    'reduce_scatter',
    'scatter',
    'send',
    'recv',
)


@HOOKS.register_module()
class Witness(Hook):
    """Count trapped and vanished channels on every rank, by plain means.

    Args:
        interval (int): Iterations between reports.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval):
        self.interval = interval
        self.reports = []
        self.collectives = []

    def before_train(self, runner):
        self.norms = find_norms(runner.model.module)
        self.reached = {
            name: np.zeros(norm.num_features, bool) for name, norm in self.norms.items()
        }
        runner.optim_wrapper.optimizer.register_step_pre_hook(self.look)
        for name in COLLECTIVES:
            setattr(dist, name, self.listed(getattr(dist, name), name))

    def listed(self, collective, name):
        def call(*args, **kwargs):
            files = [Path(frame.filename).parts for frame in traceback.extract_stack()]
            ours = {'hooks', 'collapse', 'recovery'}
            if any('psbn_mmdet' in parts and ours & set(parts) for parts in files):
                self.collectives.append(name)
            return collective(*args, **kwargs)

        return call

    def look(self, optimizer, args, kwargs):
        for name, norm in self.norms.items():
            for param in norm.parameters():
                if param.grad is not None:
                    self.reached[name] |= (param.grad != 0).numpy()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.every_n_train_iters(runner, self.interval):
            return
        found = census_of_model(runner.model.module)
        self.reports.append(
            dict(
                iter=runner.iter + 1,
                trapped={n: np.flatnonzero(~mask).tolist() for n, mask in self.reached.items()},
                vanished={x.name: np.flatnonzero(x.vanished).tolist() for x in found.layers},
            )
        )
        for mask in self.reached.values():
            mask[:] = False

    def after_train(self, runner):
        report = dict(
            reports=self.reports,
            collectives=self.collectives,
            norms=[type(norm).__name__ for norm in self.norms.values()],
            pid=os.getpid(),
        )
        path = Path(runner.work_dir) / f'witness_{get_rank()}.json'
        path.write_text(json.dumps(report))
