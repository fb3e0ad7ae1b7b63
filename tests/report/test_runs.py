"""What is read from a work dir."""

import json
from pathlib import Path

import numpy as np
import pytest

from psbn_mmdet.records import read_records, write_snapshot
from psbn_mmdet.report import find_record, read_run
from psbn_mmdet.report.figures import FIGURES


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


def test_life_lines_tell_when_a_channel_was_collapsed(tmp_path, write_run):
    states = [[5, 70], [70], [5, 1], [1], []]
    run = read_run(write_run(tmp_path, states, start=[5, 9]), 'BN')
    lives = {(life.layer, life.channel): life.spans for life in run.events.lives(10)}
    assert lives == {
        (0, 5): [(0, 100), (150, 200)],
        (0, 9): [(0, 50)],
        (1, 6): [(50, 150)],
        (0, 1): [(150, 250)],
    }
    assert list(lives) == [(0, 5), (0, 9), (1, 6), (0, 1)], 'by the first collapse'


def test_life_lines_tell_when_the_recovery_hook_opened_a_channel(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[5, 70], [70], [], [5]])
    (path,) = work_dir.glob('*/collapse.jsonl')
    header, *reports = map(json.loads, path.read_text().splitlines())
    for report, opened in zip(reports, (['', '', None], ['5', ''], ['', '6-7'], ['5', ''])):
        report['channels']['recovered'] = [*opened, None][:3]
    path.write_text(''.join(json.dumps(line) + '\n' for line in (header, *reports)))
    run = read_run(work_dir, 'psBN')
    lives = {(life.layer, life.channel): life.recovered for life in run.events.lives(10)}
    assert lives == {(0, 5): [100, 200], (1, 6): [150]} and run.ever_recovered == 3
    figure = FIGURES['life_lines'].draw([run])
    assert 'opened by RecoveryHook' in [t.get_text() for t in figure.legends[0].get_texts()]
    marks = figure.axes[0].collections[-1].get_offsets().tolist()
    assert sorted(marks) == [[100, 1], [150, 2], [200, 1]]


def test_a_lasting_collapse_has_no_end(tmp_path, write_run):
    run = read_run(write_run(tmp_path, [[], [3]]), 'BN')
    assert [life.spans for life in run.events.lives(10)] == [[(100, None)]]


def test_too_many_lives_are_chosen_evenly_from_first_to_last(tmp_path, write_run):
    states = [range(n) for n in range(1, 65)]
    run = read_run(write_run(tmp_path, states), 'BN')
    chosen = [life.channel for life in run.events.lives(8)]
    assert chosen == [0, 9, 18, 27, 36, 45, 54, 63]


def test_life_lines_agree_with_the_masks_of_every_report(tmp_path, write_run):
    rng = np.random.default_rng(0)
    states = [np.flatnonzero(rng.random(160) < 0.1) for _ in range(30)]
    work_dir = write_run(tmp_path, states, start=[0, 8, 100])
    lives = read_run(work_dir, 'BN').events.lives(1000)
    offsets = [0, 64, 128]
    for index, state in enumerate(states):
        iteration = 50 * (index + 1)
        alive = {
            offsets[life.layer] + life.channel
            for life in lives
            if any(a <= iteration and (b is None or iteration < b) for a, b in life.spans)
        }
        assert alive == set(state.tolist())


def test_a_deleted_line_loses_nothing_but_itself(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[], [1], [1, 2], [2]])
    path = find_record(work_dir)
    lines = path.read_text().splitlines(keepends=True)
    del lines[2]
    path.write_text(''.join(lines))
    run = read_run(work_dir, 'BN')
    assert {life.channel: life.spans for life in run.events.lives(9)} == {
        1: [(150, 200)],
        2: [(150, None)],
    }


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


# Average precision


def test_ap_is_read_by_epoch(tmp_path, write_run):
    run = read_run(write_run(tmp_path, scores={1: 0.1, 2: 0.3}), 'BN')
    assert run.scores == {'AP': ([1, 2], [0.1, 0.3]), 'AP50': ([1, 2], [0.2, 0.6])}
    assert run.score_unit == 'epoch'


@pytest.mark.parametrize(
    ('key', 'name'),
    [
        ('coco/bbox_mAP', 'AP'),
        ('lvis/bbox_AP', 'AP'),
        ('pascal_voc/mAP', 'AP'),
        ('coco/bbox_mAP_50', 'AP50'),
        ('pascal_voc/AP50', 'AP50'),
        ('coco/bbox_mAP_75', None),
        ('coco/segm_mAP', None),
    ],
)
def test_which_metrics_are_ap(tmp_path, write_run, key, name):
    work_dir = write_run(tmp_path, scores={1: 0.1})
    log = find_record(work_dir).parent / 'vis_data/scalars.json'
    log.write_text(json.dumps({key: 0.5, 'step': 1}) + '\n')
    assert read_run(work_dir, 'BN').scores == ({name: ([1], [0.5])} if name else {})


def test_a_loop_without_epochs_has_ap_by_iteration(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[], []], scores={40: 0.1, 80: 0.2})
    assert read_run(work_dir, 'BN').score_unit == 'iteration'


def test_scores_of_resumed_runs_are_put_together(tmp_path, write_run, write_scores):
    write_run(tmp_path, [[]] * 8, scores={1: 0.1, 2: 0.2, 3: 0.3})
    write_run(tmp_path, [[]] * 4, scores={9: 0.9}, timestamp='20260102_000000')  # another run
    resumed = write_run(
        tmp_path, [[]] * 8, timestamp='20260103_000000', continues='../20260101_000000'
    )
    write_scores(find_record(resumed).parent, {4: 0.4}, first_epoch=3)
    # The third epoch was trained again, and has not been validated since.
    assert read_run(resumed, 'BN').scores['AP'] == ([1, 2, 4], [0.1, 0.2, 0.4])


@pytest.mark.parametrize('claim', ['.', '../gone', '../20260101_000000', 5, 'x' * 5000, 'a\0b'])
def test_a_run_that_continues_itself_in_circles_or_what_is_gone_is_read(tmp_path, write_run, claim):
    write_run(tmp_path, timestamp='20260101_000000', continues='../20260102_000000')
    write_run(tmp_path, timestamp='20260102_000000', scores={1: 0.1}, continues=claim)
    assert read_run(tmp_path, 'BN').scores['AP'] == ([1], [0.1])


def test_a_damaged_log_is_named_and_a_torn_line_is_not(tmp_path, write_run):
    work_dir = write_run(tmp_path, scores={1: 0.1})
    log = find_record(work_dir).parent / 'vis_data/scalars.json'
    log.write_text(log.read_text() + '{"coco/bbox')
    assert read_run(work_dir, 'BN').scores['AP'] == ([1], [0.1])
    log.write_text('{"coco/bbox\n')
    with pytest.raises(ValueError, match=r'scalars\.json, line 1 is damaged'):
        read_run(work_dir, 'BN')


# Which record


def test_a_work_dir_a_run_folder_and_a_record_are_found(tmp_path, write_run):
    write_run(tmp_path)
    write_run(tmp_path, timestamp='20260102_000000')
    latest = tmp_path / '20260102_000000/collapse.jsonl'
    assert find_record(tmp_path) == find_record(latest.parent) == find_record(latest) == latest
    for number in (2, 10):
        write_run(tmp_path, timestamp=f'{latest.parent.name}_{number}')
    assert find_record(tmp_path).parent.name == f'{latest.parent.name}_10'


def test_a_work_dir_without_a_record_or_a_report_is_named(tmp_path, write_run):
    with pytest.raises(FileNotFoundError, match='CollapseHook'):
        read_run(tmp_path, 'BN')
    with pytest.raises(ValueError, match='no report yet'):
        read_run(write_run(tmp_path, []), 'BN')


def damages() -> dict:
    """Ways to spoil the report of line 3."""
    return {
        'no JSON': lambda r: r.clear(),
        'too few layers': lambda r: r['channels']['collapsed'].pop(),
        'no channels': lambda r: r.pop('channels'),
        'a kind that is missing': lambda r: r['channels'].pop('unstarted'),
        'collapsed channels that are unknown': lambda r: r['channels'].update(new=[None] * 3),
        'channels that are no numbers': lambda r: r['channels'].update(new=['x', '', '']),
        'channels that are no list': lambda r: r['channels'].update(dead={'0': '1'}),
        'an iteration out of order': lambda r: r.update(iter=50),
        'an iteration that is none': lambda r: r.update(iter='100'),
        'a learning rate that is a word': lambda r: r.update(lr={'lr': 'high'}),
    }


@pytest.mark.parametrize('damage', damages())
def test_a_damaged_report_is_rejected_with_its_line(tmp_path, write_run, damage):
    work_dir = write_run(tmp_path)
    path = find_record(work_dir)
    lines = path.read_text().splitlines()
    report = json.loads(lines[2])
    damages()[damage](report)
    lines[2] = json.dumps(report)
    path.write_text('\n'.join(lines) + '\n')
    with pytest.raises(ValueError, match='line 3 is damaged'):
        read_run(work_dir, 'BN')


@pytest.mark.parametrize('setting', [dict(interval=0), dict(window=0), dict(tau=1), dict(k=-1)])
def test_a_header_of_no_hook_is_rejected(tmp_path, write_run, setting):
    with pytest.raises(ValueError, match='line 1 is damaged'):
        read_run(write_run(tmp_path, **setting), 'BN')


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


def test_the_scores_of_a_teacher_and_a_student_are_told_apart(tmp_path, write_run):
    work_dir = write_run(tmp_path, scores={1: 0.1})
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    line = {'teacher/coco/bbox_mAP': 0.4, 'student/coco/bbox_mAP': 0.3, 'step': 1}
    log.write_text(json.dumps(line) + '\n')
    assert read_run(work_dir, 'x').scores == {
        'AP of the teacher': ([1], [0.4]),
        'AP of the student': ([1], [0.3]),
    }


def test_a_validation_without_epochs_is_at_the_iteration_of_the_training_before(
    tmp_path, write_run
):
    work_dir = write_run(tmp_path, [[], []], scores={1: 0.1})
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    lines = []
    for iteration, ap in ((100, 0.1), (200, 0.2), (300, 0.3)):
        lines.append({'loss': 1.0, 'epoch': 1, 'iter': iteration, 'step': iteration})
        lines.append({'coco/bbox_mAP': ap, 'step': 0})
    log.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    run = read_run(work_dir, 'x')
    assert run.scores == {'AP': ([100, 200, 300], [0.1, 0.2, 0.3])}
    assert run.score_unit == 'iteration'
