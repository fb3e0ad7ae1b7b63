"""Finetuning from ImageNet weights, as MMDetection's users do.

MMDetection's SSDLite with public MobileNetV2 weights, on photographs of blood cells at 320 px: BN,
psBN and psBN with recovery at the baseline's learning rate and at four times that, with the
statistics of ImageNet in the backbone (norm_eval) or those of the batch. Controls at the larger
rate: BN whose new layers, those of neck and head, start at b = 0.1 as psBN's do; and psBN without
the filters that collapse with BN, which are taken away from the first step on. The weights are
those of networks.py, which says where to get them. Each run is one of tools/train.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from common import (
    IMAGES,
    ORANGE,
    RED,
    Experiment,
    cell_of,
    cells_table,
    contrasts_of,
    contrasts_table,
    table,
)
from detection import (
    CONFIGS,
    QUICK,
    biases_at,
    data_options,
    filters_of,
    is_finished,
    outcome,
    parts_with_norms,
    remove_checkpoints,
    train,
)
from matplotlib.cm import viridis
from matplotlib.figure import Figure
from mmdet.models.backbones import MobileNetV2
from networks import PACKAGES

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.records import read_records, stage_of
from psbn_mmdet.report import find_record

WEIGHTS = 'mobilenet_v2-b0353104.pth'
CONFIG = 'ssdlite_mobilenetv2_photographs'
LEARNING_RATE = 0.015 * 8 / 192  # the baseline's, for 8 images
RECOVERY = 'psBN, recovery'
ARMS = ('BN', 'psBN', RECOVERY)
CONTROL = 'BN, starts at 0.1'
WITHOUT = 'psBN, without them'
ALL = (*ARMS, CONTROL, WITHOUT)
RATES = (1, 4)
CONTRASTS = {
    'psBN over BN': ('psBN', 'BN'),
    'psBN with recovery over BN': (RECOVERY, 'BN'),
    'the start alone: BN that starts at 0.1 over BN': (CONTROL, 'BN'),
    'psBN with recovery over BN that starts at 0.1': (RECOVERY, CONTROL),
    'what the filters are worth: psBN over psBN without them': ('psBN', WITHOUT),
}
OPTIONS = [
    ('--jobs', '2', 'runs at a time'),
    ('--seeds', '3', 'seeds of each arm'),
    PACKAGES,
    IMAGES,
]


def as_backbone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Torchvision's weights under the names of MMDetection's MobileNetV2, in the same order.

    Raises:
        ValueError: If they are of another network.
    """
    features = [value for key, value in weights.items() if key.startswith('features.')]
    own = MobileNetV2().state_dict()
    names = [name for name in own if not name.endswith('num_batches_tracked')]
    features = [value for value in features if value.dim()]
    if [value.shape for value in features] != [own[name].shape for name in names]:
        raise ValueError('the weights are not those of a MobileNetV2')
    return dict(zip(names, features))


def biases_of_new_layers() -> dict[str, torch.Tensor]:
    """The biases at 0.1 of those norms of BN's model that ImageNet's weights have not."""
    biases = biases_at(CONFIGS / f'{CONFIG}.py', 0.1)
    return {name: value for name, value in biases.items() if not name.startswith('backbone.')}


class Finetuning:
    """The runs, in a work dir."""

    def __init__(self, experiment: Experiment, weights: Path) -> None:
        self.folder = experiment.work_dir.resolve() / 'imagenet'
        self.folder.mkdir(parents=True, exist_ok=True)
        self.backbone = self.folder / 'mobilenet_v2.pth'
        state = read_weights(weights).state_dict
        torch.save({'state_dict': as_backbone(state)}, self.backbone)
        self.biases = self.folder / 'biases.pth'
        torch.save({'state_dict': biases_of_new_layers()}, self.biases)
        images = os.path.abspath(experiment.args.images)
        quick = {**QUICK, 'train_dataloader.batch_size': 4} if experiment.quick else {}
        self.options = {  # of the data set within the one that repeats it
            key.replace('train_dataloader.dataset', 'train_dataloader.dataset.dataset'): value
            for key, value in {**data_options(images), **quick}.items()
        }

    def without_those_of(self, work_dir: Path) -> Path:
        """Write a config that takes away what collapsed in a run."""
        masks = filters_of(work_dir, 'collapsed')
        channels = {layer: np.flatnonzero(mask).tolist() for layer, mask in masks.items()}
        config = self.folder / f'without_{work_dir.name}.py'
        config.write_text(f"""_base_ = {str(CONFIGS / f'{CONFIG}.py')!r}
custom_imports = dict(imports=['psbn_mmdet', 'ssd_on_cpus', 'take_away'])
custom_hooks = _base_.custom_hooks + [dict(type='TakeAwayHook', channels={channels})]
""")
        return config

    def run(self, arm: str, times: int, norm_eval: bool, seed: int) -> list[dict]:
        """Finetune."""

        def folder_of(arm: str) -> Path:
            statistics = 'eval' if norm_eval else 'train'
            return self.folder / f'{arm.replace(", ", "_")}_{statistics}_{times}x_{seed}'

        work_dir = folder_of(arm)
        config = CONFIGS / f'{CONFIG}{"_recovery" if arm == RECOVERY else ""}.py'
        if arm == WITHOUT:
            if not is_finished(folder_of('BN')):  # in this work dir, which has its record
                self.run('BN', times, norm_eval, seed)
            config = self.without_those_of(folder_of('BN'))
        kind = 'psBN' if arm.startswith('psBN') else 'BN'
        train(
            config,
            work_dir,
            **{f'model.{part}.norm_cfg.type': kind for part in parts_with_norms(config)},
            **{
                'model.backbone.init_cfg.checkpoint': self.backbone,
                'model.backbone.norm_eval': norm_eval,
                'optim_wrapper.optimizer.lr': LEARNING_RATE * times,
                'randomness.seed': seed,
                'load_from': self.biases if arm == CONTROL else None,
            },
            **self.options,
        )
        remove_checkpoints(work_dir)
        return [{**outcome(work_dir), 'course': course(work_dir)}]


def course(work_dir: Path) -> list[dict]:
    """Collapsed filters by stage in each report."""
    records = read_records(find_record(work_dir))
    rows = []
    for report in records.reports:
        counts: dict[str, int] = {}
        for i, layer in enumerate(records.header['layers']):
            stage = stage_of(layer['name'])
            counts[stage] = counts.get(stage, 0) + report['layers']['collapsed'][i]
        rows += [
            {'iter': report['iter'], 'stage': stage, 'collapsed': counts[stage]} for stage in counts
        ]
    return rows


def main() -> None:
    """Finetune, write."""
    experiment = Experiment('imagenet', __doc__, OPTIONS)
    found = sorted(Path(experiment.args.packages).rglob(WEIGHTS))
    if not found or not Path(experiment.args.images, 'annotations/train.json').is_file():
        print('imagenet: no weights in --packages, or no photographs in --images: skipped')
        return
    finetuning = Finetuning(experiment, found[0])
    quick = experiment.quick
    settings = [
        dict(arm=arm, times=times, norm_eval=norm_eval, seed=seed)
        for seed in range(1 if quick else int(experiment.args.seeds))
        for times in ((4,) if quick else RATES)
        for norm_eval in ((True,) if quick else (False, True))
        for arm in ([RECOVERY] if quick else ARMS if times == 1 else (*ARMS, CONTROL))
    ]
    jobs = int(experiment.args.jobs)
    runs = experiment.run(settings, finetuning.run, jobs)
    without = [{**s, 'arm': WITHOUT} for s in settings if s['times'] == 4 and s['arm'] == 'BN']
    runs += experiment.run(without, finetuning.run, jobs)  # after those that they are like
    rows = [{**setting, **found} for setting, (found,) in runs]
    cells, contrasts = compare(rows)
    courses = [
        {**{key: row[key] for key in settings[0]}, **step} for row in rows for step in row['course']
    ]
    experiment.write(
        cells=table(cells),
        contrasts=table(contrasts),
        runs=table([{k: v for k, v in row.items() if k != 'course'} for row in rows]),
        courses=table(courses),
    )
    experiment.save(draw(rows))
    experiment.tell(as_markdown(cells, contrasts))


def name_of(times: int, norm_eval: bool) -> str:
    """A setting in words."""
    return f'lr x {times}, statistics {"of ImageNet" if norm_eval else "of the batch"}'


def compare(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The arms' means in each setting, and their contrasts, at last those of all settings.

    There a seed counts once, with its mean, and only if it has BN and both psBN in each setting:
    runs of one seed see the same images in the same order, and are not independent.
    """
    cells, contrasts = [], []
    of_seeds: dict[int, list[list[float]]] = {}
    for times, norm_eval in dict.fromkeys((row['times'], row['norm_eval']) for row in rows):
        scores = {}
        setting = name_of(times, norm_eval)
        for arm in ALL:
            mine = [
                row
                for row in rows
                if (row['times'], row['norm_eval'], row['arm']) == (times, norm_eval, arm)
            ]
            if mine:
                counts = ('collapsed_first', 'collapsed', 'trapped', 'new', 'revived')
                cell, scores[arm] = cell_of(mine, 'AP', counts)
                cells.append({'setting': setting, 'arm': arm, **cell})
        contrasts += contrasts_of(scores, CONTRASTS, f'{setting}: ')
        for seed in set.intersection(*(set(scores.get(arm, ())) for arm in ARMS)):
            of_seeds.setdefault(seed, []).append([scores[arm][seed] for arm in ARMS])
    most = max(map(len, of_seeds.values()), default=0)
    means = {seed: np.mean(found, 0) for seed, found in of_seeds.items() if len(found) == most}
    of_all = {
        arm: {seed: float(mean[i]) for seed, mean in means.items()} for i, arm in enumerate(ARMS)
    }
    return cells, contrasts + contrasts_of(of_all, CONTRASTS, 'all settings: ')


def as_markdown(cells: list[dict], contrasts: list[dict]) -> str:
    """The tables of the page."""
    first = cells_table(
        cells,
        ['setting', 'arm'],
        {
            'collapsed_first': 'collapsed at the start',
            'collapsed': 'collapsed',
            'trapped': 'trapped',
        },
    )
    return first + '\n' + contrasts_table(contrasts, 'AP')


def draw(rows: list[dict]) -> Figure:
    """Collapsed filters of each stage over the steps, a panel for each setting and arm."""
    settings = list(dict.fromkeys((row['times'], row['norm_eval']) for row in rows))
    arms = [arm for arm in ALL if any(row['arm'] == arm for row in rows)]
    stages = list(dict.fromkeys(step['stage'] for row in rows for step in row['course']))
    deep = [stage for stage in stages if stage.startswith('backbone')]
    colours = {
        'neck': ORANGE,
        'bbox_head': RED,
        **dict(zip(deep, viridis(np.linspace(0, 1, len(deep))))),
    }
    figure = Figure(figsize=(3.2 * len(arms), 2.2 * len(settings) + 0.8), layout='constrained')
    axes = figure.subplots(len(settings), len(arms), squeeze=False, sharex=True, sharey='row')
    for row_of_axes, setting in zip(axes, settings):
        for ax, arm in zip(row_of_axes, arms):
            steps = [
                step
                for row in rows
                if (row['times'], row['norm_eval'], row['arm']) == (*setting, arm)
                for step in row['course']
            ]
            ax.set_title(f'{arm}\n{name_of(*setting)}', fontsize=8)
            if not steps:
                ax.text(0.5, 0.5, 'not run', transform=ax.transAxes, ha='center')
                continue
            iterations = sorted({step['iter'] for step in steps})
            heights = [
                [
                    np.mean(
                        [s['collapsed'] for s in steps if (s['iter'], s['stage']) == (x, stage)]
                    )
                    for x in iterations
                ]
                for stage in stages
            ]
            ax.stackplot(
                iterations, heights, labels=stages, lw=0, colors=[colours[s] for s in stages]
            )
    for ax in axes[-1]:
        ax.set_xlabel('step')
    for ax in axes[:, 0]:
        ax.set_ylabel('collapsed filters')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right center', fontsize=7)
    return figure


if __name__ == '__main__':
    main()
