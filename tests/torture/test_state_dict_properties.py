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

from psbn_mmdet.checkpoints import (
    convert_checkpoint,
    read_content,
    read_weights,
    write_content,
)
from psbn_mmdet.checkpoints.formats import CheckpointError
from psbn_mmdet.commands import audit
from psbn_mmdet.layers import (
    PostShiftedBatchNorm2d,
    bn_to_psbn,
    find_norm_states,
    psbn_to_bn,
)
from psbn_mmdet.records import UNSTARTED_INFO

REALS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
ENTRIES = ('weight', 'bias', 'beta', 'shift', 'running_mean', 'running_var', 'num_batches_tracked')
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
        kind = draw(st.sampled_from(['bias', 'beta']))
        layer = {'weight': torch.ones(3), kind: torch.zeros(3)}
        if kind == 'beta':
            layer['shift'] = torch.tensor(0.1)
        layer |= {'running_mean': torch.zeros(3), 'running_var': torch.ones(3)}
        if wrong:
            for entry in sorted(draw(st.sets(st.sampled_from(ENTRIES), max_size=3))):
                layer[entry] = draw(entries)
            for entry in sorted(draw(st.sets(st.sampled_from(ENTRIES), max_size=2))):
                layer.pop(entry, None)
        full = f'{prefix}{name}.' if name else prefix
        state_dict |= {f'{full}{entry}': value for entry, value in layer.items()}
    return state_dict


def is_plain(tensor: object) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and not tensor.is_complex()
        and not tensor.is_quantized
        and tensor.layout == torch.strided
    )


def bias_of(state_dict: dict, name: str, kind: str) -> torch.Tensor:
    """What the rectifier sees, by the definition, in float64."""
    prefix = f'{name}.' if name else ''
    if kind == 'BN':
        return state_dict[f'{prefix}bias'].double()
    return state_dict[f'{prefix}beta'].double() + state_dict[f'{prefix}shift'].double().reshape(())


def assert_near(actual: torch.Tensor, expected: torch.Tensor, step: float) -> None:
    actual, expected = actual.double(), expected.double()
    # What float32 can't hold is infinite there.
    expected = expected.float().double() if actual.abs().eq(float('inf')).any() else expected
    torch.testing.assert_close(actual, expected, rtol=step, atol=step, equal_nan=True)


@given(state_dict=state_dicts(), shift=st.floats(0.01, 1))
def test_the_conversion_of_a_state_dict_keeps_b_and_what_is_no_layer(state_dict, shift):
    count()
    kinds = find_norm_states(state_dict)
    psbn = bn_to_psbn(state_dict, shift)
    back = psbn_to_bn(psbn)
    assert list(find_norm_states(psbn)) == list(kinds)
    for name, kind in kinds.items():
        prefix = f'{name}.' if name else ''
        if kind not in ('BN', 'psBN'):
            for entry in ENTRIES:  # left alone
                for made in (psbn, back):
                    assert made.get(prefix + entry) is state_dict.get(prefix + entry)
            continue
        assert find_norm_states(psbn)[name] == 'psBN'
        if isinstance(state_dict.get(f'{prefix}running_var'), torch.Tensor):
            assert find_norm_states(back)[name] == 'BN'
        old = state_dict[prefix + ('bias' if kind == 'BN' else 'beta')]
        if old.is_meta:
            continue
        expected = bias_of(state_dict, name, kind)
        step = 1e-2 if kind == 'psBN' and old.dtype in REALS[:2] else 1e-6
        assert_near(bias_of(psbn, name, 'psBN'), expected, 1e-6)
        assert_near(bias_of(back, name, 'BN'), expected, step)
        assert psbn[prefix + 'weight'] is back[prefix + 'weight'] is state_dict[prefix + 'weight']
    layers = tuple(f'{name}.' if name else '' for name in kinds)
    for key, value in state_dict.items():
        if not key.startswith(layers):
            assert psbn[key] is back[key] is value


@given(
    layer=st.dictionaries(st.sampled_from(ENTRIES), entries),
    assign=st.booleans(),
    strict=st.booleans(),
)
@example({'weight': torch.ones(3), 'bias': [0.0, 0.0, 0.0]}, False, False)  # no tensor
@example({'beta': torch.ones(3), 'shift': torch.ones(3)}, False, False)
@example({'beta': torch.ones(3), 'shift': torch.tensor(float('nan'))}, False, False)
@example({'beta': torch.ones(3), 'shift': torch.tensor(1)}, True, False)
@example({'bias': torch.ones(3, dtype=torch.int64)}, True, False)
@example({'bias': torch.ones(3, dtype=torch.complex64)}, False, False)
def test_a_layer_takes_what_bn_takes_and_computes_the_same(layer, assign, strict):
    count()
    has_value = all(not v.is_meta for v in layer.values() if isinstance(v, torch.Tensor))
    psbn, bn = PostShiftedBatchNorm2d(3, shift=0.25), nn.BatchNorm2d(3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        load = psbn.load_state_dict
        _, error = attempt(load, layer, strict=strict, assign=assign, error=RuntimeError)
        if error:
            assert 'Error(s) in loading state_dict' in error
            assert any(entry in error for entry in ENTRIES)
            return
        if not has_value:
            return
        used = {key: value for key, value in layer.items() if value is not None}
        assert all(map(is_plain, used.values())) or 'num_batches_tracked' in used
        expected = used.get('bias')
        if 'beta' in used:
            shift = used.get('shift', torch.tensor(0.25)).double().reshape(())
            assert 0 < shift < float('inf')
            expected = used['beta'].double() + shift
        if expected is None:
            expected = torch.full((3,), 0.25)  # untouched
        wide = torch.float64 if assign else torch.float32
        assert psbn.bias.dtype.is_floating_point
        half = assign and psbn.bias.dtype in REALS[:2]
        limit = torch.finfo(psbn.bias.dtype).max / 2
        if expected.abs().nan_to_num(0).max() < limit:
            actual = psbn.bias.detach().to(wide)
            assert_near(actual, expected.reshape(actual.shape), 1e-2 if half else 1e-6)
        plain = {k: v for k, v in used.items() if k not in ('bias', 'beta', 'shift')}
        bn.load_state_dict(plain, strict=False, assign=assign)
        for name in ('weight', 'running_mean', 'running_var'):
            assert torch.allclose(getattr(psbn, name), getattr(bn, name), equal_nan=True)


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
            'runtime_info': {UNSTARTED_INFO: [1] if wrong_info else info},
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
        assert not kinds & {'BN', 'psBN'} or meta or claims, error
        words = ('no BN or psBN layer', 'cannot be audited', 'without values', 'incomplete')
        assert claims or any(text in error for text in words), error
        return
    weights = {layer.name: layer for layer in found.census.layers}
    kinds = find_norm_states(state_dict)
    good = [name for name, kind in kinds.items() if kind in ('BN', 'psBN')]
    assert len(weights) == len(good)
    for (_, layer), name in zip(weights.items(), good):
        prefix = f'{name}.' if name else ''
        gamma = state_dict[f'{prefix}weight'].double().float().numpy()
        bias = bias_of(state_dict, name, kinds[name]).float().numpy()
        assert layer.norm == kinds[name]
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
        words = ['cannot be audited', 'no BN or psBN layer', 'bytes, but only']
        if torch.__version__.startswith('2.1.'):  # which refuses quantised tensors by itself
            words.append('_rebuild_qtensor')
        assert any(text in error for text in words), error
    else:
        assert not found.census.layers[0].unstarted.any()


@given(state_dict=state_dicts(), to=st.sampled_from(['psbn', 'bn']), average=st.booleans())
def test_a_checkpoint_is_converted_whole_or_refused(state_dict, to, average):
    count()
    content = {'state_dict': state_dict, 'meta': {'epoch': 3, 'names': ('a', ['b'])}}
    content['self'] = content['meta']['content'] = content  # as pickles can be
    if average:
        content['ema_state_dict'] = {f'module.{k}': v for k, v in state_dict.items()}
    wanted = 'BN' if to == 'psbn' else 'psBN'
    kinds = find_norm_states(state_dict)
    made, error = attempt(convert_checkpoint, content, to, 0.25, error=CheckpointError)
    if error:
        assert f'there is no {wanted} to convert' in error
        assert wanted not in kinds.values()
        return
    new, done = made
    assert new['self'] is new and new['meta']['content'] is new
    assert new['meta']['names'] == ('a', ['b'])
    names = [name for name, kind in kinds.items() if kind == wanted]
    assert done.converted['state_dict'] == names
    new_kinds = find_norm_states(new['state_dict'])
    for name in names:  # a BN without statistics looks like any other layer
        assert new_kinds.get(name) == ('psBN' if to == 'psbn' else 'BN') or to == 'bn'
    assert content['state_dict'] is state_dict and find_norm_states(state_dict) == kinds
    if average:
        wrapped = {f'module.{k}': v for k, v in new['state_dict'].items()}
        assert list(wrapped) == list(new['ema_state_dict'])


@given(
    state_dict=state_dicts(wrong=False),
    wrapper=st.sampled_from(['', 'module.', 'module._orig_mod.']),
    ending=st.sampled_from(['.pth', '.safetensors']),
)
def test_files_come_back_as_they_went(tmp_path_factory, state_dict, wrapper, ending):
    count()
    folder = tmp_path_factory.mktemp('files')
    bn = psbn_to_bn({f'{wrapper}{key}': value for key, value in state_dict.items()})
    write_content(bn, folder / f'bn{ending}')
    for source, target, to in (('bn', 'psbn', 'psbn'), ('psbn', 'back', 'bn')):
        content, _ = convert_checkpoint(read_content(folder / f'{source}{ending}'), to)
        write_content(content, folder / f'{target}{ending}')
    back = read_content(folder / f'back{ending}')
    assert set(back) == set(bn)
    for key, value in bn.items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-7)
    names = read_weights(folder / f'psbn{ending}').state_dict
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


def nested(depth: int, inner: object) -> dict:
    for _ in range(depth):
        inner = {'a': inner}
    return inner


def test_content_in_itself_or_in_many_places_is_read_in_bounded_time():
    count()
    state_dict = dict(nn.BatchNorm2d(2).state_dict())
    content = {'state_dict': state_dict}
    for _ in range(60):  # 2^60 paths
        content = {'a': content, 'b': content}
    new, done = convert_checkpoint(content, 'psbn')
    assert sum(map(len, done.converted.values())) == 1 and new['a'] is new['b']
    with pytest.raises(CheckpointError, match='nested too deep'):
        convert_checkpoint({'state_dict': state_dict, 'x': nested(10**5, 1)}, 'psbn')


@pytest.mark.parametrize('of', ['psBN without statistics', 'statistics of no shape'])
def test_unstarted_filters_of_layers_without_a_running_variance(tmp_path, of):
    count()
    if of == 'psBN without statistics':
        state_dict = PostShiftedBatchNorm2d(2, track_running_stats=False).state_dict()
    else:
        state_dict = nn.BatchNorm2d(2).state_dict() | {'x.running_var': torch.tensor(1.0)}
    hub = {'runtime_info': {UNSTARTED_INFO: {'': '0'}}}
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
