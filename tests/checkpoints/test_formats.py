"""Reading checkpoints of whatever origin, and writing them whole or not at all."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import Classifier, run
from torch import nn

from psbn_mmdet.checkpoints import (
    CheckpointError,
    read_content,
    read_weights,
    write_content,
)
from psbn_mmdet.collapse import ASSUMED, census_of_state_dict
from psbn_mmdet.layers import PostShiftedBatchNorm2d


def network() -> nn.Sequential:
    """With one vanished and one dead channel of 6."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.append(nn.Conv2d(4, 2, 1)).append(PostShiftedBatchNorm2d(2))
    model[1].weight.data[0] = 0
    model[1].bias.data[0] = 1
    model[1].bias.data[1] = -4
    return model


def prefixed(prefix: str) -> dict:
    return {prefix + key: value for key, value in network().state_dict().items()}


PLAIN = prefixed('')
NESTINGS = {
    'plain PyTorch': (PLAIN, ''),
    'MMEngine': (dict(meta={}, state_dict=PLAIN, optimizer=dict(state={0: {}})), 'state_dict'),
    'DDP': (dict(state_dict=prefixed('module.'), best_prec1=90.0), 'state_dict'),
    'torchvision': (dict(model=PLAIN, optimizer={}, epoch=3), 'model'),
    'compiled under DDP': (dict(model=prefixed('module._orig_mod.')), 'model'),
    'timm': (dict(epoch=3, state_dict_ema=PLAIN, state_dict=PLAIN), 'state_dict'),
    'average alone': (dict(ema=prefixed('module.'), updates=7), 'ema'),
    'average, nested': (dict(ema=dict(state_dict=PLAIN), step=3), 'ema.state_dict'),
    'MMEngine with EMA': (
        dict(ema_state_dict=dict(prefixed('module.'), steps=torch.tensor(3)), state_dict=PLAIN),
        'state_dict',
    ),
}  # fmt: skip


@pytest.mark.parametrize('origin', NESTINGS)
def test_the_network_is_found_in_files_of_all_origins(origin, tmp_path):
    content, key = NESTINGS[origin]
    torch.save(content, tmp_path / 'a.pth')
    weights = read_weights(tmp_path / 'a.pth')
    assert weights.key == key
    found = census_of_state_dict(weights.state_dict, rectifiers={'1': ASSUMED, '4': ASSUMED})
    assert [(layer.name, layer.channels) for layer in found.layers] == [('1', 4), ('4', 2)]
    assert found.count('vanished') == 1 and found.count('dead') == 1
    assert weights.state_dict.keys() >= PLAIN.keys()


def test_another_state_dict_of_the_file_can_be_chosen(tmp_path):
    average = dict(prefixed('module.'), steps=torch.tensor(3))
    average['module.1.weight'] = torch.zeros(4)
    torch.save(dict(state_dict=PLAIN, ema_state_dict=average), tmp_path / 'a.pth')
    assert read_weights(tmp_path / 'a.pth').others == ['ema_state_dict']
    weights = read_weights(tmp_path / 'a.pth', 'ema_state_dict')
    assert census_of_state_dict(weights.state_dict).count('vanished') == 4
    with pytest.raises(CheckpointError, match=r"'emma'.*give one of state_dict, ema_state_dict"):
        read_weights(tmp_path / 'a.pth', 'emma')


def test_safetensors_files_are_read_and_written(tmp_path):
    save_file(network().state_dict(), tmp_path / 'a.safetensors')
    weights = read_weights(tmp_path / 'a.safetensors')
    assert census_of_state_dict(weights.state_dict).count('vanished') == 1
    write_content(read_content(tmp_path / 'a.safetensors'), tmp_path / 'b.safetensors')
    assert read_content(tmp_path / 'b.safetensors').keys() == PLAIN.keys()
    with pytest.raises(CheckpointError, match='safetensors files hold tensors only'):
        write_content(dict(state_dict=PLAIN), tmp_path / 'c.safetensors')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.safetensors', 'b.safetensors']


@pytest.mark.parametrize('legacy', [False, True])
def test_nobodys_pickle_runs(bomb, legacy, tmp_path):
    content = dict(state_dict=PLAIN, meta=bomb)
    torch.save(content, tmp_path / 'bad.pth', _use_new_zipfile_serialization=not legacy)
    for read in (read_content, read_weights):
        with pytest.raises(CheckpointError, match=r'asks for .*mkdir, which may run any code'):
            read(tmp_path / 'bad.pth')
    assert not bomb.path.exists()


def test_even_harmless_objects_are_refused_by_name(tmp_path):
    torch.save(dict(state_dict=PLAIN, args=argparse.Namespace(lr=1)), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'asks for argparse\.Namespace'):
        read_weights(tmp_path / 'a.pth')


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r'none\.pth does not exist'):
        read_weights(tmp_path / 'none.pth')
    for name in ('a.pth', 'a.safetensors', 'a.onnx'):
        (tmp_path / name).write_bytes(b'no such file format')
        with pytest.raises(CheckpointError, match=f'{name} cannot be read as a'):
            read_weights(tmp_path / name)
    torch.save(nn.Sequential(nn.LayerNorm(4)).state_dict(), tmp_path / 'ln.pth')
    with pytest.raises(CheckpointError, match=r'ln.pth has no BN layer'):
        read_weights(tmp_path / 'ln.pth')


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / 'a.pth').write_text('precious')
    (tmp_path / 'link.pth').symlink_to('nowhere')
    for name in ('a.pth', 'link.pth'):
        with pytest.raises(CheckpointError, match='exists and is not overwritten'):
            write_content({}, tmp_path / name)
    assert (tmp_path / 'a.pth').read_text() == 'precious'


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match=r"[Cc]an't (get|pickle)"):
        write_content(dict(cannot=lambda: None), tmp_path / 'a.pth')
    assert list(tmp_path.iterdir()) == []


def test_the_metadata_of_a_safetensors_file_is_kept(tmp_path):
    save_file(network().state_dict(), tmp_path / 'a.safetensors', {'format': 'pt', 'by': 'us'})
    write_content(read_content(tmp_path / 'a.safetensors'), tmp_path / 'b.safetensors')
    with safe_open(tmp_path / 'b.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'by': 'us'}


def test_tied_tensors_are_written_apart_to_safetensors(tmp_path):
    bias = torch.arange(4.0)
    write_content({'a': bias, 'b': bias, 'c': bias[1:]}, tmp_path / 'a.safetensors')
    found = read_content(tmp_path / 'a.safetensors')
    assert torch.equal(found['a'], bias) and torch.equal(found['b'], bias)
    assert torch.equal(found['c'], bias[1:])


def test_it_is_known_which_weights_of_mmengine_are_the_average(tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    ema = [dict(type='EMAHook', momentum=0.5), dict(type='CollapseHook')]
    runner = run(tmp_path, Classifier(), lr=0.5, default_hooks=hooks, custom_hooks=ema)
    trained = runner.model.state_dict()['stem.0.weight']
    weights = read_weights(tmp_path / 'epoch_2.pth')
    assert (weights.key, weights.others) == ('state_dict', ['ema_state_dict'])
    assert 'average' in weights.roles['state_dict']
    assert 'in training' in weights.roles['ema_state_dict']
    assert not torch.equal(weights.state_dict['stem.0.weight'], trained)
    in_training = read_weights(tmp_path / 'epoch_2.pth', 'ema_state_dict').state_dict
    assert torch.equal(in_training['stem.0.weight'], trained)


def test_an_average_that_others_have_saved_is_told_by_its_name(tmp_path):
    sd = network().state_dict()
    for name in ('ema_state_dict', 'state_dict_ema', 'model_ema'):
        torch.save({'state_dict': sd, name: sd}, tmp_path / 'a.pth')
        weights = read_weights(tmp_path / 'a.pth')
        assert weights.key == 'state_dict' and weights.roles == {name: 'an average, by its name'}
    torch.save({'state_dict': sd}, tmp_path / 'a.pth')
    assert read_weights(tmp_path / 'a.pth').roles == {}
