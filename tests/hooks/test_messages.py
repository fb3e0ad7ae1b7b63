"""Which psBN layers weight decay does not reach, and why."""

import pytest
from torch import nn
from torch.optim import SGD, Rprop

from psbn_mmdet.collapse import find_norms
from psbn_mmdet.hooks.messages import unstepped_warning, weight_decay_warning
from psbn_mmdet.layers import PostShiftedBatchNorm2d


def network(norm=PostShiftedBatchNorm2d) -> nn.Sequential:
    return nn.Sequential(norm(4), norm(4))


def warning(model, *optimizers, **cfg):
    return weight_decay_warning(find_norms(model), optimizers, cfg)


def unstepped(model, *optimizers):
    return unstepped_warning(find_norms(model), optimizers)


@pytest.mark.parametrize('decayed', ['weight', 'bias'])
def test_gamma_and_bias_must_both_be_decayed(decayed):
    model = network()
    groups = [
        dict(params=[p], weight_decay=0.1 if name in ('0.weight', '0.bias', f'1.{decayed}') else 0)
        for name, p in model.named_parameters()
    ]
    said = warning(model, SGD(groups, lr=0.1, weight_decay=0.1))
    assert "1 of 2 psBN layers, such as 1 (the cause is the optimizer's parameter groups)" in said


def test_one_that_is_frozen_needs_no_decay():
    model = network()
    model[0].bias.requires_grad_(False)
    groups = [
        dict(params=[p], weight_decay=0 if name == '0.bias' else 0.1)
        for name, p in model.named_parameters()
    ]
    assert warning(model, SGD(groups, lr=0.1)) is None
    model[0].weight.requires_grad_(False)
    assert warning(model, SGD(model[1].parameters(), lr=0.1, weight_decay=0.1)) is None


def test_layers_that_no_optimizer_has_are_told_from_layers_without_decay():
    model = network()
    decay = SGD(model[0].parameters(), lr=0.1, weight_decay=0.1)
    assert warning(model, decay) is None
    assert unstepped(model, decay) == (
        'psBN: the bias of 1 of 2 layers, such as 1, is in no optimizer: where copies or flattened '
        'parameters are stepped in its place (Apex O2, FSDP), weight decay pulls it to 0, as in '
        'BN, and not to the shift.'
    )
    plain = SGD(model.parameters(), lr=0.1)
    assert '2 of 2' in warning(model, plain)
    assert 'cause is optim_wrapper.optimizer.weight_decay=0' in warning(model, plain)
    assert unstepped(model, plain) is None


def test_copies_that_are_stepped_in_a_bias_place_are_said():
    """As Apex O2's and DeepSpeed's master copies are."""
    model = network()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert 'the bias of 2 of 2 layers' in unstepped(model, SGD(copies, lr=0.1))
    model.requires_grad_(False)
    assert unstepped(model, SGD(copies, lr=0.1)) is None
    assert unstepped(network(nn.BatchNorm2d), SGD(copies, lr=0.1)) is None


def test_all_optimizers_are_looked_at():
    model = network()
    first = SGD(model[0].parameters(), lr=0.1, weight_decay=0.1)
    second = SGD(model[1].parameters(), lr=0.1)
    said = warning(model, first, second)
    assert "1 of 2 psBN layers, such as 1 (the cause is the optimizer's parameter groups)" in said
    second.param_groups[0]['weight_decay'] = 0.1
    assert warning(model, first, second) is None


@pytest.mark.parametrize(
    ('cfg', 'settings'),
    [
        (
            dict(paramwise_cfg=dict(norm_decay_mult=0, flat_decay_mult=0)),
            'paramwise_cfg.norm_decay_mult=0 and optim_wrapper.paramwise_cfg.flat_decay_mult=0',
        ),
        (
            dict(paramwise_cfg=dict(custom_keys=dict(a=dict(lr_mult=0), b=dict(decay_mult=0)))),
            "the cause is optim_wrapper.paramwise_cfg.custom_keys['b'].decay_mult=0)",
        ),
        (
            dict(paramwise_cfg=dict(norm_decay_mult=0), constructor='Own'),
            'the cause is optim_wrapper.paramwise_cfg.norm_decay_mult=0)',
        ),
        (
            dict(paramwise_cfg=dict(norm_decay_mult=0.5), constructor='Own'),
            'the cause is optim_wrapper.constructor=Own)',
        ),
    ],
)
def test_the_settings_that_take_decay_from_norms_are_named(cfg, settings):
    model = network()
    groups = [dict(params=model.parameters(), weight_decay=0)]
    assert settings in warning(model, SGD(groups, lr=0.1, weight_decay=0.1), **cfg)


def test_an_optimizer_that_knows_no_decay_gives_none():
    model = network()
    assert '2 of 2' in warning(model, Rprop(model.parameters()))


def test_a_layer_without_bias_is_judged_by_its_gamma():
    model = nn.Sequential(PostShiftedBatchNorm2d(4))
    model[0].bias = None
    assert warning(model, SGD(model.parameters(), lr=0.1, weight_decay=0.1)) is None
    assert '1 of 1' in warning(model, SGD(model.parameters(), lr=0.1))


def test_bn_needs_no_decay():
    model = network(nn.BatchNorm2d)
    assert warning(model, SGD(model.parameters(), lr=0.1)) is None
