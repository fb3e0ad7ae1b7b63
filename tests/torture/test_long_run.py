"""CollapseHook over 200,000 reports: memory, the record's size, the time of a report."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from small_run import KILLED, Classifier

from psbn_mmdet.hooks.scalars import KEPT
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import RECORD_FILE

PART = 5000  # reports between measurements; the first ones fill all buffers
# Of a report, of its two layers, of five collapsed filters, as docs/collapse.md has it.
BYTES = 400 + 50 * 2 + 65 * 5
SECONDS = 5e-3  # of a report


class Loop:
    """What the hook sees of a training: a Runner that makes no forward passes."""

    def __init__(self, folder: Path) -> None:
        model = Classifier(PostShiftedBatchNorm2d)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self.runner = SimpleNamespace(
            model=model,
            optim_wrapper=OptimWrapper(optimizer),
            cfg=Config(),
            iter=0,
            epoch=0,
            max_iters=1,
            log_dir=str(folder),
            work_dir=str(folder.parent),
            hooks=[],
            param_schedulers=[],
            train_loop=None,
            train_dataloader=None,
            logger=logging.getLogger('long run'),
            message_hub=MessageHub.get_instance('long run'),
        )
        self.hook = HOOKS.build(dict(type='CollapseHook', interval=1, window=1))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        for name, channels in KILLED.items():
            layer = model.get_submodule(name)
            layer.weight.grad[channels] = 0
            layer.bias.grad[channels] = 0
        self.hook.before_train(self.runner)

    def step(self) -> None:
        """One iteration, with its report."""
        runner, hook = self.runner, self.hook
        hook.before_train_iter(runner, 0)
        # Filters open and close, so that reports are not all alike.
        gamma = runner.model.stem[1].weight
        with torch.no_grad():
            gamma[1] = 0.0 if runner.iter % 7 < 3 else 1.0
        runner.optim_wrapper.optimizer.step()
        hook.after_train_iter(runner, 0)
        runner.iter += 1


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def run(folder: Path, reports: int, part: int = PART) -> None:
    loop = Loop(folder)
    record = folder / RECORD_FILE
    sizes, slow, memory = [], [], []
    for _ in range(reports // part):
        begin = time.process_time()
        for _ in range(part):
            loop.step()
            cases.count()
        slow.append((time.process_time() - begin) / part)
        sizes.append(record.stat().st_size)
        memory.append(resident())
        assert memory[-1] - memory[0] < 2**20, memory
    grown = memory[-1] - memory[0]
    print(f'{max(slow) * 1e3:.2f} ms, {sizes[-1] / reports:.0f} bytes, {grown} more')
    loop.hook.after_train(loop.runner)
    assert (sizes[-1] - sizes[0]) / (reports - part) < BYTES
    assert max(slow) < SECONDS, slow
    # Not a matter of how many there have been; the middle ones bear what else the machine does.
    half = len(slow) // 2
    assert sorted(slow[half:])[half // 2] < 1.5 * sorted(slow[:half])[half // 2] + 1e-4, slow
    with open(record) as file:
        next(file)
        assert sum(json.loads(line)['total']['collapsed'] in (4, 5) for line in file) == reports
    assert loop.hook._parts.works('records') and loop.hook._parts.works('counts')
    # All of it is in each checkpoint.
    buffers = loop.runner.message_hub.log_scalars.values()
    assert {len(buffer.data[0]) for buffer in buffers} == {KEPT}


@pytest.mark.slow
def test_some_thousand_reports(tmp_path):
    run(tmp_path / 'log', 3000, 1000)


@pytest.mark.slow
def test_two_hundred_thousand_reports(tmp_path):
    run(tmp_path / 'log', 200_000)
