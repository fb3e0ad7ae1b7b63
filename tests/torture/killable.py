"""Trainings that are killed: a process that has imported everything forks one for each.

``python killable.py`` reads one JSON object a line: the arguments of tools/train.py, where to keep
its output, and when to die; it answers with how the training ended, and after how long.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import Hook, checkpoint_hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS

from psbn_mmdet.records import RecordWriter, atomic
from psbn_mmdet.recovery import recovery

ROOT = Path(__file__).resolve().parents[2]


@HOOKS.register_module()
class SeedEachStep(Hook):
    """MMEngine keeps no random state in checkpoints: the samplers of a detector draw from it."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed(runner.iter)
        np.random.seed(runner.iter)
        random.seed(runner.iter)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nth(owner, name, n, instead):
    """Call something else at the n-th call of a function."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        return (instead if len(calls) == n else function)(*args, **kwargs)

    setattr(owner, name, call)
    return function


def after(owner, name, n):
    """Die once the n-th call has done its work."""

    def work(*args, **kwargs):
        function(*args, **kwargs)
        die()

    function = nth(owner, name, n, work)


def arm(point: str, n: int, share: float) -> None:
    """Die at the n-th time that this is done, when that share of it is."""

    def torn_checkpoint(self, content, path):
        Path(path).write_bytes(content[: int(share * len(content))])
        die()

    def torn_report(self, report):
        line = json.dumps(report) + '\n'
        with open(self.path, 'a') as file:
            file.write(line[: int(share * len(line))])
        die()

    def torn_part(source, target):
        os.truncate(source, int(share * os.path.getsize(source)))
        die()

    def emptied(path, mode='r'):
        open(path, mode).close()
        die()

    if point == 'step':
        nth(OptimWrapper, 'update_params', n, lambda *args, **kwargs: die())
    elif point == 'stepped':
        after(OptimWrapper, 'update_params', n)
    elif point == 'recovery':
        after(recovery._Group, 'decay', n)
    elif point == 'restoring':
        after(recovery, 'restore', n)
    elif point == 'save':
        nth(LocalBackend, 'put', n, torn_checkpoint)
    elif point == 'saved':
        after(LocalBackend, 'put', n)
    elif point == 'naming':
        checkpoint_hook.open = open
        nth(checkpoint_hook, 'open', n, emptied)
    elif point == 'record':
        nth(RecordWriter, 'append', n, torn_report)
    elif point == 'recorded':
        after(RecordWriter, 'append', n)
    elif point == 'file':  # a snapshot, or a record that begins
        atomic.os = type('os', (), dict(vars(os)))
        nth(atomic.os, 'replace', n, torn_part)
    else:
        raise ValueError(point)


def train(arguments: list[str], output: str, kill: dict | None) -> None:
    """In the forked process."""
    with open(output, 'w') as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if kill and kill['point'] != 'time':
        arm(**kill)
    script = str(ROOT / 'tools/train.py')
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries say when they are imported
    # What a training imports on its way.
    import mmdet.apis
    import mmdet.datasets
    import mmdet.evaluation
    import mmdet.models  # noqa: F401

    sys.modules.setdefault('killable', sys.modules['__main__'])
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            train(**job)
        kill = job['kill'] or {}
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if kill.get('point') == 'time' and time.monotonic() - begin > kill['share']:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        answer = dict(code=os.waitstatus_to_exitcode(status), seconds=time.monotonic() - begin)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    main()
