"""Which record a resumed run continues."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub
from small_run import Classifier, channels_of, records_of, run, texts
from torch import nn

from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import find_snapshots
from psbn_mmdet.report import find_record


def resumable(tmp_path, epochs, **kwargs):
    time.sleep(1)  # log folders are named by the second
    default_hooks = dict(
        logger=dict(type='LoggerHook', interval=4),
        checkpoint=dict(type='CheckpointHook', interval=1),
    )
    settings = dict(epochs=epochs, lr=0.1, weight_decay=0.5, default_hooks=default_hooks)
    return run(tmp_path, Classifier(PostShiftedBatchNorm2d), **(settings | kwargs))


def test_resume_continues_the_record_without_repeating_an_iteration(tmp_path):
    whole = records_of(resumable(tmp_path / 'whole', 5))
    first = resumable(tmp_path / 'run', 3)
    # killed in the third epoch: the checkpoint of the second is the last
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'run/epoch_2.pth'))
    with open(Path(first.log_dir) / 'collapse.jsonl', 'a') as file:
        file.write('{"iter": 40, "to')
    second = resumable(tmp_path / 'run', 5, resume=True)
    assert second.log_dir != first.log_dir
    resumed = records_of(second)
    assert [r['iter'] for r in resumed.reports] == [r['iter'] for r in whole.reports]
    assert list(find_snapshots(second.log_dir)) == [0, 12, 24, 36, 48, 60]
    earlier = Path(second.log_dir) / resumed.header['continues']
    assert earlier.resolve() == Path(first.log_dir).resolve()
    assert whole.header['continues'] is None
    start = [find_snapshots(run.log_dir)[0].read_bytes() for run in (first, second)]
    assert start[0] == start[1]
    for a, b in zip(resumed.reports, whole.reports):
        assert a['channels']['collapsed'] == b['channels']['collapsed'], a['iter']
        assert a['total']['revived'] == b['total']['revived'], a['iter']


class Changing(Classifier):
    """Filters 1 and 2 close in the tenth step, filter 2 opens again in the fourteenth."""

    def train_step(self, data, optim_wrapper):
        losses = super().train_step(data, optim_wrapper)
        step = MessageHub.get_current_instance().get_info('iter') + 1
        with torch.no_grad():
            if step == 10:
                self.stem[1].weight[1:3], self.stem[1].bias[1:3] = 0.01, -1.0
            if step == 14:
                self.stem[1].weight[2], self.stem[1].bias[2] = 1.0, 0.0
        return losses


def test_what_is_new_and_what_revived_is_the_same_after_a_resume(tmp_path):
    hook = dict(type='CollapseHook', interval=8, window=8)
    settings = dict(custom_hooks=[hook], default_hooks=dict(checkpoint=dict(type='CheckpointHook')))

    def changes(folder, epochs, **kwargs):
        time.sleep(1)
        made = run(folder, Changing(killed={}), epochs=epochs, **settings, **kwargs)
        found = records_of(made)
        return {
            r['iter']: [channels_of(found, r, kind) for kind in ('new', 'revived')]
            for r in found.reports
            if r['iter'] % 8 == 0
        }

    whole = changes(tmp_path / 'whole', 2)
    assert whole[16] == [{'stem.1': [1]}, {}]
    changes(tmp_path / 'run', 1)
    first = find_record(tmp_path / 'run')  # with a report at its end
    first.write_text(''.join(first.read_text().splitlines(True)[:-1]))  # as if killed after 12
    assert changes(tmp_path / 'run', 2, resume=True)[16] == whole[16]


def test_a_new_run_in_the_same_work_dir_starts_its_own_record(tmp_path):
    resumable(tmp_path, 1)
    second = resumable(tmp_path, 1)
    assert [r['iter'] for r in records_of(second).reports] == [4, 8, 12]
    assert len(list(tmp_path.glob('*/collapse.jsonl'))) == 2


def test_a_run_that_is_resumed_past_its_end_leaves_the_record_as_it_is(tmp_path):
    first = resumable(tmp_path, 2)
    before = (Path(first.log_dir) / 'collapse.jsonl').read_bytes()
    second = resumable(tmp_path, 1, resume=True)
    assert second.iter == 24
    assert not (Path(second.log_dir) / 'collapse.jsonl').exists()
    assert find_record(tmp_path).parent == Path(first.log_dir)
    assert find_record(tmp_path).read_bytes() == before
    assert 'are off from iteration' not in texts(tmp_path)


def test_a_damaged_record_is_left_alone_and_said(tmp_path):
    first = resumable(tmp_path, 1)
    path = Path(first.log_dir) / 'collapse.jsonl'
    damaged = path.read_text().replace('"iter"', 'iter', 1)
    path.write_text(damaged)
    second = resumable(tmp_path, 2, resume=True)
    assert [r['iter'] for r in records_of(second).reports] == [16, 20, 24]
    assert path.read_text() == damaged
    assert 'line 2 is damaged' in texts(tmp_path)


def edited(path, **values):
    header, *rest = path.read_text().splitlines()
    path.write_text('\n'.join([json.dumps(json.loads(header) | values), *rest, '']))


def test_two_runs_in_one_work_dir_are_not_spliced(tmp_path):
    first = resumable(tmp_path, 1)
    checkpoint = shutil.copy(tmp_path / 'epoch_1.pth', tmp_path / 'of_first.pth')
    resumable(tmp_path, 2, randomness=dict(seed=1))  # the newest record of the folder
    third = resumable(tmp_path, 2, resume=True, load_from=str(checkpoint))
    assert [r['iter'] for r in records_of(third).reports] == [4, 8, 12, 16, 20, 24]
    assert records_of(third).header['continues'] == f'../{Path(first.log_dir).name}'
    assert records_of(third).reports[:3] == records_of(first).reports
    assert records_of(third).header['id'] != records_of(first).header['id']


def test_the_record_is_found_where_checkpoints_lie_elsewhere(tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, out_dir=str(tmp_path / 'out')))
    first = resumable(tmp_path / 'run', 1, default_hooks=hooks)
    (checkpoint,) = (tmp_path / 'out').rglob('epoch_1.pth')
    second = resumable(tmp_path / 'run', 2, resume=True, load_from=str(checkpoint))
    assert records_of(second).header['continues'] == f'../{Path(first.log_dir).name}'
    other = resumable(tmp_path / 'other', 2, resume=True, load_from=str(checkpoint))
    assert [r['iter'] for r in records_of(other).reports] == [4, 8, 12, 16, 20, 24]


def test_a_work_dir_that_was_moved_keeps_its_record(tmp_path):
    resumable(tmp_path / 'run', 1)
    (tmp_path / 'run').rename(tmp_path / 'moved')
    (tmp_path / 'moved/last_checkpoint').write_text(str(tmp_path / 'moved/epoch_1.pth'))
    second = resumable(tmp_path / 'moved', 2, resume=True)
    assert [r['iter'] for r in records_of(second).reports] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize('how', ['deleted', 'replaced'])
def test_a_record_that_is_gone_is_said_and_no_other_taken(tmp_path, how):
    first = resumable(tmp_path, 1)
    path = Path(first.log_dir) / 'collapse.jsonl'
    if how == 'deleted':
        path.unlink()
    else:
        edited(path, id='another')
    second = resumable(tmp_path, 2, resume=True)
    assert [r['iter'] for r in records_of(second).reports] == [16, 20, 24]
    assert records_of(second).header['continues'] is None
    assert 'collapse.jsonl, is gone: a new one is begun' in texts(tmp_path)


@pytest.mark.parametrize('identity', ['', 'z'])
def test_a_folder_of_the_same_name_does_not_hide_the_record(tmp_path, identity):
    first = resumable(tmp_path / 'run', 1)
    double = tmp_path / 'other' / Path(first.log_dir).name
    shutil.copytree(first.log_dir, double)
    edited(double / 'collapse.jsonl', id=identity)
    checkpoint = str(tmp_path / 'run/epoch_1.pth')
    second = resumable(tmp_path / 'other', 2, resume=True, load_from=checkpoint)
    assert [r['iter'] for r in records_of(second).reports] == [4, 8, 12, 16, 20, 24]
    earlier = Path(second.log_dir) / records_of(second).header['continues']
    assert earlier.resolve() == Path(first.log_dir).resolve()


@pytest.mark.parametrize('other', ['name', 'channels', 'order'])
def test_a_record_of_other_layers_is_said_and_not_continued(tmp_path, other):
    first = resumable(tmp_path, 1)
    path = Path(first.log_dir) / 'collapse.jsonl'
    stem, head = records_of(first).header['layers']
    stem_of_other = stem | dict(name=dict(name='stem.9'), channels=dict(channels=9)).get(other, {})
    edited(path, layers=[head, stem] if other == 'order' else [stem_of_other, head])
    second = resumable(tmp_path, 2, resume=True)
    assert [r['iter'] for r in records_of(second).reports] == [16, 20, 24]
    assert 'network with other BN layers' in texts(tmp_path)


def test_a_checkpoint_without_a_record_is_said(tmp_path):
    resumable(tmp_path, 1, custom_hooks=[])
    second = resumable(tmp_path, 2, resume=True)
    assert [r['iter'] for r in records_of(second).reports] == [16, 20, 24]
    assert 'the checkpoint names no record' in texts(tmp_path)


class Trapping(Classifier):
    """Filter 6 gets no gradient, filter 1 is dead alone; some iterations do not train the layer."""

    def __init__(self, idle):
        super().__init__(killed={})
        nn.init.normal_(self.stem[1].weight, 1, 0.1)
        self.stem[1].weight.data[1], self.stem[1].bias.data[1] = 0.5, -1.1  # opens for xhat > 2.2
        for param in self.stem[1].parameters():
            param.register_hook(lambda grad: grad * (torch.arange(8) != 6))
        self.idle, self.calls = idle, 0

    def train_step(self, data, optim_wrapper):
        self.stem[1].requires_grad_(self.calls not in self.idle)
        self.calls += 1
        return super().train_step(data, optim_wrapper)


class Opening(Trapping):
    """The dead one opens."""

    def train_step(self, data, optim_wrapper):
        self.stem[1].bias.data[1] = 0.0
        return super().train_step(data, optim_wrapper)


@pytest.mark.parametrize('last', ['observed', 'not observed'])
def test_after_a_resume_what_was_trapped_is_so_still_and_what_was_dead_can_revive(tmp_path, last):
    settings = dict(
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        hook=dict(k=2),
        lr=1e-6,
    )
    idle = range(8, 12) if last == 'not observed' else ()
    first = run(tmp_path, Trapping(idle), epochs=1, **settings)
    known = [report['layers']['trapped'][0] for report in records_of(first).reports]
    assert known == [1, 1, 1 if last == 'observed' else None]
    time.sleep(1)
    second = run(tmp_path, Opening(range(8)), epochs=2, resume=True, **settings)
    resumed = records_of(second)
    assert [r['layers']['trapped'][0] for r in resumed.reports] == [*known, None, None, 1]
    for report in resumed.reports:
        dead = [1] if report['iter'] <= 12 else []
        assert channels_of(resumed, report, 'collapsed') == {'stem.1': [*dead, 6]}
    assert [report['total']['revived'] for report in resumed.reports] == [0, 0, 0, 1, 0, 0]
    assert [report['total']['new'] for report in resumed.reports] == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize('record', [True, False])
def test_filters_that_have_not_begun_are_known_after_a_resume(tmp_path, record):
    def start(epochs, **kwargs):
        time.sleep(1)
        model = Classifier(killed={})
        nn.init.zeros_(model.head[1].weight)
        model.head[2] = nn.Identity()
        hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
        return run(tmp_path, model, lr=1e-5, epochs=epochs, default_hooks=hooks, **kwargs)

    first = start(1)
    assert records_of(first).reports[-1]['total']['unstarted'] == 8
    if not record:
        (Path(first.log_dir) / 'collapse.jsonl').unlink()
    second = start(2, resume=True)
    assert 0 < second.model.head[1].weight.detach().abs().max() < 1e-3
    for report in records_of(second).reports:
        assert (report['total']['unstarted'], report['total']['collapsed']) == (8, 0)
    # For a new run on the same weights they are vanished.
    torch.save(second.model.state_dict(), tmp_path / 'weights.pth')
    third = start(1, load_from=str(tmp_path / 'weights.pth'))
    assert records_of(third).reports[0]['total']['vanished'] == 8
