"""The hook in a real Runner, judged by what a user reads: logs, records, warnings."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from psbn_mmdet.collapse import find_snapshots, parse_ranges, read_records, read_snapshot
from psbn_mmdet.hooks import CollapseHook
from psbn_mmdet.layers import PostShiftedBatchNorm2d

KILLED = {'stem.1': [0, 3, 4], 'head.1': [7]}


class Images(Dataset):
    """48 random images with the class that their mean tells."""

    METAINFO = {}

    def __len__(self):
        return 48

    def __getitem__(self, index):
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return image, int(image.mean() > 0)


class Classifier(BaseModel):
    """Two blocks of convolution, norm and ReLU, and a linear layer."""

    def __init__(self, norm=nn.BatchNorm2d, killed=KILLED, frozen_head=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), norm(8), nn.ReLU())
        self.linear = nn.Linear(8, 2)
        for name, channels in killed.items():
            layer = self.get_submodule(name)
            with torch.no_grad():
                layer.weight[channels] = 0.01
                shift = layer.beta if isinstance(layer, PostShiftedBatchNorm2d) else layer.bias
                shift[channels] = -1.0
        if frozen_head:
            self.head.requires_grad_(False)

    def forward(self, images, labels, mode='tensor'):
        logits = self.linear(self.head(self.stem(torch.stack(images))).mean((2, 3)))
        labels = torch.as_tensor(labels)
        return dict(loss=nn.functional.cross_entropy(logits, labels))


def collate(batch):
    return dict(images=[image for image, _ in batch], labels=[label for _, label in batch])


def run(work_dir, model, *, hook=None, epochs=2, weight_decay=0.0, lr=0.01, **kwargs):
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=lr, weight_decay=weight_decay))
    settings = dict(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4,
            dataset=Images(),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=collate,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=optim_wrapper,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=4)),
        custom_hooks=[dict(type='CollapseHook', interval=4, **(hook or {}))],
        randomness=dict(seed=0),
        experiment_name=f'test_{np.random.randint(1 << 30)}',
    )
    settings.update(kwargs)
    runner = Runner(**settings)
    runner.train()
    return runner


def texts(work_dir) -> str:
    return '\n'.join(path.read_text() for path in sorted(Path(work_dir).glob('*/*.log')))


def records_of(runner):
    return read_records(Path(runner.log_dir) / 'collapse.jsonl')


def channels_of(records, report, kind) -> dict:
    return {
        records.header['layers'][int(index)]['name']: parse_ranges(ranges, 8).nonzero()[0].tolist()
        for index, ranges in report['channels'][kind].items()
    }


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
def test_counts_stand_in_the_text_log_and_the_json_log(tmp_path, norm):
    runner = run(tmp_path, Classifier(norm))
    line = next(x for x in texts(tmp_path).splitlines() if 'Epoch(train)' in x)
    assert re.search(
        r'collapse/collapsed: 4  collapse/vanished: 0  collapse/dead: 4  collapse/trapped: 4  '
        r'collapse/revived: 0$',
        line,
    ), line
    (log,) = Path(runner.log_dir).glob('vis_data/*_*.json')
    scalars = json.loads(log.read_text().splitlines()[0])
    assert scalars['collapse/trapped'] == scalars['collapse/collapsed'] == 4
    assert runner.message_hub.get_scalar('train/collapse/dead').current() == 4


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
def test_exactly_the_killed_filters_are_trapped(tmp_path, norm):
    records = records_of(run(tmp_path, Classifier(norm)))
    assert [report['iter'] for report in records.reports] == [4, 8, 12, 16, 20, 24]
    for report in records.reports:
        assert channels_of(records, report, 'trapped') == KILLED
        assert channels_of(records, report, 'dead') == KILLED
        assert report['total']['new'] == report['total']['revived'] == 0
        assert report['steps'] == 4
    assert records.reports[-1]['epoch'] == 2 and records.reports[-1]['lr'] == {'lr': 0.01}


def test_bn_stays_trapped_and_psbn_is_revived_when_theory_says_so(tmp_path):
    lr, weight_decay, shift, interval = 0.5, 0.1, 0.1, 4
    # When a filter opens its gamma has decayed by the same factor, to 0.001: the default tau would
    # call it vanished until gamma has grown again.
    settings = dict(lr=lr, weight_decay=weight_decay, epochs=5, hook=dict(tau=1e-4))
    bn = records_of(run(tmp_path / 'bn', Classifier(nn.BatchNorm2d), **settings))
    for report in bn.reports:
        assert channels_of(bn, report, 'trapped') == KILLED
        assert report['total']['revived'] == 0

    psbn = records_of(run(tmp_path / 'psbn', Classifier(PostShiftedBatchNorm2d), **settings))
    # Only decay acts on a closed filter: beta = -(1 - lr wd)^t, gamma = 0.01 (1 - lr wd)^t. It
    # opens where beta + shift + gamma * xhat > 0 for the largest xhat, which is between 0 and 5.
    earliest = math.log(shift / (1 - 0.01 * 5)) / math.log(1 - lr * weight_decay)
    latest = math.log(shift) / math.log(1 - lr * weight_decay)
    for name, channels in KILLED.items():
        for channel in channels:

            def first(kind, value):
                return next(
                    report['iter']
                    for report in psbn.reports
                    if (channel in channels_of(psbn, report, kind).get(name, [])) == value  # noqa: B023
                )

            assert earliest <= first('trapped', False) <= latest + interval
            assert earliest <= first('revived', True) <= latest + interval


def test_new_and_revived_follow_from_the_collapsed_channels(tmp_path):
    runner = run(tmp_path, Classifier(PostShiftedBatchNorm2d), lr=0.1, weight_decay=0.5, epochs=8)
    records = records_of(runner)
    before = {name: set(channels) for name, channels in KILLED.items()}  # dead at the start
    for report in records.reports:
        now = {k: set(v) for k, v in channels_of(records, report, 'collapsed').items()}
        new = sum(len(now[k] - before.get(k, set())) for k in now)
        revived = sum(len(before[k] - now.get(k, set())) for k in before)
        assert (report['total']['new'], report['total']['revived']) == (new, revived)
        union = channels_of(records, report, 'vanished')
        for kind in ('dead', 'trapped'):
            for name, channels in channels_of(records, report, kind).items():
                union[name] = sorted({*union.get(name, []), *channels})
        assert union == {k: sorted(v) for k, v in now.items()}
        before = now


def test_a_table_by_stage_is_logged_at_each_epochs_end(tmp_path):
    run(tmp_path, Classifier(frozen_head=True), epochs=2)
    text = texts(tmp_path)
    assert text.count('Collapsed filters at iteration') == 2
    table = text[text.index('Collapsed filters at iteration 24') :]
    rows = {
        cells[0]: cells[1:]
        for cells in (re.split(r'\s*[│┃|]\s*', line.strip('│┃| \n')) for line in table.split('\n'))
        if len(cells) > 5
    }
    assert rows['stage'][:6] == ['filters', 'frozen', 'vanished', 'dead', 'trapped', 'collapsed']
    assert rows['stem'][:6] == ['8', '0', '0', '3', '3', '3']
    assert rows['head'][:6] == ['8', '8', '0', '1', '-', '1']
    assert rows['all'][:6] == ['16', '8', '0', '4', '3', '4']


def test_an_epoch_without_a_report_has_a_table_too(tmp_path):
    run(tmp_path, Classifier(), epochs=1, custom_hooks=[dict(type='CollapseHook', interval=100)])
    table = texts(tmp_path)
    table = table[table.index('Collapsed filters at iteration 12') :]
    assert re.search(r'all\W+16\W+0\W+0\W+4\W+-\W+4', table)


def test_a_window_without_a_step_is_not_observed_rather_than_0(tmp_path):
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=6)
    runner = run(tmp_path, Classifier(), epochs=1, optim_wrapper=optim_wrapper)
    records = records_of(runner)
    assert [r['steps'] for r in records.reports] == [0, 1, 1]
    assert [r['total']['trapped'] for r in records.reports] == [None, 4, 4]
    lines = [x for x in texts(tmp_path).splitlines() if 'Epoch(train)' in x]
    assert ['collapse/trapped' in line for line in lines] == [False, True, True]
    assert texts(tmp_path).count('trapped filters not observed') == 1
    assert all(r['total']['new'] == r['total']['revived'] == 0 for r in records.reports)


def test_the_window_limits_the_steps_looked_at(tmp_path):
    records = records_of(run(tmp_path, Classifier(), epochs=1, hook=dict(window=1)))
    assert [r['steps'] for r in records.reports] == [1, 1, 1]
    assert channels_of(records, records.reports[-1], 'trapped') == KILLED


def test_several_optimisers(tmp_path):
    class TwoOptimizers(Classifier):
        def train_step(self, data, optim_wrapper):
            losses = self(**data, mode='loss')
            optim_wrapper['stem'].backward(losses['loss'])
            for wrapper in optim_wrapper.values():
                wrapper.step()
                wrapper.zero_grad()
            return losses

    model = TwoOptimizers()
    rest = [p for name, p in model.named_parameters() if not name.startswith('stem')]
    wrappers = OptimWrapperDict(
        stem=OptimWrapper(torch.optim.SGD(model.stem.parameters(), lr=0.01)),
        rest=OptimWrapper(torch.optim.AdamW(rest, lr=0.01)),
    )
    records = records_of(run(tmp_path, model, epochs=1, optim_wrapper=wrappers))
    assert channels_of(records, records.reports[0], 'trapped') == KILLED
    assert records.reports[0]['lr'] == {'stem.lr': 0.01, 'rest.lr': 0.01}


def test_scalars_and_stages_can_be_chosen(tmp_path):
    run(tmp_path, Classifier(), hook=dict(scalars=['new'], by_stage=True))
    line = next(x for x in texts(tmp_path).splitlines() if 'Epoch(train)' in x)
    assert line.endswith('collapse/new: 0  collapse/stem: 3  collapse/head: 1')


@pytest.mark.parametrize(
    ('argument', 'value'),
    [
        ('interval', 0),
        ('interval', 1.5),
        ('tau', -1.0),
        ('k', -2.0),
        ('window', 0),
        ('window', 51),
        ('scalars', ['dying']),
    ],
)
def test_arguments_out_of_range_are_refused(argument, value):
    bad = value[0] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=re.escape(repr(bad))):
        CollapseHook(**{argument: value})


# Snapshots


def test_gamma_and_shift_are_kept_at_the_start_after_each_epoch_and_at_the_end(tmp_path):
    model = Classifier(PostShiftedBatchNorm2d)
    runner = run(tmp_path, model, epochs=2, weight_decay=0.1)
    found = find_snapshots(runner.log_dir)
    assert list(found) == [0, 12, 24]
    gamma, shift = read_snapshot(found[0], 16)
    killed = [0, 3, 4, 8 + 7]  # the head's channels follow the stem's
    assert gamma[killed] == pytest.approx(0.01, abs=1e-5)
    assert shift[killed] == pytest.approx(-0.9, abs=1e-3)  # beta -1, shift 0.1
    for values, what in zip(read_snapshot(found[24], 16), ('weight', 'bias')):
        norms = torch.cat([getattr(model.stem[1], what), getattr(model.head[1], what)])
        assert values == pytest.approx(norms.detach().numpy(), rel=1e-3)


def test_a_loop_without_epochs_keeps_start_and_end(tmp_path):
    cfg = dict(by_epoch=False, max_iters=10)
    runner = run(tmp_path, Classifier(), train_cfg=cfg)
    assert list(find_snapshots(runner.log_dir)) == [0, 10]


# Resume


def resumable(tmp_path, epochs, **kwargs):
    time.sleep(1)  # log folders are named by the second
    default_hooks = dict(
        logger=dict(type='LoggerHook', interval=4),
        checkpoint=dict(type='CheckpointHook', interval=1),
    )
    return run(
        tmp_path,
        Classifier(PostShiftedBatchNorm2d),
        epochs=epochs,
        lr=0.1,
        weight_decay=0.5,
        default_hooks=default_hooks,
        **kwargs,
    )


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


def test_a_new_run_in_the_same_work_dir_starts_its_own_record(tmp_path):
    resumable(tmp_path, 1)
    second = resumable(tmp_path, 1)
    assert [r['iter'] for r in records_of(second).reports] == [4, 8, 12]
    assert len(list(tmp_path.glob('*/collapse.jsonl'))) == 2


def test_a_damaged_record_is_left_alone_and_said(tmp_path):
    first = resumable(tmp_path, 1)
    path = Path(first.log_dir) / 'collapse.jsonl'
    damaged = path.read_text().replace('"iter"', 'iter', 1)
    path.write_text(damaged)
    second = resumable(tmp_path, 2, resume=True)
    assert [r['iter'] for r in records_of(second).reports] == [16, 20, 24]
    assert path.read_text() == damaged
    assert 'line 2 is damaged' in texts(tmp_path)


# Warnings and refusals


@pytest.mark.parametrize(
    ('optim_wrapper', 'cause'),
    [
        (dict(optimizer=dict(type='SGD', lr=0.01)), 'optimizer.weight_decay=0'),
        (
            dict(
                optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
            'paramwise_cfg.norm_decay_mult=0',
        ),
        (
            dict(
                optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),
                paramwise_cfg=dict(flat_decay_mult=0.0),
            ),
            'paramwise_cfg.flat_decay_mult=0',
        ),
        (
            dict(
                optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),
                paramwise_cfg=dict(custom_keys={'stem': dict(decay_mult=0.0)}),
            ),
            "custom_keys['stem'].decay_mult=0",
        ),
    ],
)
def test_a_warning_names_the_setting_that_keeps_psbn_from_recovering(
    tmp_path, optim_wrapper, cause
):
    run(
        tmp_path,
        Classifier(PostShiftedBatchNorm2d),
        epochs=1,
        optim_wrapper=optim_wrapper,
        cfg=dict(optim_wrapper=optim_wrapper),
    )
    (line,) = [x for x in texts(tmp_path).splitlines() if 'Weight decay does not reach' in x]
    assert cause in line
    assert ('1 of 2' if 'stem' in cause else '2 of 2') in line


@pytest.mark.parametrize(
    ('norm', 'optim_wrapper'),
    [
        (nn.BatchNorm2d, dict(optimizer=dict(type='SGD', lr=0.01))),
        (
            PostShiftedBatchNorm2d,
            dict(
                optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),
                paramwise_cfg=dict(bias_decay_mult=0.0),
            ),
        ),
    ],
)
def test_no_warning_where_there_is_nothing_to_warn_of(tmp_path, norm, optim_wrapper):
    run(tmp_path, Classifier(norm), epochs=1, optim_wrapper=optim_wrapper)
    assert 'Weight decay does not reach' not in texts(tmp_path)


def test_a_model_without_bn_is_said_and_trains(tmp_path):
    model = Classifier(lambda channels: nn.GroupNorm(2, channels), killed={})
    runner = run(tmp_path, model, epochs=1)
    assert runner.iter == 12 and 'has no BN or psBN layer' in texts(tmp_path)


def test_psbn_weights_are_not_loaded_into_bn(tmp_path):
    torch.save(
        dict(state_dict=Classifier(PostShiftedBatchNorm2d).state_dict()), tmp_path / 'psbn.pth'
    )
    with pytest.raises(RuntimeError, match=r'psBN weights for stem\.1'):
        run(tmp_path / 'run', Classifier(), load_from=str(tmp_path / 'psbn.pth'))


def test_one_line_says_how_many_layers_were_read_as_bn(tmp_path):
    torch.save(Classifier().state_dict(), tmp_path / 'bn.pth')
    psbn = Classifier(PostShiftedBatchNorm2d)
    runner = run(tmp_path / 'run', psbn, epochs=1, load_from=str(tmp_path / 'bn.pth'))
    assert texts(tmp_path / 'run').count('2 of 2 layers were read as BN') == 1
    assert 'unexpected key' not in texts(tmp_path / 'run')
    assert 'missing keys' not in texts(tmp_path / 'run')
    checkpoint = str(tmp_path / 'run/epoch_1.pth')
    for name, resume in (('loaded', False), ('resumed', True)):
        psbn = Classifier(PostShiftedBatchNorm2d)
        run(tmp_path / name, psbn, load_from=checkpoint, resume=resume)
        assert 'read as BN' not in texts(tmp_path / name)
    assert runner.iter == 12


def test_efficient_conv_bn_eval_is_refused_with_psbn(tmp_path):
    cfg = dict(efficient_conv_bn_eval='[stem]')
    with pytest.raises(RuntimeError, match='remove efficient_conv_bn_eval'):
        run(tmp_path, Classifier(PostShiftedBatchNorm2d), cfg=cfg)


def test_fsdp_is_refused(tmp_path):
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('this torch has no fully_shard')
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh('cpu', (1,))
        model = fsdp.fully_shard(Classifier(), mesh=mesh)
        with pytest.raises(RuntimeError, match='FSDP hides the gradients'):
            run(tmp_path, model)
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimiser_that_cannot_be_watched_is_refused(tmp_path):
    class Foreign:
        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

    model = Classifier()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    wrapper.optimizer = Foreign(wrapper.optimizer)
    with pytest.raises(RuntimeError, match=r'Foreign is no torch\.optim\.Optimizer'):
        run(tmp_path, model, optim_wrapper=wrapper)


# Without an effect on the training


def test_the_hook_does_not_change_the_training(tmp_path):
    def trained(hooks, **kwargs):
        model = Classifier(PostShiftedBatchNorm2d)
        run(tmp_path / str(len(hooks)), model, custom_hooks=hooks, weight_decay=0.1, **kwargs)
        return model

    with_hook = trained([dict(type='CollapseHook', interval=4)])
    without = trained([])
    for (name, a), b in zip(with_hook.state_dict().items(), without.state_dict().values()):
        assert torch.equal(a, b), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in with_hook.modules())


@pytest.mark.skipif(not hasattr(torch.compiler, 'set_stance'), reason='needs torch >= 2.6')
def test_a_compiled_model_is_counted_like_any(tmp_path):
    cfg = dict(compile=dict(backend='aot_eager'))
    records = records_of(run(tmp_path, Classifier(), epochs=1, cfg=cfg))
    assert [layer['rectifier'] for layer in records.header['layers']] == ['relu', 'relu']
    assert channels_of(records, records.reports[-1], 'trapped') == KILLED


def test_tensorboard_has_curves_and_histograms_by_stage(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    visualizer = dict(type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')])
    runner = run(tmp_path, Classifier(PostShiftedBatchNorm2d), visualizer=visualizer)
    (path,) = Path(runner.log_dir).glob('vis_data/events.*')
    events = EventAccumulator(str(path), size_guidance=dict(histograms=0, scalars=0)).Reload()
    for stage, collapsed in (('stem', 3), ('head', 1)):
        points = events.Scalars(f'collapsed/{stage}')
        assert [(point.step, point.value) for point in points] == [(12, collapsed), (24, collapsed)]
        (_, last) = events.Histograms(f'shift/{stage}')
        assert last.step == 24 and last.histogram_value.num == 8
        assert last.histogram_value.min == pytest.approx(-0.9, abs=0.01)  # beta -1, shift 0.1
        (_, last) = events.Histograms(f'gamma/{stage}')
        assert last.histogram_value.min == pytest.approx(0.01, abs=0.01)
    assert [point.value for point in events.Scalars('collapse/trapped')] == [4] * 6
