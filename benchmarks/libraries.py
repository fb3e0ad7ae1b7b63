"""tools/train.py on a config of each library on MMEngine, by its name, for some steps with psBN.

Each library that can be imported trains on random images that it is given in its own format; the
checks before a run, the switch, the counts and the record are those of a user. Set-up, beside
MMDetection: `pip install --no-deps` of mmyolo, mmsegmentation, mmpose, mmrotate and mmpretrain, in
the versions that fit the stack, and of what they import.

    python benchmarks/libraries.py    # writes benchmarks/results/libraries_STACK.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psbn_mmdet.records import read_records  # noqa: E402
from psbn_mmdet.report import find_record  # noqa: E402

SIDE = 64  # pixels
LOADER = 'num_workers=0, persistent_workers=False, batch_size=2'
SHORT = """
default_hooks = dict(logger=dict(interval=1))
custom_imports = dict(imports=['psbn_mmdet'])
load_from = None
"""


def images(folder: Path, number: int = 4) -> None:
    """Random images, and classes of their pixels, 0 and 1."""
    rng = np.random.default_rng(0)
    for part in ('a', 'b'):
        (folder / part).mkdir()
        for index in range(number):
            name = str(folder / part / f'{index}.png')
            cv2.imwrite(name, rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    (folder / 'masks').mkdir()
    for index in range(number):
        mask = rng.integers(0, 2, (SIDE, SIDE), np.uint8)
        cv2.imwrite(str(folder / 'masks' / f'{index}.png'), mask)


def coco(folder: Path, keypoints: int = 0) -> None:
    """Annotations in the format of COCO: a box in each image, maybe with keypoints."""
    points = [20, 20, 2] * keypoints
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', width=SIDE, height=SIDE) for i in range(4)],
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=1,
                bbox=[8, 8, 40, 40],
                area=1600,
                iscrowd=0,
                segmentation=[],
                **(dict(keypoints=points, num_keypoints=keypoints) if keypoints else {}),
            )
            for i in range(4)
        ],
        categories=[dict(id=1, name='person', supercategory='all')],
    )
    (folder / 'ann.json').write_text(json.dumps(content))


def mmyolo(folder: Path) -> tuple[str, str]:
    """YOLOv5, which has losses of its own and an optimiser by kinds of parameters."""
    coco(folder)
    return (
        'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
        f"""
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='mmdet.PackDetInputs')
]
train_dataloader = dict({LOADER}, dataset=dict(
    data_root='{folder}/', ann_file='ann.json', data_prefix=dict(img='a/'), pipeline=pipeline,
    metainfo=dict(classes=('person',))))
val_dataloader = val_evaluator = val_cfg = test_dataloader = test_evaluator = test_cfg = None
model = dict(bbox_head=dict(head_module=dict(num_classes=1)))
train_cfg = dict(max_epochs=1, _delete_=True, by_epoch=True)
""",
    )


def mmseg(folder: Path) -> tuple[str, str]:
    """FCN, whose training counts iterations."""
    return (
        'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        f"""
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')
]
train_dataloader = dict({LOADER}, dataset=dict(
    _delete_=True, type='BaseSegDataset', data_root='{folder}/', img_suffix='.png',
    data_prefix=dict(img_path='a', seg_map_path='masks'), pipeline=pipeline,
    metainfo=dict(classes=('no', 'yes'), palette=[[0, 0, 0], [255, 0, 0]])))
val_dataloader = val_evaluator = val_cfg = test_dataloader = test_evaluator = test_cfg = None
model = dict(pretrained=None, decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2),
             data_preprocessor=dict(size=({SIDE}, {SIDE})))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2)
""",
    )


def mmpose(folder: Path) -> tuple[str, str]:
    """A heat map of keypoints behind a ResNet-50."""
    coco(folder, keypoints=17)
    return (
        'body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py',
        f"""
train_dataloader = dict({LOADER}, dataset=dict(
    data_root='{folder}/', ann_file='ann.json', data_prefix=dict(img='a/')))
val_dataloader = val_evaluator = val_cfg = test_dataloader = test_evaluator = test_cfg = None
model = dict(backbone=dict(init_cfg=None))
train_cfg = dict(max_epochs=1)
""",
    )


def mmrotate(folder: Path) -> tuple[str, str]:
    """A rotated RetinaNet, whose annotations are a folder of texts."""
    (folder / 'labels').mkdir()
    for index in range(4):
        box = '8 8 40 8 40 40 8 40 plane 0\n'
        (folder / f'labels/{index}.txt').write_text(box)
    return (
        'rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py',
        f"""
train_dataloader = dict({LOADER}, dataset=dict(
    data_root='{folder}/', ann_file='labels/', data_prefix=dict(img_path='a/')))
val_dataloader = val_evaluator = val_cfg = test_dataloader = test_evaluator = test_cfg = None
model = dict(backbone=dict(init_cfg=None))
train_cfg = dict(max_epochs=1)
""",
    )


def mmpretrain(folder: Path) -> tuple[str, str]:
    """A ResNet-18 that tells two folders of images apart."""
    return (
        'resnet/resnet18_8xb32_in1k.py',
        f"""
train_dataloader = dict({LOADER}, dataset=dict(
    _delete_=True, type='CustomDataset', data_root='{folder}/', data_prefix='',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
val_dataloader = val_evaluator = val_cfg = test_dataloader = test_evaluator = test_cfg = None
model = dict(head=dict(num_classes=3))
train_cfg = dict(max_epochs=1)
""",
    )


LIBRARIES: dict[str, Callable[[Path], tuple[str, str]]] = {
    function.__name__: function for function in (mmyolo, mmseg, mmpose, mmrotate, mmpretrain)
}


def without_torchvision(folder: Path) -> None:
    """MMPretrain imports names of torchvision, which has no CPU build for each torch."""
    try:
        importlib.import_module('torchvision')
    except (ImportError, RuntimeError):
        package = folder / 'torchvision'
        for name in ('ops', 'transforms'):
            (package / name).mkdir(parents=True)
        names = '__version__ = "none"\ndef __getattr__(name): return object\n'
        for part in ('', 'ops/', 'transforms/'):
            (package / f'{part}__init__.py').write_text(names)
        for part in ('ops/boxes', 'transforms/functional', 'transforms/transforms'):
            (package / f'{part}.py').write_text(names)


def trained(library: ModuleType, folder: Path) -> dict:
    """What became of a training."""
    name = library.__name__
    row = {'library': name, 'version': library.__version__}
    images(folder)
    config = folder / f'{name}_small.py'
    row['config'], text = LIBRARIES[name](folder)
    base = Path(library.__file__).parent / '.mim/configs' / row['config']
    config.write_text(f"_base_ = '{base}'\n{text}{SHORT}")
    run = subprocess.run(
        [sys.executable, ROOT / 'tools/train.py', config, '--norm', 'psBN'],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    lines = (run.stdout + run.stderr).splitlines()
    row['switched'] = [line.strip() for line in lines if ' -> psBN' in line or ' left ' in line]
    if run.returncode:
        return {**row, 'failed': lines[-1][-300:]}
    report = read_records(find_record(folder / 'work_dirs' / config.stem)).reports[-1]
    warnings = [
        line.split('WARNING - ')[1] for line in lines if 'Hook: ' in line and 'WARN' in line
    ]
    return {**row, 'iterations': report['iter'], 'total': report['total'], 'warnings': warnings}


def main() -> int:
    """Train with each that is there."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', choices=LIBRARIES, help='one library, printed only')
    parser.add_argument('--stack', default='onedl', help='for the name of the file')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as stubs:
        without_torchvision(Path(stubs))
        sys.path.append(stubs)
        os.environ['PYTHONPATH'] = os.pathsep.join([os.environ.get('PYTHONPATH', ''), stubs])
        for name in [args.only] if args.only else LIBRARIES:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    library = importlib.import_module(name)
                except (ImportError, AssertionError) as error:  # they assert versions
                    print(f'{name}: {error}')
                    continue
                rows.append(trained(library, Path(folder)))
                print(json.dumps(rows[-1], indent=1))
    if not args.only:
        out = ROOT / f'benchmarks/results/libraries_{args.stack}.json'
        out.write_text(json.dumps(rows, indent=1) + '\n')
    return 1 if any('failed' in row for row in rows) else 0


if __name__ == '__main__':
    sys.exit(main())
