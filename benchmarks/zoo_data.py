"""The checks before a run, on every config of the zoo: none that MMDetection trains is refused.

Each config gets small data of the kind that it reads (COCO's format, its panoptic one, Pascal
VOC's), with all its classes; then the checks of tools/train.py are made, on the config and on what
is built from it. The model has no memory, since its heads alone are asked. Data of other kinds are
not made: there the checks of the config alone are made.

    python benchmarks/zoo_data.py                # all; writes benchmarks/results/zoo_data.json
    python benchmarks/zoo_data.py --match yolo   # those whose path has this in it, printed only
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

# Packages of some transforms, which are only asked to be there.
for name in ('transformers', 'panopticapi', 'panopticapi.utils', 'panopticapi.evaluation'):
    sys.modules[name] = MagicMock()

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402
from zoo import CONFIGS, said  # noqa: E402

from psbn_mmdet.commands.preflight import check_train_config  # noqa: E402
from psbn_mmdet.configs.model import build_model  # noqa: E402
from psbn_mmdet.configs.reading import (  # noqa: E402
    ConfigError,
    datasets_of,
    dicts,
    load_config,
    type_name,
)
from psbn_mmdet.hooks.data_check_hook import compare  # noqa: E402

OUT = ROOT / 'benchmarks/results/zoo_data.json'
SIDE = 64  # pixels of an image
URL = 'http://images.cocodataset.org/'  # LVIS takes names from it


def coco(classes: list[str], things: int, is_panoptic: bool) -> dict:
    """Annotations of one image, with one object of each class."""
    box = dict(bbox=[8, 8, 32, 32], area=1024, iscrowd=0)
    objects = [dict(box, id=i + 1, category_id=i + 1) for i in range(len(classes))]
    polygon = [[8, 8, 40, 8, 40, 40, 8, 40]]
    if is_panoptic:
        annotations = [dict(image_id=1, file_name='1.png', segments_info=objects)]
    else:
        annotations = [dict(o, image_id=1, segmentation=polygon) for o in objects]
    return dict(
        images=[dict(id=1, file_name='1.jpg', coco_url=f'{URL}1.jpg', width=SIDE, height=SIDE)],
        annotations=annotations,
        categories=[
            dict(id=i + 1, name=name, supercategory='all', isthing=int(i < things))
            for i, name in enumerate(classes)
        ],
    )


def voc(folder: Path, classes: list[str]) -> None:
    """The same in the format of Pascal VOC."""
    box = '<bndbox><xmin>8</xmin><ymin>8</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>'
    objects = ''.join(
        f'<object><name>{name}</name><difficult>0</difficult>{box}</object>' for name in classes
    )
    size = f'<size><width>{SIDE}</width><height>{SIDE}</height></size>'
    (folder / 'Annotations').mkdir(exist_ok=True)
    (folder / 'Annotations/1.xml').write_text(f'<annotation>{size}{objects}</annotation>')
    (folder / 'list.txt').write_text('1\n')


def fit(cfg: Config, folder: Path) -> bool:
    """Make data for a config, and set it to them; False if some are of another kind."""
    image = np.full((SIDE, SIDE, 3), 100, np.uint8)
    (folder / 'JPEGImages').mkdir()
    for file in (folder / '1.jpg', folder / '1.png', folder / 'JPEGImages/1.jpg'):
        cv2.imwrite(str(file), image)
    is_known, file_of = True, {}
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope') or 'mmdet') as registry:
        for stage in ('train', 'val'):
            loader = cfg.get(f'{stage}_dataloader') or {}
            for path, dataset in datasets_of(loader.get('dataset'), stage):
                cls = registry.get(dataset['type'])
                bases = {base.__name__ for base in getattr(cls, '__mro__', ())}
                meta = {**getattr(cls, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
                classes = list(meta.get('classes') or ())
                if cls.__name__ in ('VOCDataset', 'XMLDataset') and classes:
                    voc(folder, classes)
                    ann_file, prefix = 'list.txt', dict(sub_data_root='')
                elif 'CocoDataset' in bases and classes:
                    things = len(meta.get('thing_classes', classes))
                    content = coco(classes, things, 'CocoPanopticDataset' in bases)
                    ann_file, prefix = f'{path}.json', dict(dataset.get('data_prefix') or {})
                    (folder / ann_file).write_text(json.dumps(content))
                else:
                    is_known = False
                    continue
                dataset.update(
                    data_root=f'{folder}/', ann_file=ann_file, data_prefix=dict.fromkeys(prefix, '')
                )
                dataset.pop('proposal_file', None)
                file_of[stage] = str(folder / ann_file)
        for _, metric in dicts(cfg.get('val_evaluator'), ''):
            if metric.get('ann_file'):
                metric['ann_file'] = file_of.get('val', metric['ann_file'])
    for _, part in dicts(cfg.model, ''):
        if 'num_cp' in part:  # checkpointing, by one more package
            part['num_cp'] = 0
        for _, init_cfg in dicts(part.get('init_cfg'), ''):
            if type_name(init_cfg) == 'Pretrained':
                part['init_cfg'] = None
    cfg.load_from = None
    return is_known


class NoBert(nn.Module):
    """In place of the text model of the Grounding DINOs, whose weights are a download."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.language_backbone = SimpleNamespace(body=SimpleNamespace(language_dim=768))


def built_on_meta(cfg: Config) -> nn.Module:
    """A config's model, if it can be without memory."""
    try:
        with torch.device('meta'):
            return build_model(cfg)
    except ConfigError:  # what reads values while it is built
        return build_model(cfg)


def metrics_of(given: Any) -> list:
    """Those that can be built; some want packages that are no part of MMDetection."""
    metrics = []
    for metric in given if isinstance(given, list) else [given]:
        with suppress(ImportError, RuntimeError, KeyError):  # MMDetection raises either
            metrics.append(METRICS.build(metric))
    return metrics


def checked(cfg: Config) -> tuple[str, list[str]]:
    """What became of a config, and what is said of it."""
    with tempfile.TemporaryDirectory() as folder:
        is_known = fit(cfg, Path(folder))
        try:
            if not is_known:
                for stage in ('train', 'val'):
                    cfg[f'{stage}_dataloader'] = cfg[f'{stage}_evaluator'] = None
            check_train_config(cfg)
        except ConfigError as error:
            return 'refused', [said(error)]
        if not is_known:
            return 'no data made', []
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmdet'):
            try:
                built: dict[str, Any] = {}
                for stage in ('train', 'val'):
                    loader = cfg.get(f'{stage}_dataloader')
                    if loader:
                        metrics = metrics_of(cfg.get(f'{stage}_evaluator') or [])
                        built[stage] = DATASETS.build(loader.dataset), metrics
                model = built_on_meta(cfg)
            except Exception as error:  # whatever libraries raise
                return 'cannot be built', [said(error)]
            try:
                warned = list(compare(model, built))
            except ConfigError as error:
                return 'refused', [said(error)]
    return ('warned of' if warned else 'fits'), warned


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print."""
    with open(os.devnull, 'w') as null, redirect_stdout(null), redirect_stderr(null):
        yield


def main() -> int:
    """Go through the zoo."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--match', default='', help='only configs whose path has this in it')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    MODELS.register_module('mmdet.BertModel', module=NoBert, force=True)
    rows = []
    for path in tqdm(sorted(CONFIGS.rglob('*.py')), 'configs'):
        name = str(path.relative_to(CONFIGS))
        if '_base_' in path.parts or args.match not in name:
            continue
        with quiet():
            try:
                cfg = load_config(str(path))
                found, says = checked(cfg) if cfg.get('model') else ('no model', [])
            except Exception as error:  # whatever configs raise
                found, says = 'cannot be loaded', [said(error)]
        rows.append({'config': name, 'found': found, 'says': says})
    counts = Counter(row['found'] for row in rows)
    for found, count in counts.most_common():
        print(f'{count} {found}')
    for row in rows:
        if args.match or row['found'] == 'refused':
            print(row['config'], row['found'], *row['says'], sep='\n    ')
    if not args.match:
        why: dict[str, list[str]] = {}
        for row in rows:
            if row['found'] != 'fits':
                why.setdefault(': '.join([row['found'], *row['says']]), []).append(row['config'])
        OUT.write_text(json.dumps({'found': counts, 'configs': why}, indent=1) + '\n')
    return 1 if any(row['found'] == 'refused' for row in rows) else 0


if __name__ == '__main__':
    sys.exit(main())
