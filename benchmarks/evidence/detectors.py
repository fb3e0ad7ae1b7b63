"""Detectors for the experiments: arms as overlays on a config, runs of tools/train.py, results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from study import JOBS, ROOT, Study

from psbn_mmdet.checkpoints import read_content, read_weights, write_content
from psbn_mmdet.collapse import find_norms
from psbn_mmdet.configs.model import model_of_config, structure_of_config
from psbn_mmdet.configs.reading import load_config
from psbn_mmdet.layers import find_norm_states
from psbn_mmdet.records import read_records
from psbn_mmdet.recovery import revive
from psbn_mmdet.report import find_record

FOLDER = Path(__file__).resolve().parent
DEMO = ROOT / 'demo/faster-rcnn_r18_fpn_bn_demo.py'
LEARNING_RATES = {'faster-rcnn': 0.005, 'retinanet': 0.0025}  # the baselines', for 4 images
OPTIONS = [
    JOBS,
    ('--drawn', str(ROOT / 'data/demo'), 'the synthetic data, made if they are not there'),
]
QUICK = {
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
    'train_dataloader.dataset.indices': 8,
    'custom_hooks.0.interval': 1,
    'custom_hooks.0.window': 1,
}
_READING = Lock()


class Arm(NamedTuple):
    """How an arm differs from a config with BN: decay of gamma and beta, start of b, recovery."""

    norm: str = 'BN'
    gamma: float = 1  # times the weight decay of all other parameters
    beta: float = 1
    start: float | None = None  # None is the norm's own
    loaded: str | None = None  # prefix of pretrained layers, whose b does not start there
    recovery: int | None = None  # RecoveryHook's steps


def config_of(name: str) -> Path:
    """A config of this folder by its name."""
    return FOLDER / f'configs/{name}.py'


def read_config(path: Path) -> Config:
    """Read a config, in one thread at a time: older MMEngines reload a module for that."""
    with _READING:
        return load_config(str(path))


def write_config(
    file: Path,
    base: Path,
    arm: Arm,
    optimizer: dict | None = None,
    lost: dict[str, list[int]] | None = None,
    lines: str = '',
) -> None:
    """Write an arm as a config on top of another, and beside it the biases that it starts from.

    Args:
        file (Path): The config.
        base (Path): A config with BN, whose first hook is CollapseHook.
        arm (Arm): The arm.
        optimizer (dict | None): An optim_wrapper in place of the base's. Defaults to None.
        lost (dict[str, list[int]] | None): Filters, by layer, that are taken away.
        lines (str): Lines that follow. Defaults to none.
    """
    hooks, imports = '*_base_.custom_hooks', "*_base_.custom_imports['imports']"
    if arm.recovery is not None:
        hooks += f", dict(type='RecoveryHook', steps={arm.recovery})"
    if lost is not None:
        hooks += f", dict(type='TakeAwayHook', channels={lost})"
        imports += ", 'take_away'"
    paramwise: dict[str, object] = {'norm_decay_mult': arm.gamma}
    if arm.beta != arm.gamma:
        paramwise['custom_keys'] = {name: {'decay_mult': arm.beta} for name in biases_at(base, 0)}
    text = f'_base_ = {str(base)!r}\ncustom_hooks = [{hooks}]\n'
    text += f'custom_imports = dict(imports=[{imports}])\n'
    if optimizer is not None:
        own = {**optimizer, 'paramwise_cfg': paramwise}
        text += f'optim_wrapper = dict(_delete_=True, **{own})\n'
    elif (arm.gamma, arm.beta) != (1, 1):
        text += f'optim_wrapper = dict(paramwise_cfg={paramwise})\n'
    if arm.norm == 'psBN':
        norm = dict(norm_cfg=dict(type='psBN'))
        text += f'model = dict(**{dict.fromkeys(parts_with_norms(base), norm)})\n'
    text += lines
    if arm.start is not None:
        biases = biases_at(base, arm.start)
        if arm.loaded is not None:
            biases = {k: v for k, v in biases.items() if not k.startswith(arm.loaded)}
        torch.save({'state_dict': biases}, file.with_suffix('.pth'))
        text += f'load_from = {str(file.with_suffix(".pth"))!r}\n'
    file.write_text(text)


def slug(*values: object) -> str:
    """Values as the name of a file."""
    return re.sub('[ ,]+', '-', '_'.join(map(str, values)))


def train(config: Path, work_dir: Path, *flags: str, **options: object) -> None:
    """Run tools/train.py, which resumes what was interrupted; its output goes to a file.

    Args:
        config (Path): The config.
        work_dir (Path): The work dir.
        *flags (str): Of the script.
        **options (object): Those of ``--cfg-options``.
    """
    resume = ['--resume'] if (work_dir / 'last_checkpoint').exists() else []
    work_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / 'tools/train.py', config, '--work-dir', work_dir]
    command += [*resume, *flags]
    if options:
        command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    # Where the experiments' own hooks are found.
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(FOLDER)}
    with (work_dir / 'train.txt').open('a') as output:
        code = subprocess.call(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if code:
        raise RuntimeError(f'{config.stem} failed, see {work_dir / "train.txt"}')


def train_arm(
    work_dir: Path,
    base: Path,
    arm: Arm,
    options: dict,
    optimizer: dict | None = None,
    lost: dict[str, list[int]] | None = None,
    lines: str = '',
) -> dict:
    """Train an arm, see :func:`write_config`, without keeping checkpoints: the outcome."""
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    config = work_dir.parent / f'{work_dir.name}.py'
    write_config(config, base, arm, optimizer, lost, lines)
    train(config, work_dir, **{'default_hooks.checkpoint.save_best': None, **options})
    remove_checkpoints(work_dir)
    return outcome(work_dir)


def data_options(root: str) -> dict[str, object]:
    """The options of a config for data that lie elsewhere."""
    options: dict[str, object] = {}
    for loader in ('train', 'val', 'test'):
        options[f'{loader}_dataloader.dataset.data_root'] = f'{root}/'
    for evaluator in ('val', 'test'):
        options[f'{evaluator}_evaluator.ann_file'] = f'{root}/annotations/val.json'
    return options


def drawn_data(study: Study) -> dict[str, object]:
    """The options of a config for the synthetic data, which are made if they are not there."""
    root = os.path.abspath(study.args.drawn)
    if not Path(root, 'annotations/train.json').is_file() and not study.args.finished:
        subprocess.check_call([sys.executable, ROOT / 'demo/make_dataset.py', root])
    return data_options(root)


def photographs(study: Study) -> dict[str, object] | None:
    """The options of a config for the photographs, None, which is printed, if they are absent."""
    root = os.path.abspath(study.args.images)
    if not study.args.finished and study.lacks(Path(root, 'annotations/train.json')):
        return None
    return data_options(root)


def quick(study: Study) -> dict[str, object]:
    """The options of a smoke run, if it is one."""
    return QUICK if study.quick else {}


def pretrain(study: Study, detector: str) -> list[dict]:
    """Train with BN on the synthetic data until filters are closed, and revive a copy."""
    work_dir = study.work_dir / 'pretrained' / detector
    config = config_of(f'{detector}_r18_fpn_drawn')
    train(config, work_dir, **drawn_data(study), **quick(study))
    checkpoint = last_checkpoint(work_dir)
    names = find_norm_states(read_weights(checkpoint).state_dict)
    structure = structure_of_config(read_config(config), names)
    content = read_content(checkpoint)
    content['state_dict'], opened = revive(content['state_dict'], structure)
    (work_dir / 'revived.pth').unlink(missing_ok=True)
    write_content(content, work_dir / 'revived.pth')
    return [{'detector': detector, 'opened': sum(map(len, opened.values())), **outcome(work_dir)}]


def finetuning_options(
    study: Study, detector: str, norm_eval: bool, times: int, seed: int, revived: bool = False
) -> dict[str, object]:
    """The options of a finetuning on photographs, from what :func:`pretrain` has left."""
    pretrained = study.work_dir / 'pretrained' / detector
    return {
        'load_from': pretrained / 'revived.pth' if revived else last_checkpoint(pretrained),
        'model.backbone.norm_eval': norm_eval,
        'optim_wrapper.optimizer.lr': LEARNING_RATES[detector] * times,
        'randomness.seed': seed,
        **(photographs(study) or {}),
        **quick(study),
    }


def biases_at(config: Path, value: float) -> dict[str, torch.Tensor]:
    """The biases of all norms of a config, at a value."""
    norms = find_norms(model_of_config(read_config(config)))
    return {f'{name}.bias': torch.full_like(norm.bias, value) for name, norm in norms.items()}


def parts_with_norms(config: Path) -> list[str]:
    """Those of backbone, neck and head that take a norm_cfg."""
    model = read_config(config).model
    return [p for p in ('backbone', 'neck', 'bbox_head') if 'norm_cfg' in model.get(p, {})]


def last_checkpoint(work_dir: Path) -> Path:
    """What a finished training has left."""
    return Path((work_dir / 'last_checkpoint').read_text().strip())


def remove_checkpoints(work_dir: Path) -> None:
    """Those of all runs are gigabytes."""
    for checkpoint in work_dir.glob('*.pth'):
        checkpoint.unlink()


def is_finished(work_dir: Path) -> bool:
    """Whether a run has saved checkpoints, and they have been removed after it."""
    return (work_dir / 'last_checkpoint').exists() and not any(work_dir.glob('*.pth'))


def scores_of(work_dir: Path) -> list[dict]:
    """COCO AP of each validation, of the last of equal steps; without detections there is none."""
    found = {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in map(json.loads, log.read_text().splitlines()):
            if 'coco/bbox_mAP' in line:
                scores = {'AP': line['coco/bbox_mAP'], 'AP50': line['coco/bbox_mAP_50']}
                found[line['step']] = {'epoch': line['step'], **scores}
    return list(found.values())


def outcome(work_dir: Path) -> dict:
    """COCO AP at the end, and the collapsed filters at the first report and at the end."""
    scores = scores_of(work_dir)
    last = scores[-1] if scores else {'AP': 0.0, 'AP50': 0.0}
    reports = read_records(find_record(work_dir)).reports
    kinds = ('collapsed', 'vanished', 'dead', 'trapped')
    return {
        'AP': last['AP'],
        'AP50': last['AP50'],
        **{f'{kind}_first': reports[0]['total'][kind] for kind in kinds},
        **{kind: reports[-1]['total'][kind] for kind in kinds},
        'new': sum(report['total']['new'] for report in reports),
        'revived': sum(report['total']['revived'] for report in reports),
    }


def filters_of(work_dir: Path, kind: str, ever: bool = False) -> dict[str, np.ndarray]:
    """The filters (C,) of a kind by layer, where there are any: at the end of a run, or ever."""
    records = read_records(find_record(work_dir))
    reports = records.reports if ever else records.reports[-1:]
    masks = {
        layer['name']: np.any([records.mask(report, kind, i) for report in reports], axis=0)
        for i, layer in enumerate(records.header['layers'])
    }
    return {name: mask for name, mask in masks.items() if mask.any()}
