"""Arguments of the layers and the hooks: a right result, or one clear error of ours."""

from __future__ import annotations

import math

import pytest
import torch
from attempts import attempt
from cases import count
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from psbn_mmdet.hooks import CollapseHook, RecoveryHook
from psbn_mmdet.layers import (
    PostShiftedBatchNorm1d,
    PostShiftedBatchNorm2d,
    PostShiftedBatchNorm3d,
    PostShiftedSyncBatchNorm,
)
from psbn_mmdet.records import COUNTS

PSBN = {
    PostShiftedBatchNorm1d: (nn.BatchNorm1d, ()),
    PostShiftedBatchNorm2d: (nn.BatchNorm2d, (3, 2)),
    PostShiftedBatchNorm3d: (nn.BatchNorm3d, (2, 1, 2)),
    PostShiftedSyncBatchNorm: (nn.BatchNorm2d, (2, 3)),
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Older torch has no batch normalization in float16 on CPUs.
HALF_ON_CPUS = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 2)
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-6}
# Whatever a config or a call may have in the place of a number.
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from([10**400, -(10**400), 1j, ..., object(), int, math.inf, math.nan]),
)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    return type(value) is int and value >= 1


@given(
    psbn=st.sampled_from(list(PSBN)),
    channels=st.integers(1, 5),
    eps=st.floats(1e-6, 10),
    momentum=st.none() | st.floats(0, 1),
    affine=st.booleans(),
    tracked=st.booleans(),
    dtype=st.sampled_from([None, *FLOATS]),
    shift=st.floats(1e-3, 10),
    seed=st.integers(0, 1000),
)
def test_a_layer_is_bn_plus_the_shift(
    psbn, channels, eps, momentum, affine, tracked, dtype, shift, seed
):
    count()
    bn_class, space = PSBN[psbn]
    kwargs = dict(
        eps=eps, momentum=momentum, affine=affine, track_running_stats=tracked, dtype=dtype
    )
    layer, bn = psbn(channels, **kwargs, shift=shift), bn_class(channels, **kwargs)
    assume(dtype != torch.float16 or HALF_ON_CPUS)
    generator = torch.Generator().manual_seed(seed)
    if affine:
        with torch.no_grad():
            values = torch.randn(channels, generator=generator).to(bn.weight.dtype)
            bn.weight.copy_(values)
            layer.weight.copy_(values)
            bn.bias.copy_(values.flip(0))
            layer.bias.copy_(values.flip(0) + shift)
    added = shift if affine else 0  # without a bias it is BN
    tolerance = TOLERANCE[dtype or torch.float32] * (1 + shift)
    for _ in range(2):
        x = torch.randn(4, channels, *space, generator=generator).to(dtype or torch.float32)
        expected = bn(x).double() + added
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    if tracked:
        assert torch.equal(layer.running_mean, bn.running_mean)
        assert torch.equal(layer.running_var, bn.running_var)
    layer.eval(), bn.eval()
    expected = bn(x).double() + added
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    twin = psbn(channels, **kwargs, shift=shift).eval()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


@given(shift=junk | st.floats(1e-60, 1e60), dtype=st.sampled_from(FLOATS))
@example(shift=10**400, dtype=torch.float32)  # beyond all floats
@example(shift=1e-9, dtype=torch.float16)  # 0: a BN
@example(shift=1e5, dtype=torch.float16)  # infinite
def test_a_shift_is_held_by_any_type_or_refused_by_its_value(shift, dtype):
    count()
    layer, error = attempt(PostShiftedBatchNorm2d, 2, dtype=dtype, shift=shift)
    if error:
        assert error.startswith('psBN: shift') and repr(shift) in error
        assert not (is_number(shift) and 1e-4 <= shift <= 100)
        return
    assert float(layer.bias[0]) == pytest.approx(shift, rel=1e-2)
    with torch.no_grad():
        layer.bias += 0.3
    assert float(layer.bias[0]) - shift == pytest.approx(0.3, abs=0.5)


@given(
    bias=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=6),
    dtype=st.sampled_from(FLOATS),
    shift=st.floats(0.01, 1),
    rate=st.floats(0, 1),
    steps=st.integers(1, 5),
)
def test_weight_decay_goes_to_the_shift_in_any_type(bias, dtype, shift, rate, steps):
    count()
    layer = PostShiftedBatchNorm2d(len(bias), dtype=dtype, shift=shift)
    layer.load_state_dict({'bias': torch.tensor(bias)}, strict=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, weight_decay=1.0)
    before = layer.bias.detach().clone().double()
    for _ in range(steps):
        layer.bias.grad = torch.zeros_like(layer.bias)
        optimizer.step()
    expected = shift + (1 - rate) ** steps * (before - shift)
    rounding = 16 * steps * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.bias.detach().double(), expected, rtol=0, atol=rounding)
    if rate == 0:
        assert torch.equal(layer.bias.detach().double(), before)


names = st.lists(st.sampled_from([*COUNTS]) | junk, max_size=3)


@given(
    interval=st.integers(1, 10**6) | junk,
    window=st.integers(1, 10**6) | junk,
    tau=st.floats(0, 0.999) | junk,
    k=st.floats(0, 100) | junk,
    scalars=names | names.map(tuple) | junk,
    by_stage=st.booleans() | junk,
)
@example(interval=True, window=None, tau=1e-3, k=3, scalars=(), by_stage=False)
@example(interval=1, window=None, tau=1e-3, k=10**400, scalars=(), by_stage=False)
@example(interval=1, window=None, tau='0.1', k=3, scalars=(), by_stage=False)
@example(interval=1, window=None, tau=1e-3, k=3, scalars='collapsed', by_stage=False)
@example(interval=1, window=None, tau=1e-3, k=3, scalars=(), by_stage='no')
def test_a_collapse_hook_takes_its_arguments_or_names_the_wrong_one(**given):
    count()
    tau, k, scalars = given['tau'], given['k'], given['scalars']
    valid = {
        'interval': is_count(given['interval']),
        'window': given['window'] is None or is_count(given['window']),
        'tau': is_number(tau) and 0 <= tau < 1,
        'k': is_number(k) and 0 <= k <= 10**6,
        'scalars': isinstance(scalars, (list, tuple))
        and all(isinstance(name, str) and name in COUNTS for name in scalars),
        'by_stage': isinstance(given['by_stage'], bool),
    }
    hook, error = attempt(CollapseHook, **given)
    if error:
        wrong = [name for name, right in valid.items() if not right]
        assert any(f'{name} must be' in error or f'{name}, ' in error for name in wrong)
        values = [given[name] for name in wrong]
        values += scalars if isinstance(scalars, (list, tuple)) else []
        assert any(repr(value) in error for value in values)
        return
    assert all(valid.values())
    assert (hook.interval, hook.tau, hook.k) == (given['interval'], tau, k)
    assert hook.scalars == tuple(scalars) and hook.by_stage is given['by_stage']
    assert hook.window == (given['window'] or max(given['interval'], 50))


@given(steps=st.integers(-2, 10**6) | junk, window=st.integers(-2, 10**6) | junk)
def test_a_recovery_hook_takes_its_arguments_or_names_the_wrong_one(steps, window):
    count()
    hook, error = attempt(RecoveryHook, steps, window)
    if error:
        name, value = ('window', window) if is_count(steps) else ('steps', steps)
        assert not is_count(value)
        assert error == f'RecoveryHook: {name} must be an integer >= 1, got {value!r}'
        return
    assert is_count(steps) and is_count(window) and (hook.steps, hook.window) == (steps, window)
