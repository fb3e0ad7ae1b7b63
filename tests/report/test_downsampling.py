"""Fewer points, the same picture."""

import numpy as np
import pytest

from psbn_mmdet.report.downsampling import HeatMapColumns, downsample


def test_a_short_curve_is_left_alone():
    x, y = downsample(np.arange(2000), np.zeros(2000))
    assert len(x) == len(y) == 2000


def test_a_long_curve_keeps_its_ends_and_its_extremes():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_000)
    y[31_234], y[77_777] = 50, -50
    x, thinned = downsample(np.arange(100_000), y)
    assert len(x) <= 2000
    assert (x[0], x[-1]) == (0, 99_999)
    assert thinned[x == 31_234] == [50] and thinned[x == 77_777] == [-50]
    assert (np.diff(x) > 0).all() and (y[x] == thinned).all()


def test_a_gap_stays_a_gap_and_one_missing_value_makes_none():
    y = np.ones(100_000)
    y[40_000:60_000] = np.nan
    y[10] = np.nan
    x, thinned = downsample(np.arange(100_000), y)
    assert np.isnan(thinned).any()
    assert x[np.isnan(thinned)].min() > 39_000 and x[np.isnan(thinned)].max() < 61_000


@pytest.mark.parametrize('arrivals', [1, 7, 8, 9, 100, 1001])
def test_columns_are_few_and_keep_the_largest_count(arrivals):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 100, (arrivals, 3))
    columns = HeatMapColumns(3, limit=4)
    for index, row in enumerate(counts):
        columns.add(10 * (index + 1), row)
    assert columns.values.shape == (3, len(columns.ends)) and len(columns.ends) <= 8
    assert columns.ends[-1] == 10 * arrivals
    start = 0
    for end, column in zip(columns.ends, columns.values.T):
        stop = int(end) // 10
        assert column.tolist() == counts[start:stop].max(0).tolist()
        start = stop


def test_few_arrivals_have_a_column_each():
    columns = HeatMapColumns(2)
    for end in (50, 100, 175):
        columns.add(end, [end, 0])
    assert columns.ends.tolist() == [50, 100, 175]
    assert columns.values.tolist() == [[50, 100, 175], [0, 0, 0]]
