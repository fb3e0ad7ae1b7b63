"""Average precision, read from logs."""

import json

import pytest

from psbn_mmdet.report import find_record, read_run
from psbn_mmdet.report.scores import read_scores


@pytest.fixture
def scores_in(tmp_path):
    """A function from lines of a log to the scores that are read from it."""

    def scores_in(*lines: dict) -> dict:
        (tmp_path / 'vis_data').mkdir()
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (tmp_path / 'vis_data/scalars.json').write_text(text)
        return read_scores([tmp_path])

    return scores_in


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
        ('teacher/coco/bbox_mAP', 'AP of the teacher'),
        ('student/coco/bbox_mAP_50', 'AP50 of the student'),
        ('coco/bbox_mAP_75', None),
        ('coco/segm_mAP', None),
    ],
)
def test_which_metrics_are_ap(scores_in, key, name):
    assert scores_in({key: 0.5, 'step': 1}) == ({name: ([1], [0.5])} if name else {})


def test_a_loop_without_epochs_has_ap_by_iteration(tmp_path, write_run):
    work_dir = write_run(tmp_path, [[], []], scores={40: 0.1, 80: 0.2})
    assert read_run(work_dir, 'BN').score_unit == 'iteration'


def test_a_validation_without_a_step_is_at_the_iteration_of_the_training(scores_in):
    lines = []
    for iteration, ap in ((100, 0.1), (200, 0.2), (300, 0.3)):
        lines.append({'loss': 1.0, 'epoch': 1, 'iter': iteration, 'step': iteration})
        lines.append({'coco/bbox_mAP': ap, 'step': 0})
    assert scores_in(*lines) == {'AP': ([100, 200, 300], [0.1, 0.2, 0.3])}


def test_scores_of_resumed_runs_are_put_together(tmp_path, write_run, write_scores):
    write_run(tmp_path, [[]] * 8, scores={1: 0.1, 2: 0.2, 3: 0.3})
    write_run(tmp_path, [[]] * 4, scores={9: 0.9}, timestamp='20260102_000000')  # another run
    resumed = write_run(
        tmp_path, [[]] * 8, timestamp='20260103_000000', continues='../20260101_000000'
    )
    write_scores(find_record(resumed).parent, {4: 0.4}, first_epoch=3)
    # The third epoch was trained again, and has not been validated since.
    assert read_run(resumed, 'BN').scores['AP'] == ([1, 2, 4], [0.1, 0.2, 0.4])


def test_a_damaged_log_is_named_and_an_incomplete_line_is_not(tmp_path, write_scores):
    write_scores(tmp_path, {1: 0.1})
    log = tmp_path / 'vis_data/scalars.json'
    log.write_text(log.read_text() + '{"coco/bbox')
    assert read_scores([tmp_path])['AP'] == ([1], [0.1])
    log.write_text('{"coco/bbox\n')
    with pytest.raises(ValueError, match=r'scalars\.json, line 1 is damaged'):
        read_scores([tmp_path])
