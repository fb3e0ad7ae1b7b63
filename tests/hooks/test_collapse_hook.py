"""The hook in a real Runner, judged by what a user reads: logs, records, warnings."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from small_run import KILLED, Classifier, channels_of, records_of, run, texts
from torch import nn

from psbn_mmdet.checkpoints import read_content, read_weights
from psbn_mmdet.collapse import census_of_state_dict
from psbn_mmdet.hooks import CollapseHook, checks
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.records import find_snapshots, read_snapshot


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
    assert rows['stage'] == [
        *('filters', 'frozen', 'unstarted', 'vanished', 'dead', 'trapped', 'broken', 'collapsed'),
        *('new', 'revived'),
    ]
    assert rows['stem'] == ['8', '0', '0', '0', '3', '3', '0', '3', '0', '0']
    assert rows['head'] == ['8', '8', '0', '0', '1', '-', '0', '1', '0', '0']
    assert rows['all'] == ['16', '8', '0', '0', '4', '3', '0', '4', '0', '0']


def test_the_table_adds_up_what_is_new_and_revived_in_its_epoch(tmp_path):
    runner = run(tmp_path, Classifier(PostShiftedBatchNorm2d), lr=0.1, weight_decay=0.5, epochs=8)
    rows = re.findall(r'all\W+(\d+.*\d)', texts(tmp_path).replace('│', ' '))
    found = [[int(cell) for cell in row.split()[-2:]] for row in rows]
    reports = records_of(runner).reports
    assert found == [
        [
            sum(report['total'][kind] for report in reports if report['epoch'] == epoch)
            for kind in ('new', 'revived')
        ]
        for epoch in range(1, 9)
    ]
    assert sum(new for new, _ in found) > 0 and sum(revived for _, revived in found) > 0


def test_an_epoch_without_a_report_has_a_table_too(tmp_path):
    run(tmp_path, Classifier(), epochs=1, hook=dict(interval=100, window=100))
    table = texts(tmp_path)
    table = table[table.index('Collapsed filters at iteration 12') :]
    assert re.search(r'all\W+16\W+0\W+0\W+0\W+4\W+-\W+0\W+4', table)


def test_a_window_without_a_step_is_not_observed_rather_than_0(tmp_path):
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=6)
    runner = run(tmp_path, Classifier(), epochs=1, optim_wrapper=optim_wrapper)
    records = records_of(runner)
    assert [r['steps'] for r in records.reports] == [0, 1, 1]
    assert [r['total']['trapped'] for r in records.reports] == [None, 4, 4]
    lines = [x for x in texts(tmp_path).splitlines() if 'Epoch(train)' in x]
    assert ['collapse/trapped' in line for line in lines] == [False, True, True]
    assert texts(tmp_path).count('no optimizer step since the previous report') == 1
    assert all(r['total']['new'] == r['total']['revived'] == 0 for r in records.reports)


class Sleeper(Classifier):
    """The gradient of one filter of the stem is cut but in every sixth iteration."""

    calls = 0

    def __init__(self):
        super().__init__()
        for param in self.stem[1].parameters():
            param.register_hook(
                lambda grad: grad * (torch.arange(8) != 1).float() ** (self.calls % 6 != 1)
            )

    def forward(self, images, labels, mode='tensor'):
        self.calls += 1
        return super().forward(images, labels, mode)


@pytest.mark.parametrize(
    ('interval', 'window', 'trapped'),
    [  # gradients come in iterations 1, 7, 13 and 19
        (4, 1, [True] * 6),
        (4, 4, [False, False, True] * 2),
        (4, 6, [None] + [False] * 5),
        (12, None, [None, None]),  # 50 of them are needed
    ],
)
def test_the_window_is_what_no_gradient_may_have_come_in(tmp_path, interval, window, trapped):
    records = records_of(run(tmp_path, Sleeper(), hook=dict(interval=interval, window=window)))
    for report, wanted in zip(records.reports, trapped):
        found = 1 in channels_of(records, report, 'trapped').get('stem.1', [])
        assert (None if report['total']['trapped'] is None else found) == wanted
    assert len(records.reports) == len(trapped)
    full = f'counted from iteration {records.header["window"]} on'
    assert (full in texts(tmp_path)) == (trapped[0] is None)


def test_several_optimizers(tmp_path):
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


def test_the_learning_rate_of_the_first_parameter_group_is_recorded(tmp_path):
    model = Classifier()
    groups = [dict(params=model.stem.parameters(), lr=0.5), dict(params=model.head.parameters())]
    wrapper = OptimWrapper(torch.optim.SGD(groups, lr=0.01))
    records = records_of(run(tmp_path, model, epochs=1, optim_wrapper=wrapper))
    assert records.reports[0]['lr']['lr'] == 0.5


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
        ('scalars', ['dying']),
    ],
)
def test_arguments_out_of_range_are_refused(argument, value):
    bad = value[0] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=re.escape(repr(bad))):
        CollapseHook(**{argument: value})


# What has begun, and what is lost


class FromScratch(Classifier):
    """As MMDetection's ResNets start: the last norm's gammas are 0. One filter never begins."""

    def __init__(self):
        super().__init__(killed={})
        nn.init.zeros_(self.head[1].weight)
        self.head[2] = nn.Identity()
        for param in self.head[1].parameters():
            param.register_hook(lambda grad: grad * (torch.arange(8) != 5))


def test_a_run_from_scratch_starts_with_nothing_collapsed(tmp_path):
    runner = run(tmp_path, FromScratch(), hook=dict(interval=1, window=1), lr=1e-5, epochs=2)
    records = records_of(runner)
    assert records.reports[0]['total']['unstarted'] == 16  # no gradient came through the zeros yet
    for report in records.reports:
        assert report['total']['collapsed'] == report['total']['vanished'] == 0
    assert channels_of(records, report, 'unstarted') == {'head.1': list(range(8))}
    assert 0 < runner.model.head[1].weight.detach().abs().max() < 1e-2


def test_the_run_s_checkpoints_tell_which_filters_have_not_begun(tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=2))
    run(tmp_path, FromScratch(), lr=1e-5, epochs=2, default_hooks=hooks)
    found = read_weights(tmp_path / 'epoch_2.pth')
    assert {name: mask.sum() for name, mask in found.unstarted.items()} == {
        'stem.1': 0,
        'head.1': 8,
    }
    told = census_of_state_dict(found.state_dict, unstarted=found.unstarted)
    assert (told.count('unstarted'), told.count('vanished')) == (8, 0)
    assert census_of_state_dict(found.state_dict).count('vanished') == 8
    content = read_content(tmp_path / 'epoch_2.pth')
    for lie in ([], {'head.1': 'no', 'stem.1': 7}, {'head.1': '1--2', 'stem.1': '3-' + '9' * 5000}):
        content['message_hub']['runtime_info']['collapse/unstarted'] = lie
        torch.save(content, tmp_path / 'other.pth')
        masks = read_weights(tmp_path / 'other.pth').unstarted
        assert masks.keys() <= {'stem.1', 'head.1'} and all(m.shape == (8,) for m in masks.values())


def test_a_filter_begins_with_a_gradient_and_a_gamma_well_above_tau(tmp_path):
    model = FromScratch()
    records = records_of(run(tmp_path, model, hook=dict(tau=1e-5), lr=0.5))
    for report in records.reports:
        assert channels_of(records, report, 'unstarted') == {'head.1': [5]}
        assert report['total']['collapsed'] == 0
    assert model.head[1].weight[5] == 0


def test_a_gamma_of_exactly_ten_times_tau_has_not_begun(tmp_path):
    model = Classifier(killed={})
    model.head[1].weight.data.fill_(0.5)
    records = records_of(run(tmp_path, model, hook=dict(tau=0.05), lr=0.0, epochs=1))
    for report in records.reports:
        assert channels_of(records, report, 'unstarted') == {'head.1': list(range(8))}
        assert report['total']['collapsed'] == 0


class Crossing(FromScratch):
    """The head's gammas start at 0 and cross it again and again, as in a healthy network."""

    def train_step(self, data, optim_wrapper):
        losses = super().train_step(data, optim_wrapper)
        self.steps = getattr(self, 'steps', 0) + 1
        with torch.no_grad():
            self.head[1].weight.copy_(0.05 * torch.sin(self.steps + torch.arange(8.0) * 0.11))
        return losses


def test_gammas_that_cross_zero_have_not_vanished(tmp_path):
    runner = run(tmp_path, Crossing(), hook=dict(interval=1, window=6, tau=0.01), epochs=4)
    reports = records_of(runner).reports
    assert {report['total']['vanished'] for report in reports} == {0}
    assert {report['total']['unstarted'] for report in reports[1:]} == {8}  # none beyond 10 tau
    runner = run(tmp_path / 'begun', Crossing(), hook=dict(interval=1, window=6), epochs=4)
    reports = records_of(runner).reports
    assert {report['total']['vanished'] for report in reports} == {0}
    assert reports[-1]['total']['unstarted'] == 1  # no gradient reaches it
    gammas = runner.model.head[1].weight.detach().abs()
    assert (gammas <= 1e-3).any() or gammas.min() < 0.05


class Resting(Classifier):
    """From the fifth step on a gamma is small, and moves no more."""

    def train_step(self, data, optim_wrapper):
        losses = super().train_step(data, optim_wrapper)
        self.steps = getattr(self, 'steps', 0) + 1
        if self.steps >= 5:
            with torch.no_grad():
                self.stem[1].weight[2] = 5e-4
        return losses


def test_a_gamma_that_came_to_rest_has_vanished(tmp_path):
    model = Resting(killed={})
    model.head[1].weight.data[1] = 1e-4  # loaded so, which need not be waited for
    runner = run(tmp_path, model, hook=dict(interval=1, window=6), lr=1e-6)
    found = records_of(runner)
    vanished = {r['iter']: channels_of(found, r, 'vanished') for r in found.reports}
    assert vanished[1] == vanished[16] == {'head.1': [1]}
    assert vanished[17] == vanished[24] == {'stem.1': [2], 'head.1': [1]}


class Folded(Classifier):
    """The stem's statistics stand in its gamma and bias, and stay as they are."""

    def train(self, mode=True):
        super().train(mode)
        self.stem[1].eval()
        return self


def test_nothing_is_told_of_statistics_that_were_folded(tmp_path):
    model = Folded(killed={'stem.1': [3]})
    model.stem[1].weight.data = torch.linspace(1e-4, 0.5, 8)
    runner = run(tmp_path, model)
    for report in records_of(runner).reports:
        assert report['layers']['dead'][0] is report['layers']['vanished'][0] is None
        assert report['layers']['dead'][1] == 0
        assert report['total']['revived'] == 0
    log = texts(tmp_path)
    assert log.count('vanished and dead filters are not counted in 1 layers') == 1
    assert 'so nothing follows from these: stem.1.' in log
    assert '│ stem  │       8 │      0 │         0 │        - │    - │' in log


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
def test_at_the_end_it_is_told_what_can_be_cut(tmp_path, norm):
    run(tmp_path, Classifier(norm), epochs=1)
    told = 'CollapseHook: 4 filters of BN are closed: they output 0 and can be cut out'
    assert (told in texts(tmp_path)) == (norm is nn.BatchNorm2d)


def test_a_run_shorter_than_an_interval_has_one_report_at_its_end(tmp_path):
    runner = run(tmp_path, Classifier(), hook=dict(interval=50), epochs=1)
    (report,) = records_of(runner).reports
    assert (report['iter'], report['epoch'], report['total']['dead']) == (12, 1, 4)


def test_the_table_is_ascii_where_the_log_cannot_be_more(tmp_path, monkeypatch):
    monkeypatch.setattr('locale.getpreferredencoding', lambda do_setlocale=True: 'cp1252')
    runner = run(tmp_path, Classifier(), epochs=1)
    assert runner.iter == 12 and '| stem  |       8 |' in texts(tmp_path)


def test_what_the_first_step_kills_is_new(tmp_path):
    class Fragile(Classifier):
        def train_step(self, data, optim_wrapper):
            losses = super().train_step(data, optim_wrapper)
            with torch.no_grad():
                self.stem[1].weight[2], self.stem[1].bias[2] = 0.01, -1.0
            return losses

    records = records_of(run(tmp_path, Fragile(killed={})))
    assert channels_of(records, records.reports[0], 'new') == {'stem.1': [2]}
    assert channels_of(records, records.reports[0], 'dead') == {'stem.1': [2]}


def test_what_is_known_to_be_dead_only_later_is_not_new(tmp_path):
    class Late(Classifier):
        """Its head runs from the third report on."""

        calls = 0

        def forward(self, images, labels, mode='tensor'):
            self.calls += 1
            if self.calls > 8:
                return super().forward(images, labels, mode)
            logits = self.linear(self.stem(torch.stack(images)).mean((2, 3)))
            return dict(loss=nn.functional.cross_entropy(logits, torch.as_tensor(labels)))

    records = records_of(run(tmp_path, Late()))
    known = [report['layers']['dead'][1] for report in records.reports]
    assert known == [None, None, 1, 1, 1, 1]
    assert all(r['total']['new'] == r['total']['revived'] == 0 for r in records.reports)


def test_a_layer_that_is_not_trained_does_not_begin(tmp_path):
    records = records_of(run(tmp_path, Classifier(killed={}, frozen_head=True), epochs=1))
    for report in records.reports:
        assert channels_of(records, report, 'unstarted') == {'head.1': list(range(8))}


@pytest.mark.parametrize('why', ['no optimizer', 'shared'])
def test_layers_that_cannot_be_watched_are_named(tmp_path, why):
    model = Classifier()
    if why == 'shared':
        model.stem[1].weight = model.head[1].weight
        model.stem[1].bias = model.head[1].bias
        params = model.parameters()
    else:
        params = [*model.head.parameters(), *model.linear.parameters()]
    wrapper = OptimWrapper(torch.optim.SGD(params, lr=0.01))
    records = records_of(run(tmp_path, model, epochs=1, optim_wrapper=wrapper))
    assert [report['layers']['trapped'][0] for report in records.reports] == [None] * 3
    assert None not in [report['layers']['trapped'][1] for report in records.reports]
    (warning,) = [
        x for x in texts(tmp_path).splitlines() if 'trapped filters are not counted in' in x
    ]
    assert warning.endswith(': stem.1.')


def test_of_layers_in_no_optimizer_it_is_not_said_that_there_was_no_step(tmp_path):
    model = Classifier()
    wrapper = OptimWrapper(torch.optim.SGD(model.linear.parameters(), lr=0.01))
    run(tmp_path, model, epochs=1, optim_wrapper=wrapper)
    assert 'trapped filters are not counted in 2 layers' in texts(tmp_path)
    assert 'no optimizer step' not in texts(tmp_path)


@pytest.mark.parametrize('optimized', ['all', 'linear'])
def test_no_step_is_missed_where_no_layer_is_trained(tmp_path, optimized):
    model = Classifier()
    model.stem.requires_grad_(False)
    model.head.requires_grad_(False)
    params = (model if optimized == 'all' else model.linear).parameters()
    wrapper = OptimWrapper(torch.optim.SGD(params, lr=0.01))
    records = records_of(run(tmp_path, model, epochs=1, optim_wrapper=wrapper))
    assert [report['steps'] for report in records.reports] == [0, 0, 0]
    assert [report['total']['trapped'] for report in records.reports] == [None] * 3
    assert 'no optimizer step since' not in texts(tmp_path)


def test_vanished_filters_of_a_checkpoint_are_counted_from_the_start(tmp_path):
    model = Classifier(killed={})
    nn.init.normal_(model.head[1].weight)
    model.head[1].weight.data[:3] = 0
    torch.save(model.state_dict(), tmp_path / 'trained.pth')
    runner = run(
        tmp_path / 'run', Classifier(killed={}), lr=1e-6, load_from=str(tmp_path / 'trained.pth')
    )
    for report in records_of(runner).reports:
        assert channels_of(records_of(runner), report, 'vanished') == {'head.1': [0, 1, 2]}
        assert report['total']['new'] == 0
    assert 'unstarted' not in texts(tmp_path / 'run').split('Collapsed filters')[0]


def test_each_kind_alone_is_told_from_the_others(tmp_path):
    class Each(Classifier):
        def __init__(self):
            super().__init__(killed={})
            norm = self.stem[1]
            nn.init.normal_(norm.weight, 1, 0.1)
            norm.weight.data[1], norm.bias.data[1] = 0.5, -1.1  # dead: opens for xhat > 2.2
            norm.weight.data[2], norm.bias.data[2] = 1e-4, 0.5  # vanished: its rectifier is open
            for param in norm.parameters():  # trapped
                param.register_hook(lambda grad: grad * (torch.arange(8) != 6))

        def train_step(self, data, optim_wrapper):
            self.head[1].weight.data.nan_to_num_(1)  # else all is NaN soon
            losses = super().train_step(data, optim_wrapper)
            self.head[1].weight.data[3] = math.nan
            return losses

    records = records_of(run(tmp_path, Each(), lr=1e-6, hook=dict(interval=12, window=12, k=2)))
    assert len(records.reports) == 2
    for report in records.reports:
        assert channels_of(records, report, 'vanished') == {'stem.1': [2]}
        assert channels_of(records, report, 'dead') == {'stem.1': [1]}
        assert channels_of(records, report, 'trapped') == {'stem.1': [6]}
        assert channels_of(records, report, 'broken') == {'head.1': [3]}
        assert channels_of(records, report, 'collapsed') == {'stem.1': [1, 2, 6], 'head.1': [3]}
    new = [channels_of(records, report, 'new') for report in records.reports]
    assert new == [{'stem.1': [6], 'head.1': [3]}, {}]  # dead and vanished were so at the start


@pytest.mark.parametrize('tensorboard', [False, True])
def test_what_is_not_finite_is_counted_named_and_warned_of_once(tmp_path, tensorboard):
    broken = list(range(8)) if tensorboard else [1, 3, 4]

    class Breaking(Classifier):
        calls = 0

        def train_step(self, data, optim_wrapper):
            self.head[1].weight.data.nan_to_num_(1)  # else all is NaN soon
            losses = super().train_step(data, optim_wrapper)
            self.calls += 1
            if self.calls % 4 == 0:
                self.head[1].weight.data[broken] = math.nan
            return losses

    kwargs = {}
    if tensorboard:
        pytest.importorskip('tensorboard')
        kwargs['visualizer'] = dict(
            type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')]
        )
    runner = run(tmp_path, Breaking(killed={}), **kwargs)
    assert runner.iter == 24
    records = records_of(runner)
    for report in records.reports:
        assert channels_of(records, report, 'broken') == {'head.1': broken}
        assert set(broken) <= set(channels_of(records, report, 'collapsed')['head.1'])
    line = next(x for x in texts(tmp_path).splitlines() if 'Epoch(train)' in x)
    assert f'collapse/broken: {len(broken)}' in line
    (warning,) = [x for x in texts(tmp_path).splitlines() if 'not a finite number' in x]
    assert 'at iteration 4' in warning and f'{len(broken)} in head.1' in warning
    assert 'off from iteration' not in texts(tmp_path)


def test_a_layer_that_is_frozen_during_the_run_has_nothing_revived(tmp_path):
    class Freezing(Classifier):
        def __init__(self):
            super().__init__(killed={})
            nn.init.normal_(self.stem[1].weight, 1, 0.1)
            for param in self.stem[1].parameters():
                param.register_hook(lambda grad: grad * (torch.arange(8) != 6))
            self.calls = 0

        def train_step(self, data, optim_wrapper):
            self.calls += 1
            if self.calls in (9, 17):
                self.stem[1].requires_grad_(self.calls == 17)
            return super().train_step(data, optim_wrapper)

    records = records_of(run(tmp_path, Freezing()))
    assert [r['layers']['trapped'][0] for r in records.reports] == [1, 1, None, None, 1, 1]
    for report in records.reports:
        assert channels_of(records, report, 'collapsed') == {'stem.1': [6]}
        assert report['total']['revived'] == 0
    assert [r['total']['new'] for r in records.reports] == [1, 0, 0, 0, 0, 0]


def test_what_was_trapped_stays_so_in_layers_without_a_step(tmp_path):
    class Alternating(Classifier):
        """Its layers are trained in turns of 4 iterations."""

        calls = 0

        def train_step(self, data, optim_wrapper):
            losses = self(**data, mode='loss')
            optim_wrapper['all'].backward(losses['loss'])
            idle = self.head if self.calls // 4 % 2 else self.stem
            for param in idle.parameters():
                param.grad = None
            self.calls += 1
            optim_wrapper['all'].step()
            optim_wrapper['all'].zero_grad()
            return losses

    model = Alternating()
    wrapper = OptimWrapperDict(all=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.001)))
    records = records_of(run(tmp_path, model, optim_wrapper=wrapper, hook=dict(k=200)))
    assert [r['layers']['trapped'] for r in records.reports[:3]] == [
        [None, 1],
        [3, None],
        [None, 1],
    ]
    assert channels_of(records, records.reports[2], 'collapsed') == KILLED
    assert all(r['total']['revived'] == 0 for r in records.reports)


@pytest.mark.parametrize('positive', [(), (1, 6, 9, 14, 19)])
def test_a_head_with_few_positive_samples_is_healthy(tmp_path, positive):
    """In most steps its filters get no gradient, and in the others each second one."""

    class Detector(Classifier):
        calls = 0

        def __init__(self):
            super().__init__()
            self.boxes = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.boxes[1].bias.data[2] = -9  # closed

        def train_step(self, data, optim_wrapper):
            features = self.boxes(self.stem(torch.stack(data['images'])))
            chosen = torch.zeros(8)
            if self.calls in positive:
                chosen[positive.index(self.calls) % 2 :: 2] = 1
            losses = self(**data, mode='loss')
            losses['loss'] = losses['loss'] + (features * chosen[:, None, None]).mean()
            self.calls += 1
            optim_wrapper.update_params(losses['loss'])
            return losses

    records = records_of(run(tmp_path, Detector()))
    trapped = [
        channels_of(records, report, 'trapped').get('boxes.1', []) for report in records.reports
    ]
    known = [report['layers']['trapped'][2] is not None for report in records.reports]
    if positive:  # the window of 4 steps is full with the fourth
        assert known == [False, False, False, True, True, False]
        assert trapped[3] == trapped[4] == [2]
    else:
        assert not any(known)
    for report in records.reports:
        assert channels_of(records, report, 'collapsed') == {**KILLED, 'boxes.1': [2]}  # it is dead
    (warning,) = [
        x for x in texts(tmp_path).splitlines() if 'trapped filters are not counted in' in x
    ]
    assert 'not counted in 1 layers without any gradient' in warning and warning.endswith(
        ': boxes.1.'
    )


def test_a_count_that_is_no_longer_known_is_not_repeated_in_the_log(tmp_path):
    class Stopping(Classifier):
        calls = 0

        def train_step(self, data, optim_wrapper):
            self.calls += 1
            if self.calls <= 4:
                return super().train_step(data, optim_wrapper)
            return self(**data, mode='loss')

    run(tmp_path, Stopping(), epochs=1)
    lines = [x for x in texts(tmp_path).splitlines() if 'Epoch(train)' in x]
    assert ['collapse/trapped' in line for line in lines] == [True, False, False]
    assert ['collapse/dead' in line for line in lines] == [True, True, True]


# Snapshots


def test_gamma_and_bias_are_kept_at_the_start_after_each_epoch_and_at_the_end(tmp_path):
    model = Classifier(PostShiftedBatchNorm2d)
    runner = run(tmp_path, model, epochs=2, weight_decay=0.1)
    found = find_snapshots(runner.log_dir)
    assert list(found) == [0, 12, 24]
    gamma, bias = read_snapshot(found[0], 16)
    killed = [0, 3, 4, 8 + 7]  # the head's channels follow the stem's
    assert gamma[killed] == pytest.approx(0.01, abs=1e-5)
    assert bias[killed] == pytest.approx(-0.9, abs=1e-3)  # beta -1, shift 0.1
    for values, what in zip(read_snapshot(found[24], 16), ('weight', 'bias')):
        norms = torch.cat([getattr(model.stem[1], what), getattr(model.head[1], what)])
        assert values == pytest.approx(norms.detach().numpy(), rel=1e-3)


def test_a_loop_without_epochs_keeps_start_and_end(tmp_path):
    cfg = dict(by_epoch=False, max_iters=10)
    runner = run(tmp_path, Classifier(), train_cfg=cfg)
    assert list(find_snapshots(runner.log_dir)) == [0, 10]


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
        (
            dict(
                optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),
                paramwise_cfg=dict(bias_decay_mult=0.0),
            ),
            'paramwise_cfg.bias_decay_mult=0',
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
                paramwise_cfg=dict(bias_lr_mult=2.0),
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


@pytest.mark.parametrize('hook', ['CollapseHook', 'RecoveryHook'])
def test_ranks_with_other_layers_are_refused(tmp_path, monkeypatch, hook):
    own = [f'{name} (PostShiftedBatchNorm2d, 8 channels)' for name in ('stem.1', 'head.1')]
    for other, example in ((own[:1], own[1]), ([*own, 'x'], 'x'), (own[::-1], own[0])):
        monkeypatch.setattr(checks, 'all_gather_object', lambda mine: [mine, other])  # noqa: B023
        sentence = f'2 and rank 1 {len(other)}, such as {example}: start all of them with the same'
        with pytest.raises(RuntimeError, match=re.escape(sentence)):
            run(tmp_path, Classifier(PostShiftedBatchNorm2d), custom_hooks=[dict(type=hook)])
    assert 'loss: ' not in texts(tmp_path)


def test_an_optimizer_that_cannot_be_watched_is_refused(tmp_path):
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


def test_a_compiled_model_is_counted_like_any(tmp_path):
    cfg = dict(compile=dict(backend='aot_eager'))
    records = records_of(run(tmp_path, Classifier(), epochs=1, cfg=cfg))
    assert channels_of(records, records.reports[-1], 'trapped') == KILLED
    if hasattr(torch.compiler, 'set_stance'):
        assert [layer['rectifier'] for layer in records.header['layers']] == ['relu', 'relu']
    else:  # before torch 2.6
        assert 'dead filters are not counted: this torch cannot run' in texts(tmp_path)


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
        (_, last) = events.Histograms(f'bias/{stage}')
        assert last.step == 24 and last.histogram_value.num == 8
        assert last.histogram_value.min == pytest.approx(-0.9, abs=0.01)  # beta -1, shift 0.1
        (_, last) = events.Histograms(f'gamma/{stage}')
        assert last.histogram_value.min == pytest.approx(0.01, abs=0.01)
    assert [point.value for point in events.Scalars('collapse/trapped')] == [4] * 6
