"""MMEngine's checkpoints load with weights_only=True, and others' pickles do not."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch
from limits import HANG
from mmengine.logging import MessageHub
from mmengine.runner import CheckpointLoader
from torch import nn

from psbn_mmdet.checkpoints import CheckpointError, read_content, read_weights, safe_globals
from psbn_mmdet.checkpoints.safe_globals import load_plain

takes_names = pytest.mark.skipif(
    not safe_globals.TAKES_NAMES, reason='torch takes safe globals with names from 2.6 on'
)


def load(path):
    return torch.load(path, weights_only=True)


@takes_names
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


@takes_names
def test_the_list_outlives_a_load_by_mmengine(tmp_path):
    hub = MessageHub.get_instance('test')
    hub.update_scalar('train/loss', 0.5)
    path = str(tmp_path / 'epoch_1.pth')
    torch.save(dict(message_hub=hub.state_dict(), state_dict={}), path)
    CheckpointLoader.load_checkpoint(path)
    assert load(path)['message_hub']['log_scalars']['train/loss'].current() == 0.5


def test_mmengine_loads_checkpoints_and_nothing_else_where_weights_only_are_forced(tmp_path, bomb):
    hub = MessageHub.get_instance('test')
    hub.update_scalar('train/loss', 0.5)
    milestones = dict(milestones=Counter({8: 1, 11: 1}), device=torch.device('cpu'), kinds={1, 2})
    torch.save(dict(message_hub=hub.state_dict(), **milestones), tmp_path / 'epoch_1.pth')
    torch.save(dict(state_dict={}, meta=bomb), tmp_path / 'bad.pth')
    code = """if True:
        import os, pickle
        from functools import partial
        from mmengine.runner import CheckpointLoader
        import psbn_mmdet
        from psbn_mmdet.checkpoints.safe_globals import load_plain

        load_silently = partial(CheckpointLoader.load_checkpoint, logger='silent')
        seen = []
        for load in (load_silently, load_plain):
            content = load('epoch_1.pth')
            scalars = content.pop('message_hub')['log_scalars']
            seen.append((float(scalars['train/loss'].current()), *content.values()))
            try:
                load('bad.pth')
            except pickle.UnpicklingError:
                seen.append('refused')
        print(*seen, os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'])
    """
    env = dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD='1')
    command = [sys.executable, '-c', code]
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG
    )
    assert result.returncode == 0, result.stderr
    once = "(0.5, Counter({8: 1, 11: 1}), device(type='cpu'), {1, 2}) refused"
    assert result.stdout.splitlines()[-1] == f'{once} {once} 1'
    assert not (tmp_path / 'touched').exists()


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(params=['torch', 'restricted'])
def reader(request, monkeypatch):
    """What reads: torch by its list of safe globals, or our own for versions without one."""
    if request.param == 'restricted':
        monkeypatch.setattr(safe_globals, 'TAKES_NAMES', False)
    elif not safe_globals.TAKES_NAMES:
        pytest.skip('this torch takes no safe globals with names')
    return load_plain


def saved_by(numpy_package, path, content):
    """Save as under another version of NumPy, whose modules have other names."""

    class Pickler(pickle._Pickler):  # in Python, so that names can be written as wanted
        def save_global(self, obj, name=None):
            module = getattr(obj, '__module__', None) or ''
            if module.startswith(('numpy.core', 'numpy._core')):
                self.write(pickle.GLOBAL + f'{numpy_package}.multiarray\n'.encode())
                self.write(f'{obj.__name__}\n'.encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    module = ModuleType('pickle')
    module.Pickler = Pickler
    torch.save(content, path, pickle_module=module)
    assert f'{numpy_package}.multiarray'.encode() in path.read_bytes()


@pytest.mark.parametrize('numpy_package', ['numpy.core', 'numpy._core'])
def test_checkpoints_saved_under_another_numpy_load(tmp_path, reader, numpy_package):
    hub = MessageHub.get_instance('test')
    for value in (0.5, 0.25):
        hub.update_scalar('train/loss', value)
    hub.update_scalar('val/map', np.float32(0.5))
    weights = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
    arrays = {name: np.arange(3).astype(name) for name in ('uint8', 'int64', 'float16', 'bool')}
    content = dict(message_hub=hub.state_dict(), state_dict=weights, meta=dict(arrays=arrays))
    saved_by(numpy_package, tmp_path / 'epoch_1.pth', content)
    found = reader(tmp_path / 'epoch_1.pth')
    scalars = found['message_hub']['log_scalars']
    assert scalars['train/loss'].mean(2) == 0.375 and scalars['val/map'].current() == 0.5
    assert torch.equal(found['state_dict']['0.weight'], weights['0.weight'])
    for name, values in arrays.items():
        assert np.array_equal(found['meta']['arrays'][name], values)
        assert found['meta']['arrays'][name].dtype == values.dtype
    if reader is load_plain:
        assert list(read_weights(tmp_path / 'epoch_1.pth').state_dict) == list(weights)


@pytest.mark.parametrize('numpy_package', ['numpy.core', 'numpy._core'])
@pytest.mark.parametrize('function', [os.mkdir, os.system, eval, np.load, np.save])
def test_their_hostile_twins_do_not_run(tmp_path, reader, numpy_package, function):
    argument = 'touched' if function is not eval else '__import__("os").mkdir("touched")'
    call = Call(function, str(tmp_path / argument) if function is os.mkdir else argument)
    content = dict(loss=np.ones(3), state_dict=nn.BatchNorm2d(4).state_dict(), meta=call)
    saved_by(numpy_package, tmp_path / 'epoch_1.pth', content)
    with pytest.raises(pickle.UnpicklingError, match='GLOBAL'):
        reader(tmp_path / 'epoch_1.pth')
    with pytest.raises(CheckpointError, match='which may run any code'):
        read_content(tmp_path / 'epoch_1.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['epoch_1.pth']


@pytest.mark.parametrize('attribute', ['tofile', 'dump', '__class__'])
def test_getattr_is_allowed_for_nothing_else(tmp_path, reader, attribute):
    torch.save(dict(weights=Call(getattr, np.ndarray, attribute)), tmp_path / 'bad.pth')
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r'not loaded|weights_only'):
        reader(tmp_path / 'bad.pth')


def test_a_pickle_that_calls_something_does_not_run(tmp_path, reader):
    torch.save(dict(weights=Call(open, str(tmp_path / 'touched'), 'w')), tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError):
        reader(tmp_path / 'bad.pth')
    assert not (tmp_path / 'touched').exists()
