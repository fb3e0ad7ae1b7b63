"""What is read from a work dir."""

import json
from pathlib import Path

import numpy as np
import pytest

from psbn_mmdet.records import read_records, write_snapshot
from psbn_mmdet.report import find_record, read_run


def test_series_masks_and_shares_are_the_records(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[], [1], [1, 70, 71], [70]])
    run = read_run(work_dir, 'BN')
    assert run.iterations.tolist() == [50, 100, 150, 200]
    assert run.counts['collapsed'].tolist() == [0, 1, 3, 1]
    assert run.learning_rate.tolist() == [0.1] * 4
    assert run.collapsed.nonzero()[0].tolist() == [70]
    assert run.ever_collapsed.nonzero()[0].tolist() == [1, 70, 71]
    assert run.ever_revived.nonzero()[0].tolist() == [1, 71]
    assert list(run.stages) == ['backbone', 'backbone.layer1', 'neck']
    edges, share = run.share_collapsed()
    assert edges.tolist() == [0, 50, 100, 150, 200]
    assert share.tolist() == [[0, 1 / 64, 1 / 64, 0], [0, 0, 2 / 64, 1 / 64], [0, 0, 0, 0]]


def test_a_report_without_a_step_is_a_gap(tmp_path, write_run):
    work_dir = write_run(tmp_path)
    path = find_record(work_dir)
    lines = path.read_text().splitlines()
    report = json.loads(lines[2])
    report['channels']['trapped'] = [None] * 3
    lines[2] = json.dumps(report)
    path.write_text('\n'.join(lines) + '\n')
    trapped = read_run(work_dir, 'BN').counts['trapped']
    assert np.isnan(trapped).tolist() == [False, True, False, False]


def test_snapshots_of_start_middle_and_end_know_who_was_collapsed(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[1], [1, 2], [2], [2, 3]], snapshots=(0, 60, 110, 160, 220))
    run = read_run(work_dir, 'BN')
    assert [s.iteration for s in run.snapshots] == [0, 110, 220]
    assert [s.collapsed.nonzero()[0].tolist() for s in run.snapshots] == [[], [1, 2], [2, 3]]
    assert run.snapshots[0].gamma.shape == run.snapshots[0].bias.shape == (160,)


@pytest.mark.parametrize(('found', 'expected'), [([], []), ([0], [0]), ([0, 90], [0, 90])])
def test_fewer_snapshots_are_taken_as_they_are(tmp_path, write_run, found, expected):
    run = read_run(write_run(tmp_path, snapshots=found), 'BN')
    assert [s.iteration for s in run.snapshots] == expected


def test_what_a_training_adds_while_its_record_is_read_is_left_out(
    tmp_path, write_run, write_scores
):
    work_dir = write_run(tmp_path, [[], [1]], snapshots=(0, 100), scores={1: 0.1})
    folder = find_record(work_dir).parent

    def train(share: float) -> None:
        if share == 1:  # the record is read
            write_snapshot(folder, 300, np.ones(160), np.ones(160))
            write_scores(folder, {1: 0.1, 2: 0.2, 3: 0.3})

    run = read_run(work_dir, 'BN', train)
    assert [s.iteration for s in run.snapshots] == [0, 100], 'who is collapsed at 300 is not known'
    assert run.scores['AP'] == ([1], [0.1]) and run.score_unit == 'epoch'


def test_a_snapshot_of_another_network_is_an_error(tmp_path, write_run):
    work_dir = write_run(tmp_path, snapshots=())
    write_snapshot(find_record(work_dir).parent, 0, np.ones(7), np.ones(7))
    with pytest.raises(ValueError, match=r'iter_0\.npy is no snapshot of this run'):
        read_run(work_dir, 'BN')


def test_progress_grows_to_the_whole(tmp_path, write_run):
    shares: list[float] = []
    read_run(write_run(tmp_path, [[]] * 3000), 'BN', shares.append)
    assert len(shares) >= 4 and shares[-1] == 1
    assert all(a <= b for a, b in zip(shares, shares[1:]))


def test_the_kept_runs_are_read_as_they_are():
    kept = Path(__file__).resolve().parents[2] / 'benchmarks/results/compare'
    for norm in ('bn', 'psbn'):
        run = read_run(kept / norm, norm)
        records = read_records(kept / norm / 'collapse.jsonl')
        collapsed = [report['total']['collapsed'] for report in records.reports]
        assert run.counts['collapsed'].tolist() == collapsed
        assert [s.iteration for s in run.snapshots] == [0, 720, 1440]
        scores = json.loads((kept / norm / 'scores.json').read_text())
        assert run.scores['AP'][1] == [score['AP'] for score in scores.values()]
