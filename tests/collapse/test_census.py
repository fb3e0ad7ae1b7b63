"""The census of a network."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmdet.models.backbones import ResNet
from torch import nn

from psbn_mmdet.collapse import census_of_model, census_of_state_dict
from psbn_mmdet.layers import PostShiftedBatchNorm2d, bn_to_psbn


def test_vanished_dead_trapped_and_their_union():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model[1].weight.data = torch.tensor([1e-3, 1.1e-3, 0.5, -0.2, 1.0])
    model[1].bias.data = torch.tensor([0.5, 0.5, -2.0, -0.6, 0.0])
    trapped = np.array([False, False, False, False, True])
    found = census_of_model(model, rectifiers={'1': 'relu'}, trapped={'1': trapped})
    layer = found['1']
    assert layer.vanished.tolist() == [True, False, False, False, False]
    assert layer.dead.tolist() == [False, False, True, True, False]  # -0.6 + 3 * 0.2 = 0
    assert layer.collapsed.tolist() == [True, False, True, True, True]
    assert [found.count(k) for k in ('vanished', 'dead', 'trapped', 'collapsed')] == [1, 2, 1, 4]
    assert census_of_model(model, k=2, rectifiers={'1': 'relu'}).count('dead') == 2
    assert census_of_model(model, tau=0.6).count('vanished') == 4


@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_the_largest_numbers_are_judged_like_others():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model[1].weight.data = torch.tensor([3e38, -3e38, 1e38])
    model[1].bias.data = torch.tensor([-3e38, 3e38, -3.1e38])
    layer = census_of_model(model, rectifiers={'1': 'relu'})['1']
    assert layer.dead.tolist() == [False, False, True]
    assert not layer.broken.any()


def test_psbn_is_judged_by_its_bias():
    model = nn.Sequential(PostShiftedBatchNorm2d(2, shift=0.3))
    model[0].weight.data.zero_()
    model[0].bias.data = torch.tensor([0.1, -0.1])
    layer = census_of_model(model, rectifiers={'0': 'relu'}).layers[0]
    assert layer.norm == 'psBN'
    assert np.allclose(layer.bias, [0.1, -0.1])
    assert layer.dead.tolist() == [False, True]
    assert layer.vanished.all()  # constant, but alive: told apart by `dead`


def test_what_is_not_known_is_none_and_not_0():
    found = census_of_model(nn.Sequential(nn.BatchNorm2d(4)))
    assert found.count('dead') is None and found.count('trapped') is None
    assert found.count('vanished') == found.count('collapsed') == 0
    assert census_of_model(nn.Sequential(nn.ReLU())).count('collapsed') is None


def test_frozen_layers_are_counted_apart_and_never_trapped():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(6))
    model[0].requires_grad_(False)
    for norm in model:
        nn.init.normal_(norm.weight, 1)
    masks = {'0': np.ones(4, bool), '1': np.ones(6, bool)}
    found = census_of_model(model, trapped=masks)
    assert (found.frozen, found.channels, found.count('trapped')) == (4, 10, 6)
    assert found['0'].trapped is None


@pytest.mark.parametrize('kwargs', [dict(affine=False), dict(track_running_stats=False)])
def test_layers_without_gamma_or_statistics_do_no_harm(kwargs):
    model = nn.Sequential(nn.BatchNorm1d(4, **kwargs), nn.InstanceNorm2d(4, affine=True))
    assert len(census_of_model(model).layers) == ('track_running_stats' in kwargs)


def test_counts_are_the_same_for_bn_and_psbn():
    model = ResNet(18, base_channels=8)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, std=0.01)
    before = census_of_model(model, tau=0.005)
    after = census_of_model(bn_to_psbn(model), tau=0.005)
    assert {layer.norm for layer in after.layers} == {'psBN'}
    assert before.count('vanished') == after.count('vanished') > 0


@pytest.mark.parametrize(('tau', 'k'), [(-1e-3, 3), (1, 3), (1e-3, -1), (1e-3, float('nan'))])
def test_thresholds_out_of_range_are_refused(tau, k):
    bad = tau if not 0 <= tau < 1 else k
    with pytest.raises(ValueError, match=str(bad)):
        census_of_model(nn.BatchNorm2d(4), tau=tau, k=k)


def test_a_layer_as_initialized_has_lost_nothing():
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(1), nn.BatchNorm2d(2)
    )
    rectifiers = dict.fromkeys('0123', 'relu')
    for index in (0, 2, 3):  # as zero_init_residual does
        nn.init.zeros_(model[index].weight)
    found = census_of_model(model, rectifiers=rectifiers, trapped={'1': np.ones(4, bool)})
    assert found.count('unstarted') == 10
    assert found['0'].vanished.sum() == found['0'].dead.sum() == found['1'].trapped.sum() == 0
    assert found['2'].vanished.all()  # one channel alone tells nothing
    state_dict = census_of_state_dict(model.state_dict(), rectifiers=rectifiers)
    assert [layer.unstarted.sum() for layer in state_dict.layers] == [4, 4, 0, 2]
    model[0].bias.data[1] += 1e-6  # no initialization leaves a layer so
    found = census_of_model(model, rectifiers=rectifiers)
    assert found['0'].unstarted.sum() == 0 and found['0'].vanished.all() and found['0'].dead.any()


def test_a_layer_whose_gammas_are_all_0_has_vanished_if_its_statistics_moved():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    for norm in model:
        nn.init.zeros_(norm.weight)
    model[1](torch.randn(2, 4, 3, 3))  # in training
    model[2].running_var.fill_(2)  # the mean alone would not tell
    for found in (census_of_model(model), census_of_state_dict(model.state_dict())):
        assert [int(layer.vanished.sum()) for layer in found.layers] == [0, 4, 4]
        assert [int(layer.unstarted.sum()) for layer in found.layers] == [4, 0, 0]
        known = found.judged(unstarted={'1': np.array([True, False, False, False])})
        assert [int(layer.vanished.sum()) for layer in known.layers] == [0, 3, 4]


def test_channels_that_are_said_to_be_unstarted_are_neither_of_the_kinds():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].weight.data = torch.tensor([0.0, 0.0, 1.0])
    model[0].bias.data = torch.tensor([-1.0, -1.0, 0.0])
    unstarted = np.array([True, False, True])
    known = dict(rectifiers={'0': 'relu'}, trapped={'0': np.ones(3, bool)})
    layer = census_of_model(model, unstarted={'0': unstarted}, **known)['0']
    assert layer.vanished.tolist() == layer.dead.tolist() == [False, True, False]
    assert layer.trapped.tolist() == layer.collapsed.tolist() == [False, True, False]


def test_what_is_not_finite_is_broken_and_collapsed():
    nan, inf = math.nan, math.inf
    model = nn.Sequential(PostShiftedBatchNorm2d(6))
    model[0].running_mean += 0.1
    model[0].weight.data = torch.tensor([nan, 1.0, inf, 1.0, 0.5, 0.0])
    model[0].bias.data = torch.tensor([0.0, nan, 0.0, -inf, 0.0, 0.0])
    for found in (
        census_of_model(model, rectifiers={'0': 'relu'}),
        census_of_state_dict(model.state_dict(), rectifiers={'0': 'relu'}),
    ):
        assert found['0'].broken.tolist() == [True] * 4 + [False] * 2
        assert found['0'].collapsed.tolist() == [True] * 4 + [False, True]
        assert found.count('broken') == 4


def test_layers_on_two_devices_are_counted_in_their_order(second_device):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3), nn.BatchNorm2d(2))
    model[0].weight.data = torch.tensor([0.0, 1.0])
    model[1].weight.data = torch.tensor([1.0, 0.0, 2.0])
    model[2].weight.data = torch.tensor([3.0, 0.0])
    model[1].to(second_device)
    found = census_of_model(model)
    assert found.values('gamma').tolist() == [0, 1, 1, 0, 2, 3, 0]
    assert [layer.vanished.nonzero()[0].tolist() for layer in found.layers] == [[0], [1], [1]]


def test_stages_partition_the_network():
    found = census_of_model(ResNet(18, base_channels=8))
    stages = found.stages()
    assert list(stages) == ['bn1', 'layer1', 'layer2', 'layer3', 'layer4']
    assert sum(stage.channels for stage in stages.values()) == found.channels


def test_the_census_needs_no_mmdetection():
    code = (
        'import sys; sys.modules["mmdet"] = sys.modules["mmcv"] = None\n'
        'from torch import nn; from psbn_mmdet.collapse import census_of_model\n'
        'print(census_of_model(nn.Sequential(nn.BatchNorm2d(4))).channels)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '4', result.stderr
