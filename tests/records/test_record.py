"""The record file."""

import json

import numpy as np
import pytest

from psbn_mmdet.records import COUNTS, RecordWriter, format_ranges, parse_ranges, read_records

HEADER = dict(
    layers=[dict(name='bn', channels=8, norm='BN'), dict(name='head.bn', channels=4, norm='BN')],
    **dict(interval=50, window=50, tau=1e-3, k=3.0),
)


def report(iteration: int, channels: str = '') -> dict:
    masks = {key: ['', ''] for key in COUNTS} | dict(trapped=[None, None], dead=[channels, None])
    masks['collapsed'] = [channels, '0']
    return dict(iter=iteration, epoch=1, lr=dict(lr=0.1), channels=masks)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'run' / 'collapse.jsonl'
    writer = RecordWriter(path, HEADER)
    for iteration in (50, 100, 150):
        writer.append(report(iteration, '1-3'))
    return path


@pytest.mark.parametrize(
    ('ranges', 'channels'), [('', []), ('0', [0]), ('0-2,5', [0, 1, 2, 5]), ('7', [7])]
)
def test_ranges_round_trip(ranges, channels):
    mask = np.zeros(8, bool)
    mask[channels] = True
    assert format_ranges(mask) == ranges
    assert (parse_ranges(ranges, 8) == mask).all()


@pytest.mark.parametrize('channels', [-1, 10**6 + 1, 10**13])
def test_ranges_of_more_channels_than_there_can_be_take_no_memory(channels):
    with pytest.raises(ValueError, match='is no number of channels from 0 to 1,000,000'):
        parse_ranges('0', channels)


def test_what_is_written_is_read(path):
    records = read_records(path)
    assert records.header['layers'] == HEADER['layers']
    assert [r['iter'] for r in records.reports] == [50, 100, 150]
    assert records.mask(records.reports[0], 'collapsed', 0).nonzero()[0].tolist() == [1, 2, 3]
    assert not records.mask(records.reports[0], 'trapped', 1).any()


def test_counts_are_derived_from_the_channels(path):
    writer = RecordWriter(path, HEADER)
    for iteration, ranges in enumerate(['', '1-3', '1-3', '0,7'], 1):
        writer.append(report(iteration, ranges))
    reports = read_records(writer.path).reports
    assert [r['total']['collapsed'] for r in reports] == [1, 4, 4, 3]
    assert [r['layers']['collapsed'] for r in reports] == [[0, 1], [3, 1], [3, 1], [2, 1]]
    assert [r['layers']['dead'] for r in reports] == [[0, None], [3, None], [3, None], [2, None]]
    assert [r['total']['dead'] for r in reports] == [0, 3, 3, 2]
    assert {r['total']['trapped'] for r in reports} == {None}
    assert 'recovered' not in reports[0]['total']
    assert 'total' not in writer.path.read_text()


def test_each_line_is_on_disk_at_once(path):
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize('cut', [1, 5, 40])
def test_a_torn_last_line_is_passed_over(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r['iter'] for r in read_records(path).reports] == [50, 100]


@pytest.mark.parametrize(
    'line',
    [b'{"iter": 100, "epoch', b'', b'\x00' * 10, b'\xff\xfe', b'{}', b'[1]', b'{"iter": 100}'],
)
@pytest.mark.parametrize('number', [1, 2, 4])
def test_other_damage_is_rejected_with_the_line_number(path, line, number):
    assert_rejected(path, number, line)


def assert_rejected(path, number, line):
    lines = path.read_bytes().split(b'\n')
    lines[number - 1] = line
    path.write_bytes(b'\n'.join(lines))
    with pytest.raises(ValueError, match=f'line {number} is damaged'):
        read_records(path)


@pytest.mark.parametrize(
    'change',
    [
        dict(layers=[]),
        dict(layers=[dict(name='bn', channels=8)]),
        dict(layers=[dict(name='bn', channels=10**12, norm='BN')]),
        dict(interval=0),
        dict(window=0),
        dict(tau=1),
        dict(k=-1),
    ],
)
def test_a_header_of_no_hook_is_rejected(path, change):
    assert_rejected(path, 1, json.dumps(dict(format=2) | HEADER | change).encode())


@pytest.mark.parametrize(
    ('kind', 'ranges'),
    [
        ('dead', ['1']),  # of one layer
        ('dead', {'0': '1', '1': ''}),
        ('dead', ['x', '']),
        ('dead', ['8', '']),
        ('dead', [1, '']),
        ('collapsed', ['', None]),
        ('new', None),
        ('recovered', ['']),
    ],
)
def test_channels_that_are_not_those_of_the_layers_are_rejected(path, kind, ranges):
    wrong = report(100)
    wrong['channels'][kind] = ranges
    assert_rejected(path, 3, json.dumps(wrong).encode())


@pytest.mark.parametrize(
    'change', [dict(iter=50), dict(iter='100'), dict(epoch=None), dict(lr=dict(lr='high'))]
)
def test_a_report_of_wrong_values_is_rejected(path, change):
    assert_rejected(path, 3, json.dumps(report(100) | change).encode())


def test_another_format_and_an_empty_file_are_rejected(path):
    for other in (1, 99):
        path.write_text(json.dumps(dict(format=other)) + '\n')
        with pytest.raises(ValueError, match=f'format {other}'):
            read_records(path)
    path.write_text('')
    with pytest.raises(ValueError, match='no header'):
        read_records(path)


def test_a_continued_record_has_the_earlier_reports(path, tmp_path):
    writer = RecordWriter(tmp_path / 'next' / 'collapse.jsonl', HEADER, path, last=100)
    writer.append(report(120))
    assert [r['iter'] for r in read_records(writer.path).reports] == [50, 100, 120]
    assert [r['iter'] for r in read_records(path, last_of=100).reports] == [100]
    assert read_records(path, last_of=49).reports == []
    assert [p.name for p in writer.path.parent.iterdir()] == ['collapse.jsonl']
