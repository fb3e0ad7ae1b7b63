"""Detectors with collapsed filters, finetuned on photographs: what psBN, recovery and revival do.

Faster R-CNN and RetinaNet (ResNet-18, FPN) are pretrained with BN on the drawn data until filters
collapse, then finetuned on photographs of blood cells, with statistics fixed (norm_eval) or not,
at the baseline's learning rate and at four times that. Each run is one of tools/train.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    IMAGES,
    ORANGE,
    PINK,
    RED,
    ROOT,
    Experiment,
    mean_ci,
    read_config,
    table,
)
from matplotlib.figure import Figure
from mmengine.registry import DefaultScope

from psbn_mmdet.checkpoints import read_content, read_weights, write_content
from psbn_mmdet.collapse import find_norms
from psbn_mmdet.configs.model import model_of_config, structure_of_config
from psbn_mmdet.layers import find_norm_states
from psbn_mmdet.records import read_records
from psbn_mmdet.recovery import revive
from psbn_mmdet.report import find_record

CONFIGS = Path(__file__).resolve().parent / 'configs'
LEARNING_RATES = {'faster-rcnn': 0.005, 'retinanet': 0.0025}  # the baselines', for 4 images
ARMS = ('BN', 'psBN', 'psBN, recovery', 'psBN, decay', 'psBN, revived')
# norm_decay_mult of 'psBN, decay': what the forecast advises at four times the learning rate.
DECAY = {'faster-rcnn': 160, 'retinanet': 250}
COLOURS = (RED, BLUE, ORANGE, PINK, GREEN)
SEEDS = 3
OPTIONS = [
    ('--jobs', '2', 'runs at a time'),
    ('--drawn', str(ROOT / 'data/demo'), 'the drawn data, made if they are not there'),
]
QUICK = {
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 1,
    'train_dataloader.dataset.indices': 8,
    'custom_hooks.0.interval': 1,
    'custom_hooks.0.window': 1,
}


def train(config: Path, work_dir: Path, *flags: object, **options: object) -> None:
    """Run tools/train.py, which resumes what was interrupted; its output goes to a file."""
    resume = ['--resume'] if (work_dir / 'last_checkpoint').exists() else []
    work_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / 'tools/train.py', config, '--work-dir', work_dir, *resume]
    command += map(str, flags)
    if options:
        command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    # Where the experiments' own hooks are found.
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(CONFIGS.parent)}
    with (work_dir / 'train.txt').open('a') as output:
        code = subprocess.call(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if code:
        raise RuntimeError(f'{config.stem} failed, see {work_dir / "train.txt"}')


def data_options(root: str) -> dict[str, object]:
    """The options of a config for data that lie elsewhere."""
    options: dict[str, object] = {}
    for loader in ('train', 'val', 'test'):
        options[f'{loader}_dataloader.dataset.data_root'] = f'{root}/'
    for evaluator in ('val', 'test'):
        options[f'{evaluator}_evaluator.ann_file'] = f'{root}/annotations/val.json'
    return options


class Detection:
    """The runs, in a work dir."""

    def __init__(self, experiment: Experiment) -> None:
        self.folder = experiment.work_dir.resolve() / 'detection'
        self.drawn = drawn_data(experiment)
        self.photographs = data_options(os.path.abspath(experiment.args.images))
        self.quick = QUICK if experiment.quick else {}

    def pretrain(self, detector: str) -> list[dict]:
        """Train with BN on the drawn data, and revive."""
        work_dir = self.folder / detector / 'pretrained'
        config = CONFIGS / f'{detector}_r18_fpn_drawn.py'
        train(config, work_dir, **self.drawn, **self.quick)
        checkpoint = last_checkpoint(work_dir)
        names = find_norm_states(read_weights(checkpoint).state_dict)
        structure = structure_of_config(read_config(config), names)
        content = read_content(checkpoint)
        content['state_dict'], opened = revive(content['state_dict'], structure)
        (work_dir / 'revived.pth').unlink(missing_ok=True)
        write_content(content, work_dir / 'revived.pth')
        total = sum(map(len, opened.values()))
        return [{'detector': detector, 'opened': total, **outcome(work_dir)}]

    def options_of(
        self, detector: str, arm: str, norm_eval: bool, times: int, seed: int
    ) -> tuple[Path, dict[str, object]]:
        """The config of a finetuning on the photographs, and its options."""
        pretrained = self.folder / detector / 'pretrained'
        kind = 'BN' if arm == 'BN' else 'psBN'
        revived = arm == 'psBN, revived'
        start = pretrained / 'revived.pth' if revived else last_checkpoint(pretrained)
        recovery = '_recovery' if arm == 'psBN, recovery' else ''
        config = CONFIGS / f'{detector}_r18_fpn_photographs{recovery}.py'
        return config, {
            **{f'model.{part}.norm_cfg.type': kind for part in parts_with_norms(config)},
            'load_from': start,
            'model.backbone.norm_eval': norm_eval,
            'optim_wrapper.optimizer.lr': LEARNING_RATES[detector] * times,
            'randomness.seed': seed,
            'default_hooks.checkpoint.save_best': None,
            **(
                {'optim_wrapper.paramwise_cfg.norm_decay_mult': DECAY[detector] * 4 / times}
                if arm == 'psBN, decay'
                else {}
            ),
            **self.photographs,
            **self.quick,
        }

    def finetune(
        self, detector: str, arm: str, norm_eval: bool, times: int, seed: int
    ) -> list[dict]:
        """Finetune on the photographs."""
        name = f'{arm.replace(", ", "_")}_{"eval" if norm_eval else "train"}_{times}x_{seed}'
        work_dir = self.folder / detector / name
        config, options = self.options_of(detector, arm, norm_eval, times, seed)
        train(config, work_dir, **options)
        remove_checkpoints(work_dir)
        return [outcome(work_dir)]


def drawn_data(experiment: Experiment) -> dict[str, object]:
    """The options of a config for the drawn data, which are made if they are not there."""
    root = os.path.abspath(experiment.args.drawn)
    if not Path(root, 'annotations/train.json').is_file():
        subprocess.check_call([sys.executable, ROOT / 'demo/make_dataset.py', root])
    return data_options(root)


def biases_at(config: Path, value: float) -> dict[str, torch.Tensor]:
    """The biases of all norms of a config, at a value."""
    with DefaultScope.overwrite_default_scope('mmdet'):
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


def main() -> None:
    """Pretrain, finetune, write."""
    experiment = Experiment('detection', __doc__, [*OPTIONS, IMAGES])
    if not Path(experiment.args.images, 'annotations/train.json').is_file():
        print(f'detection: {experiment.args.images} has no annotations/train.json: skipped')
        return
    detection = Detection(experiment)
    jobs = int(experiment.args.jobs)
    detectors = ['retinanet'] if experiment.quick else list(LEARNING_RATES)
    networks = [{'detector': name} for name in detectors]
    pretrained = experiment.run(networks, detection.pretrain, jobs)
    settings = [
        dict(detector=detector, arm=arm, norm_eval=norm_eval, times=times, seed=seed)
        for seed in range(1 if experiment.quick else SEEDS)
        for times in ((1,) if experiment.quick else (1, 4))
        for norm_eval in ((True,) if experiment.quick else (True, False))
        for detector in detectors
        for arm in ARMS
    ]
    runs = experiment.run(settings, detection.finetune, jobs)
    rows = [{**setting, **outcome} for setting, (outcome,) in runs]
    cells = compare(rows)
    experiment.write(
        pretrained=table([row for _, rows in pretrained for row in rows]),
        cells=table(cells),
        runs=table(rows),
    )
    experiment.save(draw(cells))


def compare(rows: list[dict]) -> list[dict]:
    """By detector, setting and arm: mean counts and AP, and AP less BN's, paired by seed."""
    groups: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        key = row['detector'], row['norm_eval'], row['times'], row['arm']
        groups.setdefault(key, {})[row['seed']] = row
    cells = []
    for (detector, norm_eval, times, arm), runs in groups.items():
        bn = groups[detector, norm_eval, times, 'BN']
        cell = {
            'detector': detector,
            'norm_eval': norm_eval,
            'times': times,
            'arm': arm,
            'seeds': len(runs),
        }
        for name in ('AP', 'AP50', 'collapsed_first', 'collapsed', 'trapped', 'new', 'revived'):
            cell[name] = float(np.mean([run[name] for run in runs.values()]))
        for name in ('AP', 'AP50'):
            difference = [run[name] - bn[seed][name] for seed, run in runs.items()]
            mean, low, high = mean_ci(difference)
            cell |= {f'{name}-BN': mean, f'{name}-BN_low': low, f'{name}-BN_high': high}
        cells.append(cell)
    return cells


def draw(cells: list[dict]) -> Figure:
    """Trapped filters at the end, and AP less BN's, of each arm in each setting."""
    figure = Figure(figsize=(9, 5), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    settings = list(dict.fromkeys((c['detector'], c['norm_eval'], c['times']) for c in cells))
    for arm, colour, offset in zip(ARMS, COLOURS, np.linspace(-0.3, 0.3, len(ARMS))):
        mine = {(c['detector'], c['norm_eval'], c['times']): c for c in cells if c['arm'] == arm}
        y = [settings.index(setting) + offset for setting in mine]
        left.plot([c['trapped'] for c in mine.values()], y, 'o', color=colour, label=arm)
        if arm != 'BN':
            mean, low, high = (
                np.array([c[f'AP-BN{end}'] for c in mine.values()], float)
                for end in ('', '_low', '_high')
            )
            right.errorbar(mean, y, xerr=[mean - low, high - mean], fmt='o', color=colour)
    right.axvline(0, color=GREY, linewidth=1)
    left.set_yticks(
        range(len(settings)),
        [
            f'{detector}\n{"fixed" if norm_eval else "batch"} statistics, lr x {times}'
            for detector, norm_eval, times in settings
        ],
    )
    left.invert_yaxis()
    left.set_xlim(left=0)
    left.set_xlabel('trapped filters at the end (mean over seeds)')
    right.set_xlabel('AP less that of BN (mean, 95 % CI)')
    figure.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=5)
    clear = [
        cell
        for cell in cells
        if cell['arm'] != 'BN'
        and cell['seeds'] > 1
        and not cell['AP-BN_low'] <= 0 <= cell['AP-BN_high']
    ]
    compared = sum(cell['arm'] != 'BN' for cell in cells)
    left_trapped = sum(c['trapped'] for c in cells if c['arm'] == 'psBN, recovery')
    of_bn = sum(c['trapped'] for c in cells if c['arm'] == 'BN')
    figure.suptitle(
        f'With recovery {100 * left_trapped / max(of_bn, 1):.0f} % of the trapped filters of BN '
        f'are left; AP differs beyond the interval in {len(clear)} of {compared} cells'
    )
    return figure


if __name__ == '__main__':
    main()
