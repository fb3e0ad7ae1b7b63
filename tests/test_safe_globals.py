"""MMEngine's checkpoints load with weights_only=True, and others' pickles do not."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner import CheckpointLoader

import psbn_mmdet  # noqa: F401


def load(path):
    return torch.load(path, weights_only=True)


def test_a_message_hub_state_loads(tmp_path):
    hub = MessageHub.get_instance('test')
    for value in (0.5, 0.25):
        hub.update_scalar('train/loss', value)
    hub.update_scalar('train/collapse/dead', 3)
    hub.update_scalar('val/map', np.float32(0.5))
    torch.save(dict(message_hub=hub.state_dict(), meta=dict(iter=2)), tmp_path / 'epoch_1.pth')
    scalars = load(tmp_path / 'epoch_1.pth')['message_hub']['log_scalars']
    assert scalars['train/loss'].mean(2) == 0.375
    assert scalars['train/collapse/dead'].current() == 3


def test_the_list_outlives_a_load_by_mmengine(tmp_path):
    hub = MessageHub.get_instance('test')
    hub.update_scalar('train/loss', 0.5)
    path = str(tmp_path / 'epoch_1.pth')
    torch.save(dict(message_hub=hub.state_dict(), state_dict={}), path)
    CheckpointLoader.load_checkpoint(path)
    assert load(path)['message_hub']['log_scalars']['train/loss'].current() == 0.5


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('attribute', ['tofile', 'dump', '__class__'])
def test_getattr_is_allowed_for_nothing_else(tmp_path, attribute):
    torch.save(dict(weights=Call(getattr, np.ndarray, attribute)), tmp_path / 'bad.pth')
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r'not loaded|weights_only'):
        load(tmp_path / 'bad.pth')


def test_a_pickle_that_calls_something_does_not_run(tmp_path):
    torch.save(dict(weights=Call(open, str(tmp_path / 'touched'), 'w')), tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path / 'bad.pth')
    assert not (tmp_path / 'touched').exists()
