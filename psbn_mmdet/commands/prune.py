"""Cut the closed filters out of a checkpoint's network without changing what it computes.

Watches the network on training and validation images, cuts the filters that were never open and
what reads them, compares both networks on the validation set, and writes DIR/pruned.pth and
DIR/pruned.py for testing, further training and inference. Writes nothing if there is nothing to
cut, or if the outputs differ by more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from rich.console import Console
from rich.table import Table
from torch import nn

from ..checkpoints import CheckpointError, Weights, read_weights, write_content
from ..collapse import census_of_state_dict
from ..configs.model import model_of_config, structure_of_config
from ..configs.norm_switch import import_package
from ..configs.reading import dicts, is_pretrained, load_config
from ..layers import find_norm_states
from ..pruning import MARGIN, ChannelTrace, cut_out, plan
from ..pruning.compare import (
    by_stage,
    dataset_of,
    images_of,
    largest_difference,
    multiply_adds,
    scores_of,
    time_ratio,
)
from ..records.atomic import replacing
from . import complain, say

ROUNDING = 1e-5  # of the largest value


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, prune, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a PyTorch or safetensors file')
    parser.add_argument('--config', required=True, help='of its training: the model and the data')
    parser.add_argument('-o', '--out', required=True, metavar='DIR', help='where to write')
    parser.add_argument('--images', type=int, default=500, help='of the training set, to watch on')
    parser.add_argument(
        '--margin',
        type=float,
        default=MARGIN,
        help='how far below 0, in its own standard deviations, the largest value must be',
    )
    parser.add_argument('--force', action='store_true', help='write also if the outputs differ')
    args = parser.parse_args(argv)
    try:
        lines = prune(args)
    except (OSError, ValueError) as error:
        return complain('prune', error)
    say('\n'.join(lines))
    return 0


def prune(args: argparse.Namespace) -> list[str]:
    """What was cut, and what to run next.

    Raises:
        ValueError: If checkpoint and config do not match, or the outputs differ.
        OSError: If a file cannot be read or written.
    """
    if args.images < 1:
        raise ValueError(f'--images must be at least 1, got {args.images}')
    out = Path(args.out)
    for name in ('pruned.pth', 'pruned.py'):
        if (out / name).exists():
            raise ValueError(f'{out / name} exists and is not overwritten: give another -o')
    cfg = load_config(args.config)
    weights = read_weights(args.checkpoint)
    with (
        DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'),
        redirect_stdout(StringIO()),  # what data sets and evaluators print
        torch.no_grad(),
    ):
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        whole: Any = model_of_config(cfg).eval()
        _load(whole, weights.state_dict, args)
        val = dataset_of(cfg, 'val')
        trace, cuts = ChannelTrace(whole), []
        for data, count in ((dataset_of(cfg, 'train'), args.images), (val, len(val))):
            with trace:
                for image in images_of(data, count):
                    whole.test_step(image)
            cuts.append(plan(trace, whole, args.margin))
        first, cut = cuts
        reopened = {trace.root(channel) for channel in first.gone} - cut.gone
        left = [
            f'  {_by_parameters(cfg, weights)} by their parameters alone, as tools/audit.py counts',
            f'  {cut.held} closed channels stay: not closed by the margin of {args.margin:g}',
            f'  {len(reopened)} channels stay: closed on the training images, but not on the '
            'validation set',
            *(f'  {count} closed channels stay: {why}' for why, count in cut.left.items()),
        ]
        if not cut.kept:
            return [f'{args.checkpoint}: nothing to cut', *left]
        pruned = cut_out(whole, trace, cut)
        images = images_of(val, len(val))
        difference = max((largest_difference(whole, pruned, data) for data in images), default=0.0)
        if difference > ROUNDING and not args.force:
            raise ValueError(
                f'the outputs differ by up to {difference:.1e} of the largest value on the '
                'validation set, more than rounding: the model computes something else in each '
                'pass, or uses channels in a way that is not known: give --force to write it anyway'
            )
        scores = [scores_of(cfg, val, model) for model in (whole, pruned)]
        table = _table(val, whole, pruned)
        write(cfg, pruned, cut.kept, out)
    ap = [', '.join(f'{name} {value:.3f}' for name, value in s.items()) for s in scores]
    return [
        f'{args.checkpoint}, watched on {args.images} training images:',
        table,
        *left,
        f'On the validation set the outputs differ by {difference:.1e} of the largest value; '
        f'whole: {ap[0]}; pruned: {ap[1]}.',
        f'Test it:     python tools/test.py {out}/pruned.py {out}/pruned.pth',
        f'Train it on: python tools/train.py {out}/pruned.py',
        f'Look again:  python tools/audit.py {out}/pruned.pth --config {out}/pruned.py',
    ]


def _by_parameters(cfg: Config, weights: Weights) -> str:
    """The filters that look closed without a pass."""
    names = find_norm_states(weights.state_dict)
    census = census_of_state_dict(
        weights.state_dict,
        rectifiers=structure_of_config(cfg, names).rectifiers,
        unstarted=weights.unstarted,
    )
    vanished, dead = (census.count(kind) or 0 for kind in ('vanished', 'dead'))
    return f'{vanished:,} filters are vanished, {dead:,} dead'


def _load(model: nn.Module, weights: Any, args: argparse.Namespace) -> None:
    own = model.state_dict()
    wrong = [
        name
        for name, value in own.items()
        if not name.endswith('num_batches_tracked')
        and getattr(weights.get(name), 'shape', None) != value.shape
    ]
    if wrong:
        raise CheckpointError(
            f'{args.checkpoint} has no {wrong[0]} of the shape that the model of {args.config} '
            'has: give the config that it was trained with'
        )
    model.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)


def _table(val: Any, whole: Any, pruned: Any) -> str:
    table = Table()
    table.add_column('stage')
    for name in ('filters', 'pruned', 'parameters', 'pruned', 'kept'):
        table.add_column(name, justify='right')
    rows = [by_stage(model) for model in (whole, pruned)]
    for stage, (filters, parameters) in rows[0].items():
        less = rows[1][stage]
        share = f'{less[1] / max(parameters, 1):.1%}'
        table.add_row(
            stage, f'{filters:,}', f'{less[0]:,}', f'{parameters:,}', f'{less[1]:,}', share
        )
    sums = [[sum(row[i] for row in by.values()) for by in rows] for i in (0, 1)]
    table.add_section()
    share = f'{sums[1][1] / sums[1][0]:.1%}'
    table.add_row('all', *(f'{n:,}' for pair in sums for n in pair), share)
    text = StringIO()
    Console(file=text, width=110).print(table)
    data = next(images_of(val, 1))
    image = whole.data_preprocessor(copy.deepcopy(data), False)['inputs']
    adds = [multiply_adds(model, data) for model in (whole, pruned)]
    lines = [text.getvalue().rstrip(), f'Multiply-adds of an image: {adds[0]:,} -> {adds[1]:,}.']
    for name, run in (
        ('backbone', lambda model: model.backbone(image)),
        ('whole network', lambda model: model.test_step(data)),
    ):
        low, middle, high = time_ratio(run, pruned, whole)
        lines.append(
            f'Time of the {name}: {middle:.2f} of the whole (quartiles {low:.2f}, {high:.2f}).'
        )
    return '\n'.join(lines)


def write(cfg: Config, pruned: nn.Module, kept: dict, out: Path) -> None:
    """The weights, and a config of their own."""
    cfg = copy.deepcopy(cfg)
    own = dict(cfg.model)
    for _, part in dicts(own, ''):
        for _, init_cfg in dicts(part.get('init_cfg'), ''):
            if is_pretrained(init_cfg):
                part['init_cfg'] = None  # of the whole network
    whole_type = own.pop('type')
    cfg.model = ConfigDict(type='PrunedModel', whole_type=whole_type, kept=kept, **own)
    cfg.load_from = str(out.resolve() / 'pruned.pth')
    import_package(cfg)
    out.mkdir(parents=True, exist_ok=True)
    write_content({'state_dict': pruned.state_dict(), 'meta': {}}, out / 'pruned.pth')
    with replacing(out / 'pruned.py') as file:
        file.write_text(cfg.pretty_text, encoding='utf-8')
