"""BN and psBN in state dicts: finding them, converting them, reviving what is collapsed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from psbn_mmdet.layers import PostShiftedBatchNorm2d, bn_to_psbn, find_norm_states, psbn_to_bn

# Each family of MMDetection's backbones with BN, as small as it goes.
BACKBONES = {
    'ResNet': dict(type='ResNet', depth=50, base_channels=8),
    'ResNet, deep stem': dict(type='ResNet', depth=18, base_channels=8, deep_stem=True),
    'ResNeXt': dict(type='ResNeXt', depth=50, groups=4, base_width=4, base_channels=16),
    'ResNeSt': dict(type='ResNeSt', depth=50, base_channels=16, stem_channels=16, radix=2),
    'Res2Net': dict(type='Res2Net', depth=50, scales=4, base_width=26),
    'RegNet': dict(type='RegNet', arch='regnetx_400mf'),
    'DetectoRS_ResNet': dict(type='DetectoRS_ResNet', depth=50, base_channels=8),
    'HRNet': dict(
        type='HRNet',
        extra=dict(
            stage1=dict(
                num_modules=1,
                num_branches=1,
                block='BOTTLENECK',
                num_blocks=(1,),
                num_channels=(8,),
            ),
            stage2=dict(
                num_modules=1,
                num_branches=2,
                block='BASIC',
                num_blocks=(1, 1),
                num_channels=(8, 16),
            ),
            stage3=dict(
                num_modules=1,
                num_branches=3,
                block='BASIC',
                num_blocks=(1, 1, 1),
                num_channels=(8, 16, 32),
            ),
            stage4=dict(
                num_modules=1,
                num_branches=4,
                block='BASIC',
                num_blocks=(1, 1, 1, 1),
                num_channels=(8, 16, 32, 64),
            ),
        ),
    ),
    'HourglassNet': dict(
        type='HourglassNet',
        downsample_times=2,
        num_stacks=1,
        stage_channels=(16, 16, 32),
        stage_blocks=(1, 1, 1),
        feat_channel=16,
        norm_cfg=dict(type='BN'),
    ),
    'Darknet': dict(type='Darknet', depth=53),
    'CSPDarknet': dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125),
    'CSPNeXt': dict(type='CSPNeXt', deepen_factor=0.17, widen_factor=0.125),
    'MobileNetV2': dict(type='MobileNetV2', widen_factor=0.25),
    'EfficientNet': dict(type='EfficientNet', arch='b0', out_indices=(2, 3, 4)),
}


def build(cfg: dict, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS.build({**cfg, **kwargs})
    model.eval()  # which returns None for some
    return model


def with_realistic_norms(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Spread parameters and statistics, but so that no layer magnifies rounding errors much."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.weight.data.uniform_(0.3, 1.2, generator=generator)
            norm.bias.data.normal_(0, 0.3, generator=generator)
            norm.momentum, norm.training = 0.5, True
    with torch.no_grad():
        model(images)
    model.eval()
    return model


def outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(images)
    return list(found) if isinstance(found, (list, tuple)) else [found]


def largest_difference(one: list, other: list) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other))


@pytest.mark.parametrize('family', BACKBONES)
def test_conversion_keeps_the_function_of_each_backbone(family):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    bn = with_realistic_norms(build(BACKBONES[family]), images)
    expected = outputs(bn, images)
    assert 0.01 < max(output.abs().max().item() for output in expected) < 100

    module = bn_to_psbn(copy.deepcopy(bn), shift=0.3)
    assert any(isinstance(m, PostShiftedBatchNorm2d) for m in module.modules())
    assert largest_difference(outputs(module, images), expected) <= 1e-5

    state_dict = bn_to_psbn(bn.state_dict(), shift=0.3)
    eps = next(norm.eps for norm in bn.modules() if isinstance(norm, _BatchNorm))
    psbn = build(BACKBONES[family], norm_cfg=dict(type='psBN', shift=0.3, eps=eps))
    if family == 'HourglassNet':  # gives norm_cfg to some of its layers only
        bn_to_psbn(psbn, shift=0.3)
    psbn.load_state_dict(state_dict)
    assert largest_difference(outputs(psbn, images), expected) <= 1e-5

    bn.load_state_dict(psbn_to_bn(state_dict))
    assert largest_difference(outputs(bn, images), expected) <= 1e-5
    assert largest_difference(outputs(psbn_to_bn(module), images), expected) <= 1e-5


def test_a_state_dict_is_converted_in_a_copy_with_its_order_and_metadata():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    state_dict = model.state_dict()
    before = list(state_dict)
    converted = bn_to_psbn(state_dict)
    assert list(state_dict) == before
    expected = ['0.weight', '0.bias', '1.weight', '1.beta', '1.shift', '1.running_mean']
    assert list(converted)[:6] == expected
    assert converted._metadata == state_dict._metadata
    assert list(psbn_to_bn(converted)) == before


def test_half_precision_loses_nothing_more():
    norm = nn.BatchNorm2d(64).half()
    norm.bias.data.normal_(0, 1)
    converted = bn_to_psbn(norm.state_dict(), shift=0.1)
    assert converted['beta'].dtype == torch.float32
    assert torch.allclose(converted['beta'] + 0.1, norm.bias.float(), atol=1e-7)
    half = PostShiftedBatchNorm2d(64).half()
    half.beta.data.normal_(0, 1)
    assert torch.equal(psbn_to_bn(half.state_dict())['bias'], half.bias)


def test_layers_are_found_by_their_entries():
    model = nn.ModuleDict(
        dict(
            bn=nn.BatchNorm2d(4),
            psbn=PostShiftedBatchNorm2d(4),
            without_statistics=PostShiftedBatchNorm2d(4, track_running_stats=False),
            plain=nn.BatchNorm2d(4, affine=False),
            shift_only=PostShiftedBatchNorm2d(4, bias=False),
            group=nn.GroupNorm(2, 4),
            layer=nn.LayerNorm(4),
            linear=nn.Linear(4, 4),
        )
    )
    state_dict = {'no_norm.beta': torch.ones(4), **model.state_dict()}
    state_dict['scaled.weight'] = torch.ones(4)
    state_dict['scaled.running_var'] = torch.ones(4)
    state_dict['odd.weight'], state_dict['odd.bias'] = torch.ones(4), torch.ones(5)
    state_dict['odd.running_var'] = torch.ones(4)
    for name, shape in (('scalar', ()), ('matrix', (4, 4))):
        for entry in ('weight', 'bias', 'running_var'):
            state_dict[f'{name}.{entry}'] = torch.ones(shape)
    state_dict['bare.beta'], state_dict['bare.shift'] = torch.ones(4), torch.ones(())
    assert find_norm_states(state_dict) == {
        'bn': 'BN',
        'psbn': 'psBN',
        'without_statistics': 'psBN',
        'plain': 'no gamma',
        'shift_only': 'no beta',
        'scaled': 'no bias',
        'odd': 'shapes differ',
        'scalar': 'shapes differ',
        'matrix': 'shapes differ',
        'bare': 'no gamma',
    }
    assert find_norm_states(nn.BatchNorm2d(4).state_dict()) == {'': 'BN'}


def test_what_cannot_be_converted_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4), nn.GroupNorm(2, 4))
    state_dict = model.state_dict()
    converted = bn_to_psbn(state_dict)
    assert list(converted) == list(state_dict)
    assert all(torch.equal(converted[key], state_dict[key]) for key in state_dict)


def test_of_a_mixed_state_dict_each_direction_converts_its_own_kind():
    model = nn.Sequential(
        nn.BatchNorm2d(4), PostShiftedBatchNorm2d(4), PostShiftedBatchNorm2d(4, bias=False)
    )
    state_dict = model.state_dict()
    kinds = dict(zip('012', ('BN', 'psBN', 'no beta')))
    assert find_norm_states(state_dict) == kinds
    assert find_norm_states(bn_to_psbn(state_dict)) == kinds | {'0': 'psBN'}
    assert find_norm_states(psbn_to_bn(state_dict)) == kinds | {'1': 'BN'}


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match='finite number > 0, got -1'):
        bn_to_psbn({}, shift=-1)


# Precision


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('dtype', [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize('shift', [0.1, 0.02, 1 / 3, 2.5])
def test_saving_and_loading_again_and_again_moves_nothing(dtype, shift, assign):
    def layer():
        return PostShiftedBatchNorm2d(64, shift=shift).to(dtype)

    torch.manual_seed(0)
    first = layer()
    first.beta.data.normal_()
    state_dict = first.state_dict()
    for _ in range(100):
        norm = layer()
        norm.load_state_dict(state_dict, assign=assign)
        state_dict = copy.deepcopy(norm.state_dict())
    assert torch.equal(norm.beta, first.beta) and norm.beta.dtype == dtype
    assert torch.equal(norm.bias, first.bias) and norm.shift.dtype == dtype


@pytest.mark.parametrize('file', [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize('layer', [*HALVES, torch.float32, torch.float64])
def test_the_same_shift_is_known_in_any_precision(file, layer):
    old = PostShiftedBatchNorm2d(64)
    old.beta.data.normal_()
    state_dict = old.to(file).state_dict()
    new = PostShiftedBatchNorm2d(64).to(layer)
    new.load_state_dict(state_dict)
    assert torch.equal(new.beta, state_dict['beta'].to(layer))
    assert float(new.shift) == pytest.approx(float(torch.tensor(0.1, dtype=layer)), rel=1e-7)


@pytest.mark.parametrize('file', [*HALVES, torch.float32])
@pytest.mark.parametrize('layer', [*HALVES, torch.float32])
def test_another_shift_keeps_the_function_in_any_precision(file, layer):
    old = PostShiftedBatchNorm2d(64, shift=0.5)
    old.beta.data.normal_()
    old = old.to(file)
    new = PostShiftedBatchNorm2d(64).to(layer)
    new.load_state_dict(old.state_dict())
    coarsest = max(torch.finfo(file).eps, torch.finfo(layer).eps)
    assert torch.allclose(new.bias.float(), old.bias.float(), rtol=coarsest, atol=coarsest)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', ['BN', 'psBN', 'psBN, other shift'])
def test_assigned_entries_have_the_type_of_the_file(kind, dtype):
    norm = nn.BatchNorm2d(4) if kind == 'BN' else PostShiftedBatchNorm2d(4)
    norm = norm.to(dtype)
    layer = PostShiftedBatchNorm2d(4, shift=0.5 if 'other' in kind else 0.1)
    layer.load_state_dict(norm.state_dict(), assign=True)
    for entry in ('weight', 'beta', 'shift'):
        assert getattr(layer, entry).dtype == dtype
    assert torch.allclose(layer.bias, norm.bias, rtol=0, atol=torch.finfo(dtype).eps)


def test_an_assigned_shift_that_another_type_has_rounded_is_kept_with_its_beta():
    old = PostShiftedBatchNorm2d(4).half().float()
    assert old.shift != torch.tensor(0.1)
    layer = PostShiftedBatchNorm2d(4).half()
    layer.load_state_dict(old.state_dict(), assign=True)
    assert torch.equal(layer.shift, old.shift) and torch.equal(layer.bias, old.bias)


def test_what_was_loaded_last_tells_whether_it_was_bn():
    layer = PostShiftedBatchNorm2d(4)
    for norm, is_bn in (
        (nn.BatchNorm2d(4), True),
        (PostShiftedBatchNorm2d(4), False),
        (nn.BatchNorm2d(4), True),
    ):
        layer.load_state_dict(norm.state_dict())
        assert layer.read_as_bn is is_bn
    layer.load_state_dict({}, strict=False)  # nothing for it
    assert layer.read_as_bn


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
def test_loading_where_the_default_device_is_meta(norm, assign):
    state_dict = norm(4).state_dict()
    with torch.device('meta'):
        layer = PostShiftedBatchNorm2d(4)
        layer.load_state_dict(state_dict, assign=assign)
        PostShiftedBatchNorm2d(4).load_state_dict(norm(4).state_dict(), assign=assign)
    assert layer.beta.is_meta != assign
    if assign:
        assert torch.allclose(layer.bias, torch.full((4,), 0.0 if norm is nn.BatchNorm2d else 0.1))


# Networks of unusual make


@pytest.mark.parametrize('as_state_dict', [False, True])
def test_what_is_tied_stays_tied(as_state_dict):
    def network():
        model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        for norm in model:
            nn.init.normal_(norm.bias)
        model[1].weight, model[1].bias = model[0].weight, model[0].bias
        model.append(model[0])
        return model

    def tensors(converted, entry):
        if as_state_dict:
            return [converted[f'{i}.{entry}'].data_ptr() for i in range(4)]
        return [id(getattr(layer, entry)) for layer in converted]

    def is_tied(converted, entry):
        first, second, third, fourth = tensors(converted, entry)
        return first == second == fourth != third

    bn = network()
    there = bn_to_psbn(bn.state_dict() if as_state_dict else bn)
    assert is_tied(there, 'beta') and is_tied(there, 'weight')
    back = psbn_to_bn(there)
    assert is_tied(back, 'bias') and is_tied(back, 'weight')


@pytest.mark.parametrize('entry', ['weight', 'beta'])
def test_a_parametrised_psbn_is_refused_in_one_sentence(entry):
    model = nn.Sequential(PostShiftedBatchNorm2d(4))
    nn.utils.parametrize.register_parametrization(model[0], entry, nn.Softplus())
    with pytest.raises(ValueError, match=r'^0 is a Parametrized.*remove its parametrisations'):
        psbn_to_bn(model)
    nn.utils.parametrize.remove_parametrizations(model[0], entry)
    assert type(psbn_to_bn(model)[0]) is nn.BatchNorm2d


def test_the_process_group_is_kept():
    group = object()
    norm = nn.SyncBatchNorm(4, process_group=group)
    psbn = bn_to_psbn(norm)
    assert psbn.process_group is group and psbn_to_bn(psbn).process_group is group


@pytest.mark.parametrize('shift', [math.nan, math.inf, 0.0, -1.0])
def test_a_shift_that_no_layer_has_is_not_converted(shift):
    state = nn.Sequential(PostShiftedBatchNorm2d(3)).state_dict()
    state['0.shift'] = torch.tensor(shift)
    with pytest.raises(ValueError, match=r'0: shift is \S+ in the state dict, not a finite number'):
        psbn_to_bn(state)
