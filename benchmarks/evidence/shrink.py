"""Collapse on purpose, then cut: how much decay for how long, and what other pruners do.

Can a finetuning choose by collapse which filters a detector can do without? The tutorial's Faster
R-CNN, finetuned with BN on photographs of blood cells, plain and with --shrink at several decays of
gamma and beta and for several numbers of e-foldings; other pruners at the same multiply-adds;
detectors built narrow; and the finetuning of a detector that was pruned before. AP is that on the
validation set, and on the test set, which decided nothing. Each training is one of tools/train.py.

    make demo-compare && python benchmarks/evidence/shrink.py
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from detectors import (
    DEMO,
    OPTIONS,
    drawn_data,
    last_checkpoint,
    photographs,
    read_config,
    scores_of,
    train,
)
from matplotlib.figure import Figure
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from study import (
    GREY,
    IMAGES,
    PALETTE,
    ROOT,
    Study,
    contrasts_table,
    markdown_table,
    mean_of,
    rows_of,
    table,
)
from torch import nn

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.commands import prune
from psbn_mmdet.configs.model import model_of_config
from psbn_mmdet.pruning import compare, narrow
from psbn_mmdet.records import format_ranges, read_records
from psbn_mmdet.report import find_record

CELLS = ROOT / 'demo/faster-rcnn_r18_fpn_cells.py'
RATE = 0.02
# Epochs by decay; the longest are left out.
MAP = {0.3: (2, 4, 6, 10), 0.1: (6, 12, 18, 30), 0.03: (20,)}
EPOCHS = 18  # of --shrink 0.1, to whose size the rivals are cut
PRUNERS = {'BNScalePruner': 'gamma', 'MagnitudePruner': 'magnitude'}
L1 = (0.01, 0.03)
NARROW = (8, 16)  # base_channels: as many parameters in the backbone, as many multiply-adds
_LOCK = Lock()


class Cut(NamedTuple):
    """The files of a cut detector."""

    config: Path
    checkpoint: Path


class Shrinking:
    """The runs, in the study's folder."""

    def __init__(self, study: Study) -> None:
        self.folder = study.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cells = photographs(study) or {}
        self.drawn = drawn_data(study)
        self.start = Path(study.args.start).resolve()

    # Trainings

    def finetune(
        self,
        name: str,
        seed: int,
        epochs: int = EPOCHS,
        flags: tuple = ('--watch-collapse',),
        config: Path = CELLS,
        **options: object,
    ) -> Path:
        """A training on the photographs, with the tutorial's schedule stretched over epochs."""
        work_dir = self.folder / f'{name}_{seed}'.replace(' ', '-')
        milestones = [max(round(epochs * share), 1) for share in (2 / 3, 8 / 9)]
        settings = {
            'randomness.seed': seed,
            'optim_wrapper.optimizer.lr': RATE,
            'train_cfg.max_epochs': epochs,
            'train_cfg.val_interval': epochs,
            'param_scheduler.1.milestones': str(milestones).replace(' ', ''),
            'default_hooks.checkpoint.interval': epochs,
            'load_from': self.start,
            **self.cells,
            **options,
            **({'train_dataloader.dataset.indices': 8} if STUDY.quick else {}),
        }
        train_once(config, work_dir, *flags, **settings)
        return work_dir

    def plain(self, epochs: int, seed: int, rate: float = RATE) -> list[dict]:
        """BN with the weight decay of all else."""
        name = f'plain_{epochs}' + ('' if rate == RATE else f'_{rate}')
        work_dir = self.finetune(name, seed, epochs, **{'optim_wrapper.optimizer.lr': rate})
        return [self.whole(work_dir)]

    def shrunk(self, decay: float, epochs: int, seed: int, rate: float = RATE) -> list[dict]:
        """--shrink, which cuts at the end."""
        name = f'shrink_{decay}_{epochs}' + ('' if rate == RATE else f'_{rate}')
        options = {'optim_wrapper.optimizer.lr': rate}
        work_dir = self.finetune(name, seed, epochs, ('--shrink', str(decay)), **options)
        return [{**self.whole(work_dir), **self.cut_of(work_dir)}]

    def again(self, seed: int) -> list[dict]:
        """--shrink, cut, and trained as long again with the decay of all else."""
        before = self.folder / f'shrink_0.1_{EPOCHS}_{seed}'
        files = cut_files(before)
        return [self.trained_on('shrink', seed, files)]

    def pruned(self, pruner: str, seed: int) -> list[dict]:
        """The plain detector cut by another pruner, as it is and trained as long again."""
        before = self.folder / f'plain_{EPOCHS}_{seed}'
        return self._rival(pruner, before, PRUNERS[pruner], seed)

    def slimmed(self, l1: float, seed: int) -> list[dict]:
        """Network slimming: a training with L1 on gamma, cut by gamma, trained as long again."""
        config = self.folder / 'slimming.py'
        if not config.exists():
            config.write_text(
                f'_base_ = [{str(CELLS)!r}]\n'
                "custom_imports = dict(imports=['psbn_mmdet', 'slimming'])\n"
                "custom_hooks = [dict(type='SlimmingHook', weight=0.0)]\n"
            )
        weight = {'custom_hooks.0.weight': l1}
        work_dir = self.finetune(f'slimming_{l1}', seed, config=config, **weight)
        return self._rival(f'slimming {l1}', work_dir, 'gamma', seed)

    def _rival(self, name: str, before: Path, by: str, seed: int) -> list[dict]:
        target = self.cut_of(self.folder / f'shrink_0.1_{EPOCHS}_{seed}')['multiply-adds pruned']
        files = cut_by(by, before, target, self.folder / f'{name}_cut_{seed}'.replace(' ', '-'))
        whole, cut = self.whole(before), self.measure(files)
        as_cut = {'trained again': False, 'AP whole': whole['AP'], **cut, 'AP': cut['AP pruned']}
        return [as_cut, {'AP whole': whole['AP'], **self.trained_on(name, seed, files)}]

    def trained_on(self, name: str, seed: int, files: Cut) -> dict:
        """A cut detector's scores after as long a training again."""
        options = {
            'load_from': files.checkpoint,
            'optim_wrapper.paramwise_cfg.norm_decay_mult': 1,
        }
        work_dir = self.finetune(f'{name}_again', seed, config=files.config, **options)
        again = Cut(files.config, last_checkpoint(work_dir))
        return {'trained again': True, **self.measure(again), **self.whole(work_dir)}

    def narrow(self, channels: int, pretrained: bool, epochs: int, seed: int) -> list[dict]:
        """A detector built with a narrower backbone."""
        narrower = {
            'model.backbone.base_channels': channels,
            'model.neck.in_channels': str([channels * k for k in (1, 2, 4, 8)]).replace(' ', ''),
        }
        options: dict[str, object] = {'load_from': None}
        if pretrained:
            before = self.folder / f'pretrained_{channels}'
            train_once(DEMO, before, **narrower, **self.drawn)
            options['load_from'] = last_checkpoint(before)
        name = f'narrow_{channels}_{epochs}' + ('_pretrained' if pretrained else '')
        work_dir = self.finetune(name, seed, epochs, **narrower, **options)
        files = Cut(work_dir / CELLS.name, last_checkpoint(work_dir))
        return [{**self.whole(work_dir), **self.measure(files)}]

    def from_scratch(self, times: int, seed: int) -> list[dict]:
        """The demo's detector on the drawn data, with a multiple of the decay; then cut."""
        work_dir = self.folder / f'scratch_{times}_{seed}'
        options = {
            'randomness.seed': seed,
            'optim_wrapper.paramwise_cfg.norm_decay_mult': times,
            'default_hooks.checkpoint.save_best': None,
            **self.drawn,
        }
        train_once(DEMO, work_dir, **options)
        out = work_dir / 'pruned_last'
        if not (out / 'pruned.py').exists():
            checkpoint = last_checkpoint(work_dir)
            command = [checkpoint, '--config', work_dir / DEMO.name, '-o', out, '--force']
            with _LOCK, (work_dir / 'train.txt').open('a') as file, redirect_stdout(file):
                if prune.main(list(map(str, command))):
                    raise RuntimeError(f'{checkpoint} could not be pruned')
        return [{**self.whole(work_dir, test=False), **self.cut_of(work_dir, test=False)}]

    def free(self, cut: bool, seed: int) -> list[dict]:
        """The tutorial's finetuning of the detector from scratch at 50 times, whole or cut first.

        Cut by what was closed on the drawn images, not on the photographs.
        """
        before = self.folder / 'scratch_50_0'
        files = Cut(before / DEMO.name, last_checkpoint(before))
        name, config = 'free_whole', CELLS
        if cut:
            name, config = 'free_cut', self.folder / 'free_cut.py'
            files = Cut(before / 'pruned_last/pruned.py', before / 'pruned_last/pruned.pth')
            with alone():
                cfg = read_config(CELLS)
                cfg.model = read_config(files.config).model
                cfg.model.roi_head.bbox_head.num_classes = 3
                cfg.dump(config)
        options = {'optim_wrapper.optimizer.lr': 0.005, 'load_from': files.checkpoint}
        work_dir = self.finetune(name, seed, 6, config=config, **options)
        return [self.whole(work_dir)]

    def costs(self) -> list[dict]:
        """Time and memory of a training step of the cut detector over those of the whole one."""
        runners = []
        for name in ('free_whole', 'free_cut'):
            cfg = read_config(next((self.folder / f'{name}_0').glob('*.py')))
            cfg.work_dir, cfg.visualizer.name = str(self.folder / f'costs_{name}'), name
            cfg.custom_hooks = []
            cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
            with alone(), torch.enable_grad():
                runners.append(Runner.from_cfg(cfg))
                runners[-1].load_or_resume()
        batch = next(iter(runners[0].train_dataloader))

        def step(runner: Any) -> None:
            torch.manual_seed(0)
            runner.model.train_step(copy.deepcopy(batch), runner.optim_wrapper)

        for runner in runners:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
        whole, cut = (_bytes_of_step(runner, step) for runner in runners)
        _, ratio, _ = compare.time_ratio(step, runners[1], runners[0])
        return [{'time': float(ratio), 'memory': cut / whole}]

    # What became of them

    def whole(self, work_dir: Path, test: bool = True) -> dict:
        """AP of a training's last checkpoint, and the filters that have collapsed."""
        reports = read_records(find_record(work_dir)).reports
        found = {
            'AP': scores_of(work_dir)[-1]['AP'],
            'collapsed': reports[-1]['total']['collapsed'],
        }
        if test:
            config = next(work_dir.glob('*.py'))
            for path in (work_dir / 'shrunk.py', work_dir / CELLS.name):
                config = path if path.exists() else config
            found['AP test'] = self.on_test(Cut(config, last_checkpoint(work_dir)))
        return found

    def on_test(self, files: Cut) -> float:
        """AP on the test set."""
        cfg = read_config(files.config)
        cfg.test_dataloader.dataset.ann_file = 'annotations/test.json'
        cfg.val_evaluator.ann_file = cfg.val_evaluator.ann_file.replace('val.json', 'test.json')
        with alone():
            model = built(cfg, files.checkpoint)
            return compare.scores_of(cfg, compare.dataset_of(cfg, 'test'), model)['coco/bbox_mAP']

    def measure(self, files: Cut) -> dict:
        """AP and sizes of a detector."""
        cfg = read_config(files.config)
        with alone():
            model, val = built(cfg, files.checkpoint), compare.dataset_of(cfg, 'val')
            adds = compare.multiply_adds(model, next(compare.images_of(val, 1)))
            ap = compare.scores_of(cfg, val, model)['coco/bbox_mAP']
        return {
            'AP pruned': ap,
            'multiply-adds pruned': adds,
            'backbone pruned': sum(p.numel() for p in model.backbone.parameters()),
        }

    def cut_of(self, work_dir: Path, test: bool = True) -> dict:
        """What pruning said of a training's last checkpoint, and AP on the test set."""
        text = (work_dir / 'train.txt').read_text()
        row: dict[str, Any] = {}
        for name, pattern in (
            ('multiply-adds', r'Multiply-adds of an image: ([\d,]+) -> ([\d,]+)'),
            ('AP', r'whole: coco/bbox_mAP ([\d.]+).*pruned: coco/bbox_mAP ([\d.]+)'),
        ):
            found = [float(n.replace(',', '')) for n in re.findall(pattern, text)[-1]]
            row[f'{name} whole'], row[f'{name} pruned'] = found
        lines = [line.split('│') for line in text.split('watched on')[-1].splitlines()]
        cells = [line[4:6] for line in lines if line[1:] and line[1].startswith(' backbone')]
        sums = [sum(int(c.replace(',', '')) for c in column) for column in zip(*cells)]
        row['backbone whole'], row['backbone pruned'] = sums
        times = re.findall(r'Time of the .*?: ([\d.]+)', text)
        row['time backbone'], row['time'] = map(float, times[-2:])
        row['difference'] = float(re.findall(r'differ by ([\d.e+-]+)', text)[-1])
        if test:
            row['AP test pruned'] = self.on_test(cut_files(work_dir))
        return row


def _bytes_of_step(runner: Any, step: Callable[[Any], None]) -> int:
    """What a step keeps for its backward pass, and parameters, gradients and momentum."""
    own = list(runner.model.train().parameters())
    kept = {param.data_ptr(): 3 * param.nbytes for param in own}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.data_ptr(), tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(runner)
    return sum(kept.values())


def train_once(config: Path, work_dir: Path, *flags: object, **options: object) -> None:
    """Train, if that has not ended, and its cut with it."""
    if not (work_dir / 'done').exists():
        train(config, work_dir, *flags, **options)
        (work_dir / 'done').touch()


def cut_files(work_dir: Path) -> Cut:
    """What --shrink has written."""
    (config,) = work_dir.glob('pruned_epoch_*/pruned.py')
    return Cut(config, config.with_suffix('.pth'))


@contextmanager
def alone() -> Iterator[None]:
    """In MMDetection's scope, without gradients; one thread at a time, since these are global."""
    with _LOCK, DefaultScope.overwrite_default_scope('mmdet'), torch.no_grad():
        yield


def built(cfg: Any, checkpoint: Path) -> Any:
    """The model of a config with a checkpoint's weights."""
    model = model_of_config(cfg).eval()
    model.load_state_dict(read_weights(checkpoint).state_dict)
    return model


# The rivals


class Features(nn.Module):
    """Backbone and neck, on an image."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        """The neck's outputs."""
        return self.model.extract_feat(x)


def kept_by(by: str, model: nn.Module, ratio: float) -> dict[str, dict[str, str]]:
    """What a pruner of Torch-Pruning keeps of a backbone."""
    import torch_pruning as tp

    net = Features(copy.deepcopy(model)).eval()
    for param in net.parameters():
        param.requires_grad_(True)
    names = {module: name[len('model.') :] for name, module in net.named_modules()}
    pruner, importance = {
        'gamma': (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance()),
        'magnitude': (tp.pruner.MetaPruner, tp.importance.GroupMagnitudeImportance(p=2)),
    }[by]
    pruner = pruner(
        net,
        torch.zeros(1, 3, 128, 128),
        importance=importance,
        pruning_ratio=ratio,
        max_pruning_ratio=0.99,
        global_pruning=True,
        ignored_layers=[
            module
            for module, name in names.items()
            if isinstance(module, nn.Conv2d) and not name.startswith('backbone')
        ],
    )
    gone: dict[tuple[str, str], set[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            name = names.get(dependency.target.module)
            if name is not None:
                is_out = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                gone.setdefault((name, 'outputs' if is_out else 'inputs'), set()).update(indices)
    kept: dict[str, dict[str, str]] = {}
    modules: Any = dict(model.named_modules())
    for (name, side), indices in gone.items():
        module = modules[name]
        size = module.num_features if hasattr(module, 'num_features') else None
        if size is None:
            size = module.weight.shape[0 if side == 'outputs' else 1]
        kept.setdefault(name, {})[side] = format_ranges(~np.isin(range(size), list(indices)))
    return kept


def cut_by(by: str, before: Path, target: float, out: Path) -> Cut:
    """Cut a training's last checkpoint by a pruner, to at most so many multiply-adds."""
    files = Cut(out / 'pruned.py', out / 'pruned.pth')
    if files.config.exists():
        return files
    cfg = read_config(next(before.glob('*.py')))
    cfg.custom_imports.imports, cfg.custom_hooks = ['psbn_mmdet'], []
    with alone():
        whole = built(cfg, last_checkpoint(before))
        data = next(compare.images_of(compare.dataset_of(cfg, 'val'), 1))
        low, high = 0.0, 0.99
        for _ in range(8):
            ratio = (low + high) / 2
            with torch.enable_grad():
                kept = kept_by(by, whole, ratio)
            pruned = narrow(copy.deepcopy(whole), kept)
            low, high = (
                (low, ratio) if compare.multiply_adds(pruned, data) <= target else (ratio, high)
            )
        with torch.enable_grad():
            kept = kept_by(by, whole, high)
    pruned = narrow(copy.deepcopy(whole), kept)
    prune.write(cfg, pruned, kept, out)
    return files


def plan_of_runs() -> Iterator[list[dict]]:
    """What is trained, within three hours: first what others start from."""
    tutorial = dict(epochs=6, rate=0.005)

    def rivals(seed: int) -> list[dict]:
        return [
            *(dict(kind='pruned', pruner=p, seed=seed) for p in PRUNERS),
            *(
                dict(kind='narrow', channels=c, pretrained=True, epochs=EPOCHS, seed=seed)
                for c in NARROW
            ),
        ]

    yield [dict(kind='shrunk', decay=0.1, epochs=EPOCHS, seed=seed) for seed in range(3)]
    yield [dict(kind='plain', epochs=EPOCHS, seed=seed) for seed in range(3)]
    yield [dict(kind='shrunk', decay=0.92, seed=seed, **tutorial) for seed in range(3)]
    yield [dict(kind='plain', seed=seed, **tutorial) for seed in range(3)]
    yield [dict(kind='from_scratch', times=50, seed=0)]
    yield [
        *(dict(kind='shrunk', decay=d, epochs=e, seed=0) for d in MAP for e in MAP[d]),
        *(dict(kind='plain', epochs=e, seed=0) for e in (6, 36)),
        dict(kind='again', seed=0),
        *(dict(kind='slimmed', l1=l1, seed=0) for l1 in L1),
        *rivals(0),
    ]
    yield [dict(kind='free', cut=cut, seed=seed) for seed in range(3) for cut in (False, True)]
    yield [dict(kind='costs')]
    yield [
        dict(kind='shrunk', decay=0.1, epochs=30, seed=1),
        dict(kind='plain', epochs=36, seed=1),
        *rivals(1),
    ]


def arm_of(record: dict) -> str:
    """The arm that a run's row is of."""
    again = f', {EPOCHS} epochs more' if record.get('trained again') else ', as cut'
    rate = ', lr 0.005' if record.get('rate') else ''
    return {
        'plain': f'plain, {record.get("epochs")} epochs{rate}',
        'shrunk': f'`--shrink {record.get("decay")}`, {record.get("epochs")} epochs{rate}',
        'again': f'`--shrink 0.1`, {EPOCHS} epochs, cut{again}',
        'pruned': f'{record.get("pruner")} of the plain one{again}',
        'slimmed': f'network slimming, L1 {record.get("l1")}{again}',
        'narrow': f'built with {record.get("channels")} channels, {record.get("epochs")} epochs',
        'from_scratch': f'demo from scratch, decay x {record.get("times")}',
        'free': f'lr 0.005, 6 epochs, {"cut first" if record.get("cut") else "whole"}',
    }[record['kind']]


def with_arms(records: Sequence[dict]) -> list[dict]:
    """The runs with their arms, in the order of the table."""
    runs = [{**record, 'arm': arm_of(record)} for record in records if record['kind'] != 'costs']
    order = ('plain', 'shrunk', 'again', 'pruned', 'slimmed', 'narrow', 'from_scratch', 'free')
    return sorted(
        runs,
        key=lambda r: (
            (order.index(r['kind']), r.get('rate', 1) != 1, -r.get('decay', 0))
            + (r.get('epochs', 0), r['arm'], r['seed'])
        ),
    )


STUDY = Study(
    'shrink',
    __doc__,
    [
        *OPTIONS,
        IMAGES,
        ('--start', str(ROOT / 'work_dirs/compare/bn/epoch_16.pth'), 'the pretrained detector'),
    ],
    contrasts={
        '`--shrink 0.1` over plain, 18 epochs': (
            '`--shrink 0.1`, 18 epochs',
            'plain, 18 epochs',
        ),
        '`--shrink 0.1`, 30 epochs, over plain, 36': (
            '`--shrink 0.1`, 30 epochs',
            'plain, 36 epochs',
        ),
        '`--shrink 0.92` over plain, 6 epochs at lr 0.005': (
            '`--shrink 0.92`, 6 epochs, lr 0.005',
            'plain, 6 epochs, lr 0.005',
        ),
        'cut first over whole': ('lr 0.005, 6 epochs, cut first', 'lr 0.005, 6 epochs, whole'),
    },
)


def compare_runs(records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """The cells, with sizes, and the contrasts."""
    records = with_arms(records)
    STUDY.arms = list(dict.fromkeys(record['arm'] for record in records))
    cells, contrasts = STUDY.compare(records)
    for cell in cells:
        mine = [record for record in records if record['arm'] == cell['arm']]
        for key in ('multiply-adds', 'backbone'):
            # The rivals are cut from the same detector as --shrink cuts.
            whole = next(r[f'{key} whole'] for r in records if f'{key} whole' in r)
            of = [
                r[f'{key} pruned'] / r.get(f'{key} whole', whole)
                for r in mine
                if f'{key} pruned' in r
            ]
            cell[key] = mean_of(of) if of else None
        for key in ('AP test', 'AP pruned', 'AP test pruned', 'collapsed', 'time backbone', 'time'):
            having = [record[key] for record in mine if record.get(key) is not None]
            cell[key] = mean_of(having) if having else None
    return cells, contrasts


def tell(result: dict) -> str:
    """Cells and contrasts as Markdown."""

    def shown(value: float | None, form: str) -> str:
        return '' if value is None else f'{value:{form}}'

    columns = {
        'AP': '.3f', 'AP test': '.3f', 'AP pruned': '.3f', 'collapsed': ',.0f',
        'backbone': '.1%', 'multiply-adds': '.2f', 'time backbone': '.2f', 'time': '.2f',
    }  # fmt: skip
    headings = (
        'AP', 'AP, test set', 'AP, cut', 'collapsed',
        'backbone left', 'multiply-adds', 'time, backbone', 'time',
    )  # fmt: skip
    first = markdown_table(
        ['', 'seeds', *headings],
        [
            [cell['arm'], cell['seeds'], *(shown(cell[key], f) for key, f in columns.items())]
            for cell in rows_of(result['cells'])
        ],
    )
    return first + '\n' + contrasts_table(rows_of(result['contrasts']), 'AP')


def draw(result: dict) -> Figure:
    """AP over multiply-adds, and over the parameters of the backbone."""
    cells = rows_of(result['cells'])
    figure = Figure(figsize=(11, 4.6), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    kinds = {  # what arms begin with: label, marker, line
        'plain': ('plain', 's', ''),
        '`--shrink 0.3': ('--shrink 0.3', 'o', '-'),
        '`--shrink 0.1': ('--shrink 0.1', 'o', '-'),
        '`--shrink 0.03': ('--shrink 0.03', 'o', '-'),
        'BNScalePruner': ('Torch-Pruning, gamma', '^', ''),
        'MagnitudePruner': ('Torch-Pruning, magnitude', 'v', ''),
        'network slimming': ('network slimming', 'D', ''),
        'built': ('built narrow', 'P', ''),
    }
    for (begin, (label, marker, line)), colour in zip(kinds.items(), PALETTE):
        mine = [
            cell
            for cell in cells
            if cell['arm'].startswith(begin) and not re.search('lr 0.005|, cut, ', cell['arm'])
        ]
        for ax, key in zip(axes, ('multiply-adds', 'backbone')):
            x = [1.0 if cell[key] is None else cell[key] for cell in mine]
            y = [cell['AP'] for cell in mine]
            ax.plot(x, y, line, color=colour, lw=1)
            for at, ap, cell in zip(x, y, mine):
                face = 'white' if 'as cut' in cell['arm'] else colour
                ax.plot(at, ap, marker, ms=7, mfc=face, color=colour)
                if line or begin == 'plain':
                    epochs = re.search(r'(\d+) epochs', cell['arm'])
                    ax.annotate(
                        epochs[1] if epochs else '',
                        (at, ap),
                        (6, -3),
                        textcoords='offset points',
                        fontsize=7,
                    )
        if mine:
            axes[0].plot([], [], marker, color=colour, label=label)
    axes[0].set_ylabel('AP, validation set (mean over seeds)')
    axes[0].set_xlabel('multiply-adds, of those of the whole detector')
    axes[1].set_xlabel("parameters, of those of the whole detector's backbone")
    axes[1].set_xscale('log')
    for ax in axes:
        ax.grid(alpha=0.3, lw=0.5, color=GREY)
    figure.legend(fontsize=8, loc='outside lower center', ncols=8)
    figure.suptitle(
        'Numbers are epochs. Other pruners: hollow as cut, filled after 18 epochs more (36 in all)',
        fontsize=9,
    )
    return figure


def main() -> None:
    """Train, cut, write."""
    STUDY.start()
    if photographs(STUDY) is None:
        return
    if not STUDY.args.finished and STUDY.lacks(Path(STUDY.args.start)):
        return
    runs = Shrinking(STUDY)

    def do(kind: str, **setting: Any) -> list[dict]:
        return getattr(runs, kind)(**setting)

    plan = plan_of_runs()
    if STUDY.quick:
        plan = iter([[dict(kind='shrunk', decay=0.9, epochs=1, seed=0)]])
    records = [r for settings in plan for r in STUDY.run(settings, do, int(STUDY.args.jobs))]
    records = list({str(record): record for record in records}.values())
    cells, contrasts = compare_runs(records)
    result = {'cells': table(cells), 'contrasts': table(contrasts), 'runs': table(records)}
    STUDY.publish(result, tell(result), draw(result))


if __name__ == '__main__':
    main()
