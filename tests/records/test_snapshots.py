"""The snapshots of gamma and bias."""

import numpy as np
import pytest

from psbn_mmdet.records import copy_snapshots, find_snapshots, read_snapshot, write_snapshot

GAMMA, SHIFT = np.array([1.0, 0.5, 1e6]), np.array([0.0, -0.1, np.nan])


def test_what_is_written_is_read_to_float16s_precision(tmp_path):
    path = write_snapshot(tmp_path, 90, GAMMA, SHIFT)
    gamma, bias = read_snapshot(path, 3)
    assert gamma.tolist() == [1.0, 0.5, np.inf]
    assert bias == pytest.approx([0.0, -0.1, np.nan], abs=1e-4, nan_ok=True)


def test_a_snapshot_takes_four_bytes_per_channel(tmp_path):
    path = write_snapshot(tmp_path, 0, np.zeros(26_560), np.zeros(26_560))
    assert path.stat().st_size == 26_560 * 2 * 2 + 128


def test_a_snapshot_is_not_written_twice(tmp_path):
    write_snapshot(tmp_path, 90, GAMMA, SHIFT)
    path = write_snapshot(tmp_path, 90, GAMMA + 1, SHIFT)
    assert read_snapshot(path, 3)[0][0] == 1.0
    assert [p.name for p in path.parent.iterdir()] == ['iter_90.npy']


def test_they_are_found_in_the_order_of_iterations(tmp_path):
    for iteration in (1000, 90, 0):
        write_snapshot(tmp_path, iteration, GAMMA, SHIFT)
    (tmp_path / 'snapshots/iter_5.npy.1.part').touch()
    (tmp_path / 'snapshots/iter_x.npy').touch()
    assert list(find_snapshots(tmp_path)) == [0, 90, 1000]
    assert find_snapshots(tmp_path / 'other') == {}


def test_those_up_to_an_iteration_are_copied(tmp_path):
    for iteration in (0, 90, 180):
        write_snapshot(tmp_path / 'a', iteration, GAMMA, SHIFT)
    copy_snapshots(tmp_path / 'a', tmp_path / 'b', last=90)
    found = find_snapshots(tmp_path / 'b')
    assert list(found) == [0, 90]
    assert found[90].read_bytes() == find_snapshots(tmp_path / 'a')[90].read_bytes()


@pytest.mark.parametrize('content', [b'', b'no array', b'\x93NUMPY'])
def test_a_damaged_snapshot_is_named(tmp_path, content):
    path = write_snapshot(tmp_path, 90, GAMMA, SHIFT)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'iter_90\.npy is no snapshot'):
        read_snapshot(path, 3)


@pytest.mark.parametrize('channels', [2, 4])
def test_a_snapshot_of_another_network_is_refused(tmp_path, channels):
    path = write_snapshot(tmp_path, 90, GAMMA, SHIFT)
    with pytest.raises(ValueError, match=rf'shape \(2, 3\), the record has {channels} channels'):
        read_snapshot(path, channels)
