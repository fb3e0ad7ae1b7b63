from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from pycocotools.coco import COCO

DEMO = Path(__file__).resolve().parents[1] / 'demo'
spec = importlib.util.spec_from_file_location('make_dataset', DEMO / 'make_dataset.py')
demo_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo_data)

TINY = dict(num_train=3, num_val=2, image_size=64)
SPLITS = ('train', 'val')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('data') / 'demo'
    return demo_data.make_dataset(out_dir, num_train=60, num_val=15)


def boxes_of(coco):
    """All boxes as (x1, y1, x2, y2), by image."""
    return {
        image_id: np.array([[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in anns)])
        for image_id, anns in coco.imgToAnns.items()
    }


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize(('split', 'count'), [('train', 60), ('val', 15)])
def test_pycocotools_loads_what_lies_on_disk(folder, split, count):
    coco = COCO(folder / 'annotations' / f'{split}.json')
    assert len(coco.imgs) == count
    assert set(coco.imgToAnns) == set(coco.imgs)  # no image without an object
    for image in coco.imgs.values():
        pixels = cv2.imread(str(folder / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)


@pytest.mark.parametrize('split', SPLITS)
def test_every_class_is_in_both_splits(folder, split):
    coco = COCO(folder / 'annotations' / f'{split}.json')
    names = [coco.cats[a['category_id']]['name'] for a in coco.anns.values()]
    assert set(names) == set(demo_data.CLASSES)


def test_objects_are_small_medium_and_large_as_coco_has_it(folder):
    areas = [a['area'] for a in COCO(folder / 'annotations/train.json').anns.values()]
    counts = np.histogram(areas, [0, 32**2, 96**2, 192**2])[0]
    assert counts.sum() == len(areas)
    assert (counts > 0.01 * len(areas)).all()


@pytest.mark.parametrize('split', SPLITS)
def test_boxes_lie_inside_the_image_and_some_overlap(folder, split):
    overlaps = 0
    for boxes in boxes_of(COCO(folder / 'annotations' / f'{split}.json')).values():
        assert (boxes >= 0).all() and (boxes <= 192).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 3).all()
        overlaps += sum(
            (np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all()
            for a, b in combinations(boxes, 2)
        )
    assert overlaps > 10


def test_boxes_fit_the_visible_pixels_tightly(folder):
    coco = json.loads((folder / 'annotations/train.json').read_text())
    _, labels, masks = demo_data.draw_scene(np.random.default_rng([0, 0, 5]), 192)
    annotations = [a for a in coco['annotations'] if a['image_id'] == 5]
    assert [a['category_id'] - 1 for a in annotations] == labels
    for annotation, mask in zip(annotations, masks):
        x, y, w, h = annotation['bbox']
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        assert (x, y) == (columns[0], rows[0])
        assert (x + w, y + h) == (columns[-1] + 1, rows[-1] + 1)
        assert annotation['area'] == mask.sum()


def test_annotated_pixels_are_where_the_object_was_painted(folder, monkeypatch):
    rng = [0, 0, 5]
    with_objects, labels, masks = demo_data.draw_scene(np.random.default_rng(rng), 192)
    with monkeypatch.context() as patch:
        patch.setattr(demo_data, 'MIN_VISIBLE', 2)  # nothing can be seen twice over
        without, none, _ = demo_data.draw_scene(np.random.default_rng(rng), 192)
    assert labels and not none
    changed = np.abs(with_objects.astype(int) - without).sum(axis=2)
    seen = masks.any(axis=0)
    rim = cv2.dilate(seen.astype(np.uint8), np.ones((3, 3))) > 0
    assert np.median(changed[seen]) > 2 * np.median(changed[~rim])


def test_hidden_objects_are_left_out(monkeypatch):
    alphas = []
    rasterise = demo_data._rasterise
    monkeypatch.setattr(
        demo_data, '_rasterise', lambda *args: alphas.append(rasterise(*args)) or alphas[-1]
    )
    for seed in range(20):
        alphas.clear()
        _, _, masks = demo_data.draw_scene(np.random.default_rng(seed), 96)
        for mask in masks:
            # Each object lies within one of the drawn shapes and shows a good part of it.
            shown = [mask.sum() / (a > 0.5).sum() for a in alphas if not (mask & (a <= 0.5)).any()]
            assert max(shown) > 0.25


def test_same_arguments_give_the_same_bytes(tmp_path):
    first = demo_data.make_dataset(tmp_path / 'a', **TINY)
    second = demo_data.make_dataset(tmp_path / 'b', **TINY)
    assert contents(first) == contents(second)


def test_another_seed_gives_other_images(tmp_path):
    first = demo_data.make_dataset(tmp_path / 'a', **TINY)
    second = demo_data.make_dataset(tmp_path / 'b', **TINY, seed=1)
    assert not set(contents(first).values()) & set(contents(second).values())


def test_a_second_run_writes_nothing(tmp_path):
    folder = demo_data.make_dataset(tmp_path / 'demo', **TINY)
    times = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    demo_data.make_dataset(folder, **TINY)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == times


def test_other_arguments_replace_the_set(tmp_path):
    folder = demo_data.make_dataset(tmp_path / 'demo', **TINY)
    demo_data.make_dataset(folder, **{**TINY, 'num_train': 1})
    assert len(list((folder / 'train').iterdir())) == 1
    assert len(COCO(folder / 'annotations/train.json').imgs) == 1


def test_an_interrupted_run_is_not_taken_as_complete(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data.cv2, 'imwrite', interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_data.make_dataset(tmp_path / 'demo', **TINY)
    monkeypatch.undo()
    assert not (tmp_path / 'demo').exists()

    folder = demo_data.make_dataset(tmp_path / 'demo', **TINY)
    assert contents(folder) == contents(demo_data.make_dataset(tmp_path / 'whole', **TINY))
    assert {p.name for p in tmp_path.iterdir()} == {'demo', 'whole'}


@pytest.mark.parametrize('lost', ['train/00001.jpg', 'annotations/val.json'])
def test_a_damaged_set_is_made_anew(tmp_path, lost):
    folder = demo_data.make_dataset(tmp_path / 'demo', **TINY)
    before = contents(folder)
    (folder / lost).unlink()
    assert contents(demo_data.make_dataset(folder, **TINY)) == before


def test_files_of_others_are_not_deleted(tmp_path):
    precious = tmp_path / 'annotations' / 'train.json'
    precious.parent.mkdir()
    precious.write_text('{"images": []}')
    with pytest.raises(FileExistsError, match='not a generated set'):
        demo_data.make_dataset(tmp_path, **TINY)
    assert precious.read_text() == '{"images": []}'


def test_a_wrong_number_ends_in_one_sentence(tmp_path):
    command = [sys.executable, DEMO / 'make_dataset.py', tmp_path / 'demo', '--num-val', '0']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == 'error: make_dataset: num_val must be at least 1, got 0\n'


def test_the_demo_configs_know_the_classes_and_differ_in_norm_and_recovery_alone():
    psbn = Config.fromfile(DEMO / 'faster-rcnn_r18_fpn_psbn_demo.py')
    bn = Config.fromfile(DEMO / 'faster-rcnn_r18_fpn_bn_demo.py')
    assert psbn.metainfo.classes == demo_data.CLASSES
    assert psbn.model.roi_head.bbox_head.num_classes == len(demo_data.CLASSES)
    assert [hook.type for hook in psbn.custom_hooks] == ['CollapseHook', 'RecoveryHook']
    del psbn.custom_hooks[1]
    assert psbn.pretty_text.replace("'psBN'", "'BN'") == bn.pretty_text
