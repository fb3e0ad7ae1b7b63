"""What the data check refuses before a run, what it warns of, and what it lets pass."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.models import RPNHead
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn

from psbn_mmdet.configs.reading import ConfigError, load_config
from psbn_mmdet.hooks import data_check_hook
from psbn_mmdet.hooks.data_check_hook import explain

CLASSES = ('disc', 'square', 'triangle', 'cross')


@pytest.fixture(scope='module')
def content(coco_root) -> dict:
    """The annotation files, by stage."""
    return {
        s: json.loads((coco_root / f'annotations/{s}.json').read_text()) for s in ('train', 'val')
    }


@pytest.fixture(scope='module')
def loaded_cfg(shrink) -> Config:
    cfg = load_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    cfg.custom_hooks = [dict(type='CollapseHook'), dict(type='DataCheckHook')]
    shrink(cfg)
    cfg.merge_from_dict(
        {
            'model.backbone.base_channels': 8,
            'model.neck.in_channels': [8, 16, 32, 64],
            'model.neck.out_channels': 8,
            'model.bbox_head.in_channels': 8,
            'model.bbox_head.feat_channels': 8,
            'train_cfg.max_epochs': 0,
        }
    )
    cfg.visualizer = None
    return cfg


@pytest.fixture
def data(loaded_cfg, content, tmp_path) -> Data:
    return Data(deepcopy(loaded_cfg), deepcopy(content), tmp_path)


def failure(run: Callable) -> Exception:
    """Whatever it raises."""
    try:
        run()
    except Exception as error:
        return error
    pytest.fail('nothing was raised')


class Data:
    """A training of no epoch, whose files can be changed before it."""

    def __init__(self, cfg: Config, content: dict, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.train, self.val = content['train'], content['val']
        self.sets = {stage: cfg[f'{stage}_dataloader'].dataset for stage in ('train', 'val')}
        for stage, dataset in self.sets.items():
            dataset.ann_file = str(folder / f'{stage}.json')
        cfg.val_evaluator.ann_file = self.sets['val'].ann_file

    def run(self) -> list[str]:
        """What is warned of."""
        (self.folder / 'train.json').write_text(json.dumps(self.train))
        (self.folder / 'val.json').write_text(json.dumps(self.val))
        return self.run_as_it_is()

    def run_as_it_is(self) -> list[str]:
        """With the files that are there."""
        self.cfg.work_dir = str(self.folder / uuid.uuid4().hex)
        Runner.from_cfg(self.cfg).train()
        (log,) = Path(self.cfg.work_dir).glob('*/*.log')
        return [line for line in log.read_text().splitlines() if 'DataCheckHook: ' in line]

    def refusal(self) -> str:
        return self.sentence(failure(self.run))

    def sentence(self, error: Exception) -> str:
        """As the tools give it."""
        known = error if isinstance(error, ConfigError) else explain(error, self.cfg)
        assert known is not None, error
        assert '\n' not in str(known) and not str(known).endswith('.')
        return str(known)

    def rename(self, **names: str) -> None:
        for category in [*self.train['categories'], *self.val['categories']]:
            category['name'] = names.get(category['name'], category['name'])

    def classes(self, *names: str) -> None:
        for dataset in self.sets.values():
            dataset.metainfo = dict(classes=names)


def test_what_fits_passes_in_silence(data):
    assert data.run() == []


# Names and order of the categories


def test_categories_that_are_none_of_the_classes(data):
    data.rename(**{name: name.upper() for name in CLASSES})
    sentence = data.refusal()
    assert "metainfo.classes ('disc', 'square', 'triangle', 'cross') has none of" in sentence
    assert "set train_dataloader.dataset.metainfo=dict(classes=('DISC', 'SQUARE'," in sentence
    for dataset in data.sets.values():
        del dataset['metainfo']
    sentence = data.refusal()
    assert 'and 74 more), which it has by default, has none of the categories of' in sentence


def test_classes_in_another_order_than_the_file(data):
    data.classes('square', 'disc', 'triangle', 'cross')
    sentence = data.refusal()
    assert (
        "'disc' is class 1 of train_dataloader.dataset.metainfo.classes, but class 0 of" in sentence
    )


def test_a_class_without_category_shifts_those_behind_it(data):
    data.classes('disc', 'ring', 'square', 'triangle', 'cross')
    data.cfg.model.bbox_head.num_classes = 5
    assert "'square' is class 2 of train_dataloader" in data.refusal()
    data.classes(*CLASSES, 'ring')
    (line, other) = data.run()  # one for each file
    assert "has 'ring', not among the categories" in line and 'val.json' in other


def test_another_order_in_the_validation(data):
    data.val['categories'].reverse()
    assert f'class 0 of {data.sets["val"].ann_file}: labels go by the' in data.refusal()
    data.sets['val'].metainfo = dict(classes=CLASSES[::-1])
    words = 'class 3 of train_dataloader.dataset.metainfo.classes, but class 0 of val_dataloader'
    assert words in data.refusal()


def test_another_order_in_a_part_of_the_data(data):
    other = dict(
        data.sets['train'], ann_file=data.sets['val'].ann_file, data_prefix=dict(img='val/')
    )
    data.cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(type='ConcatDataset', datasets=[data.sets['train'], other]),
    )
    assert data.run() == []
    data.val['categories'].reverse()
    assert (
        "'cross' is class 3 of train_dataloader.dataset.dataset.datasets.1.metainfo"
        in data.refusal()
    )


def test_a_subset_of_the_categories_passes(data):
    data.classes('square', 'cross')
    data.cfg.model.bbox_head.num_classes = 2
    assert data.run() == []


def test_two_categories_of_one_name(data):
    data.rename(cross='disc')
    assert "'disc' is class 0 of" in data.refusal()


def test_own_categories_of_which_one_is_a_default_class(data):
    """With 80 outputs it would train on persons alone."""
    data.rename(disc='person', square='helmet')
    for dataset in data.sets.values():
        del dataset['metainfo']
    advice = (
        "set train_dataloader.dataset.metainfo=dict(classes=('person', 'helmet', 'triangle', 'c"
    )
    sentence = data.refusal()
    assert 'num_classes=4, but train_dataloader.dataset has 80 classes by default, wi' in sentence
    assert advice in sentence
    data.cfg.model.bbox_head.num_classes = 80
    lines = data.run()
    assert "is without 'helmet', 'triangle', 'cross' of the categories" in lines[0]
    assert advice in lines[0]


def test_a_single_class_without_its_comma(data):
    data.sets['train'].metainfo = dict(classes='disc')
    assert "write ('disc',) with a comma" in data.refusal()


def test_a_category_id_that_is_no_category(data):
    data.train['annotations'][0]['category_id'] = 77
    (line,) = data.run()
    assert 'train.json has annotations of a category_id that is no category: 77' in line


# Images and annotations


def test_nothing_to_learn(data):
    data.train['annotations'] = []
    words = 'train.json cannot be read, or no image of it is taken (ValueError: need at least'
    assert words in data.refusal()
    data.sets['train'].filter_cfg = None
    assert 'no image has an annotation that is taken from' in data.refusal()


def test_a_part_without_annotations_passes(data):
    """Such as the unlabeled images of a semi-supervised training."""
    other = dict(data.sets['train'], ann_file=str(data.folder / 'no.json'), filter_cfg=None)
    (data.folder / 'no.json').write_text(json.dumps(data.train | dict(annotations=[])))
    data.cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[data.sets['train'], other]
    )
    assert data.run() == []


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('<annotation/>', '(JSONDecodeError: Expecting value'),
        ('[1]', '(AssertionError: annotation file format'),
        ('{"images": [], "shapes": []}', "(KeyError: 'categories'"),
    ],
)
def test_annotations_that_are_not_of_coco(data, text, words):
    (data.folder / 'train.json').write_text(text)
    (data.folder / 'val.json').write_text(json.dumps(data.val))
    sentence = data.sentence(failure(data.run_as_it_is))
    assert sentence.startswith(f'train_dataloader.dataset: {data.folder}/train.json cannot be read')
    assert words in sentence


def test_what_fails_elsewhere_is_not_explained(data):
    data.cfg.model.backbone.depth = 19
    assert explain(failure(data.run), data.cfg) is None


def test_images_that_are_elsewhere(data):
    for image in data.val['images']:
        image['file_name'] = f'elsewhere/{image["file_name"]}'
    sentence = data.refusal()
    assert 'val_dataloader.dataset: none of 4 images that were looked for is there' in sentence
    data.sets['val'].pipeline[0].backend_args = dict(backend='lmdb', db_path='elsewhere')
    assert data.run() == []


# The evaluation


def test_classes_that_the_validation_has_not(data):
    data.val['categories'].pop()
    data.val['annotations'] = [a for a in data.val['annotations'] if a['category_id'] != 4]
    assert "val_evaluator.0: 'cross', which are trained, are not among" in data.refusal()


def test_an_evaluator_with_another_file(data):
    other = deepcopy(data.val)
    data.cfg.val_evaluator.ann_file = str(data.folder / 'other.json')

    def refusal() -> str:
        (data.folder / 'other.json').write_text(json.dumps(other))
        return data.refusal()

    for image in other['images']:
        image['file_name'] = f'other_{image["file_name"]}'
    assert 'val_evaluator.0 evaluates another file than that of val_dataloader.dataset' in refusal()
    other['images'] = other['images'][1:]
    assert 'it has no image 0: set its ann_file to' in refusal()
    other = deepcopy(data.val)
    other['categories'].reverse()
    assert 'class 0 of the file of val_evaluator.0' in refusal()


# Heads


def test_a_head_with_too_few_classes(data):
    data.cfg.model.bbox_head.num_classes = 3
    sentence = data.refusal()
    assert 'model.bbox_head.num_classes=3, but train_dataloader.dataset has 4 classes' in sentence
    assert sentence.endswith("('disc', 'square', 'triangle', 'cross'): set it to 4")


def test_a_head_with_too_many_may_be_meant(data):
    data.cfg.model.bbox_head.num_classes = 80
    (line,) = data.run()
    assert 'set it to 4, if that is not meant' in line


def network(**heads: dict) -> nn.Module:
    """A network with such heads."""
    model = nn.Module()
    for name, attributes in heads.items():
        head = nn.Module()
        vars(head).update(attributes)
        setattr(model, name, head)
    return model


@pytest.mark.parametrize('name', ['mask_iou_head', 'point_head', 'head_module'])
def test_other_heads(data, name):
    (source,) = data_check_hook._sources(Things(), 'data')
    wrong = network(bbox_head=dict(num_classes=2), **{name: dict(num_classes=1)})
    with pytest.raises(ConfigError, match=f'{name}.num_classes=1, but data has 2'):
        list(data_check_hook._check_heads(wrong, source))


class Things:
    """Things with instances, and stuff without."""

    METAINFO = dict(classes=('person', 'car', 'sky'), thing_classes=('person', 'car'))
    metainfo = METAINFO


def test_heads_of_panoptic_segmentation(data):
    (source,) = data_check_hook._sources(Things(), 'data')
    right = network(
        bbox_head=dict(num_classes=2),
        panoptic_head=dict(num_things_classes=2, num_classes=3),
        semantic_head=dict(num_classes=2),
        rpn_head=dict(num_classes=1),
    )
    assert list(data_check_hook._check_heads(right, source)) == []
    right.panoptic_head.num_things_classes = 1
    with pytest.raises(ConfigError, match='num_things_classes=1, but data has 2'):
        list(data_check_hook._check_heads(right, source))


def test_heads_that_class_by_a_text_or_not_at_all(data):
    by_text = network(bbox_head=dict(num_classes=256), language_model={})
    agnostic = network(mask_head=dict(num_classes=1, class_agnostic=True))
    agnostic.bbox_head = RPNHead(num_classes=1, in_channels=4)
    for model in (by_text, agnostic):
        assert list(data_check_hook.compare(model, dict(train=(Things(), [])))) == []


# Weights


def saved(path: Path, state_dict: dict) -> str:
    torch.save(dict(state_dict=state_dict), path)
    return str(path)


def test_a_checkpoint_of_which_nothing_fits(data):
    weight = torch.ones(8, 3, 7, 7)
    data.cfg.load_from = saved(data.folder / 'right.pth', {'module.backbone.conv1.weight': weight})
    assert data.run() == []
    data.cfg.load_from = saved(data.folder / 'wrong.pth', {'model.backbone.conv1.weight': weight})
    assert f'checkpoint {data.cfg.load_from}: none of its weights has name and' in data.refusal()


def test_pretrained_weights_of_which_nothing_fits(data):
    weight = torch.ones(8, 3, 7, 7)
    file = saved(data.folder / 'net.pth', {'backbone.conv1.weight': weight})
    data.cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=file)
    assert f'model.backbone.init_cfg.checkpoint {file}: none of its weights' in data.refusal()
    data.cfg.model.backbone.init_cfg.prefix = 'backbone'
    assert data.run() == []
    data.cfg.model.backbone.init_cfg.prefix = 'back'
    assert data.refusal().endswith("or another prefix than 'back.'")


# What is not known


@DATASETS.register_module(force=True)
class OddDataset(CocoDataset):
    """Whose labels are no numbers."""

    def load_data_list(self) -> list[dict]:
        found = super().load_data_list()
        self.cat2label = {'a': 'b'}
        return found


def test_what_is_like_nothing_else_is_one_line(data):
    data.sets['train'].type = 'OddDataset'
    (line,) = data.run()
    assert 'not compared to the end. Cause: TypeError: ' in line


def test_large_files_are_not_read_again(data, monkeypatch):
    monkeypatch.setattr(data_check_hook, 'LARGEST', 10)
    data.classes('square', 'disc', 'triangle', 'cross')
    data.cfg.val_evaluator = None
    data.cfg.val_dataloader = data.cfg.val_cfg = None
    assert data.run() == []


def test_without_it_nothing_of_this_is_said(data):
    data.cfg.custom_hooks.pop()
    data.classes('square', 'disc', 'triangle', 'cross')
    assert data.run() == []
