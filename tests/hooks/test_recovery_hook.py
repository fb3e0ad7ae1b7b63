"""RecoveryHook in a real Runner."""

import time

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from small_run import Classifier, Images, channels_of, collate, records_of, run, texts
from torch import nn

from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.recovery import recovery

KILLED = {'stem.1': [0, 3, 4], 'head.1': [7]}
HOOKS_ON = [
    dict(type='CollapseHook', interval=4, window=4),
    dict(type='RecoveryHook', steps=20, window=3),
]


def trained(work_dir, hooks=HOOKS_ON, lost=False, **kwargs):
    net = Classifier(PostShiftedBatchNorm2d)
    if lost:  # as after a long time
        with torch.no_grad():
            net.stem[0].weight[KILLED['stem.1']] *= 1e-3
            net.head[0].weight[:, KILLED['stem.1']] *= 1e-2
    return run(work_dir, net, custom_hooks=hooks, **kwargs)


def test_closed_filters_are_recovered_in_the_run_and_the_record_says_when(tmp_path):
    runner = trained(tmp_path, epochs=6)
    records = records_of(runner)
    reports = records.reports
    assert channels_of(records, reports[0], 'trapped') == KILLED
    assert reports[-1]['total']['trapped'] == reports[-1]['total']['dead'] == 0
    recovered = {}
    for report in reports:
        for layer, channels in channels_of(records, report, 'recovered').items():
            recovered.setdefault(layer, []).extend(channels)
    assert {layer: sorted(set(channels)) for layer, channels in recovered.items()} == KILLED
    log = texts(tmp_path)
    assert 'RecoveryHook: 0 closed filters were opened in this epoch, 0 so far, ' in log
    assert ', 4 so far, of which 0 are closed again; 0 are being decayed.' in log
    assert 'collapse/recovered: ' in log
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks
    assert not any(m._forward_hooks for m in runner.model.modules())


def test_without_it_they_stay_and_nothing_speaks_of_recovery(tmp_path):
    runner = trained(tmp_path, HOOKS_ON[:1], epochs=6)
    records = records_of(runner)
    assert channels_of(records, records.reports[-1], 'trapped') == KILLED
    assert 'recovered' not in records.reports[-1]['total']
    assert 'recovered: ' not in texts(tmp_path) and 'RecoveryHook:' not in texts(tmp_path)


def test_the_report_before_and_after_is_that_of_the_watched_alone(tmp_path):
    with_it = trained(tmp_path / 'with', epochs=1)
    without = trained(tmp_path / 'without', HOOKS_ON[:1], epochs=1)
    for one, other in zip(records_of(with_it).reports, records_of(without).reports):
        for kind in ('trapped', 'vanished'):
            assert one['channels'][kind] == other['channels'][kind]


def test_no_weight_decay_is_no_fault_then(tmp_path):
    trained(tmp_path / 'with', epochs=1)
    trained(tmp_path / 'without', HOOKS_ON[:1], epochs=1)
    assert 'Weight decay does not reach' not in texts(tmp_path / 'with')
    assert "Add dict(type='RecoveryHook') to custom_hooks" in texts(tmp_path / 'without')


def test_it_works_alone(tmp_path):
    runner = trained(tmp_path, HOOKS_ON[1:], epochs=6)
    stem = runner.model.stem[1]
    assert (stem.bias > 0)[KILLED['stem.1']].all()
    assert 'closed filters were opened in this epoch' in texts(tmp_path)


@pytest.mark.parametrize('at', [1, 2])
def test_a_resumed_run_gives_the_same_weights(tmp_path, at):
    assert_resumes(tmp_path, at)


def test_so_does_one_whose_convolutions_were_restored(tmp_path):
    whole = assert_resumes(tmp_path, 1, lost=True)
    stem, head = whole.model.stem[0].weight, whole.model.head[0].weight.transpose(0, 1)
    for weight in (stem, head):
        sizes = weight.detach().flatten(1).norm(dim=1)
        assert (sizes[KILLED['stem.1']] > 0.3 * sizes[[1, 2]].mean()).all()


def assert_resumes(tmp_path, at, lost=False):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    settings = dict(default_hooks=hooks, epochs=4, optim_wrapper=MOMENTUM, lost=lost)
    whole = trained(tmp_path / 'whole', **settings)
    time.sleep(1)
    checkpoint = str(tmp_path / f'whole/epoch_{at}.pth')
    went_on = trained(tmp_path / 'on', load_from=checkpoint, resume=True, **settings)
    assert went_on.iter == whole.iter == 48
    for (name, value), other in zip(
        went_on.model.state_dict().items(), whole.model.state_dict().values()
    ):
        assert torch.equal(value, other), name
    assert whole.model.stem[1].bias[0] > -0.8  # the recovery was under way
    return whole


MOMENTUM = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))


def test_a_checkpoint_of_another_network_s_recovery_is_said_and_not_taken(tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    trained(tmp_path, default_hooks=hooks, epochs=1)
    path = tmp_path / 'epoch_1.pth'
    content = torch.load(path, weights_only=False)
    kept = content['psbn_recovery']
    (group,) = kept['channels']
    short = torch.zeros(3, dtype=torch.int32)
    others = [dict(layers=['x']), group | dict(proof=short), group | dict(kept=short)]
    for state in (*(kept | dict(channels=[other]) for other in others), {}, 7):
        content['psbn_recovery'] = state
        torch.save(content, path)
        time.sleep(1)
        assert trained(tmp_path, resume=True, epochs=2).iter == 24
        (tmp_path / 'last_checkpoint').write_text(str(path))
    assert texts(tmp_path).count('what the checkpoint has of it is not taken over') == 5


def test_average_and_accumulation(tmp_path):
    optim_wrapper = dict(type='OptimWrapper', accumulative_counts=2) | MOMENTUM
    average = dict(type='EMAHook', momentum=0.5)
    runner = trained(tmp_path, [*HOOKS_ON, average], epochs=12, optim_wrapper=optim_wrapper)
    assert (runner.model.stem[1].bias > 0)[KILLED['stem.1']].all()
    assert runner.iter == 144 and 'off from iteration' not in texts(tmp_path)


def test_a_model_of_plain_bn_is_refused_and_told_why(tmp_path):
    with pytest.raises(RuntimeError, match='stays closed all the way to gamma = beta = 0'):
        run(tmp_path, Classifier(nn.BatchNorm2d), custom_hooks=HOOKS_ON)


def test_in_a_compiled_model_nothing_is_touched_and_the_log_says_so(tmp_path):
    cfg = dict(compile=dict(backend='eager'))
    runner = trained(tmp_path, HOOKS_ON[1:], epochs=1, cfg=cfg)
    assert runner.iter == 12 and (runner.model.stem[1].bias[KILLED['stem.1']] == 0.1 - 1).all()
    assert 'RecoveryHook: no filter is recovered' in texts(tmp_path)
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def test_frozen_layers_are_left_alone(tmp_path):
    model = Classifier(PostShiftedBatchNorm2d, frozen_head=True)
    start = model.head[1].bias.detach().clone()
    run(tmp_path, model, custom_hooks=HOOKS_ON, epochs=6)
    assert torch.equal(model.head[1].bias, start) and (model.stem[1].bias > 0)[[0, 3, 4]].all()


@pytest.mark.parametrize('setting', [dict(steps=0), dict(steps=2.5), dict(window=-1)])
def test_settings_out_of_range_are_refused(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=f'RecoveryHook: {name} must be .* got {value}'):
        HOOKS.build(dict(type='RecoveryHook', **setting))


def test_a_fault_is_one_warning_and_the_training_goes_on(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('no such device')

    monkeypatch.setattr(recovery._Group, 'judge', fail)
    runner = trained(tmp_path)
    assert runner.iter == 24
    assert texts(tmp_path).count('RecoveryHook: off from iteration 2 on') == 1
    assert 'no such device' in texts(tmp_path)
    assert [r['iter'] for r in records_of(runner).reports] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize('steps', [6, 30])
def test_a_checkpoint_has_what_was_opened_and_what_was_restored(tmp_path, monkeypatch, steps):
    hooks = [
        dict(type='CollapseHook', interval=8, window=4),  # epochs, and their checkpoints, have 12
        dict(type='RecoveryHook', steps=steps, window=3),
    ]
    default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    settings = dict(epochs=2, lost=True, default_hooks=default_hooks)
    whole = trained(tmp_path / 'whole', hooks, **settings)
    restored = []
    monkeypatch.setattr(recovery, 'restore', lambda *args: restored.append(args))
    load = dict(load_from=str(tmp_path / 'whole/epoch_1.pth'), resume=True)
    resumed = trained(tmp_path / 'on', hooks, **settings, **load)
    found, wanted = (
        [channels_of(records, report, 'recovered') for report in records.reports]
        for records in map(records_of, (resumed, whole))
    )
    # Opened after the report of iteration 8 and before the checkpoint, or not at all.
    assert found == wanted == [{}, KILLED if steps == 6 else {}, {}]
    assert not restored  # they were in the first epoch


class Tested(Classifier):
    """Can be tested, too."""

    def forward(self, images, labels, mode='tensor'):
        return [0] if mode == 'predict' else super().forward(images, labels, mode)


class Count(BaseMetric):
    """Of the batches."""

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'batches': len(results)}


def test_a_model_of_bn_is_tested_though_its_config_has_the_hook(tmp_path):
    """In a training it is refused."""
    loader = dict(
        batch_size=4,
        dataset=Images(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=collate,
    )
    runner = Runner(
        model=Tested(),
        work_dir=str(tmp_path),
        test_dataloader=loader,
        test_cfg=dict(),
        test_evaluator=[Count()],
        custom_hooks=HOOKS_ON,
        experiment_name='tested',
    )
    assert runner.test() == {'batches': 12}
