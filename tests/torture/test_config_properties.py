"""Configs of any content, through the switch."""

from __future__ import annotations

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

from psbn_mmdet.configs.norm_switch import switch_config
from psbn_mmdet.configs.reading import ConfigError, type_name
from psbn_mmdet.layers import PostShiftedBatchNorm


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
    lines, error = attempt(switch_config, cfg, norm, scope, watch, error=ConfigError)
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
        _, error = attempt(switch_config, cfg, norm, error=ConfigError)
        assert error.startswith('model is ') and 'leave out --norm' in error


@given(
    model=models,
    switches=st.lists(
        st.tuples(st.sampled_from(['psBN', 'BN']), st.sampled_from([None, 'backbone', 'head'])),
        min_size=2,
        max_size=4,
    ),
)
def test_switches_follow_one_another(model, switches):
    count()
    cfg = Config(dict(model=model))
    wanted = {name: isinstance(m, PostShiftedBatchNorm) for name, m in norms_of(cfg).items()}
    own = copy.deepcopy(cfg.model)
    for norm, scope in switches:
        _, error = attempt(switch_config, cfg, norm, scope, error=ConfigError)
        if error:
            assert 'there is no' in error
            continue
        for name in wanted:
            if scope is None or f'.{scope}.' in f'.{name}.':
                wanted[name] = norm == 'psBN'
        found = {n: isinstance(m, PostShiftedBatchNorm) for n, m in norms_of(cfg).items()}
        assert found == wanted
        for name, layer in norms_of(cfg).items():
            bias = layer.state_dict()['bias']
            assert torch.equal(bias, torch.full_like(bias, 0.1 if wanted[name] else 0.0))
    if cfg.model.type != 'SwitchNorms':
        assert cfg.model == own
