"""Editing the text of a config without running it."""

from __future__ import annotations

import pytest
from mmengine.config import Config

from psbn_mmdet.checkpoints.config_text import config_to_bn, config_to_psbn

TEXT = """
custom_imports = dict(allow_failed_imports=False, imports=['other'])
custom_hooks = [dict(type='EMAHook'), dict(type='CollapseHook', interval=50), dict(
    type='RecoveryHook')]
model = dict(
    backbone=dict(norm_cfg=dict(requires_grad=True, type='SyncBN'), type='ResNet'),
    heads=[{'norm_cfg': {'type': 'BN1d'}, 'a-b': 1}],
    other=dict(type='GN', num_groups=32))
"""


def loaded(text: str) -> dict:
    scope: dict = {}
    exec(text, {}, scope)
    return scope


@pytest.mark.parametrize('shift', [0.1, 0.25])
def test_bn_types_become_psbn_and_back(shift):
    psbn = loaded(config_to_psbn(TEXT, shift))
    own = {} if shift == 0.1 else dict(shift=shift)
    model = psbn['model']
    assert model['backbone']['norm_cfg'] == dict(type='psSyncBN', requires_grad=True, **own)
    assert model['heads'] == [{'norm_cfg': {'type': 'psBN1d', **own}, 'a-b': 1}]
    assert model['other'] == dict(type='GN', num_groups=32)
    assert psbn['custom_imports']['imports'] == ['other', 'psbn_mmdet']
    back = loaded(config_to_bn(config_to_psbn(TEXT, shift)))
    assert back['model'] == loaded(TEXT)['model']
    assert back['custom_imports']['imports'] == ['other']
    assert back['custom_hooks'] == [dict(type='EMAHook')]


def test_the_import_is_added_where_there_is_none():
    text = config_to_psbn("norm_cfg = dict(type='BN')", 0.1)
    assert Config.fromstring(text, '.py').custom_imports.imports == ['psbn_mmdet']


def test_a_text_without_bn_is_left_as_it_is():
    text = "# a comment\nnorm_cfg = dict(type = 'GN')"
    assert config_to_psbn(text, 0.1) is text
    assert config_to_bn(text) is text


def test_nothing_in_the_text_runs(tmp_path):
    text = f"open({str(tmp_path / 'touched')!r}, 'w')\nnorm_cfg = dict(type='BN')"
    assert 'psBN' in config_to_psbn(text, 0.1)
    assert not (tmp_path / 'touched').exists()


def test_what_the_switch_wrote_is_taken_back():
    text = """
model = dict(type='SwitchNorms', model_type='YOLOV3', norm='psBN', neck=dict(type='YOLOV3Neck'))
other = {'type': 'SwitchNorms', 'model_type': 'A', 'norm': 'psBN', 'norm_scope': 'neck', 'a-b': 1}
"""
    back = loaded(config_to_bn(text))
    assert back['model'] == dict(type='YOLOV3', neck=dict(type='YOLOV3Neck'))
    assert back['other'] == {'type': 'A', 'a-b': 1}


@pytest.mark.parametrize(
    'model',
    [
        "dict(type='YOLOV3', neck=dict(type='YOLOV3Neck'))",
        "{'neck': {'type': 'YOLOV3Neck'}, 'type': 'YOLOV3'}",
        "dict(model_type='YOLOV3', neck=dict(type='YOLOV3Neck'), norm='psBN', norm_scope='neck', "
        "type='SwitchNorms')",
    ],
)
def test_a_model_whose_norms_the_text_does_not_say_is_switched(model):
    text = config_to_psbn(f'model = {model}', 0.1)
    assert loaded(text) == dict(
        model=dict(
            type='SwitchNorms', model_type='YOLOV3', norm='psBN', neck=dict(type='YOLOV3Neck')
        ),
        custom_imports=dict(imports=['psbn_mmdet'], allow_failed_imports=False),
    )
    assert loaded(config_to_bn(text))['model'] == dict(type='YOLOV3', neck=dict(type='YOLOV3Neck'))
