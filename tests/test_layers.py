"""psBN under everything that a naive ``super().forward(x) + shift`` would break."""

import copy
import io
import math

import mmengine
import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, fuse_conv_bn
from mmdet.models.backbones import ResNet
from mmdet.models.layers import FrozenBatchNorm2d
from mmengine.model import (
    ExponentialMovingAverage,
    constant_init,
    convert_sync_batchnorm,
    initialize,
    revert_sync_batchnorm,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from onnx_export import export
from randomize import randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import psbn_mmdet  # noqa: F401
from psbn_mmdet.layers import (
    PostShiftedBatchNorm,
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
    bn_to_psbn,
    psbn_to_bn,
)

SHAPES = {
    'psBN': (4, 6, 5, 5),
    'psBN1d': (4, 6, 5),
    'psBN2d': (4, 6, 5, 5),
    'psBN3d': (4, 6, 3, 3, 3),
    'psSyncBN': (4, 6, 5, 5),
}


def conv_norm(norm_type: str, **kwargs) -> nn.Sequential:
    torch.manual_seed(0)
    norm = MODELS.build(dict(type=norm_type, num_features=6, **kwargs))
    return randomize(nn.Sequential(nn.Conv2d(3, 6, 3), norm))


def resnet(norm_type: str, **kwargs) -> ResNet:
    torch.manual_seed(0)
    return randomize(
        ResNet(18, base_channels=8, norm_cfg=dict(type=norm_type, requires_grad=True), **kwargs)
    )


def evaluating(model: ResNet) -> ResNet:
    model.eval()  # which returns None
    return model


def effective_biases(module: nn.Module) -> torch.Tensor:
    return torch.cat([m.bias.detach() for m in module.modules() if isinstance(m, _BatchNorm)])


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# The layer itself


@pytest.mark.parametrize('norm_type', SHAPES)
@pytest.mark.parametrize('training', [True, False])
def test_adds_the_shift_to_what_bn_computes(norm_type, training):
    x = torch.randn(SHAPES[norm_type])
    bn = MODELS.build(dict(type=norm_type[2:], num_features=6)).train(training)
    psbn = MODELS.build(dict(type=norm_type, num_features=6, shift=0.3)).train(training)
    assert torch.allclose(psbn(x), bn(x) + 0.3, atol=1e-6)
    assert torch.equal(psbn.running_mean, bn.running_mean)
    assert torch.equal(psbn.running_var, bn.running_var)


@pytest.mark.parametrize('shift', [0, -0.1, math.nan, math.inf, 'a', None, True])
def test_refuses_a_bad_shift_by_its_value(shift):
    with pytest.raises(ValueError, match='finite number > 0, got') as error:
        MODELS.build(dict(type='psBN', num_features=6, shift=shift))
    assert repr(shift) in str(error.value)


@pytest.mark.parametrize('norm_type', SHAPES)
def test_is_built_by_mmcv_as_a_bn(norm_type):
    name, layer = build_norm_layer(dict(type=norm_type, requires_grad=False), 6, postfix=1)
    assert name == 'bn1'
    assert isinstance(layer, _BatchNorm)
    assert not any(p.requires_grad for p in layer.parameters())
    assert [n for n, _ in layer.named_parameters()] == ['weight', 'beta']


def test_takes_the_arguments_of_torch():
    layer = PostShiftedBatchNorm2d(6, 1e-3, 0.2, True, False, torch.device('cpu'), torch.float64)
    assert (layer.eps, layer.momentum, layer.running_mean) == (1e-3, 0.2, None)
    assert layer.beta.dtype == layer.shift.dtype == torch.float64
    sync = PostShiftedSyncBatchNorm(6, 1e-3, 0.2, True, True, None, None, torch.float64)
    assert sync.beta.dtype == torch.float64


@pytest.mark.parametrize('norm_type', SHAPES)
@pytest.mark.parametrize('kwargs', [dict(affine=False), dict(bias=False)])
def test_without_beta_the_shift_alone_remains(norm_type, kwargs):
    x = torch.randn(SHAPES[norm_type])
    layer = MODELS.build(dict(type=norm_type, num_features=6, **kwargs))
    plain = MODELS.build(dict(type=norm_type[2:], num_features=6, affine=False))
    assert layer.beta is None
    assert (layer.weight is None) == ('affine' in kwargs)
    assert torch.allclose(layer(x), plain(x) + 0.1, atol=1e-6)


def test_a_filter_at_zero_gets_gradient_through_the_rectifier():
    x = torch.randn(4, 6, 5, 5)
    for layer, alive in ((nn.BatchNorm2d(6), False), (PostShiftedBatchNorm2d(6), True)):
        nn.init.zeros_(layer.weight)
        layer(x).relu().square().sum().backward()
        shift = layer.beta if alive else layer.bias
        assert bool((shift.grad != 0).all()) == alive


def test_bias_cannot_be_assigned():
    with pytest.raises(KeyError, match='already exists'):
        PostShiftedBatchNorm2d(6).bias = nn.Parameter(torch.zeros(6))


def test_deepcopy_and_pickle_keep_the_function():
    x = torch.randn(4, 6, 5, 5)
    layer = randomize(PostShiftedBatchNorm2d(6, shift=0.4)).eval()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), layer(x))


def test_reset_parameters_refills_the_shift_after_to_empty():
    layer = PostShiftedBatchNorm2d(6, shift=0.3, device='meta').to_empty(device='cpu')
    layer.shift.fill_(math.nan)
    layer.reset_parameters()
    assert torch.allclose(layer.bias, torch.full((6,), 0.3))


def test_half_precision_rounds_the_shift_and_no_more():
    layer = PostShiftedBatchNorm2d(6).half()
    assert layer.bias.dtype == torch.float16
    assert torch.allclose(layer.bias.float(), torch.tensor(0.1), atol=1e-4)


# Fusing and freezing


def test_mmcv_fuse_conv_bn_keeps_the_shift(image):
    model = conv_norm('psBN').eval()
    expected = model(image)
    fused = fuse_conv_bn(copy.deepcopy(model))
    assert isinstance(fused[1], nn.Identity)
    assert torch.allclose(fused(image), expected, atol=1e-5)


@pytest.mark.parametrize('kwargs', [dict(), dict(affine=False)])
def test_torch_fuse_conv_bn_eval_keeps_the_shift(image, kwargs):
    torch.manual_seed(0)
    norm = PostShiftedBatchNorm2d(6, **kwargs)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm).eval()
    assert torch.allclose(fuse_conv_bn_eval(*model)(image), model(image), atol=1e-5)


@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
def test_efficient_conv_bn_eval_of_mmcv_is_exact_and_gradients_flow(image, norm_type):
    torch.manual_seed(0)
    plain = ConvModule(3, 6, 3, norm_cfg=dict(type=norm_type), act_cfg=None)
    randomize(plain).eval()
    fast = copy.deepcopy(plain)
    fast.turn_on_efficient_conv_bn_eval()
    for model in (plain, fast):
        model(image).square().sum().backward()
    assert torch.allclose(fast(image), plain(image), atol=1e-5)
    for p, q in zip(plain.parameters(), fast.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    assert plain.bn.beta.grad.abs().sum() > 0


def test_efficient_conv_bn_eval_of_mmengine_is_exact(image):
    from mmengine.model.efficient_conv_bn_eval import efficient_conv_bn_eval_forward

    conv, norm = conv_norm('psBN').eval()
    output = efficient_conv_bn_eval_forward(norm, conv, image)
    assert torch.allclose(output, norm(conv(image)), atol=1e-5)
    output.sum().backward()
    assert (norm.beta.grad != 0).all()


def test_frozen_batch_norm_of_mmdet_keeps_the_shift(image):
    model = conv_norm('psBN').eval()
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(model))
    assert isinstance(frozen[1], FrozenBatchNorm2d)
    assert torch.allclose(frozen(image), model(image), atol=1e-5)


# SyncBN


@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
@pytest.mark.parametrize('kwargs', [dict(), dict(affine=False), dict(bias=False)])
@pytest.mark.parametrize(
    'converter', [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm]
)
def test_generic_sync_bn_converters_fail_loudly(converter, norm_type, kwargs):
    norm = MODELS.build(dict(type=norm_type, num_features=6, **kwargs))
    with pytest.raises(TypeError, match='bias'):
        converter(nn.Sequential(nn.Conv2d(3, 6, 3), norm))


@pytest.mark.parametrize('kwargs', [dict(), dict(affine=False)])
def test_sync_bn_stays_itself_in_one_process_without_a_warning(image, kwargs, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), PostShiftedSyncBatchNorm(6, **kwargs))
    expected = model(image)
    reverted = revert_sync_batchnorm(model)
    assert isinstance(reverted[1], PostShiftedSyncBatchNorm)
    assert torch.allclose(reverted(image), expected)
    assert 'Failed to convert' not in caplog.text


def test_the_sync_bn_that_configs_build_is_converted_and_keeps_its_function(image):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), MODELS.build(dict(type='SyncBN', num_features=6)))
    nn.init.normal_(model[1].bias)
    expected = model.eval()(image)
    assert isinstance(bn_to_psbn(model)[1], PostShiftedSyncBatchNorm)
    assert torch.allclose(model(image), expected, atol=1e-6)
    assert type(psbn_to_bn(model)[1]) is nn.SyncBatchNorm


# State dicts


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
def test_a_bn_state_dict_keeps_its_function(image, strict, norm_type):
    bn, psbn = evaluating(resnet('BN')), evaluating(resnet(norm_type))
    result = psbn.load_state_dict(bn.state_dict(), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    for a, b in zip(bn(image), psbn(image)):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_bn_state_dict_loads_through_mmengine(image, tmp_path):
    bn = evaluating(resnet('BN'))
    path = str(tmp_path / 'bn.pth')
    torch.save(dict(state_dict=bn.state_dict()), path)
    torch.save(
        dict(state_dict={f'backbone.{k}': v for k, v in bn.state_dict().items()}),
        str(tmp_path / 'detector.pth'),
    )
    by_load_checkpoint = evaluating(resnet('psBN'))
    mmengine.runner.load_checkpoint(by_load_checkpoint, path, strict=True)
    by_init_cfg = evaluating(resnet('psBN', init_cfg=dict(type='Pretrained', checkpoint=path)))
    by_init_cfg.init_weights()
    by_prefix = evaluating(
        resnet(
            'psBN',
            init_cfg=dict(
                type='Pretrained', checkpoint=str(tmp_path / 'detector.pth'), prefix='backbone.'
            ),
        )
    )
    by_prefix.init_weights()
    for psbn in (by_load_checkpoint, by_init_cfg, by_prefix):
        for a, b in zip(bn(image), psbn(image)):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('strict', [True, False])
def test_a_psbn_state_dict_keeps_its_function_under_another_shift(image, strict):
    first = conv_norm('psBN', shift=0.1).eval()
    second = conv_norm('psBN', shift=0.5).eval()
    second.load_state_dict(first.state_dict(), strict=strict)
    assert torch.allclose(first(image), second(image), atol=1e-5)
    assert second[1].shift == 0.5
    assert not torch.allclose(first[1].beta, second[1].beta, atol=0.1)


@pytest.mark.parametrize('strict', [True, False])
def test_a_psbn_state_dict_cannot_go_unnoticed_in_bn(strict):
    psbn, bn = conv_norm('psBN'), conv_norm('BN')
    if strict:
        with pytest.raises(RuntimeError, match='beta'):
            bn.load_state_dict(psbn.state_dict())
    else:
        result = bn.load_state_dict(psbn.state_dict(), strict=False)
        assert result.missing_keys == ['1.bias']
        assert result.unexpected_keys == ['1.beta', '1.shift']


def test_loading_does_not_change_the_state_dict():
    state_dict = nn.BatchNorm2d(6).state_dict()
    before = {key: value.clone() for key, value in state_dict.items()}
    layer = PostShiftedBatchNorm2d(6)
    mmengine.runner.load_state_dict(layer, state_dict)
    assert state_dict.keys() == before.keys()
    assert all(torch.equal(state_dict[key], before[key]) for key in before)


def test_missing_and_misshapen_keys_are_reported():
    layer = PostShiftedBatchNorm2d(6)
    state_dict = layer.state_dict()
    del state_dict['beta'], state_dict['shift']
    with pytest.raises(RuntimeError, match=r'Missing key.*beta'):
        layer.load_state_dict(state_dict)
    with pytest.raises(RuntimeError, match='size mismatch'):
        layer.load_state_dict(nn.BatchNorm2d(5).state_dict())


def test_without_beta_another_shift_is_refused():
    layer = PostShiftedBatchNorm2d(6, affine=False, shift=0.2)
    layer.load_state_dict(PostShiftedBatchNorm2d(6, affine=False, shift=0.2).state_dict())
    with pytest.raises(RuntimeError, match=r'build the layer with shift=0\.1'):
        layer.load_state_dict(PostShiftedBatchNorm2d(6, affine=False).state_dict())


def test_state_dict_round_trip_is_exact(image):
    model = evaluating(resnet('psBN'))
    twin = evaluating(ResNet(18, base_channels=8, norm_cfg=dict(type='psBN')))
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model(image), twin(image)))
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(a, b), key


def test_a_state_dict_is_assigned_to_a_meta_layer():
    bn = randomize(nn.BatchNorm2d(6))
    layer = PostShiftedBatchNorm2d(6, device='meta')
    layer.load_state_dict(bn.state_dict(), assign=True)
    assert torch.allclose(layer.bias, bn.bias, atol=1e-6)


def test_a_half_precision_state_dict_loses_no_more_than_half_precision():
    bn = randomize(nn.BatchNorm2d(6)).half()
    layer = PostShiftedBatchNorm2d(6)
    layer.load_state_dict(bn.state_dict())
    assert torch.allclose(layer.bias, bn.bias.float(), atol=1e-7)


# EMA


@pytest.mark.parametrize('update_buffers', [True, False])
def test_ema_averages_the_parameters(update_buffers):
    model = conv_norm('psBN')
    average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=update_buffers)
    first = model[1].beta.detach().clone()
    average.update_parameters(model)
    model[1].beta.data.add_(1)
    average.update_parameters(model)
    norm = average.module[1]
    assert torch.allclose(norm.beta, first + 0.25)
    assert torch.allclose(norm.bias, first + 0.25 + 0.1)
    assert torch.equal(norm.shift, model[1].shift)


# torch.compile, AMP, memory formats, ONNX


def test_torch_compile_gives_the_same(image):
    model = conv_norm('psBN')
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend='aot_eager', fullgraph=True)
    compiled(image).sum().backward()
    model(image).sum().backward()
    assert torch.allclose(compiled(image), model(image), atol=1e-5)
    assert torch.allclose(twin[1].beta.grad, model[1].beta.grad, atol=1e-4)


def test_autocast_bfloat16_gives_what_bn_gives(image):
    bn, psbn = conv_norm('BN'), conv_norm('psBN')
    psbn.load_state_dict(bn.state_dict())
    with torch.autocast('cpu', torch.bfloat16):
        expected, output = bn(image), psbn(image)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(output, expected, atol=0.02)
    output.float().square().sum().backward()
    assert psbn[1].beta.grad.dtype == torch.float32


def test_channels_last_is_kept(image):
    model = conv_norm('psBN')
    expected = model(image)
    output = model.to(memory_format=torch.channels_last)(
        image.contiguous(memory_format=torch.channels_last)
    )
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(output, expected, atol=1e-5)


def test_torch_script_gives_the_same(image):
    model = conv_norm('psBN').eval()
    assert torch.allclose(torch.jit.script(model)(image), model(image), atol=1e-6)


@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
def test_onnx_export_gives_the_same(image, norm_type, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    model = evaluating(resnet(norm_type))
    path = str(tmp_path / 'model.onnx')
    export(model, (image,), path, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    outputs = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    for output, expected in zip(outputs, model(image)):
        scale = expected.abs().max().item()
        assert np.allclose(output, expected.detach().numpy(), atol=1e-5 * max(1, scale))


# In MMDetection and MMEngine


def test_norm_eval_and_frozen_stages_of_the_resnet_hold(image):
    model = resnet('psBN', norm_eval=True, frozen_stages=1)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(output.sum() for output in model(image)).backward()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for name, module in model.named_modules():
        if isinstance(module, PostShiftedBatchNorm):
            frozen = name == 'bn1' or name.startswith('layer1')
            assert not module.training, name
            assert (module.beta.grad is None) == frozen, name
            assert (module.weight.grad is None) == frozen, name


def test_zero_init_residual_zeroes_gamma_and_keeps_the_shift():
    model = ResNet(18, base_channels=8, norm_cfg=dict(type='psBN'), zero_init_residual=True)
    model.init_weights()
    norm = model.layer1[0].bn2
    assert (norm.weight == 0).all() and torch.allclose(norm.bias, torch.tensor(0.1))
    assert (model.bn1.weight == 1).all()


@pytest.mark.parametrize('layer', ['_BatchNorm', 'BatchNorm2d', 'PostShiftedBatchNorm2d'])
def test_init_cfg_finds_the_layer(layer):
    model = conv_norm('psBN')
    initialize(model, dict(type='Constant', layer=layer, val=0.7, bias=0))
    assert (model[1].weight == 0.7).all()


def test_constant_init_with_bias_0_is_right_by_the_start_value():
    norm = PostShiftedBatchNorm2d(6)
    constant_init(norm, 1, bias=0)
    assert (norm.beta == 0).all()


def test_norm_decay_mult_reaches_beta_and_bias_decay_mult_does_not():
    def decays(**paramwise_cfg):
        model = conv_norm('psBN')
        wrapper = build_optim_wrapper(
            model,
            dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5), paramwise_cfg=paramwise_cfg),
        )
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            names[id(group['params'][0])]: group['weight_decay']
            for group in wrapper.optimizer.param_groups
        }

    found = decays(norm_decay_mult=0.0)
    assert found['1.weight'] == found['1.beta'] == 0 and found['0.weight'] == 0.5
    found = decays(bias_decay_mult=0.0)
    assert found['0.bias'] == 0 and found['1.beta'] == 0.5


# Conversion


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shift', [0.1, 0.5])
def test_bn_to_psbn_and_back_keep_the_function(image, training, shift):
    model = resnet('BN', norm_eval=False)
    model.train(training)
    expected = copy.deepcopy(model)(image)
    psbn = bn_to_psbn(copy.deepcopy(model), shift=shift)
    norms = [m for m in psbn.modules() if isinstance(m, _BatchNorm)]
    assert all(type(m) is PostShiftedBatchNorm2d and m.shift_value == shift for m in norms)
    assert all(m.training == training for m in norms)
    bn = psbn_to_bn(copy.deepcopy(psbn))
    assert not any(isinstance(m, PostShiftedBatchNorm) for m in bn.modules())
    for converted in (psbn, bn):
        for a, b in zip(converted(image), expected):
            assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(effective_biases(bn), effective_biases(model), atol=1e-6)


@pytest.mark.parametrize(
    ('bn', 'psbn', 'shape'),
    [
        (nn.BatchNorm1d, PostShiftedBatchNorm1d, (4, 6)),
        (nn.BatchNorm2d, PostShiftedBatchNorm2d, (4, 6, 5, 5)),
        (nn.BatchNorm3d, PostShiftedBatchNorm3d, (4, 6, 3, 3, 3)),
        (nn.SyncBatchNorm, PostShiftedSyncBatchNorm, (4, 6, 5, 5)),
    ],
)
def test_each_class_is_converted_to_its_own_and_back(bn, psbn, shape):
    layer = randomize(bn(6)).eval()
    layer.bias.requires_grad_(False)
    x = torch.randn(shape)
    expected = layer(x)
    converted = bn_to_psbn(layer)
    assert type(converted) is psbn and not converted.beta.requires_grad
    assert torch.allclose(converted(x), expected, atol=1e-6)
    back = psbn_to_bn(converted)
    assert type(back) is bn and not back.bias.requires_grad
    assert torch.allclose(back(x), expected, atol=1e-6)


def test_what_mmengine_makes_of_sync_bn_in_one_process_is_converted():
    layer = randomize(revert_sync_batchnorm(nn.SyncBatchNorm(6))).eval()
    x = torch.randn(4, 6, 5)
    expected = layer(x)
    converted = bn_to_psbn(layer)
    assert type(converted) is PostShiftedSyncBatchNorm and converted.process_group is None
    assert torch.allclose(converted(x), expected, atol=1e-6)


def test_psbn_without_beta_becomes_bn_with_a_constant_bias():
    layer = PostShiftedBatchNorm2d(6, affine=False)
    x = torch.randn(4, 6, 5, 5)
    bn = psbn_to_bn(copy.deepcopy(layer))
    assert torch.allclose(bn(x), layer(x), atol=1e-6)
    assert not any(p.requires_grad for p in bn.parameters())


def test_conversion_leaves_alone_what_it_cannot_or_should_not_convert():
    class Custom(nn.BatchNorm2d):
        pass

    without_bias = nn.BatchNorm2d(6)
    without_bias.bias = None
    model = nn.Sequential(
        Custom(6), nn.BatchNorm2d(6, affine=False), without_bias, nn.InstanceNorm2d(6)
    )
    before = list(model)
    assert list(bn_to_psbn(model)) == before


def test_conversion_keeps_a_shared_layer_shared():
    norm = nn.BatchNorm2d(6)
    model = bn_to_psbn(nn.ModuleList([nn.Sequential(norm), nn.Sequential(norm)]))
    assert model[0][0] is model[1][0]
    assert isinstance(model[0][0], PostShiftedBatchNorm2d)
