"""State dicts of any content: a right result, or one clear error of ours."""

from __future__ import annotations

import argparse
import contextlib
import io
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from attempts import attempt
from cases import count
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from psbn_mmdet.checkpoints import find_state_dicts, read_content, read_weights, write_content
from psbn_mmdet.checkpoints.formats import CheckpointError
from psbn_mmdet.commands import audit
from psbn_mmdet.layers import PostShiftedBatchNorm2d, find_norm_states
from psbn_mmdet.records import STATE_INFO

REALS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
ENTRIES = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
PREFIXES = ['', 'module.', 'module.module.', '_orig_mod.', 'ema_model.', 'backbone.layer1.0.']
values = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.5, 1e-9, 6e4, 1e300, *map(float, ('nan', 'inf'))])


@st.composite
def tensors(draw, channels: int = 3):
    """A tensor that may be right, or wrong in shape, kind or values."""
    shape = draw(st.sampled_from([(channels,)] * 6 + [(), (1,), (0,), (2,), (channels, 1), (7,)]))
    dtype = draw(st.sampled_from([*REALS, torch.float32, *INTEGERS, torch.complex64]))
    size = int(np.prod(shape))
    tensor = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)))
    with np.errstate(all='ignore'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tensor = tensor.reshape(shape).to(dtype)
    kind = draw(st.sampled_from(['plain'] * 12 + ['meta', 'sparse', 'quantised', 'expanded']))
    if kind == 'meta':
        return tensor.to('meta')
    if kind == 'sparse' and tensor.dim():
        return tensor.to_sparse()
    if kind == 'quantised':
        return torch.quantize_per_tensor(torch.zeros(channels), 0.1, 0, torch.qint8)
    if kind == 'expanded':
        return torch.zeros(()).expand(draw(st.sampled_from([10**9, 10**12])))
    return tensor


entries = tensors() | st.sampled_from([None, 1, 0.1, 'text', [1.0, 2.0, 3.0], {}])


@st.composite
def state_dicts(draw, wrong: bool = True):
    """One to three layers, the network's other weights, and the prefixes of wrappers."""
    prefix = draw(st.sampled_from(PREFIXES))
    state_dict = {f'{prefix}conv.weight': torch.ones(3, 2, 1, 1)}
    for name in draw(st.sampled_from([['bn'], ['bn1', 'bn2'], ['', 'a', 'a.b']])):
        layer = {'weight': torch.ones(3), 'bias': torch.zeros(3)}
        layer |= {'running_mean': torch.zeros(3), 'running_var': torch.ones(3)}
        if wrong:
            for entry in sorted(draw(st.sets(st.sampled_from(ENTRIES), max_size=3))):
                layer[entry] = draw(entries)
            for entry in sorted(draw(st.sets(st.sampled_from(ENTRIES), max_size=2))):
                layer.pop(entry, None)
        full = f'{prefix}{name}.' if name else prefix
        state_dict |= {f'{full}{entry}': value for entry, value in layer.items()}
    return state_dict


@given(
    layer=st.dictionaries(st.sampled_from(ENTRIES), entries),
    assign=st.booleans(),
    strict=st.booleans(),
)
@example({'weight': torch.ones(3), 'bias': [0.0, 0.0, 0.0]}, False, False)  # no tensor
@example({'bias': torch.ones(3, dtype=torch.complex64)}, False, False)
def test_a_layer_takes_what_bn_takes_and_refuses_what_bn_refuses(layer, assign, strict):
    count()
    norms = PostShiftedBatchNorm2d(3), nn.BatchNorm2d(3)
    norms[1].bias.data.fill_(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        said = []
        for norm in norms:
            try:
                norm.load_state_dict(layer, strict=strict, assign=assign)
                said.append('')
            except Exception as error:  # torch's, of many kinds
                said.append(str(error).replace(type(norm).__name__, 'norm'))
        assert said[0] == said[1]
    for name in ENTRIES:
        ours, theirs = (getattr(norm, name) for norm in norms)
        if isinstance(ours, torch.Tensor) and ours.layout == torch.strided:
            assert ours.dtype == theirs.dtype and ours.is_meta == theirs.is_meta
            if not (ours.is_meta or ours.is_quantized):
                assert torch.allclose(ours.detach(), theirs.detach(), equal_nan=True)


def options(*paths: Path, **given) -> argparse.Namespace:
    defaults = dict(config=None, tau=1e-3, k=3.0, key=None)
    return argparse.Namespace(checkpoints=[str(path) for path in paths], **(defaults | given))


@given(
    state_dict=state_dicts(),
    place=st.sampled_from([(), ('state_dict',), ('ema_state_dict',), ('model', 'module', 'x')]),
    unstarted=st.none()
    | st.sampled_from(['0', '0-1', '2-999999999', '-1', '5-3', 'x', '0-99999999999', '٣', None, 7]),
    wrong_info=st.booleans(),
)
def test_an_audit_of_any_file_is_right_or_says_what_is_wrong(
    tmp_path_factory, state_dict, place, unstarted, wrong_info
):
    count()
    path = tmp_path_factory.mktemp('audit') / 'a.pth'
    content = state_dict
    for key in reversed(place):
        content = {key: content}
    info = dict.fromkeys(find_norm_states(state_dict), unstarted)
    if place and unstarted is not None:
        content['message_hub'] = {
            'runtime_info': {STATE_INFO: [1] if wrong_info else {'unstarted': info}},
        }
    torch.save(content, path)
    tracemalloc.start()
    found, error = attempt(audit.make_audit, options(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    path.unlink()
    assert peak < 50e6
    if error:
        kinds = set(find_norm_states(state_dict).values())
        meta = any(v.is_meta for v in state_dict.values() if isinstance(v, torch.Tensor))
        claims = 'bytes, but only' in error
        assert None not in kinds or meta or claims, error
        words = ('no BN layer', 'cannot be audited', 'without values', 'incomplete')
        assert claims or any(text in error for text in words), error
        return
    weights = {layer.name: layer for layer in found.census.layers}
    good = [name for name, unknown in find_norm_states(state_dict).items() if not unknown]
    assert len(weights) == len(good)
    for (_, layer), name in zip(weights.items(), good):
        prefix = f'{name}.' if name else ''
        gamma = state_dict[f'{prefix}weight'].double().float().numpy()
        bias = state_dict[f'{prefix}bias'].double().float().numpy()
        np.testing.assert_array_equal(layer.gamma, gamma)
        np.testing.assert_allclose(layer.bias, bias, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(layer.broken, ~(np.isfinite(gamma) & np.isfinite(bias)))
        with np.errstate(invalid='ignore'):
            vanished = (np.abs(gamma) <= 1e-3) & ~layer.unstarted
        np.testing.assert_array_equal(layer.vanished, vanished)


@pytest.mark.parametrize(
    'statistics',
    [
        torch.zeros(3).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        torch.zeros(()).expand(10**12),
        'text',
    ],
    ids=['sparse', 'quantised', 'a terabyte', 'text'],
)
def test_a_layer_with_statistics_of_any_kind_is_audited(tmp_path, statistics):
    count()
    state_dict = dict(nn.BatchNorm2d(3).state_dict()) | {'running_mean': statistics}
    torch.save(state_dict, tmp_path / 'a.pth')
    found, error = attempt(audit.make_audit, options(tmp_path / 'a.pth'))
    if error:
        words = ['cannot be audited', 'no BN layer', 'bytes, but only']
        if torch.__version__.startswith('2.1.'):  # which refuses quantised tensors by itself
            words.append('_rebuild_qtensor')
        assert any(text in error for text in words), error
    else:
        assert not found.census.layers[0].unstarted.any()


@given(
    state_dict=state_dicts(wrong=False),
    wrapper=st.sampled_from(['', 'module.', 'module._orig_mod.']),
    ending=st.sampled_from(['.pth', '.safetensors']),
)
def test_files_come_back_as_they_went(tmp_path_factory, state_dict, wrapper, ending):
    count()
    path = tmp_path_factory.mktemp('files') / f'a{ending}'
    state_dict = {f'{wrapper}{key}': value for key, value in state_dict.items()}
    write_content(state_dict, path)
    back = read_content(path)
    assert set(back) == set(state_dict)
    assert all(torch.equal(back[key], value) for key, value in state_dict.items())
    names = read_weights(path).state_dict
    assert not any(name.startswith(('module.', '_orig_mod.')) for name in names)


@given(
    noise=st.binary(max_size=300), cut=st.integers(0, 2000), ending=st.sampled_from(['pth', 'st'])
)
def test_a_damaged_file_is_refused_by_its_name(tmp_path_factory, noise, cut, ending):
    count()
    name = 'a.safetensors' if ending == 'st' else 'a.pth'
    path = tmp_path_factory.mktemp('damaged') / name
    write_content(nn.BatchNorm2d(2).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)] + noise)
    weights, error = attempt(read_weights, path, error=CheckpointError)
    if error:
        assert str(path) in error and ': ' in error
        return
    assert find_norm_states(weights.state_dict)


def test_content_in_itself_or_in_many_places_is_read_in_bounded_time():
    count()
    state_dict = dict(nn.BatchNorm2d(2).state_dict())
    content = {'state_dict': state_dict}
    content['self'] = content
    for _ in range(60):  # 2^60 paths
        content = {'a': content, 'b': content}
    ((_, found),) = find_state_dicts(content)
    assert found is state_dict


def test_unstarted_filters_beside_statistics_of_no_shape(tmp_path):
    count()
    state_dict = nn.BatchNorm2d(2).state_dict() | {'x.running_var': torch.tensor(1.0)}
    hub = {'runtime_info': {STATE_INFO: {'unstarted': {'': '0'}}}}
    torch.save({'state_dict': dict(state_dict), 'message_hub': hub}, tmp_path / 'a.pth')
    assert read_weights(tmp_path / 'a.pth').unstarted[''].tolist() == [True, False]


@given(
    name=st.text(min_size=1, max_size=40),
    kind=st.sampled_from(['table', 'json', 'csv']),
)
@example(name='\ud800', kind='table')
@example(name='\x1b[31m\n[bold]', kind='table')
def test_an_audit_prints_layers_of_any_name(tmp_path_factory, name, kind):
    count()
    path = tmp_path_factory.mktemp('name') / 'a.pth'
    state_dict = {f'{name}.{key}': value for key, value in nn.BatchNorm2d(2).state_dict().items()}
    state_dict[f'{name}.weight'] = torch.tensor([0.0, 1.0])
    torch.save({'state_dict': state_dict}, path)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')  # a strict one, as a terminal is
    with contextlib.redirect_stdout(stdout):
        assert audit.main([str(path), '--format', kind]) == 0
    stdout.flush()
    text = stdout.buffer.getvalue().decode()
    assert '\x1b' not in text
