"""psBN on two gloo ranks, against one process that has the whole batch."""

from __future__ import annotations

import pytest
import torch
from decay_rank import CASES, biases, network, train
from decay_rank import SETTINGS as DECAY
from naive import ALPHA, NaivePSBN2d
from sync_rank import SETTINGS, SHAPES, made, result
from two_ranks import two_ranks


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return two_ranks('layers/sync_rank.py', tmp_path_factory.mktemp('ranks'))


@pytest.fixture(scope='module')
def decayed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return two_ranks('layers/decay_rank.py', tmp_path_factory.mktemp('decay'))


@pytest.mark.parametrize('name', CASES)
def test_the_bias_decays_to_the_shift_however_it_is_spread_over_ranks(decayed, name):
    first, second = (found[name] for found in decayed)
    if isinstance(first, Exception):
        pytest.skip(f'not in this torch: {first}')
    net = network(NaivePSBN2d)
    naive = biases(train(net, torch.optim.SGD(net.parameters(), **DECAY))) + ALPHA
    assert torch.equal(first, second)
    torch.testing.assert_close(first, naive, rtol=0, atol=1e-6)


def test_bn_weights_reach_a_sharded_network(decayed):
    found = decayed[0]['FSDP2 from BN']
    if isinstance(found, Exception):
        pytest.skip(f'not in this torch: {found}')
    assert torch.equal(found, torch.full((12,), 0.7))


def test_flat_parameters_are_said_to_decay_as_those_of_bn(decayed):
    for found in decayed:
        if isinstance(found['FSDP1'], Exception):
            pytest.skip(f'not in this torch: {found["FSDP1"]}')
        assert 'no torch.optim.Optimizer has stepped a trained bias' in found['FSDP1'][0]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', SETTINGS)
def test_two_ranks_compute_what_one_process_does(ranks, name, shape):
    whole = result(*made(name, shape))
    first, second = (found[name, shape] for found in ranks)
    assert first.keys() == second.keys() == whole.keys()
    for key, expected in whole.items():
        if key in ('y', 'dx'):
            joined = torch.cat([first[key], second[key]])
        elif key.startswith('d'):  # a parameter's, which DDP sums
            joined = first[key] + second[key]
        else:
            assert torch.equal(first[key], second[key]), key
            joined = first[key]
        torch.testing.assert_close(joined, expected, rtol=1e-6, atol=1e-6)


def test_half_precision_is_computed_in_full_and_evaluation_needs_no_other_rank(ranks):
    layer, x, gradient = made('plain', SHAPES[0])
    whole = result(layer, x.bfloat16(), gradient.bfloat16())
    joined = torch.cat([found['half']['y'] for found in ranks])
    assert joined.dtype == torch.bfloat16
    torch.testing.assert_close(joined, whole['y'], rtol=0.02, atol=0.02)
    torch.testing.assert_close(ranks[0]['half']['running_var'], whole['running_var'])
    expected = layer.eval()(x.bfloat16().float()).detach()
    torch.testing.assert_close(torch.cat([found['eval'] for found in ranks]), expected)


def test_one_value_per_channel_on_all_ranks_is_refused(ranks):
    for found in ranks:
        assert 'expected more than 1 value per channel when training' in found['refused']
