"""Configs of any content, through the switch and through the texts in checkpoints."""

from __future__ import annotations

import ast
import copy

import pytest
import torch
from attempts import attempt
from cases import count
from hypothesis import example, given
from hypothesis import strategies as st
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from psbn_mmdet.checkpoints import convert_checkpoint
from psbn_mmdet.checkpoints.config_text import TO_PSBN, config_to_bn, config_to_psbn
from psbn_mmdet.layers import PostShiftedBatchNorm
from psbn_mmdet.norm_switch import switch_config
from psbn_mmdet.preflight import PreflightError, type_name


@pytest.fixture(scope='module', autouse=True)
def _tiny():
    """A model of a backbone by its norm_cfg, and a neck whose norm its class writes out."""

    class TortureTiny(BaseModule):
        def __init__(self, norm_cfg=None, head=None, write_out=False, **_):
            super().__init__()
            self.backbone = ConvModule(3, 4, 1, norm_cfg=norm_cfg)
            self.neck = nn.Sequential(nn.BatchNorm2d(4)) if write_out else nn.Identity()
            self.head = ConvModule(4, 4, 1, norm_cfg=(head or {}).get('norm_cfg'))

    MODELS.register_module('TortureTiny', module=TortureTiny)
    yield
    del MODELS._module_dict['TortureTiny']


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text('abc', max_size=2), st.integers(), max_size=1),
)
norm_cfgs = st.none() | st.fixed_dictionaries(
    {'type': st.sampled_from(['BN', 'BN2d', 'SyncBN', 'psBN', 'psSyncBN', nn.BatchNorm2d, 'IN'])},
    optional={
        'requires_grad': st.booleans(),
        'eps': st.sampled_from([1e-3, 1e-5]),
        'momentum': st.sampled_from([0.03, 0.1]),
    },
)
models = st.fixed_dictionaries(
    {'type': st.just('TortureTiny'), 'norm_cfg': norm_cfgs},
    optional={
        'head': st.fixed_dictionaries({'norm_cfg': norm_cfgs}),
        'write_out': st.booleans(),
        'test_cfg': junk,
    },
)
hooks = st.sampled_from(
    [
        dict(type='EMAHook'),
        dict(type='CollapseHook', interval=7),
        dict(type='mmdet.RecoveryHook'),
        dict(type='RecoveryHook', steps=3),
        dict(),
        'RecoveryHook',
    ]
)
custom_hooks = st.lists(hooks, max_size=3) | st.lists(hooks, max_size=2).map(tuple) | junk
imports = st.lists(st.sampled_from(['mmdet', 'psbn_mmdet', 'json']), max_size=2)
custom_imports = junk | st.fixed_dictionaries(
    {'imports': imports | imports.map(tuple) | st.sampled_from(['json', 'psbn_mmdet', '']) | junk},
    optional={'allow_failed_imports': st.booleans()},
)


def norms_of(cfg: Config) -> dict[str, nn.Module]:
    model = MODELS.build(copy.deepcopy(cfg.model))
    kinds = nn.modules.batchnorm._BatchNorm
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


@given(
    model=models,
    hooks=custom_hooks,
    imports=custom_imports,
    norm=st.sampled_from(['psBN', 'BN', None]),
    scope=st.sampled_from([None, None, None, 'backbone', 'neck', 'nothing', 'head.conv']),
    watch=st.booleans(),
)
@example(dict(type='TortureTiny', norm_cfg=None), [], 5, None, None, True)
@example(dict(type='TortureTiny', norm_cfg=None), [], dict(imports=5), None, None, True)
def test_a_switched_config_has_the_norms_and_hooks_it_says(
    model, hooks, imports, norm, scope, watch
):
    count()
    cfg = Config(dict(model=model, custom_hooks=hooks, custom_imports=imports, other=[1]))
    before = norms_of(cfg)
    lines, error = attempt(switch_config, cfg, norm, scope, watch, error=PreflightError)
    if error:
        starts = (
            '--norm-scope is for',
            f'--norm {norm}: there is no',
            'custom_hooks is',
            'custom_',
        )
        assert error.startswith(starts) and ': ' in error, error
        return
    assert cfg.other == [1]
    after = norms_of(cfg)
    assert list(after) == list(before)
    for name, layer in after.items():
        inside = scope is None or f'.{scope}.' in f'.{name}.'
        was = isinstance(before[name], PostShiftedBatchNorm)
        wanted = norm == 'psBN' if norm and inside else was
        assert isinstance(layer, PostShiftedBatchNorm) == wanted
        assert (layer.eps, layer.momentum) == (before[name].eps, before[name].momentum)
        old = [p.requires_grad for p in before[name].parameters()]
        assert [p.requires_grad for p in layer.parameters()] == old
    assert bool(lines) == (norm is not None)
    kinds = list(map(type_name, cfg.get('custom_hooks') or [])) if norm or watch else []
    if norm == 'psBN' or watch:
        assert 'psbn_mmdet' in cfg.custom_imports['imports']
        assert 'CollapseHook' in kinds
    if norm == 'psBN':
        assert 'RecoveryHook' in kinds
    again, _ = attempt(switch_config, copy.deepcopy(cfg), None, None, watch)
    assert again == []


@given(model=junk | st.lists(models, max_size=1), norm=st.sampled_from(['psBN', 'BN']))
def test_a_config_without_a_model_is_refused(model, norm):
    count()
    for cfg in (Config(dict(model=model)), Config(dict(other=1))):
        if isinstance(cfg.get('model'), dict):
            continue
        _, error = attempt(switch_config, cfg, norm, error=PreflightError)
        assert error.startswith('model is ') and 'leave out --norm' in error


# Texts of configs: values as Python writes them, in dict(...) or {...}.
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.just(10**50),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from(['a', 'b', 'c-d', 'in', '']), inner, max_size=3)
    ),
    max_leaves=6,
)
norm_dicts = st.sampled_from([*TO_PSBN, 'GN', 'LN']).flatmap(
    lambda kind: st.dictionaries(st.sampled_from(['eps', 'requires_grad']), plain, max_size=2).map(
        lambda settings: {**settings, 'type': kind}
    )
)
model_dicts = st.fixed_dictionaries(
    {'type': st.sampled_from(['A', 'mmdet.B', 'YOLOV3'])},
    optional={
        'norm_cfg': norm_dicts,
        'heads': st.lists(norm_dicts | plain, max_size=3),
        'neck': st.fixed_dictionaries({'type': st.just('FPN'), 'norm_cfg': norm_dicts | plain}),
        'other': plain,
    },
)


def written(value, call: bool) -> str:
    """A value as source code; dicts as calls where their keys allow it."""
    if isinstance(value, dict):
        if call and all(key.isidentifier() and key != 'in' for key in value):
            return f'dict({", ".join(f"{key}={written(v, call)}" for key, v in value.items())})'
        return '{' + ', '.join(f'{k!r}: {written(v, call)}' for k, v in value.items()) + '}'
    if isinstance(value, list):
        return f'[{", ".join(written(v, call) for v in value)}]'
    if isinstance(value, tuple):
        return f'({"".join(f"{written(v, call)}, " for v in value)})'
    return repr(value)


def loaded(text: str) -> dict:
    scope: dict = {}
    exec(text, {}, scope)
    return scope


def with_psbn(value, shift: float):
    """What a value of a config becomes."""
    if isinstance(value, dict):
        new = {key: with_psbn(v, shift) for key, v in value.items()}
        if value.get('type') in TO_PSBN:
            new['type'] = TO_PSBN[value['type']]
            if shift != 0.1:
                new['shift'] = shift
        return new
    if isinstance(value, (list, tuple)):
        return type(value)(with_psbn(v, shift) for v in value)
    return value


@given(
    model=model_dicts,
    norm_cfg=st.none() | norm_dicts,
    imports=st.none() | imports | st.sampled_from(['json', 'psbn_mmdet', '']),
    call=st.booleans(),
    shift=st.sampled_from([0.1, 0.25, 1, 3e-5]),
    runs=st.booleans(),
)
@example(dict(type='A'), None, 'json', True, 0.1, False)
@example(dict(type='A'), None, '', False, 0.1, False)
def test_a_text_becomes_psbn_and_back_and_never_runs(model, norm_cfg, imports, call, shift, runs):
    count()
    parts = [f'model = {written(dict(type="old"), call)}', f'model = {written(model, call)}']
    if norm_cfg is not None:
        parts.insert(1, f'norm_cfg = {written(norm_cfg, call)}')
    if imports is not None:
        parts.append(f'custom_imports = {written(dict(imports=imports), call)}')
    parts.append("custom_hooks = [dict(type='EMAHook')]")
    text = '\n'.join(parts)
    trap = '\nif True:\n    raise SystemExit("run")'
    psbn = config_to_psbn(text + trap * runs, shift)
    back = config_to_bn(psbn)
    if runs:
        assert 'raise SystemExit' in psbn and 'raise SystemExit' in back
        psbn, back = (t[: t.index('if True:')] + t[t.index("('run')") + 7 :] for t in (psbn, back))
    old, new, again = loaded(text), loaded(psbn), loaded(back)
    expected = with_psbn(model, shift)
    kind = expected.pop('type')
    wanted = {'type': 'SwitchNorms', 'model_type': kind, 'norm': 'psBN', **expected}
    assert new['model'] == wanted
    found = new['custom_imports']['imports']
    assert isinstance(found, list) and found.count('psbn_mmdet') >= 1
    given = [imports] if isinstance(imports, str) and imports else imports or []
    assert [name for name in found if name != 'psbn_mmdet'] == [
        name for name in given if name != 'psbn_mmdet'
    ]
    assert again['model'] == old['model'] and again.get('norm_cfg') == old.get('norm_cfg')
    assert again['custom_hooks'] == [dict(type='EMAHook')]
    assert 'psbn_mmdet' not in again['custom_imports']['imports']
    assert config_to_psbn(psbn, shift) == psbn or loaded(config_to_psbn(psbn, shift)) == new


@given(text=st.text(max_size=60) | st.sampled_from(['(' * 300, '-' * 20_000 + '1', '\0', '\ud800']))
@example('model = ' + '[' * 150 + ']' * 150)
@example('model = dict(type="A", x=' + '-' * 5000 + '1)')
@example('x = ' + '+'.join(['1'] * 20_000))
@example('model = dict(type="A", **{**{}})\ncustom_imports = dict(**x, imports=y)')
@example('model = dict(type="SwitchNorms", model_type=A, norm="psBN")')
@example('model: dict = dict(type="BN")')
def test_a_text_of_any_content_is_left_or_converted(text):
    count()
    layer = nn.BatchNorm2d(2).state_dict()
    content = {'state_dict': dict(layer), 'meta': {'cfg': text}}
    new, done = convert_checkpoint(content, 'psbn')
    assert isinstance(new['meta']['cfg'], str)
    if done.configs:
        ast.parse(new['meta']['cfg'])
    back, _ = convert_checkpoint(new, 'bn')
    for key, value in layer.items():
        torch.testing.assert_close(back['state_dict'][key], value, rtol=0, atol=1e-7)
    if 'model_type=A' in text:  # a type that is no text can't be told: nothing is guessed
        assert 'type=None' not in back['meta']['cfg']
