"""The census of state dicts: against that of the network, and against real forward passes."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cifar10 import CifarResNet
from torch import Tensor, nn

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.collapse import (
    ASSUMED,
    census_of_model,
    census_of_state_dict,
    compare,
    find_norms,
    trace_rectifiers,
    trace_structure,
)
from psbn_mmdet.layers import find_norm_states
from psbn_mmdet.recovery import revive

DATA = Path(__file__).resolve().parents[3] / 'shared/data'
# What the public checkpoints hold: filters, dead by the parameter rule, vanished.
CHECKPOINTS = {
    'resnet20-12fca82f.th': (3, 688, 18, 17),
    'resnet32-d509ac18.th': (5, 1136, 38, 36),
}
with_checkpoints = pytest.mark.skipif(
    not (DATA / 'checkpoints').is_dir(), reason='the public checkpoints are not at hand'
)


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model[1].weight.data = torch.tensor([0.0, 1.0, 0.5, 1e-3])
    model[1].bias.data = torch.tensor([0.1, -3.0, -1.6, -0.5])
    model[3].bias.data = torch.tensor([-3.5, 0.0, 0.0, 0.0])
    model[1].running_mean += 0.1
    return model.eval()


def test_the_parameters_tell_what_they_tell_in_the_network():
    model = small()
    rectifiers = trace_rectifiers(model, torch.randn(1, 3, 8, 8))
    expected = census_of_model(model, rectifiers=rectifiers)
    found = census_of_state_dict(model.state_dict(), rectifiers=rectifiers)
    assert [layer.name for layer in found.layers] == ['1', '3']
    for layer, wanted in zip(found.layers, expected.layers):
        assert np.array_equal(layer.gamma, wanted.gamma)
        assert np.allclose(layer.bias, wanted.bias, atol=1e-7)
    assert found['1'].vanished.tolist() == [True, False, False, True]
    assert found['1'].dead.tolist() == [False, True, True, True]
    assert found['3'].dead is None


def test_dead_is_not_known_unless_a_rectifier_is_known_or_assumed():
    found = census_of_state_dict(small().state_dict())
    assert found['3'].rectifier is found['3'].dead is None
    found = census_of_state_dict(small().state_dict(), rectifiers={'1': 'relu', '3': ASSUMED})
    assert found['1'].rectified and found['3'].rectified is None
    assert found['3'].dead.tolist() == [True, False, False, False]


def test_two_networks_are_compared_where_they_are_alike():
    rectifiers = {'1': 'relu'}
    before = census_of_state_dict(small().state_dict(), rectifiers=rectifiers)
    state_dict = small().state_dict()
    state_dict['1.weight'] = torch.tensor([1.0, 1.0, 0.5, 1e-3])
    state_dict['1.bias'] = torch.tensor([-4.0, 0.0, -1.6, -0.5])
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith('3')}
    changes = compare(before, census_of_state_dict(state_dict, rectifiers=rectifiers))
    assert changes.keys() == {'1'}
    new, revived = changes['1']
    assert new.tolist() == [False] * 4  # channel 0 has vanished before and is dead now
    assert revived.tolist() == [False, True, False, False]


def images(kind: str) -> Tensor:
    """64 images as the networks expect them: random, or photographs."""
    if kind == 'random':
        return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    files = sorted((DATA / 'bccd/images').iterdir())[:64]
    photographs = np.stack([cv2.resize(cv2.imread(str(file)), (32, 32)) for file in files])
    pixels = torch.from_numpy(photographs[..., ::-1] / 255.0).permute(0, 3, 1, 2).float()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (pixels - mean) / std


def largest_after_rectifier(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By BN layer, each channel's largest value after a ReLU, over all images and positions."""
    largest = {}

    def hook(name):
        def record(module, inputs, output):
            largest[name] = output.relu().amax((0, 2, 3))

        return record

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model(x)
    return largest


@with_checkpoints
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_real_collapse_is_found(name):
    _, filters, dead, vanished = CHECKPOINTS[name]
    weights = read_weights(DATA / 'checkpoints' / name)
    rectifiers = dict.fromkeys(find_norm_states(weights.state_dict), ASSUMED)
    found = census_of_state_dict(weights.state_dict, rectifiers=rectifiers)
    assert found.count('unstarted') == found.count('broken') == 0
    assert (found.channels, found.count('dead'), found.count('vanished')) == (
        filters,
        dead,
        vanished,
    )
    assert found.layers[0].name == 'bn1'


@with_checkpoints
@pytest.mark.parametrize('kind', ['random', 'photographs'])
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_a_forward_pass_confirms_each_dead_filter(name, kind):
    if kind == 'photographs' and not (DATA / 'bccd').is_dir():
        pytest.skip('the photographs are not at hand')
    model = CifarResNet(CHECKPOINTS[name][0]).eval()
    state_dict = read_weights(DATA / 'checkpoints' / name).state_dict
    model.load_state_dict(state_dict)
    x = images(kind)
    rectifiers = trace_rectifiers(model, x[:2])
    found = census_of_state_dict(state_dict, rectifiers=rectifiers)
    largest = largest_after_rectifier(model, x)
    passing, closed = {}, {}
    for layer in found.layers:
        assert layer.rectifier == ('relu' if layer.name.endswith('bn1') else 'other')
        if layer.dead is not None:
            zero = (largest[layer.name] == 0).numpy()
            for channel in np.flatnonzero(layer.dead & ~zero):
                passing[layer.name, channel] = largest[layer.name][channel].item()
            for channel in np.flatnonzero(zero & ~layer.dead):
                closed[layer.name, channel] = layer.gamma[channel]
    if kind == 'photographs':  # every dead filter is zero at every position of every image
        assert not passing
    else:  # noise is no photograph: 5 of 43 pass a trace, where others pass about 1
        assert len(passing) == {'resnet20-12fca82f.th': 2, 'resnet32-d509ac18.th': 3}[name]
        assert max(passing.values()) < 1e-3
    # And hardly any other filter is zero on all of these images.
    assert len(closed) <= 1


@with_checkpoints
def test_nothing_is_told_of_statistics_that_were_folded_into_the_parameters():
    """As in the Caffe weights of MMDetection; reviving them would ruin the network."""
    model = CifarResNet(3)
    model.load_state_dict(read_weights(DATA / 'checkpoints/resnet20-12fca82f.th').state_dict)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        for norm in find_norms(model).values():
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            norm.bias -= norm.running_mean * scale
            norm.weight.copy_(scale * math.sqrt(1 + norm.eps))
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
        assert torch.allclose(model(x), y, atol=1e-4)
    structure = trace_structure(model, x)
    for found in (
        census_of_model(model, rectifiers=structure.rectifiers),
        census_of_state_dict(model.state_dict(), rectifiers=structure.rectifiers),
    ):
        assert all(layer.folded for layer in found.layers)
        assert found.count('dead') is found.count('vanished') is None
        assert found.count('collapsed') == 0
    assert revive(model.state_dict(), structure)[1] == {}
    model.train()  # by the batch: gamma and bias tell again
    assert census_of_model(model, rectifiers=structure.rectifiers).count('dead') is not None
