"""Record files and snapshots, torn, shuffled, forged: read right, or refused by their line."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
from attempts import attempt
from cases import count
from hypothesis import example, given
from hypothesis import strategies as st

from psbn_mmdet.records import (
    COUNTS,
    Records,
    format_ranges,
    parse_ranges,
    read_records,
    read_snapshot,
    write_snapshot,
)
from psbn_mmdet.report import read_run
from psbn_mmdet.report.figures import FIGURES
from psbn_mmdet.report.stage_table import stage_rows

LAYERS = [('backbone.bn1', 5), ('neck.bn', 3)]
HEADER = dict(
    format=2,
    layers=[dict(name=name, channels=n, norm='BN') for name, n in LAYERS],
    interval=50,
    window=50,
    tau=1e-3,
    k=3.0,
)


def split(mask: np.ndarray) -> list[np.ndarray]:
    return [mask[:5], mask[5:]]


def report_of(iteration: int, before: np.ndarray, now: np.ndarray) -> dict:
    masks = dict.fromkeys(COUNTS, now & False) | {
        'dead': now,
        'collapsed': now,
        'new': now & ~before,
        'revived': before & ~now,
    }
    return dict(
        iter=iteration,
        epoch=1,
        lr=dict(lr=0.1),
        steps=50,
        channels={kind: list(map(format_ranges, split(mask))) for kind, mask in masks.items()},
    )


def reports_of(states: list[int]) -> list[dict]:
    """Reports of states, each the bits of the collapsed channels."""
    masks = [np.array([state >> bit & 1 for bit in range(8)], bool) for state in states]
    return [
        report_of(50 * (i + 1), before, now)
        for i, (before, now) in enumerate(zip([masks[0] & False, *masks], masks))
    ]


def write(folder: Path, lines: list) -> Path:
    path = folder / 'collapse.jsonl'
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b''.join(line + b'\n' for line in text))
    return path


def assert_named(error: str, path: Path) -> None:
    assert str(path) in error and ('line' in error or 'report yet' in error), error


states = st.lists(st.integers(0, 255), min_size=1, max_size=6)
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([10**30, -1, 2**63, 1e400, 'x' * 5000, '0-3', '-1', [], {}, [1], {'a': 1}]),
    st.lists(st.integers(-1, 9), max_size=3),
)


@given(mask=st.lists(st.booleans(), min_size=1, max_size=200))
def test_ranges_come_back_as_they_went(mask):
    count()
    mask = np.array(mask)
    assert (parse_ranges(format_ranges(mask), len(mask)) == mask).all()


@given(
    ranges=st.text('0123456789,- ', max_size=12)
    | st.text(max_size=6)
    | st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 12))).map(
        lambda pairs: ','.join(f'{a}-{b}' for a, b in pairs)
    ),
    channels=st.integers(0, 10),
)
@example(ranges='0-999999999999', channels=8)
@example(ranges='-1', channels=8)
@example(ranges='5-3', channels=8)
@example(ranges='5-', channels=8)
@example(ranges='8', channels=8)
@example(ranges='1_0', channels=20)
@example(ranges='٣', channels=8)
@example(ranges='2-5,3-6,2', channels=8)  # they may overlap
def test_ranges_are_channels_of_the_layer_or_refused(ranges, channels):
    count()
    expected: set[int] | None = set()
    for part in filter(None, ranges.split(',')):
        ends = part.split('-')
        plain = len(ends) <= 2 and all(end.isascii() and end.isdigit() for end in ends)
        if not plain or not int(ends[0]) <= int(ends[-1]) < channels:
            expected = None
            break
        expected |= set(range(int(ends[0]), int(ends[-1]) + 1))
    mask, error = attempt(parse_ranges, ranges, channels)
    assert bool(error) == (expected is None)
    if error:
        assert f'is no range of {channels} channels' in error
    else:
        assert set(mask.nonzero()[0].tolist()) == expected


@given(states=states, cut=st.integers(1, 2000))
def test_a_torn_end_loses_the_last_line_alone(tmp_path_factory, states, cut):
    count()
    path = write(tmp_path_factory.mktemp('torn'), [HEADER, *reports_of(states)])
    whole = path.read_bytes()
    kept = whole[: max(1, len(whole) - cut % len(whole))]
    path.write_bytes(kept)
    lines = kept.count(b'\n')
    records, error = attempt(read_records, path)
    run, no_run = attempt(read_run, path, 'BN')
    if lines == 0:
        assert 'no header line' in error and 'no header line' in no_run
        return
    assert [report['iter'] for report in records.reports] == [50 * n for n in range(1, lines)]
    if lines == 1:
        assert_named(no_run, path)
        return
    check_run(run, states[: lines - 1])


def check_run(run, states: list[int]) -> None:
    """A run's numbers against the states that it went through."""
    bits = np.array([[state >> bit & 1 for bit in range(8)] for state in states], bool)
    assert run.counts['collapsed'].tolist() == bits.sum(1).tolist()
    assert (run.collapsed == bits[-1]).all()
    assert (run.ever_collapsed == bits.any(0)).all()
    was = np.logical_or.accumulate(bits)
    assert (run.ever_revived == (was[:-1] & ~bits[1:] & bits[:-1]).any(0)).all()
    assert stage_rows(run)[-1][1] == '8'


@given(
    states=st.lists(st.integers(0, 255), min_size=2, max_size=6),
    damage=st.sampled_from(['swap', 'duplicate', 'header twice', 'delete', 'noise', 'glue', 'cut']),
    where=st.integers(0, 5),
    noise=st.binary(min_size=1, max_size=60).filter(lambda noise: b'\n' not in noise),
)
@example(states=[1, 2], damage='noise', where=0, noise=b'[' * 100_000)
@example(states=[1, 2], damage='noise', where=0, noise=b'1' * 100_000)
def test_lines_out_of_place_are_refused_by_their_number(
    tmp_path_factory, states, damage, where, noise
):
    count()
    folder = tmp_path_factory.mktemp('shuffled')
    lines = [json.dumps(line).encode() for line in (HEADER, *reports_of(states))]
    at = 1 + where % len(states)  # of a report
    if damage == 'swap':
        other = at % len(states) + 1
        lines[at], lines[other] = lines[other], lines[at]
    elif damage == 'duplicate':
        lines.insert(at, lines[at])
    elif damage == 'header twice':
        lines.insert(at, lines[0])
    elif damage == 'delete':
        del lines[at], states[at - 1]
    elif damage == 'noise':
        lines.insert(at, noise)
    elif damage == 'glue':
        lines[at - 1 : at + 1] = [lines[at - 1] + lines[at]]
    else:
        lines[at] = lines[at][: len(lines[at]) // 2]
    path = write(folder, lines)
    read = read_records, (lambda path: read_run(path, 'BN'))
    if damage == 'delete':  # what a user may do with a damaged line
        (records, _), (run, _) = (attempt(function, path) for function in read)
        assert len(records.reports) == len(states)
        check_run_without_a_line(run, states)
        return
    for function in read:
        _, error = attempt(function, path)
        assert_named(error, path)
        assert 'is damaged (' in error and len(error) < 1000


def check_run_without_a_line(run, states: list[int]) -> None:
    bits = np.array([[state >> bit & 1 for bit in range(8)] for state in states], bool)
    assert run.counts['collapsed'].tolist() == bits.sum(1).tolist()


paths = st.sampled_from(
    [
        ('iter',),
        ('epoch',),
        ('lr',),
        ('lr', 'lr'),
        ('channels',),
        ('channels', 'collapsed'),
        ('channels', 'collapsed', 0),
        ('channels', 'unstarted'),
        ('channels', 'unstarted', 1),
        ('channels', 'dead', 0),
        ('channels', 'new'),
        ('channels', 'new', 1),
        ('channels', 'revived', 0),
        ('channels', 'recovered'),
    ]
)
header_paths = st.sampled_from(
    [
        ('format',),
        ('layers',),
        ('layers', 0),
        ('layers', 0, 'name'),
        ('layers', 1, 'channels'),
        ('layers', 0, 'channels'),
        ('layers', 0, 'norm'),
        ('interval',),
        ('window',),
        ('tau',),
        ('k',),
        ('continues',),
    ]
)


def changed(value, path: tuple, new):
    """A copy of JSON with one value replaced, or removed where ``new`` is ``...``."""
    value = json.loads(json.dumps(value))
    *outer, last = path
    inner = value
    for key in outer:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
    if new is ...:
        inner.pop(last) if isinstance(inner, list) else inner.pop(last, None)
    else:
        inner[last] = new
    return value


def draw_all(run) -> None:
    """Everything that a report makes of a run, but for the rendering."""
    stage_rows(run)
    for figure in FIGURES.values():
        figure.draw([run])


@given(
    states=st.lists(st.integers(1, 255), min_size=2, max_size=3),
    path=paths,
    new=junk | st.just(...),
    last=st.booleans(),
)
@example(states=[1, 1], path=('channels', 'unstarted'), new=['1'], last=True)
@example(states=[1, 1], path=('channels', 'dead'), new=['0-999999999', None], last=True)
@example(states=[1, 1], path=('channels', 'recovered'), new=['0', None], last=True)
@example(states=[1, 1], path=('epoch',), new='3', last=True)
@example(states=[1, 1], path=('channels', 'collapsed', 0), new=None, last=True)
@example(states=[1, 1], path=('channels', 'new', 0), new='5', last=True)
@example(states=[1, 1], path=('lr', 'lr'), new=float('inf'), last=True)
def test_a_report_of_wrong_values_is_refused_or_read_right(
    tmp_path_factory, states, path, new, last
):
    count()
    lines = [HEADER, *reports_of(states)]
    at = -1 if last else 1
    lines[at] = changed(lines[at], path, new)
    file = write(tmp_path_factory.mktemp('wrong'), lines)
    run, error = attempt(read_run, file, 'BN')
    if error:
        assert_named(error, file)
        assert len(error) < 1000
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        draw_all(run)
    for counts in run.counts.values():
        assert np.nanmax(counts, initial=0) <= 8
    if 'collapsed' not in path:
        bits = [bin(state).count('1') for state in states]
        assert run.counts['collapsed'].tolist() == bits


@given(path=header_paths, new=junk | st.just(...))
@example(path=('layers', 0, 'channels'), new=10**12)  # a terabyte
@example(path=('layers', 0, 'channels'), new=-3)
@example(path=('layers', 0, 'channels'), new='5')
@example(path=('layers', 0, 'channels'), new=5.0)
@example(path=('layers',), new=[])
@example(path=('tau',), new='0.1')
@example(path=('k',), new=1e308)
@example(path=('interval',), new=10**30)
@example(path=('continues',), new='a\0b')
@example(path=('continues',), new='../' * 5000)
def test_a_header_of_wrong_values_is_refused_or_read_right(tmp_path_factory, path, new):
    count()
    states = [1, 3, 2]
    lines = [changed(HEADER, path, new), *reports_of(states)]
    file = write(tmp_path_factory.mktemp('header'), lines)
    _, no_records = attempt(read_records, file)
    run, error = attempt(read_run, file, 'BN')
    if no_records:
        assert error
    if error:
        assert_named(error, file)
        assert len(error) < 1000
        return
    draw_all(run)
    assert run.counts['collapsed'].tolist() == [1, 2, 1]


@given(lines=st.lists(st.binary(max_size=60), max_size=5), header=st.booleans())
def test_noise_is_refused(tmp_path_factory, lines, header):
    count()
    file = tmp_path_factory.mktemp('noise') / 'collapse.jsonl'
    start = json.dumps(HEADER).encode() + b'\n' if header else b''
    file.write_bytes(start + b'\n'.join(lines))
    for function in (read_records, lambda path: read_run(path, 'BN')):
        records, error = attempt(function, file)
        if error:
            assert str(file) in error and ('line' in error or 'no report yet' in error)
        else:  # a header, and a torn line
            assert header and isinstance(records, Records) and not records.reports


scalars = st.dictionaries(
    st.sampled_from(['coco/bbox_mAP', 'coco/bbox_mAP_50', 'step', 'epoch', 'loss']),
    junk | st.integers(0, 5) | st.floats(0, 1),
    max_size=5,
)


@given(lines=st.lists(scalars | junk, max_size=4))
@example(lines=[{'epoch': 1, 'step': 1}, {'coco/bbox_mAP': 0.5, 'step': 1e300}])
@example(lines=[{'epoch': 1, 'step': 1}, {'coco/bbox_mAP': True, 'step': '5'}])
@example(lines=[{'epoch': 1}, {'coco/bbox_mAP': 0.5, 'step': 10**30}])
def test_logs_of_wrong_values_are_refused_or_read_right(tmp_path_factory, lines):
    count()
    folder = tmp_path_factory.mktemp('scalars')
    file = write(folder, [HEADER, *reports_of([1, 2])])
    log = folder / 'vis_data' / 'scalars.json'
    log.parent.mkdir()
    log.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    run, error = attempt(read_run, file, 'BN')
    if error:
        assert f'{log}, line' in error and 'is damaged (' in error
        return
    for steps, values in run.scores.values():
        assert all(type(step) is int for step in steps) and np.isfinite(values).all()
    FIGURES['scores'].draw([run])


snapshot_dtypes = st.sampled_from(['f2', 'f4', 'f8', 'i4', 'u1', '?', 'c8', 'U3', 'S2', 'M8[s]'])


@given(
    shape=st.sampled_from([(2, 8)] * 4 + [(2, 7), (8, 2), (2,), (), (0,), (2, 8, 1), (16,)]),
    dtype=snapshot_dtypes,
    cut=st.none() | st.integers(0, 200),
    noise=st.binary(max_size=8),
    at=st.integers(0, 200),
)
def test_a_snapshot_is_read_right_or_refused(tmp_path_factory, shape, dtype, cut, noise, at):
    count()
    path = tmp_path_factory.mktemp('snapshot') / 'iter_1.npy'
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    np.save(path, values)
    whole = path.read_bytes()
    data = whole[:cut] if cut is not None else whole
    data = data[:at] + noise + data[at + len(noise) :]
    path.write_bytes(data)
    read, error = attempt(read_snapshot, path, 8)
    if error:
        assert str(path) in error and 'delete it' in error and len(error) < 20_000
        intact = data == whole and shape == (2, 8) and dtype in ('f2', 'f4', 'f8')
        assert not intact
        return
    assert [part.shape for part in read] == [(8,), (8,)]
    if data == whole:
        assert (np.stack(read) == values.astype(np.float32)).all()


@pytest.mark.parametrize(
    'header',
    [
        "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 1000000000000), }",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 99999999999999999999999), }",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (-2, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 8), }",
        "{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (2, 8), }",
        '(' * 5000,
        '{"a',
        '"""',
        '\\\n ',
    ],
)
@pytest.mark.parametrize('version', [1, 2, 3, 9])
def test_a_header_of_a_snapshot_takes_no_memory(tmp_path, header, version):
    count()
    path = tmp_path / 'iter_1.npy'
    size = len(header).to_bytes(2 if version == 1 else 4, 'little')
    path.write_bytes(b'\x93NUMPY' + bytes([version, 0]) + size + header.encode() + bytes(32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, error = attempt(read_snapshot, path, 10**12 if '1000000000000' in header else 8)
    assert 'is no snapshot of this run' in error and 'delete it' in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


@pytest.mark.parametrize('content', [b'PK\x03\x04', b'PK\x05\x06' + bytes(18), b'', b'\x80\x04.'])
def test_other_files_are_no_snapshots(tmp_path, content):
    count()
    path = tmp_path / 'iter_1.npy'
    path.write_bytes(content)
    assert 'is no snapshot of this run' in attempt(read_snapshot, path, 8)[1]


def test_an_archive_is_no_snapshot(tmp_path):
    count()
    np.savez(tmp_path / 'a.npz', np.zeros((2, 8)))
    (tmp_path / 'a.npz').rename(tmp_path / 'iter_1.npy')
    assert 'is no snapshot of this run' in attempt(read_snapshot, tmp_path / 'iter_1.npy', 8)[1]


@given(iteration=st.sampled_from(['9' * 30, '9' * 240, '٣', '0', '00', '150']))
def test_snapshots_of_any_iteration_are_shown(tmp_path_factory, iteration):
    count()
    folder = tmp_path_factory.mktemp('names')
    file = write(folder, [HEADER, *reports_of([1, 3, 2])])
    made = write_snapshot(folder, 100, np.ones(8), np.full(8, np.nan))
    made.with_name(f'iter_{iteration}.npy').write_bytes(made.read_bytes())
    run, error = attempt(read_run, file, 'BN')
    assert not error
    FIGURES['channels'].draw([run])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['collapsed', 'recovered'])
def test_a_short_record_takes_no_memory_without_bound(tmp_path, kind):
    """A line of a hundred bytes says that a million channels have changed."""
    count()
    header = HEADER | {'layers': [dict(name='bn', channels=10**6, norm='BN')]}
    lines: list = [header]
    for index in range(1, 60):
        everything = kind == 'recovered' or index % 2
        channels = {key: [''] for key in COUNTS} | {kind: ['0-999999' if everything else '']}
        lines.append(dict(iter=index, epoch=1, lr={}, channels=channels))
    file = write(tmp_path, lines)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, error = attempt(read_run, file, 'BN')
    assert 'is damaged (it has more than' in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KB


@pytest.mark.slow
def test_a_record_of_a_million_lines_is_read(tmp_path):
    count()
    bodies = [json.dumps(report)[1:] for report in reports_of([1, 3, 2, 1])[1:]]
    path = tmp_path / 'collapse.jsonl'
    with open(path, 'w') as file:
        file.write(json.dumps(HEADER) + '\n')
        first = json.dumps(reports_of([1])[0])
        file.write(first + '\n')
        for index in range(1, 10**6):
            body = bodies[(index - 1) % 3].split(', ', 1)[1]
            file.write(f'{{"iter": {50 * (index + 1)}, {body}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = read_run(path, 'BN')
    assert len(run.iterations) == 10**6 and run.iterations[-1] == 50 * 10**6
    assert run.counts['collapsed'].sum() == 1 + (2 + 1 + 1) * 333_333
    draw_all(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB
