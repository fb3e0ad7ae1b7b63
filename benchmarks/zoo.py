"""Every config that MMDetection installs, with psBN by the switch of tools/train.py.

Each model is built with random weights and its norms are switched; then the weights of its BN twin
are loaded, both are run on the same images (the outputs must agree), and psBN makes one training
step, after which its filters are counted. What fails is put down to us, or to the baseline where
the BN twin fails at the same step. Configs that differ in data and schedule alone have one model,
which is run once.

    python benchmarks/zoo.py                # all; writes docs/zoo.md, benchmarks/results/zoo.json
    python benchmarks/zoo.py --match yolo   # those whose path has this in it, printed only
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mmdet  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MessageHub  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.structures import BaseDataElement, InstanceData  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402
from tqdm import tqdm  # noqa: E402

from psbn_mmdet.collapse import RectifierTrace, census_of_model  # noqa: E402
from psbn_mmdet.configs.model import build_model  # noqa: E402
from psbn_mmdet.configs.norm_switch import switch_config  # noqa: E402
from psbn_mmdet.configs.reading import dicts, load_config, type_name  # noqa: E402
from psbn_mmdet.layers import PostShiftedBatchNorm  # noqa: E402

CONFIGS = Path(mmdet.__file__).parent / '.mim/configs'
SECONDS = 300  # for one model
TASKS = 10  # of a process, whose memory grows
PART = 'no model'  # what some configs add to others
SIZES = (128, 256, 384)  # of the images; some models need larger ones
FOLDERS = re.compile(r'(?<![\w.])(/[\w.+-]+)+/')
FEW = {'max_per_img': 20, 'nms_pre': 200}  # boxes, which cost time and tell nothing of norms


class LateError(Exception):
    """A model took too long."""


def small(cfg: Config) -> Config:
    """A config with few boxes and small images; all that has norms stays as it is."""
    for _, part in dicts(cfg.model, ''):
        for key, most in FEW.items():
            if isinstance(part.get(key), int):
                part[key] = min(part[key], most)
        if type_name(part) in ('RandomSampler', 'MaskPseudoSampler') and 'num' in part:
            part['num'] = 32
        if type_name(part) == 'BatchFixedSizePad':
            part['size'] = SIZES[:1] * 2
    return cfg


def batch(cfg: Config, size: int, masks: bool, semantic: int) -> dict:
    """Two images of noise, with boxes, maybe masks, and segments at a stride that is not 0."""
    from mmdet.testing import demo_mm_inputs

    classes = [
        part['num_classes']
        for path, part in dicts(cfg.model, '')
        if isinstance(part.get('num_classes'), int) and not path.endswith('rpn_head')
    ]
    more = dict(with_semantic=True, sem_seg_output_strides=semantic) if semantic else {}
    image = (3, size, size)
    data = demo_mm_inputs(2, [image, image], num_items=[3, 3], with_mask=masks, **more)
    for sample in data['data_samples']:
        boxes = sample.gt_instances
        boxes.labels %= min(classes, default=1)
        # What a model without an RPN is given.
        sample.proposals = InstanceData(bboxes=boxes.bboxes, scores=torch.ones(len(boxes)))
    return data


def forward(model: nn.Module, data: dict, mode: str) -> Any:
    """One pass as the Runner makes it."""
    data = model.data_preprocessor(copy.deepcopy(data), mode == 'loss')
    return model(**data, mode=mode)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of floats in what a model returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (BaseDataElement, dict)):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def equal(mine: Any, theirs: Any) -> bool:
    """Whether two models have returned the same, bit for bit."""
    ours, others = list(tensors_in(mine)), list(tensors_in(theirs))
    return len(ours) == len(others) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, others)
    )


@torch.no_grad()
def calibrate(model: nn.Module, data: dict) -> None:
    """Give the norms the statistics of a batch, without which activations grow by each layer."""
    norms = [m for m in model.eval().modules() if isinstance(m, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        forward(model, data, 'tensor')
    finally:
        for norm, momentum in zip(norms, usual):
            norm.eval().momentum = momentum


def step(model: nn.Module, data: dict) -> RectifierTrace:
    """One training step by SGD; what follows each norm is watched."""
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    with RectifierTrace(model) as trace:
        losses = forward(model, data, 'loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
    if trace.failure is not None:
        raise trace.failure
    torch.optim.SGD(params, lr=1e-4).step()
    return trace


def said(error: Exception) -> str:
    """An error in one line, without the folders of this machine."""
    line = ' '.join(f'{type(error).__name__}: {error}'.split())
    return FOLDERS.sub('', line)[:240]


class Run:
    """What became of one model, of the twin and of ours."""

    def __init__(self, name: str) -> None:
        self.row: dict[str, Any] = {'config': name, 'norms': 0, 'switch': '', 'failed': ''}

    def tried(self, stage: str, ours: bool, do: Any) -> Any:
        """Do something; a failure is put down to us or to the baseline, and ends the run."""
        if self.row['failed']:
            return None
        try:
            return do()
        except Exception as error:  # whatever models raise
            whose = 'ours' if ours else 'baseline'
            self.row |= {'failed': whose, 'stage': stage, 'why': said(error)}
            return None


def of_config(name: str) -> dict:
    """Try one config, in the worker's process."""

    def late(*_: Any) -> None:
        raise LateError(f'took more than {SECONDS} s')

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    started = time.perf_counter()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    run = Run(name)
    hub = MessageHub.get_current_instance()  # some models ask it where the training is
    for key, value in (('iter', 0), ('epoch', 0), ('max_iters', 100), ('max_epochs', 1)):
        hub.update_info(key, value)
    with open(os.devnull, 'w') as null:
        kept, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), null, null
        try:
            _steps(run, name)
        except LateError as error:
            run.row |= {'failed': 'baseline', 'stage': 'time', 'why': str(error)}
        finally:
            sys.stdout, sys.stderr = kept
            signal.alarm(0)
    return {**run.row, 'seconds': round(time.perf_counter() - started, 1)}


_thread = threading.local()


def in_worker(name: str) -> dict:
    """Try one config in a process beside, which a crash in a library's own code may end."""
    worker = getattr(_thread, 'worker', None)
    if worker is None or _thread.tasks == TASKS:
        if worker is not None:
            worker.shutdown()
        _thread.tasks = 0
        worker = _thread.worker = ProcessPoolExecutor(1, get_context('spawn'))
    _thread.tasks += 1
    try:
        return worker.submit(of_config, name).result()
    except BrokenProcessPool:
        _thread.worker = None
        why = 'the process was ended, such as by a segmentation fault'
        return {**Run(name).row, 'failed': 'baseline', 'stage': 'process', 'why': why}


def _steps(run: Run, name: str) -> None:
    row = run.row
    cfg = run.tried('config', False, lambda: small(load_config(str(CONFIGS / name))))
    twin = run.tried('build', False, lambda: revert_sync_batchnorm(build_model(cfg)))
    if twin is None:
        return
    bns = [m for m in twin.modules() if isinstance(m, _BatchNorm)]
    row['norms'] = len(bns)
    if not bns:
        row['switch'] = 'no BN'
        return
    switched = copy.deepcopy(cfg)
    lines = run.tried('switch', True, lambda: switch_config(switched, 'psBN'))
    if lines is None:
        return
    row['switch'] = 'psBN'
    row['left'] = [line.strip() for line in lines if ' left ' in line]
    ours = run.tried('build', True, lambda: revert_sync_batchnorm(build_model(switched)))
    if ours is None:
        return
    reached = sum(isinstance(m, PostShiftedBatchNorm) for m in ours.modules())
    row['reached'] = reached
    if reached < len(bns) and not row['left']:
        row.update(failed='ours', stage='switch', why=f'{reached} of {len(bns)} norms reached')
        return
    with torch.no_grad():
        for norm in bns:
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.1)
    data, cannot_train = trained(name, cfg, twin)
    run.tried('load', True, lambda: ours.load_state_dict(twin.state_dict()))
    with torch.no_grad():
        theirs = run.tried('outputs', False, lambda: forward(twin.eval(), data, 'tensor'))
        mine = run.tried('outputs', True, lambda: forward(ours.eval(), data, 'tensor'))
    if mine is not None and theirs is not None and not equal(mine, theirs):
        row.update(failed='ours', stage='outputs', why='they differ')
    if row['failed'] == 'ours':
        return
    # A baseline without a 'tensor' mode may train well.
    row.update(cannot_train or {'failed': ''})
    trace = run.tried('training step', True, lambda: step(ours, data))
    census = run.tried(
        'count', True, lambda: census_of_model(ours, rectifiers=trace.structure.rectifiers)
    )
    if census is not None:
        row['filters'] = sum(len(layer.gamma) for layer in census.layers)
        row['collapsed'] = census.count('collapsed')
        row['follows'] = dict(Counter(layer.rectifier or 'not run' for layer in census.layers))


def trained(name: str, cfg: Config, twin: nn.Module) -> tuple[dict, dict]:
    """The batch with which a copy of the twin makes a step, or why it makes none."""
    labels = ((False, 0), (True, 0), (True, 8), (True, 1))  # what its losses want
    for size, (masks, semantic) in product(SIZES, labels):
        run = Run(name)
        data = run.tried('data', False, partial(batch, cfg, size, masks, semantic))
        run.tried('outputs', False, partial(calibrate, twin, data))
        run.row['failed'] = ''  # some models have no such outputs, and train well
        run.tried('training step', False, partial(step, copy.deepcopy(twin), data))
        if not run.row['failed']:
            return data, {}
    return data, {key: run.row[key] for key in ('failed', 'stage', 'why')}


def models_of(names: list[str]) -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
    """The configs by model, those without one, and why others cannot be loaded."""
    groups: dict[str, list[str]] = {}
    parts: list[str] = []
    broken: dict[str, str] = {}
    for name in tqdm(names, 'configs'):
        try:
            model = load_config(str(CONFIGS / name)).get('model')
        except Exception as error:
            broken[name] = said(error)
            continue
        if not model:
            parts.append(name)
            continue
        text = Config(dict(model=model)).pretty_text
        groups.setdefault(hashlib.sha1(text.encode()).hexdigest(), []).append(name)
    return groups, parts, broken


def main() -> int:
    """Go through the zoo."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--match', default='', help='only configs whose path has this in it')
    parser.add_argument('--jobs', type=int, default=2, help='models at a time')
    parser.add_argument(
        '--work-dir', type=Path, default='work_dirs/zoo', help='keeps finished models for a restart'
    )
    args = parser.parse_args()
    names = sorted(
        str(path.relative_to(CONFIGS))
        for path in CONFIGS.rglob('*.py')
        if '_base_' not in path.parts and args.match in str(path)
    )
    groups, parts, broken = models_of(names)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    kept = args.work_dir / 'zoo.jsonl'
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {row['config']: row for row in map(json.loads, lines)}
    missing = [same[0] for same in groups.values() if same[0] not in done]
    with kept.open('a') as file, ThreadPoolExecutor(args.jobs) as threads:
        tried = [threads.submit(in_worker, name) for name in missing]
        for row in tqdm((future.result() for future in as_completed(tried)), 'models', len(tried)):
            file.write(json.dumps(row) + '\n')
            file.flush()
            done[row['config']] = row
    rows = [{**done[same[0]], 'configs': len(same)} for same in groups.values()]
    for name, why in broken.items():
        failed = {'failed': 'baseline', 'stage': 'config', 'why': why}
        rows.append({'config': name, 'configs': 1, 'norms': 0, 'switch': '', **failed})
    if parts:
        rows.append({'config': parts[0], 'configs': len(parts), 'switch': PART, 'failed': ''})
    text = report(mmdet.__version__, rows)
    if args.match:
        failed = [f'{row["config"]}: {row["stage"]}: {row["why"]}' for row in rows if row['failed']]
        print(text, *failed, sep='\n')
    else:
        result = {'mmdet': mmdet.__version__, 'torch': torch.__version__, 'models': rows}
        (ROOT / 'benchmarks/results/zoo.json').write_text(json.dumps(result, indent=0) + '\n')
        (ROOT / 'docs/zoo.md').write_text(text)
    return 1 if any(row['failed'] == 'ours' for row in rows) else 0


def report(version: str, rows: list[dict]) -> str:
    """The page: how many configs and models ended in which way."""

    def counted(some: list[dict]) -> str:
        return f'{sum(row["configs"] for row in some)} configs, {len(some)} models'

    total = sum(row['configs'] for row in rows)
    ours = [row for row in rows if row['failed'] == 'ours']
    theirs = [row for row in rows if row['failed'] == 'baseline']
    plain = [row for row in rows if row['switch'] == 'no BN']
    parts = [row for row in rows if row['switch'] == PART]
    well = [row for row in rows if not row['failed'] and row['switch'] not in (PART, 'no BN')]
    return f"""# The zoo

`make zoo` tries `--norm psBN` on all {total} configs of MMDetection {version} and compares each
model with its BN twin. Configs that only differ in data or schedule share a model. *Pass* means
that every BN became psBN, the weights of the twin loaded, the outputs were equal bit for bit, and
one training step and a count of the filters ran.

| result | number |
|---|---|
| pass | {counted(well)} |
| no BN to replace (GN, LN, none) | {counted(plain)} |
| part of other configs, without a model | {sum(row['configs'] for row in parts)} configs |
| failed with psBN only | {counted(ours)} |
| failed with BN too | {counted(theirs)} |

[zoo.json](../benchmarks/results/zoo.json) has every model, with its norms, the activations after
them, and the error if it failed.
"""


if __name__ == '__main__':
    sys.exit(main())
