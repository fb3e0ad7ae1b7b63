"""psBN is a BN: to torch, MMCV, MMEngine, MMDetection and other people's code."""

from __future__ import annotations

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
    BaseModule,
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


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# The layer itself


@pytest.mark.parametrize('norm_type', SHAPES)
@pytest.mark.parametrize('training', [True, False])
def test_a_new_layer_adds_the_shift_to_what_bn_computes(norm_type, training):
    x = torch.randn(SHAPES[norm_type])
    bn = MODELS.build(dict(type=norm_type[2:], num_features=6)).train(training)
    psbn = MODELS.build(dict(type=norm_type, num_features=6, shift=0.3)).train(training)
    assert torch.allclose(psbn(x), bn(x) + 0.3, atol=1e-6)
    assert torch.equal(psbn.running_mean, bn.running_mean)
    assert torch.equal(psbn.running_var, bn.running_var)


@pytest.mark.parametrize('norm_type', ['psBN', 'psBN1d', 'psBN3d'])
def test_forward_parameters_and_entries_are_those_of_bn(norm_type):
    bn, psbn = (MODELS.build(dict(type=t, num_features=6)) for t in (norm_type[2:], norm_type))
    assert type(psbn).forward is type(bn).forward
    assert list(psbn.state_dict()) == list(bn.state_dict())
    assert [name for name, _ in psbn.named_parameters()] == ['weight', 'bias']
    assert type(psbn.bias) is nn.Parameter and psbn.affine is True


@pytest.mark.parametrize('shift', [0, -0.1, 1e-5, 101, math.nan, math.inf, 'a', None, True])
def test_refuses_a_bad_shift_by_its_value(shift):
    with pytest.raises(ValueError, match=r'finite number > 0 .*, got') as error:
        MODELS.build(dict(type='psBN', num_features=6, shift=shift))
    assert repr(shift) in str(error.value)


@pytest.mark.parametrize('norm_type', SHAPES)
def test_is_built_by_mmcv_as_a_bn(norm_type):
    name, layer = build_norm_layer(dict(type=norm_type, requires_grad=False), 6, postfix=1)
    assert name == 'bn1'
    assert isinstance(layer, _BatchNorm)
    assert not any(p.requires_grad for p in layer.parameters())


def test_takes_the_arguments_of_torch():
    layer = PostShiftedBatchNorm2d(6, 1e-3, 0.2, True, False, torch.device('cpu'), torch.float64)
    assert (layer.eps, layer.momentum, layer.running_mean) == (1e-3, 0.2, None)
    assert layer.bias.dtype == torch.float64
    sync = PostShiftedSyncBatchNorm(6, 1e-3, 0.2, True, True, None, None, torch.float64)
    assert sync.bias.dtype == torch.float64
    assert 'eps=0.001' in repr(layer) and 'shift=0.1' in repr(layer)


@pytest.mark.parametrize('norm_type', SHAPES)
def test_without_a_bias_it_is_bn(norm_type):
    x = torch.randn(SHAPES[norm_type])
    layer = MODELS.build(dict(type=norm_type, num_features=6, affine=False))
    plain = MODELS.build(dict(type=norm_type[2:], num_features=6, affine=False))
    assert layer.bias is None and torch.equal(layer(x), plain(x))


def test_a_filter_at_zero_gets_gradient_through_the_rectifier():
    x = torch.randn(4, 6, 5, 5)
    for layer, alive in ((nn.BatchNorm2d(6), False), (PostShiftedBatchNorm2d(6), True)):
        nn.init.zeros_(layer.weight)
        layer(x).relu().square().sum().backward()
        assert bool((layer.bias.grad != 0).all()) == alive


# Where the bias starts: what an initializer writes means beta


class Block(BaseModule):
    """Two of MMCV's blocks and a bare norm, initialized as in MMDetection."""

    def __init__(self, norm_type: str = 'psBN', **kwargs):
        super().__init__(init_cfg=dict(type='Constant', layer='_BatchNorm', val=1, bias=0))
        cfg = dict(type=norm_type, **kwargs)
        self.conv = ConvModule(3, 6, 3, norm_cfg=cfg)
        self.tail = nn.Sequential(ConvModule(6, 6, 3, norm_cfg=cfg), build_norm_layer(cfg, 6)[1])

    def forward(self, x):
        return self.tail(self.conv(x))


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def assert_started(module: nn.Module, shift: float = 0.1) -> None:
    for norm in norms_of(module):
        assert torch.equal(norm.bias, torch.full_like(norm.bias, shift))


def test_resetting_starts_anew():
    layer = PostShiftedBatchNorm2d(6, shift=0.3, device='meta').to_empty(device='cpu')
    layer.reset_parameters()
    assert_started(layer, 0.3)
    assert (layer.weight == 1).all() and (layer.running_var == 1).all()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('init_weights', [True, False])
def test_initializers_that_write_0_leave_a_new_layer_at_the_shift(training, init_weights, image):
    torch.manual_seed(0)
    block = Block(shift=0.3).train(training)
    if init_weights:
        block.init_weights()
    plain = Block('BN').train(training)
    plain.load_state_dict(block.state_dict())
    for norm in norms_of(plain):
        assert (norm.bias == 0.3).all(), 'a state dict has the shift'
    block(image)
    assert_started(block, 0.3)
    for norm in norms_of(block):
        nn.init.zeros_(norm.bias)  # once more, before any step
    block(image)
    assert_started(block, 0.3) if training else None


def test_old_initializers_write_to_data(image):
    layer = PostShiftedBatchNorm2d(3)
    layer.bias.data.zero_()
    layer(image)
    assert_started(layer)


@pytest.mark.parametrize('zeros', ['loaded', 'trained', 'converted'])
def test_other_zeros_are_zeros(zeros, image):
    bn = nn.BatchNorm2d(3)
    layer = PostShiftedBatchNorm2d(3)
    if zeros == 'loaded':
        layer.load_state_dict(bn.state_dict())
    elif zeros == 'converted':
        layer = bn_to_psbn(copy.deepcopy(bn))
    else:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.bias.grad = torch.zeros(3)
        optimizer.step()
        layer.bias.data.zero_()
    assert torch.equal(layer(image), bn(image))
    assert not layer.state_dict()['bias'].any()


@pytest.mark.parametrize('trains_first', [True, False])
def test_averages_and_teachers_start_there_too(trains_first, image):
    student = Block()
    average = ExponentialMovingAverage(student, momentum=0.5)
    teacher = Block()
    student.init_weights()
    if trains_first:
        student(image)
    average.update_parameters(student)
    with torch.no_grad():  # as MeanTeacherHook does before the training
        for theirs, ours in zip(teacher.parameters(), student.parameters()):
            theirs.data.copy_(ours.data)
    for module in (average.module, teacher, student):
        module.eval()(image)
        assert_started(module)


def test_what_is_frozen_from_the_start_has_the_shift(image):
    block = Block()
    block.requires_grad_(False)
    block.init_weights()
    block(image)
    assert_started(block)


# Weights of BN


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
def test_a_state_dict_of_bn_is_one_of_psbn_and_back(image, strict, norm_type):
    bn, psbn = evaluating(resnet('BN')), evaluating(resnet(norm_type))
    for norm in norms_of(psbn):
        nn.init.zeros_(norm.bias)
    result = psbn.load_state_dict(bn.state_dict(), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    back = evaluating(resnet('BN'))
    back.load_state_dict(psbn.state_dict(), strict=True)
    for a, b, c in zip(bn(image), psbn(image), back(image)):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_bn_weights_load_through_mmengine(image, tmp_path):
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
            assert torch.equal(a, b)


def test_a_state_dict_is_assigned_to_a_meta_layer():
    bn = randomize(nn.BatchNorm2d(6))
    layer = PostShiftedBatchNorm2d(6, device='meta')
    layer.load_state_dict(bn.state_dict(), assign=True)
    assert torch.equal(layer.bias, bn.bias)


def test_finetuning_with_frozen_stages_starts_from_the_very_function(image):
    bn, psbn = resnet('BN', frozen_stages=1), resnet('psBN', frozen_stages=1)
    psbn.load_state_dict(bn.state_dict())
    frozen = [norm for norm in norms_of(psbn) if not norm.bias.requires_grad]
    before = [norm.bias.clone() for norm in frozen]
    optimizer = torch.optim.AdamW(psbn.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        outputs = psbn(image)
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(outputs, bn(image)))
        optimizer.zero_grad()
        sum(output.sum() for output in outputs).backward()
        optimizer.step()
    assert len(frozen) > 3
    assert all(torch.equal(norm.bias, old) for norm, old in zip(frozen, before))


# Other people's code


def test_optimizer_constructors_that_collect_biases_by_type_find_them():
    """As MMYOLO's and Ultralytics' do."""
    model = resnet('psBN')
    biases = [m.bias for m in model.modules() if isinstance(getattr(m, 'bias', None), nn.Parameter)]
    assert len(biases) == len(norms_of(model))


def test_recipes_that_freeze_the_bias_freeze_it(image):
    """As MMAction2's ``partial_bn`` does."""
    layer = PostShiftedBatchNorm2d(3)
    layer.weight.requires_grad = False
    layer.bias.requires_grad = False
    before = layer.bias.clone()
    layer(image.requires_grad_()).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(layer.bias, before)


def test_recipes_that_copy_by_named_parameters_copy_all(image):
    """As MMAction2's loading of ImageNet weights does."""
    bn, psbn = evaluating(resnet('BN')), evaluating(resnet('psBN'))
    theirs = dict(bn.named_parameters()) | dict(bn.named_buffers())
    for name, value in [*psbn.named_parameters(), *psbn.named_buffers()]:
        value.data.copy_(theirs.pop(name).data)
    assert not theirs
    assert all(torch.equal(a, b) for a, b in zip(psbn(image), bn(image)))


def test_torch_pruning_prunes_it_as_bn(image):
    tp = pytest.importorskip('torch_pruning')
    models = []
    for norm_type in ('BN', 'psBN'):
        model = nn.Sequential(conv_norm(norm_type), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=image)
        graph.get_pruning_group(model[0][0], tp.prune_conv_out_channels, idxs=[1, 4]).prune()
    norm = models[1][0][1]
    assert isinstance(norm, PostShiftedBatchNorm2d) and norm.bias.shape == (4,)
    assert torch.equal(*(model(image) for model in models))
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1, weight_decay=1.0)
    norm.bias.data.fill_(0.1)
    norm.bias.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(norm.bias, torch.full((4,), 0.1)), 'the new parameter decays to the shift'


def test_deepcopy_and_pickle_keep_the_function():
    x = torch.randn(4, 6, 5, 5)
    layer = randomize(PostShiftedBatchNorm2d(6, shift=0.4)).eval()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), layer(x)) and twin.shift == 0.4


def test_mmcv_fuses_it_with_the_convolution(image):
    model = conv_norm('psBN').eval()
    expected = model(image)
    fused = fuse_conv_bn(copy.deepcopy(model))
    assert isinstance(fused[1], nn.Identity)
    assert torch.allclose(fused(image), expected, atol=1e-5)
    assert torch.allclose(fuse_conv_bn_eval(*model)(image), expected, atol=1e-5)


@pytest.mark.parametrize('by', ['torch.fx', 'torch.ao'])
def test_fusing_by_exact_class_needs_the_class_of_bn(image, by):
    model = nn.Sequential(conv_norm('psBN'), nn.ReLU()).eval()
    expected = model(image)
    bn = psbn_to_bn(copy.deepcopy(model))
    if by == 'torch.fx':
        from torch.fx.experimental.optimization import fuse

        fused = fuse(bn)
    else:
        from torch.ao.quantization import fuse_modules

        fused = fuse_modules(bn, ['0.0', '0.1', '1'])
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    assert torch.allclose(fused(image), expected, atol=1e-5)


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
    assert plain.bn.bias.grad.abs().sum() > 0


def test_frozen_batch_norm_of_mmdet_is_exact(image):
    model = conv_norm('psBN').eval()
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(model))
    assert isinstance(frozen[1], FrozenBatchNorm2d)
    assert torch.allclose(frozen(image), model(image), atol=1e-5)


@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
@pytest.mark.parametrize(
    'converter', [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm]
)
def test_generic_sync_bn_converters_make_sync_bn_of_the_same_function(converter, norm_type, image):
    model = conv_norm(norm_type).eval()
    expected = model(image)
    converted = converter(model)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert torch.equal(converted.eval()(image), expected)


def test_sync_bn_stays_itself_in_one_process_without_a_warning(image, caplog):
    model = conv_norm('psSyncBN')
    expected = model(image)
    reverted = revert_sync_batchnorm(model)
    assert isinstance(reverted[1], PostShiftedSyncBatchNorm)
    assert torch.allclose(reverted(image), expected)
    assert 'Failed to convert' not in caplog.text


@pytest.mark.parametrize('update_buffers', [True, False])
def test_ema_averages_the_parameters(update_buffers):
    model = conv_norm('psBN')
    average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=update_buffers)
    first = model[1].bias.detach().clone()
    average.update_parameters(model)
    model[1].bias.data.add_(1)
    average.update_parameters(model)
    assert torch.allclose(average.module[1].bias, first + 0.25)


@pytest.mark.parametrize('is_new', [False, True])
def test_torch_compile_gives_the_same_in_one_graph(image, is_new):
    model = conv_norm('psBN')
    if is_new:
        model[1].reset_parameters()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend='aot_eager', fullgraph=True)
    compiled(image).sum().backward()
    model(image).sum().backward()
    assert torch.allclose(compiled(image), model(image), atol=1e-5)
    assert torch.allclose(twin[1].bias.grad, model[1].bias.grad, atol=1e-4)


def test_torch_script_gives_the_same(image):
    model = conv_norm('psBN').eval()
    assert torch.allclose(torch.jit.script(model)(image), model(image), atol=1e-6)


@pytest.mark.parametrize('dynamo', [True, False])
@pytest.mark.parametrize('norm_type', ['psBN', 'psSyncBN'])
def test_onnx_export_gives_the_graph_of_bn(image, norm_type, dynamo, tmp_path):
    onnx = pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    graphs = []
    for kind in ('BN', norm_type):
        model = evaluating(resnet(kind))
        path = str(tmp_path / f'{kind}.onnx')
        version = {} if dynamo else dict(opset_version=17)
        export(model, (image,), path, dynamo=dynamo, **version)
        graphs.append([node.op_type for node in onnx.load(path).graph.node])
    assert graphs[0] == graphs[1]
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
            assert (module.bias.grad is None) == frozen, name
            assert (module.weight.grad is None) == frozen, name


def test_zero_init_residual_zeroes_gamma_and_keeps_the_shift(image):
    model = ResNet(18, base_channels=8, norm_cfg=dict(type='psBN'), zero_init_residual=True)
    model.init_weights()
    model(image)
    assert (model.layer1[0].bn2.weight == 0).all() and (model.bn1.weight == 1).all()
    assert_started(model)


@pytest.mark.parametrize('layer', ['_BatchNorm', 'BatchNorm2d', 'PostShiftedBatchNorm2d'])
def test_init_cfg_finds_the_layer(layer):
    model = conv_norm('psBN')
    initialize(model, dict(type='Constant', layer=layer, val=0.7, bias=0.5))
    assert (model[1].weight == 0.7).all() and (model[1].bias == 0.5).all()


def test_constant_init_with_bias_0_means_the_start(image):
    norm = PostShiftedBatchNorm2d(3)
    constant_init(norm, 1, bias=0)
    norm(image)
    assert_started(norm)


def test_norm_decay_mult_and_bias_decay_mult_reach_the_bias_as_that_of_bn():
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
    assert found['1.weight'] == found['1.bias'] == 0 and found['0.weight'] == 0.5
    found = decays(bias_decay_mult=0.0)
    assert found['0.bias'] == found['1.bias'] == 0 and found['1.weight'] == 0.5


# BN to psBN and back in a built network


@pytest.mark.parametrize('training', [True, False])
def test_bn_to_psbn_and_back_change_the_class_alone(image, training):
    model = resnet('BN', norm_eval=False)
    model.train(training)
    expected = copy.deepcopy(model)(image)
    tensors = [*model.parameters(), *model.buffers()]
    psbn = copy.deepcopy(bn_to_psbn(model, shift=0.5))
    assert all(type(m) is PostShiftedBatchNorm2d and m.shift == 0.5 for m in norms_of(model))
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()]))
    bn = copy.deepcopy(psbn_to_bn(model))
    assert all(type(m) is nn.BatchNorm2d for m in norms_of(model))
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()]))
    for converted in (psbn, bn):
        assert all(torch.equal(a, b) for a, b in zip(converted(image), expected))


@pytest.mark.parametrize(
    ('bn', 'psbn', 'shape'),
    [
        (nn.BatchNorm1d, PostShiftedBatchNorm1d, (4, 6)),
        (nn.BatchNorm2d, PostShiftedBatchNorm2d, (4, 6, 5, 5)),
        (nn.BatchNorm3d, PostShiftedBatchNorm3d, (4, 6, 3, 3, 3)),
        (nn.SyncBatchNorm, PostShiftedSyncBatchNorm, (4, 6, 5, 5)),
    ],
)
def test_each_class_becomes_its_own_and_back(bn, psbn, shape):
    layer = randomize(bn(6)).eval()
    layer.bias.requires_grad_(False)
    x = torch.randn(shape)
    expected = layer(x)
    assert bn_to_psbn(layer) is layer
    assert type(layer) is psbn and not layer.bias.requires_grad
    assert torch.equal(layer(x), expected)
    assert type(psbn_to_bn(layer)) is bn and torch.equal(layer(x), expected)


@pytest.mark.parametrize('made', ['by a config', 'by MMEngine in one process', 'with a group'])
def test_all_forms_of_sync_bn_become_pssyncbn(made):
    group = object()
    layer = {
        'by a config': lambda: MODELS.build(dict(type='SyncBN', num_features=6)),
        'by MMEngine in one process': lambda: revert_sync_batchnorm(nn.SyncBatchNorm(6)),
        'with a group': lambda: nn.SyncBatchNorm(6, process_group=group),
    }[made]()
    randomize(layer).eval()
    x = torch.randn(4, 6, 5)
    expected = layer(x)
    bn_to_psbn(layer)
    assert type(layer) is PostShiftedSyncBatchNorm
    assert layer.process_group is (group if made == 'with a group' else None)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert type(psbn_to_bn(layer)) is nn.SyncBatchNorm


def test_a_layer_made_bn_decays_to_0_again():
    model = psbn_to_bn(bn_to_psbn(nn.Sequential(nn.BatchNorm2d(3))))
    model[0].bias.data.fill_(0.1)
    model[0].bias.grad = torch.zeros(3)
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0).step()
    assert torch.allclose(model[0].bias, torch.full((3,), 0.09))


def test_conversion_leaves_alone_what_may_compute_something_else_or_has_no_bias():
    class Custom(nn.BatchNorm2d):
        pass

    class CustomPSBN(PostShiftedBatchNorm2d):
        pass

    without_bias = nn.BatchNorm2d(6)
    without_bias.bias = None
    layers = [Custom(6), nn.BatchNorm2d(6, affine=False), without_bias, nn.InstanceNorm2d(6)]
    model = nn.Sequential(*layers, CustomPSBN(6))
    nn.utils.parametrize.register_parametrization(model[-1], 'weight', nn.Softplus())
    before = [type(layer) for layer in model]
    assert [type(layer) for layer in psbn_to_bn(bn_to_psbn(model))] == before


def test_a_wrong_shift_is_named():
    with pytest.raises(ValueError, match=r'finite number > 0 .* got -1'):
        bn_to_psbn(nn.BatchNorm2d(3), shift=-1)
