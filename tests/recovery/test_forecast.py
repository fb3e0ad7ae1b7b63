"""The forecast against real trainings, and what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, ReduceOnPlateauLR
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from small_run import Classifier, channels_of, records_of, run, texts
from torch import nn

from psbn_mmdet.collapse import census_of_model, find_norms
from psbn_mmdet.commands.audit import main
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.recovery.forecast import make_forecast, read_schedule

ROOT = Path(__file__).resolve().parents[2]
# Filters of gamma = 0 at several depths: what the decay has to overcome.
DEPTHS = {0: 0.12, 1: 0.2, 2: 0.3, 4: 0.5, 5: 1.0}
SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.05)
ADAMW = dict(type='AdamW', lr=0.02, weight_decay=2.0)
OPTIMIZERS = {
    'momentum': SGD,
    'plain': dict(type='SGD', lr=0.3, weight_decay=0.1),
    'nesterov': SGD | dict(nesterov=True),
    'dampening': SGD | dict(dampening=0.5),
    'AdamW': ADAMW,
    'Adam': dict(type='Adam', lr=0.01, weight_decay=0.01),
    'RMSprop': dict(type='RMSprop', lr=0.003, weight_decay=0.01),
}
WARM_UP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=15)
SCHEDULES = {
    'constant': [],
    'step': [dict(type='MultiStepLR', milestones=[2, 3], gamma=0.3, by_epoch=True)],
    'cosine': [dict(type='CosineAnnealingLR', T_max=5, by_epoch=True, convert_to_iter_based=True)],
    'warm-up, step': [WARM_UP, dict(type='MultiStepLR', milestones=[3], by_epoch=True)],
    'momentum schedule': [
        WARM_UP,
        dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, begin=0, end=30),
    ],
}


@HOOKS.register_module(name='KeepForecast')
class KeepForecast(Hook):
    """Forecasts at the start, and keeps it."""

    def before_train(self, runner):
        norms = find_norms(runner.model)
        params = [param for norm in norms.values() for param in norm.parameters()]
        schedulers = runner.param_schedulers or []
        length = len(runner.train_dataloader)
        self.schedule = read_schedule(
            runner.optim_wrapper, schedulers, params, runner.max_iters - runner.iter, length
        )
        census = census_of_model(runner.model, rectifiers=dict.fromkeys(norms, 'relu'))
        self.forecast = make_forecast(census, norms, self.schedule, runner.iter, None)
        self.rates = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append(runner.optim_wrapper.get_lr()['lr'][0])


@OPTIM_WRAPPERS.register_module(name='NoForecast')
class ClosureWrapper(OptimWrapper):
    """For an optimizer that wants a closure."""

    def step(self, **kwargs):
        self.optimizer.step(lambda: 0.0)


def classifier():
    net = Classifier(PostShiftedBatchNorm2d, killed={})
    for norm in (net.stem[1], net.head[1]):
        with torch.no_grad():
            for channel, depth in DEPTHS.items():
                norm.weight[channel], norm.bias[channel] = 0.0, 0.1 - depth
    return net


def trained(work_dir, optimizer, schedule, every=1, paramwise=None, epochs=5):
    hooks = [dict(type='CollapseHook', interval=1, window=1), dict(type='KeepForecast')]
    wrapper = dict(optimizer=optimizer, accumulative_counts=every)
    return run(
        work_dir,
        classifier(),
        epochs=epochs,
        custom_hooks=hooks,
        param_scheduler=schedule or None,
        optim_wrapper=wrapper | (dict(paramwise_cfg=paramwise) if paramwise else {}),
    )


def opened_in(runner, layer):
    """Iterations after which planted filters are no longer closed, and the first not trapped."""
    records = records_of(runner)
    dead, trapped = {}, {}
    for report in records.reports:
        for kind, found in (('dead', dead), ('trapped', trapped)):
            closed = channels_of(records, report, kind).get(layer, [])
            for channel in DEPTHS:
                if channel not in closed:
                    found.setdefault(channel, report['iter'])
    return dead, trapped


@pytest.mark.parametrize(
    ('optimizer', 'schedule'),
    [
        (optimizer, schedule)
        for optimizer in OPTIMIZERS
        for schedule in SCHEDULES
        if schedule != 'momentum schedule' or 'momentum' in OPTIMIZERS[optimizer]
    ],
)
def test_filters_open_when_it_was_said(tmp_path, optimizer, schedule):
    runner = trained(tmp_path, OPTIMIZERS[optimizer], SCHEDULES[schedule])
    hook = next(hook for hook in runner.hooks if isinstance(hook, KeepForecast))
    assert np.allclose([step[0]['lr'] for step in hook.schedule.rates], hook.rates)
    (part,) = hook.forecast.parts
    predicted = dict(zip(DEPTHS, part.opened['weight decay'].tolist()))  # the stem's come first
    measured, gradient = opened_in(runner, 'stem.1')
    for channel in DEPTHS:
        expected = predicted[channel] if predicted[channel] >= 0 else None
        assert measured.get(channel) == expected, channel
        if expected is not None and expected < runner.max_iters:
            assert gradient[channel] in (expected, expected + 1)
    assert measured, 'some open in this training'
    bound = part.opens_above_b
    for channel, depth in DEPTHS.items():
        assert (0.1 - depth > bound) == (channel in measured)


def test_groups_accumulation_and_settings_of_their_own(tmp_path):
    paramwise = dict(custom_keys={'stem': dict(lr_mult=3.0), 'head.1.bias': dict(decay_mult=0.0)})
    runner = trained(tmp_path, SGD, SCHEDULES['cosine'], every=2, paramwise=paramwise, epochs=8)
    hook = next(hook for hook in runner.hooks if isinstance(hook, KeepForecast))
    of_layer = {part.layers[0]: part for part in hook.forecast.parts}
    assert of_layer.keys() == {'stem.1', 'head.1'}
    assert of_layer['head.1'].opened['weight decay'].tolist() == [-1] * len(DEPTHS)
    assert of_layer['head.1'].opens_above_b == 0
    measured, _ = opened_in(runner, 'stem.1')
    predicted = of_layer['stem.1'].opened['weight decay']
    assert [measured.get(channel, -1) for channel in DEPTHS] == predicted.tolist()
    assert len(measured) >= 3 and not opened_in(runner, 'head.1')[0]


def sentence_of(work_dir):
    lines = [line for line in texts(work_dir).splitlines() if 'CollapseHook: ' in line]
    return next(line for line in lines if 'closed' in line).partition('CollapseHook: ')[2]


def logged(work_dir, hooks=(), killed=None, **kwargs):
    killed = {'stem.1': [0, 3], 'head.1': [7]} if killed is None else killed
    hooks = [dict(type='CollapseHook', interval=4, window=4), *hooks]
    net = Classifier(PostShiftedBatchNorm2d, killed=killed)
    runner = run(work_dir, net, custom_hooks=hooks, **(dict(epochs=8) | kwargs))
    return runner, sentence_of(work_dir)


def test_the_log_says_how_many_open(tmp_path):
    runner, said = logged(tmp_path / 'plain', weight_decay=1e-3, lr=0.1)
    assert said.startswith(
        'of 3 closed filters, the deepest at b = -0.9, weight decay opens 0 by iteration 96 '
        '(those with b > -0.0'
    )
    assert "dict(type='RecoveryHook') in custom_hooks opens all" in said
    assert records_of(runner).reports[-1]['total']['dead'] == 3
    hook = dict(type='RecoveryHook', steps=30)
    runner, said = logged(tmp_path / 'hook', [hook], weight_decay=1e-3, lr=0.1)
    assert (
        'of 3 closed filters RecoveryHook(steps=30) opens 3 by iteration 96, the last at ' in said
    )
    last = int(said.rstrip('.').rpartition(' ')[2])
    reports = records_of(runner).reports
    assert next(r['iter'] for r in reports if r['total']['dead'] == 0) <= last + 4


def test_other_cases_of_the_sentence(tmp_path):
    _, said = logged(tmp_path / 'none', killed={}, weight_decay=1e-3, epochs=1)
    assert said.startswith('no filter before a ReLU is closed at the start.')
    hook = dict(type='RecoveryHook', steps=30)
    _, said = logged(tmp_path / 'hook', [hook], killed={}, weight_decay=1e-3, epochs=1)
    assert said.endswith(
        'RecoveryHook(steps=30) opens one that closes later at b = -1 in 40 steps.'
    )
    _, said = logged(tmp_path / 'no decay', epochs=8)
    assert 'weight decay opens 0 by iteration 96.' in said
    lbfgs = dict(optimizer=dict(type='LBFGS'), type='NoForecast')
    run(tmp_path / 'closure', Classifier(PostShiftedBatchNorm2d), epochs=1, optim_wrapper=lbfgs)
    assert 'LBFGS cannot be stepped without the network' in texts(tmp_path / 'closure')
    run(tmp_path / 'BN', Classifier(nn.BatchNorm2d), epochs=1)
    assert 'closed filters' not in texts(tmp_path / 'BN')


@pytest.mark.parametrize('act', [nn.SiLU, nn.GELU, nn.LeakyReLU])
def test_where_no_rectifier_closes_a_filter_the_log_says_so_and_counts_what_has_a_meaning(
    tmp_path, act
):
    net = Classifier(PostShiftedBatchNorm2d)
    net.stem[2], net.head[2] = act(), act()
    hooks = [dict(type='CollapseHook', interval=4, window=4), dict(type='RecoveryHook', steps=30)]
    runner = run(tmp_path, net, custom_hooks=hooks, epochs=1)
    assert sentence_of(tmp_path).startswith('no psBN layer stands right before a ReLU.')
    total = records_of(runner).reports[-1]['total']
    assert total['trapped'] == 0 and not total['recovered']
    if act is not nn.LeakyReLU:  # where dead filters are leaky
        assert total['dead'] is None
        assert 'collapse/dead' not in texts(tmp_path)


def test_a_resumed_run_forecasts_what_is_left(tmp_path):
    whole = trained(tmp_path / 'whole', SGD, SCHEDULES['cosine'], epochs=5)
    trained(tmp_path / 'parts', SGD, [SCHEDULES['cosine'][0] | dict(end=5)], epochs=2)
    hooks = [dict(type='CollapseHook', interval=1, window=1), dict(type='KeepForecast')]
    runner = run(
        tmp_path / 'parts',
        classifier(),
        epochs=5,
        custom_hooks=hooks,
        param_scheduler=SCHEDULES['cosine'],
        optim_wrapper=dict(optimizer=SGD),
        resume=True,
    )
    hook = next(hook for hook in runner.hooks if isinstance(hook, KeepForecast))
    assert hook.forecast.begin == 24 and hook.forecast.iterations == 36
    first = next(hook for hook in whole.hooks if isinstance(hook, KeepForecast))
    assert np.allclose([step[0]['lr'] for step in hook.schedule.rates], first.rates[24:])


def test_a_frozen_parameter_is_left_out_though_the_optimizer_has_it():
    trained, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.SGD([trained, frozen], lr=0.1, weight_decay=0.1)
    found = read_schedule(OptimWrapper(optimizer), [], [trained, frozen], 4, None)
    assert list(found.kinds) == [trained]


def forecast_of(iterations, recovery=None, schedulers=(), beta=-0.2, **settings):
    """Of one filter with gamma = 0."""
    net = nn.Sequential(PostShiftedBatchNorm2d(1))
    with torch.no_grad():
        net[0].weight[:], net[0].bias[:] = 0.0, 0.1 + beta
    optimizer = torch.optim.SGD(net.parameters(), **settings)
    wrapper = OptimWrapper(optimizer)
    schedulers = [make(wrapper) for make in schedulers]
    schedule = read_schedule(wrapper, schedulers, list(net.parameters()), iterations, 100)
    census = census_of_model(net, rectifiers={'0': 'relu'})
    return make_forecast(census, find_norms(net), schedule, 0, recovery)


def test_long_trainings_are_foretold_by_fewer_steps():
    settings = dict(lr=0.02, momentum=0.9, weight_decay=1e-4)
    expected = np.log(0.1 / 0.2) / np.log1p(-0.02 * 1e-4 / (1 - 0.9))
    assert expected == pytest.approx(34657, abs=1), 'as docs/layers.md has it'
    (part,) = forecast_of(40000, **settings).parts
    assert part.opened['weight decay'][0] == pytest.approx(expected, rel=5e-3)
    (part,) = forecast_of(40000, (100, 10), **settings).parts
    opened = part.opened['RecoveryHook'][0]
    assert opened == pytest.approx(10 + 100 * np.log(2) / np.log(11), abs=1)
    # What comes after the steps of the schedulers is as at their end.
    (part,) = forecast_of(50_000_000, beta=-10.0, **settings).parts
    far = np.log(0.1 / 10) / np.log1p(-0.02 * 1e-4 / (1 - 0.9))
    assert part.opened['weight decay'][0] == pytest.approx(far, rel=0.1)


def test_schedulers_that_follow_a_metric_leave_the_rate_as_it_is():
    plateau = lambda wrapper: ReduceOnPlateauLR(wrapper, monitor='loss', by_epoch=True)  # noqa: E731
    settings = dict(lr=0.1, weight_decay=0.1)
    (part,) = forecast_of(100, schedulers=[plateau], **settings).parts
    (plain,) = forecast_of(100, **settings).parts
    assert part.opened['weight decay'][0] == plain.opened['weight decay'][0] > 0


CONFIG = """
_base_ = '{demo}'
data_root = '{data}/'
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
custom_hooks = [dict(type='CollapseHook'), dict(type='RecoveryHook', steps=4, window=1)]
"""


@pytest.fixture(scope='module')
def demo(tmp_path_factory, coco_root):
    """A training config on the drawn set, and a BN checkpoint for it with closed filters."""
    from mmengine.registry import MODELS, DefaultScope

    folder = tmp_path_factory.mktemp('forecast')
    base = ROOT / 'demo/faster-rcnn_r18_fpn_psbn_demo.py'
    (folder / 'train.py').write_text(CONFIG.format(demo=base, data=coco_root))
    bn = Config.fromfile(ROOT / 'demo/faster-rcnn_r18_fpn_bn_demo.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(bn.model)
    state = model.state_dict()
    for name in ('backbone.bn1', 'backbone.layer2.0.bn1'):
        state[f'{name}.weight'][:3], state[f'{name}.bias'][:3] = 0.01, -0.4
    torch.save(dict(state_dict=state), folder / 'bn.pth')
    return folder


@pytest.fixture
def audit(demo, monkeypatch, capsys):
    """A function that audits the checkpoint with a config, and returns what is said."""
    monkeypatch.chdir(demo)

    def audit(config: str, *arguments: str) -> str:
        code = main(['bn.pth', '--config', config, *arguments])
        said, error = capsys.readouterr()
        assert (code, error) == (0, '')
        return said

    return audit


def test_the_audit_tells_it_before_any_training(audit):
    shown = audit('train.py')
    assert 'weight decay 0.01' in shown and '│ RecoveryHook ' in shown
    # 16 epochs of 8 images, 4 at a time.
    assert 'Forecast: of 6 closed filters RecoveryHook(steps=4) opens 6 by iteration 32' in shown
    told = json.loads(audit('train.py', '--format', 'json'))
    (part,) = told['forecast']['parts']
    assert told['forecast']['iterations'] == 32
    assert part['closed'] == 6 and part['weight decay'] == [] and len(part['RecoveryHook']) == 6


def test_the_audit_scales_the_learning_rate_as_the_training_does(demo, audit):
    text = (demo / 'train.py').read_text()
    hooks = 'custom_hooks = []'
    (demo / 'plain.py').write_text(f'{text}\n{hooks}\n')
    (demo / 'scaled.py').write_text(
        f'{text}\n{hooks}\nauto_scale_lr = dict(enable=True, base_batch_size=1)\n'
    )

    def bound(config):
        told = json.loads(audit(config, '--format', 'json'))
        return told['forecast']['parts'][0]['opens_above_b']

    plain, scaled = bound('plain.py'), bound('scaled.py')
    assert scaled == pytest.approx(plain * 4, rel=0.2)


def test_an_audit_goes_on_without_a_forecast(demo, audit):
    text = (demo / 'train.py').read_text()
    (demo / 'no_data.py').write_text(text.replace("data_root = '", "data_root = 'nowhere"))
    (demo / 'model.py').write_text(f'{text}\ntrain_dataloader = None\n')
    bn = ROOT / 'demo/faster-rcnn_r18_fpn_bn_demo.py'
    (demo / 'bn.py').write_text(
        text.replace(str(ROOT / 'demo/faster-rcnn_r18_fpn_psbn_demo.py'), str(bn))
    )
    frozen = 'norm_cfg=dict(requires_grad=False)'
    (demo / 'frozen.py').write_text(
        f'{text}\nmodel = dict(backbone=dict({frozen}), neck=dict({frozen}))\n'
    )
    for config, why in (
        ('no_data.py', 'No such file'),
        ('model.py', 'the config has no train_dataloader'),
        ('frozen.py', 'the config trains no psBN'),
    ):
        said = audit(config)
        assert 'No forecast of a training with psBN: ' in said and why in said
    said = audit('bn.py')
    assert 'Forecast with --norm psBN: of 6 closed filters RecoveryHook(steps=4)' in said
    assert 'INFO' not in said
