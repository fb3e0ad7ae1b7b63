"""CollapseHook over many reports: memory, the record's size, the work for a report."""

from __future__ import annotations

import gc
import logging
import sys
import tracemalloc
from collections.abc import Callable
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
from psbn_mmdet.records import RECORD_FILE, stream_records

PART = 5000  # reports between measurements; the first ones fill all buffers
# Of a report, of its two layers, of five collapsed filters, as docs/collapse.md has it.
BYTES = 300 + 55 * 2 + 40 * 5


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


def allocated() -> int:
    """Bytes that Python's objects take, NumPy's arrays among them."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def calls_of(function: Callable[[], None]) -> int:
    """How many functions a call runs: its work, on whatever machine."""
    count = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == 'call'

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def run(folder: Path, reports: int, part: int = PART) -> None:
    loop = Loop(folder)
    record = folder / RECORD_FILE
    sizes, calls, memory = [], [], []
    for _ in range(reports // part):
        for _ in range(part - 7):
            loop.step()
        calls.append(sum(calls_of(loop.step) for _ in range(7)))
        cases.CASES['cases'] += part
        sizes.append(record.stat().st_size)
        memory.append(allocated())
        assert memory[-1] - memory[0] < 2**16, memory
    loop.hook.after_train(loop.runner)
    assert (sizes[-1] - sizes[0]) / (reports - part) < BYTES
    assert max(calls) < 1.01 * calls[0], 'a report is no more work than the first ones'
    with open(record, 'rb') as file:
        lines = stream_records(file)
        next(lines)
        assert sum(report['total']['collapsed'] in (4, 5) for report in lines) == reports
    assert not any(map(loop.hook._guard.is_off, ('records', 'counts')))
    # All of it is in each checkpoint.
    buffers = loop.runner.message_hub.log_scalars.values()
    assert {len(buffer.data[0]) for buffer in buffers} == {KEPT}


@pytest.fixture
def traced():
    """Python's memory is followed."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.usefixtures('traced')
def test_many_reports(tmp_path):
    if cases.FULL:
        run(tmp_path / 'log', 200_000)
    else:
        run(tmp_path / 'log', 6000, 2000)
