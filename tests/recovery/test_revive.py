"""Opening closed filters in a state dict: which, to where, and what is restored around them."""

import pytest
import torch
from closed_chain import CLOSED, chain, images
from torch import nn

from psbn_mmdet.collapse import Structure, trace_structure
from psbn_mmdet.recovery import revive

# Channel 0 is collapsed, 1 dead with a gamma, 2 vanished but alive, 3 far below, 4 well.
GAMMA = [0.0, 0.01, 0.0, 0.01, 1.0]
BIAS = [0.0, -0.05, 0.2, -5.0, 0.1]
OPENED = [0, 1, 3]
RELU = Structure({'0': 'relu'})


def half_collapsed() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))
    for norm in (model[0], model[2]):
        norm.weight.data, norm.bias.data = torch.tensor(GAMMA), torch.tensor(BIAS)
        norm.running_mean += 1e-3
    return model.eval()


def test_what_passes_nothing_is_opened_before_a_relu_and_all_else_kept():
    model = half_collapsed()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    new, opened = revive(model.state_dict(), RELU)
    assert opened == {'0': OPENED}
    assert new['0.bias'].tolist() == pytest.approx([0.02, 0.02, 0.2, 0.02, 0.1])
    assert all(torch.equal(new[key], start[key]) for key in start if key != '0.bias')
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())


def test_the_network_changes_by_what_the_opened_filters_put_out():
    model, x = half_collapsed(), torch.randn(8, 5, 6, 6)
    before = model[:2](x)
    model.load_state_dict(revive(model.state_dict(), RELU)[0])
    after = model[:2](x)
    assert torch.allclose(after[:, [2, 4]], before[:, [2, 4]], atol=1e-6)
    assert before[:, OPENED].max() == 0
    assert 0.01 < after[:, OPENED].mean() < 0.03


def test_closed_is_what_opens_only_beyond_three_standard_deviations():
    norm = nn.BatchNorm2d(6)
    norm.weight.data = torch.tensor([0.25, -0.25, 0.25, -0.25, 0.25, 0.25])
    norm.bias.data = torch.tensor([-0.7501, -0.7501, -0.74, -0.74, -0.9, -0.6])
    _, opened = revive(norm.state_dict(), Structure({'': 'relu'}))
    assert opened == {'': [0, 1, 4]}


@pytest.mark.parametrize('revived', [False, True])
def test_opened_filters_get_gradient_from_the_first_step_on_however_deep(revived):
    model = half_collapsed().train()
    if revived:
        model.load_state_dict(revive(model.state_dict(), RELU)[0])
    model[:2](torch.randn(8, 5, 6, 6)).sum().backward()
    trained = [0, 1, 2, 3, 4] if revived else [2, 4]
    assert model[0].bias.grad.nonzero().flatten().tolist() == trained


@pytest.mark.parametrize('kind', ['leaky_relu', 'other'])
def test_nothing_is_closed_before_anything_but_a_relu(kind):
    assert revive(half_collapsed().state_dict(), Structure({'0': kind}))[1] == {}


@pytest.mark.parametrize('groups', [1, 6])
def test_decayed_weights_around_them_are_restored(groups):
    net, x = chain(groups), images()
    net.eval()
    with torch.no_grad():
        before, y = net(x), net[:3](x)
    structure = trace_structure(net, x)
    state_dict = net.state_dict()
    net.load_state_dict(revive(state_dict, structure)[0])
    reading = net[3].weight if groups > 1 else net[3].weight.transpose(0, 1)
    for weight in (net[0].weight, reading):
        sizes = weight.detach().flatten(1).norm(dim=1)
        assert torch.allclose(sizes[CLOSED], sizes[~CLOSED].median())
    with torch.no_grad():
        now = net[:3](x)
        assert torch.equal(now[:, ~CLOSED], y[:, ~CLOSED])
        assert torch.allclose(now[:, CLOSED], torch.tensor(0.02), atol=1e-3)
        assert 0 < (net(x) - before).abs().max() < 0.1


def test_a_bias_that_two_layers_share_is_opened_in_one():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    model[0].bias.data.fill_(-1)
    model[2].bias = model[0].bias
    model[0].weight.data.fill_(0.01)
    new, _ = revive(model.state_dict(), RELU)
    assert new['0.bias'].tolist() == pytest.approx([0.02] * 2)
    assert new['2.bias'].tolist() == [-1, -1]


def test_names_of_the_backbone_alone_and_of_wrappers():
    structure = Structure(
        {'backbone.bn1': 'relu', 'neck.bn': 'relu'},
        {'backbone.bn1': 'backbone', 'neck.bn': 'neck.bn'},
        {'backbone.bn1': 'backbone.conv1', 'neck.bn': 'neck.conv'},
        {'backbone.bn1': ['backbone.conv2', 'neck.conv']},
        ['neck.conv'],
    )
    assert structure.renamed('backbone.', 'module.') == Structure(
        {'module.bn1': 'relu'},
        {},
        {'module.bn1': 'module.conv1'},
        {'module.bn1': ['module.conv2']},
    )
