"""When channels collapsed and were revived."""

import json

import numpy as np

from psbn_mmdet.report import find_record, read_run
from psbn_mmdet.report.figures import FIGURES


def test_lives_tell_when_a_channel_was_collapsed(tmp_path, write_run):
    states = [[5, 70], [70], [5, 1], [1], []]
    run = read_run(write_run(tmp_path, states, start=[5, 9]), 'BN')
    lives = {(life.layer, life.channel): life.spans for life in run.events.lives(10)}
    assert list(lives.items()) == [  # by the first collapse
        ((0, 5), [(0, 100), (150, 200)]),
        ((0, 9), [(0, 50)]),
        ((1, 6), [(50, 150)]),
        ((0, 1), [(150, 250)]),
    ]


def test_a_lasting_collapse_has_no_end(tmp_path, write_run):
    run = read_run(write_run(tmp_path, [[], [3]]), 'BN')
    assert [life.spans for life in run.events.lives(10)] == [[(100, None)]]


def test_lives_tell_when_the_recovery_hook_opened_a_channel(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[5, 70], [70], [], [5]])
    path = find_record(work_dir)
    header, *reports = map(json.loads, path.read_text().splitlines())
    for report, opened in zip(reports, (['', ''], ['5', ''], ['', '6-7'], ['5', ''])):
        report['channels']['recovered'] = [*opened, None]
    path.write_text(''.join(json.dumps(line) + '\n' for line in (header, *reports)))
    run = read_run(work_dir, 'psBN')
    lives = {(life.layer, life.channel): life.recovered for life in run.events.lives(10)}
    assert lives == {(0, 5): [100, 200], (1, 6): [150]} and run.ever_recovered == 3
    figure = FIGURES['life_lines'].draw([run])
    assert 'opened by RecoveryHook' in [t.get_text() for t in figure.legends[0].get_texts()]
    marks = figure.axes[0].collections[-1].get_offsets().tolist()
    assert sorted(marks) == [[100, 1], [150, 2], [200, 1]]


def test_too_many_lives_are_chosen_evenly_from_first_to_last(tmp_path, write_run):
    run = read_run(write_run(tmp_path, [range(n) for n in range(1, 65)]), 'BN')
    chosen = [life.channel for life in run.events.lives(8)]
    assert chosen == [0, 9, 18, 27, 36, 45, 54, 63]


def test_lives_agree_with_the_masks_of_every_report(tmp_path, write_run):
    rng = np.random.default_rng(0)
    states = [np.flatnonzero(rng.random(160) < 0.1) for _ in range(30)]
    run = read_run(write_run(tmp_path, states, start=[0, 8, 100]), 'BN')
    offsets = [0, 64, 128]
    for iteration, state in zip(run.iterations, states):
        collapsed = {
            offsets[life.layer] + life.channel
            for life in run.events.lives(1000)
            if any(a <= iteration and (b is None or iteration < b) for a, b in life.spans)
        }
        assert collapsed == set(state.tolist())


def test_a_deleted_line_loses_nothing_but_itself(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[], [1], [1, 2], [2]])
    path = find_record(work_dir)
    lines = path.read_text().splitlines(keepends=True)
    del lines[2]
    path.write_text(''.join(lines))
    lives = read_run(work_dir, 'BN').events.lives(9)
    assert {life.channel: life.spans for life in lives} == {1: [(150, 200)], 2: [(150, None)]}
