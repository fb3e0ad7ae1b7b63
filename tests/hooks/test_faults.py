"""Whatever fails in the hook after the start: one warning, and the training continues."""

import errno
import os
import shutil
import time

import numpy as np
import pytest
import torch
from small_run import Classifier, channels_of, records_of, run, texts
from torch import nn

from psbn_mmdet.collapse import CollapseMonitor, GradientWatch, monitor
from psbn_mmdet.hooks import collapse_hook, recorder
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import STATE_INFO, find_snapshots


def trained(work_dir, **kwargs):
    model = Classifier(PostShiftedBatchNorm2d)
    runner = run(work_dir, model, lr=0.1, weight_decay=0.1, **kwargs)
    assert runner.iter == 24
    return runner


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """What the training gives without the hook."""
    return trained(tmp_path_factory.mktemp('plain'), custom_hooks=[]).model.state_dict()


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


TENSORBOARD = dict(type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')])
FAULTS = {  # what fails, and the part that is off then
    'reading the parameters': ((monitor, 'census_of_model'), 'counts'),
    'watching the optimizer': ((monitor, 'GradientWatch'), 'counts'),
    'watching steps': ((monitor, 'watch_steps'), 'counts'),
    'reading gradients': ((GradientWatch, 'reached'), 'counts'),
    'comparing': ((CollapseMonitor, 'report'), 'counts'),
    'logging scalars': ((collapse_hook, 'log_scalars'), 'counts'),
    'making the recorder': ((collapse_hook, 'Recorder'), 'records'),
    'making the record': ((recorder, 'RecordWriter'), 'records'),
    'appending to the record': ((recorder.RecordWriter, 'append'), 'records'),
    'writing a snapshot': ((recorder, 'write_snapshot'), 'snapshots'),
    'drawing the table': ((collapse_hook.EpochTable, 'render'), 'tables'),
    'reading the schedule': ((collapse_hook, 'read_schedule'), 'forecasts'),
    'forecasting': ((collapse_hook, 'make_forecast'), 'forecasts'),
    'warning of optimizers': ((collapse_hook, '_warn_of_optimizers'), 'messages'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_one_warning_and_the_training_goes_on(tmp_path, monkeypatch, weights, fault):
    (owner, name), part = FAULTS[fault]
    monkeypatch.setattr(owner, name, fail)
    runner = trained(tmp_path)
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    (warning,) = [x for x in texts(tmp_path).splitlines() if 'WARNING - CollapseHook:' in x]
    assert f'{part} are off from iteration' in warning and os.strerror(errno.ENOSPC) in warning
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks
    assert not any(m._forward_hooks for m in runner.model.modules())
    assert 'train_step' not in vars(runner.model)
    if part not in ('counts', 'records'):
        assert [r['iter'] for r in records_of(runner).reports] == [4, 8, 12, 16, 20, 24]
        assert records_of(runner).reports[-1]['total']['trapped'] is not None
    if part != 'counts':
        assert texts(tmp_path).count('collapse/collapsed') == 6
    if part not in ('counts', 'snapshots') and fault != 'making the recorder':
        assert list(find_snapshots(runner.log_dir)) == [0, 12, 24]


def test_counting_that_fails_later_leaves_no_old_number_in_the_log(tmp_path, monkeypatch):
    report, calls = CollapseMonitor.report, []

    def failing(*args):
        calls.append(1)
        return fail() if len(calls) == 3 else report(*args)

    monkeypatch.setattr(CollapseMonitor, 'report', failing)
    runner = trained(tmp_path)
    assert texts(tmp_path).count('collapse/collapsed') == 2
    assert 'counts are off from iteration 12 on' in texts(tmp_path)
    assert len(records_of(runner).reports) == 2 and len(calls) == 3


def test_a_disk_that_is_full_for_a_while_leaves_the_record_whole(tmp_path, monkeypatch):
    append, calls = recorder.RecordWriter.append, []

    def failing(writer, report):
        calls.append(1)
        if len(calls) == 3:
            with open(writer.path, 'a') as file:
                file.write('{"iter": 12, "to')
            fail()
        append(writer, report)

    monkeypatch.setattr(recorder.RecordWriter, 'append', failing)
    runner = trained(tmp_path)
    assert [r['iter'] for r in records_of(runner).reports] == [4, 8]
    assert len(calls) == 3 and texts(tmp_path).count('collapse/collapsed') == 6


def test_files_that_are_lost_stop_no_training(tmp_path):
    class Losing(Classifier):
        calls = 0

        def train_step(self, data, optim_wrapper):
            self.calls += 1
            if self.calls == 6:
                (path,) = tmp_path.glob('*/collapse.jsonl')
                path.unlink()
                path.mkdir()
                shutil.rmtree(path.parent / 'snapshots')
                (path.parent / 'snapshots').write_text('no folder any more')
            return super().train_step(data, optim_wrapper)

    runner = run(tmp_path, Losing())
    assert runner.iter == 24
    for part in ('records are off from iteration 8', 'snapshots are off from iteration 13'):
        assert texts(tmp_path).count(part) == 1


def test_reading_an_earlier_record_that_fails_starts_a_new_one(tmp_path, monkeypatch):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    run(tmp_path, Classifier(), default_hooks=hooks, epochs=1)
    monkeypatch.setattr(recorder, 'read_records', fail)
    time.sleep(1)  # log folders are named by the second
    runner = run(tmp_path, Classifier(), resume=True)
    assert [r['iter'] for r in records_of(runner).reports] == [16, 20, 24]
    assert 'Its reports are not continued.' in texts(tmp_path)


@pytest.mark.parametrize('unstarted', [3, {'stem.1': '90-99'}, {'stem.1': 7.5}, {'stem.1': None}])
def test_a_damaged_state_in_the_checkpoint_starts_counting_anew(tmp_path, unstarted):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    run(tmp_path, Classifier(), default_hooks=hooks, epochs=1)
    content = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    content['message_hub']['runtime_info'][STATE_INFO]['unstarted'] = unstarted
    torch.save(content, tmp_path / 'epoch_1.pth')
    time.sleep(1)  # log folders are named by the second
    runner = run(tmp_path, Classifier(), resume=True)
    assert [r['iter'] for r in records_of(runner).reports] == [4, 8, 12, 16, 20, 24]
    assert texts(tmp_path).count('counts of the earlier run are off') == 1


def test_a_learning_rate_that_is_a_tensor_is_written_as_a_number(tmp_path):
    class Converting(Classifier):
        def train_step(self, data, optim_wrapper):
            losses = super().train_step(data, optim_wrapper)
            group = optim_wrapper.optimizer.param_groups[0]
            self.turn = not getattr(self, 'turn', False)
            group['lr'] = torch.tensor(0.5) if self.turn else np.float32(0.25)
            return losses

    records = records_of(run(tmp_path, Converting(), hook=dict(interval=3, window=3)))
    assert [r['lr']['lr'] for r in records.reports] == [0.5, 0.25] * 4


def test_layers_that_come_and_go_stop_no_training(tmp_path):
    class Growing(Classifier):
        calls = 0

        def train_step(self, data, optim_wrapper):
            self.calls += 1
            if self.calls == 6:
                self.late = nn.BatchNorm2d(3)
            if self.calls == 18:
                self.stem[1] = nn.Identity()
            return super().train_step(data, optim_wrapper)

    runner = run(tmp_path, Growing())
    assert runner.iter == 24
    records = records_of(runner)
    assert [r['iter'] for r in records.reports] == [4, 8, 12, 16]
    assert all(len(r['layers']['vanished']) == 2 for r in records.reports)
    assert channels_of(records, records.reports[-1], 'trapped')['head.1'] == [7]
    (line,) = [x for x in texts(tmp_path).splitlines() if 'were added during the training' in x]
    assert line.endswith('late.')
    assert 'the network no longer has a layer stem.1' in texts(tmp_path)


def test_layers_of_which_it_stays_unknown_what_follows_are_said(tmp_path):
    class Idle(Classifier):
        def __init__(self):
            super().__init__()
            self.never = nn.BatchNorm2d(4)

    runner = run(tmp_path, Idle())
    (line,) = [x for x in texts(tmp_path).splitlines() if 'it is unknown what follows' in x]
    assert '1 layers' in line and line.endswith('(did not run in 20 iterations): never.')
    records = records_of(runner)
    assert records.reports[-1]['layers']['dead'] == [3, 1, None]


def test_a_step_that_fails_at_the_start_leaves_nothing_behind(tmp_path):
    class Failing(Classifier):
        def train_step(self, data, optim_wrapper):
            super().train_step(data, optim_wrapper)
            raise RuntimeError('out of memory')

    model = Failing()
    with pytest.raises(RuntimeError, match='out of memory'):
        run(tmp_path, model)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    stance = getattr(torch._dynamo.eval_frame, '_stance', None)
    assert stance is None or stance.stance == 'default'
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
