"""The experiments in benchmarks/evidence: their maths."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from mmdet.models.backbones import MobileNetV2
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parents[2]

import cifar10  # noqa: E402
import closed  # noqa: E402
import detectors  # noqa: E402
import digits  # noqa: E402
import law  # noqa: E402
import study  # noqa: E402
import take_away  # noqa: E402
from study import mean_ci  # noqa: E402

from psbn_mmdet.checkpoints import read_content  # noqa: E402
from psbn_mmdet.collapse import find_norms  # noqa: E402
from psbn_mmdet.configs.model import model_of_config  # noqa: E402
from psbn_mmdet.configs.reading import load_config  # noqa: E402
from psbn_mmdet.layers import PostShiftedBatchNorm2d  # noqa: E402


def test_mean_has_students_interval():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    mean, low, high = mean_ci(values)
    half = 2.7764 * np.std(values, ddof=1) / 5**0.5
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-4)
    assert mean_ci([1.0]) == [1, None, None]


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(2, 3, (1000, 6))
    intervals = [mean_ci(values) for values in draws]
    assert np.mean([low <= 2 <= high for _, low, high in intervals]) == pytest.approx(
        0.95, abs=0.02
    )


def test_slope_of_a_known_power_law_is_found():
    x = np.geomspace(0.01, 1, 20)
    noise = np.random.default_rng(0).normal(0, 0.05, 20)
    slope, low, high = law.slope_ci(x, 3 * x**2 * np.exp(noise))
    assert low < 2 < high
    assert high - low < 0.1
    assert slope == pytest.approx(2, abs=0.05)


def test_local_slopes_have_the_error_of_their_points():
    x = np.array([1.0, 2.0, 4.0])
    (_, slope, low, high), _ = law.local_slopes(x, x**-2, 0.01 * x**-2)
    assert slope == pytest.approx(-2)
    assert high - low == pytest.approx(2 * 1.96 * 0.01 * 2**0.5 / math.log(2), rel=1e-3)


@pytest.mark.parametrize(
    ('momentum', 'gamma', 'reach'), [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 0.05, 3.0)]
)
def test_predicted_revival_is_when_a_layer_opens(momentum, gamma, reach):
    norm = PostShiftedBatchNorm2d(1)
    nn.init.constant_(norm.weight, gamma)
    nn.init.constant_(norm.bias, -0.4)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1, weight_decay=0.01, momentum=momentum)
    predicted = closed.revival_steps(
        norm.bias.item(), 0.1, 0.1, 0.01, momentum, gamma=gamma, reach=reach
    )
    steps = 0
    while (norm.bias + reach * norm.weight.abs()).item() <= 0:
        norm.weight.grad, norm.bias.grad = torch.zeros(1), torch.zeros(1)
        optimizer.step()
        steps += 1
    # Momentum starts at 0, and takes some 1 / (1 - momentum) steps to be up to speed.
    assert steps == pytest.approx(predicted, rel=0.03, abs=1 / (1 - momentum))


@pytest.mark.parametrize(('factor', 'swings'), [(0.9, False), (1.2, True)])
def test_fast_decay_with_momentum_swings_through_zero(factor, swings):
    """Above lr * decay = (1 - sqrt(momentum))^2 a closed filter opens even with BN."""
    bias = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
    decay = factor * (1 - 0.9**0.5) ** 2
    optimizer = torch.optim.SGD([bias], lr=1, weight_decay=decay, momentum=0.9)
    bias.grad = torch.zeros_like(bias)
    highest = -1.0
    for _ in range(300):
        optimizer.step()
        highest = max(highest, bias.item())
    assert (highest > 0) == swings


def test_nothing_is_predicted_to_open_without_decay():
    assert closed.revival_steps(-1, 0.1, 0.1, 0) == math.inf
    assert closed.revival_steps(0.05, 0.1, 0.1, 0) == 0


def test_drift_by_noise_has_its_closed_form():
    z = np.random.default_rng(0).normal(size=1_000_000)
    for e in (0.3, 0.765, 1.556, 3):
        expected = np.log(np.abs(1 + e * z)).mean()
        assert law.expected_drift(e) == pytest.approx(expected, abs=0.005)
    for e in (0.003, 0.03):
        assert law.expected_drift(e) == pytest.approx(-(e**2) / 2 - 3 * e**4 / 4, rel=1e-4)


@pytest.mark.parametrize('arch', ['vgg', 'resnet'])
@pytest.mark.parametrize('norm', ['BN', 'psBN'])
def test_networks_side_by_side_train_as_they_would_alone(arch, norm):
    data = digits.load_data()

    def trained(seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        nets = digits.Nets(arch, norm, 'relu', seeds)
        optimizer = digits.OPTIMISERS['sgd'](nets.parameters(), lr=0.05, weight_decay=1e-3)
        digits.train(nets, optimizer, digits.draw_batches(seeds, 5))
        return nets.norms[2].weight.detach().view(len(seeds), -1), nets(
            data.test[:2].expand(-1, len(seeds), -1, -1)
        )

    gamma, logits = trained([3, 7])
    alone, logits_alone = trained([7])
    torch.testing.assert_close(gamma[1:], alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[:, 1:], logits_alone, rtol=1e-2, atol=1e-2)


def started(*options: str, monkeypatch: pytest.MonkeyPatch) -> study.Study:
    monkeypatch.setattr(sys, 'argv', ['x', *options])
    found = study.Study('x', 'An x.')
    found.start()
    return found


def test_a_killed_run_continues_without_doing_finished_runs_again(tmp_path, monkeypatch):
    settings = [dict(lr=lr) for lr in (0.1, 0.2, 0.3)]
    calls = []

    def do(lr: float) -> list[dict]:
        calls.append(lr)
        if lr == 0.3 and len(calls) == 3:
            raise KeyboardInterrupt
        return [{'twice': 2 * lr}]

    options = ('--quick', '--work-dir', str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        started(*options, monkeypatch=monkeypatch).run(settings, do)
    with (tmp_path / 'x.jsonl').open('a') as file:
        file.write('{"setting": {"lr": 0.3}, "rows')  # torn
    records = started(*options, monkeypatch=monkeypatch).run(settings, do)
    assert calls == [0.1, 0.2, 0.3, 0.3]
    assert records == [{'lr': lr, 'twice': 2 * lr} for lr in (0.1, 0.2, 0.3)]
    assert len(study.read_finished(tmp_path / 'x.jsonl')) == 3


def test_a_script_continues_from_a_copy_of_the_kept_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'ROOT', tmp_path)
    done: list[int] = []
    for name, seeds in (('first', 2), ('second', 3)):
        options = ['--work-dir', str(tmp_path / name)]
        found = started(*options, monkeypatch=monkeypatch)
        kept = tmp_path / 'benchmarks/results/evidence/x.jsonl'
        if kept.exists():
            (found.work_dir / 'x.jsonl').write_text(kept.read_text())
        done.clear()
        found.run([{'seed': i} for i in range(seeds)], lambda seed: [done.append(seed) or {}])
        found.write({})
    assert done == [2]
    assert len(kept.read_text().splitlines()) == 3
    found = started(*options, '--finished', monkeypatch=monkeypatch)
    assert found.run([{'seed': i} for i in (1, 3)], None) == [{'seed': 1}]


def test_tables_stand_between_the_comments_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'ROOT', tmp_path)
    found = started('--work-dir', str(tmp_path / 'work'), monkeypatch=monkeypatch)
    page = tmp_path / 'docs/evidence/x.md'
    page.parent.mkdir(parents=True)
    page.write_text('a\n<!-- x.py -->\nold\n<!-- end of x.py -->\nb\n')
    found.tell('new\n')
    assert page.read_text() == 'a\n<!-- x.py -->\nnew\n<!-- end of x.py -->\nb\n'
    page.write_text('nothing')
    with pytest.raises(ValueError, match=r'x\.md has no <!-- x\.py -->'):
        found.tell('new\n')


def test_settings_are_put_together_by_seed():
    """Runs of one seed are not independent: of all settings there are as many pairs as seeds."""
    import imagenet

    rows = [
        dict(arm=arm, times=times, norm_eval=False, seed=seed, AP=0.1 * times + 0.01 * seed * i)
        for times in (1, 4)
        for seed in range(3)
        for i, arm in enumerate(imagenet.IN_ALL)
    ]
    lonely = dict(rows[0], norm_eval=True, AP=0.9)  # BN alone is no pair
    late = [dict(row, seed=3) for row in rows if row['seed'] == 0 and row['times'] == 1]
    cells, contrasts = imagenet.compare(imagenet.with_settings([*rows, lonely, *late]))
    assert len(cells) == 7
    found = [c for c in contrasts if c['contrast'].startswith('all settings')]
    assert [c['seeds'] for c in found] == [3, 3]
    assert [c['mean'] for c in found] == pytest.approx([0.01, 0.02])
    assert len([c for c in contrasts if 'lr x 4' in c['contrast']]) == 2


def test_the_start_of_new_layers_is_theirs_alone(tmp_path):
    import imagenet

    detectors.write_config(tmp_path / 'arm.py', imagenet.BASE, imagenet.ARMS[imagenet.CONTROL])
    biases = read_content(load_config(str(tmp_path / 'arm.py')).load_from)['state_dict']
    assert {name.split('.')[0] for name in biases} == {'neck', 'bbox_head'}
    assert all(name.endswith('.bias') and (b == 0.1).all() for name, b in biases.items())


def test_what_collapsed_with_bn_is_taken_away(tmp_path, monkeypatch):
    """BN is trained first where its record is of another work dir."""
    import imagenet

    trained = []
    monkeypatch.setattr(detectors, 'train', lambda config, *args, **options: trained.append(config))
    monkeypatch.setattr(detectors, 'outcome', lambda work_dir: {})
    monkeypatch.setattr(imagenet, 'course', lambda work_dir: [])
    lost = {'neck.extra_layers.0.0.bn': np.array([True, False, True])}
    monkeypatch.setattr(imagenet, 'filters_of', lambda work_dir, kind: lost)
    monkeypatch.setattr(sys, 'argv', ['x', '--quick', '--finished', '--work-dir', str(tmp_path)])
    imagenet.STUDY.start()
    imagenet.run(imagenet.WITHOUT, 4, True, 0)
    bn, without = map(load_config, map(str, trained))
    assert (bn.model.neck.norm_cfg.type, without.model.neck.norm_cfg.type) == ('BN', 'psBN')
    hooks = without.custom_hooks
    assert [hook.type for hook in hooks] == ['CollapseHook', 'ChannelsLastHook', 'TakeAwayHook']
    assert hooks[-1].channels == {'neck.extra_layers.0.0.bn': [0, 2]}
    assert without.custom_imports.imports == ['psbn_mmdet', 'ssd_on_cpus', 'take_away']
    (tmp_path / 'imagenet/BN_4_True_0').mkdir()
    (tmp_path / 'imagenet/BN_4_True_0/last_checkpoint').touch()
    imagenet.run(imagenet.WITHOUT, 4, True, 0)
    assert len(trained) == 3


def test_weights_of_imagenet_get_mmdetections_names(torchvisions):
    import imagenet

    torch.manual_seed(1)
    own = MobileNetV2().state_dict()
    named = imagenet.as_backbone(torchvisions(own))
    assert named.keys() == {key for key in own if 'num_batches' not in key}
    assert all(torch.equal(value, own[key]) for key, value in named.items())
    with pytest.raises(ValueError, match='not those of a MobileNetV2'):
        imagenet.as_backbone({'features.0': torch.zeros(3)})


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
def test_what_is_taken_away_stays_away_in_a_training(tmp_path, norm):
    model = small_run.Classifier(norm, killed={})
    seen = []
    model.stem[1].register_forward_hook(lambda _, inputs, y: seen.append(y.detach().clone()))
    small_run.run(
        tmp_path, model, custom_hooks=[dict(type='TakeAwayHook', channels={'stem.1': [1, 5]})]
    )
    assert len(seen) == 24
    outputs = torch.stack(seen).abs().amax((0, 1, 3, 4))
    assert outputs[[1, 5]].max() < 1e-7 and outputs[[0, 2, 3, 4, 6, 7]].min() > 0.1


def test_as_many_others_are_of_the_same_layers_and_of_neither_kind():
    masks = {'a': np.array([1, 1, 0, 0, 0, 0], bool), 'b': np.array([1, 0, 1, 1], bool)}
    apart = {'a': np.array([0, 0, 1, 0, 0, 0], bool)}
    others = take_away.as_many_others(masks, apart)
    assert others['a'].sum() == 2 and not (others['a'] & (masks['a'] | apart['a'])).any()
    assert others['b'].tolist() == [False, True, False, False]  # no more are there


def test_finetunings_are_paired_by_seed():
    import detection

    base = dict(detector='retinanet', norm_eval=True, times=1, trapped=3)
    rows = [
        dict(base, arm=arm, seed=seed, AP=ap, collapsed=5)
        for arm, aps in (('BN', (0.1, 0.2, 0.3)), ('psBN', (0.11, 0.22, 0.33)))
        for seed, ap in enumerate(aps)
    ]
    _, (contrast,) = detection.STUDY.compare(detection.with_settings(rows))
    assert contrast['contrast'] == 'RetinaNet, frozen, x 1: psBN over BN'
    half = 4.3027 * 0.01 / 3**0.5
    assert contrast['mean'] == pytest.approx(0.02)
    assert contrast['low'] == pytest.approx(0.02 - half, rel=1e-3)
    assert contrast['seeds'] == 3


@pytest.mark.slow
def test_arms_of_the_decay_are_what_their_names_say(tmp_path):
    """By the optimiser that MMEngine builds, and by the biases that are loaded."""
    import decay

    for arm, expected in {
        'BN': (1, 1, 0.0),
        'psBN, gamma x 20': (20, 1, 0.1),
        'psBN, beta x 20': (1, 20, 0.1),
        'BN x 20, starts at 0.1': (20, 20, 0.1),
        'psBN x 20, starts at 0': (20, 20, 0.0),
        'BN x 0': (0, 0, 0.0),
        'psBN x 50, recovery': (50, 50, 0.1),
    }.items():
        file = tmp_path / 'arm.py'
        optimizer = load_config(str(detectors.DEMO)).optim_wrapper.to_dict()
        detectors.write_config(file, detectors.DEMO, decay.ARMS[arm], optimizer)
        config = load_config(str(file))
        hooks = [hook.type for hook in config.custom_hooks]
        assert hooks == ['CollapseHook', *['RecoveryHook'] * arm.endswith('recovery')]
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = model_of_config(config)
            optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
        if config.get('load_from'):
            state = read_content(config.load_from)['state_dict']
            assert not model.load_state_dict(state, strict=False).unexpected_keys
        decayed = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
        plain = optimizer.defaults['weight_decay']
        model.state_dict()  # which starts new layers
        for norm in find_norms(model).values():
            found = decayed[id(norm.weight)] / plain, decayed[id(norm.bias)] / plain
            assert (*found, norm.bias.mean().item()) == pytest.approx(expected, abs=1e-6), arm
            assert norm.weight.mean() == 1 and norm.running_var.mean() == 1


def test_the_best_arms_from_scratch_are_compared_once_all_seeds_were_run():
    import scratch

    rows = [
        dict(task='a', arm=arm, seed=seed, AP=0.1 * i + 0.01 * seed, collapsed=i, trapped=0)
        for i, arm in enumerate(scratch.ARMS)
        for seed in range(2)
    ]
    cells, contrasts = scratch.STUDY.compare(rows)
    assert [cell['collapsed'] for cell in cells] == list(range(7))
    last = contrasts[-1]
    best = '(psBN x 20, recovery) over the best BN (BN x 20, starts at 0.1)'
    assert last['contrast'] == f'a: the best psBN {best}'
    assert (last['mean'], last['verdict']) == (pytest.approx(0.2), 'higher')
    _, contrasts = scratch.STUDY.compare([row for row in rows if row['arm'] != 'psBN x 20'])
    assert contrasts and not any('best' in c['contrast'] for c in contrasts)
    _, contrasts = scratch.STUDY.compare(rows[:-1])
    assert contrasts and not any('best' in c['contrast'] for c in contrasts)
    assert study.forest(cells, rows, 'AP').axes


@pytest.mark.slow
def test_arms_from_scratch_differ_in_what_their_names_say_alone(tmp_path):
    """In all norm layers of each detector, with the demo's optimiser and schedule."""
    import scratch

    file = tmp_path / 'arm.py'
    demo = load_config(str(detectors.DEMO))
    for name, epochs in scratch.TASKS.values():
        for arm, start in {'BN': 0, 'BN, starts at 0.1': 0.1, 'psBN x 20, recovery': 0.1}.items():
            detectors.write_config(
                file,
                detectors.config_of(name),
                scratch.ARMS[arm],
                demo.optim_wrapper.to_dict(),
                lines=scratch.schedule(epochs),
            )
            config = load_config(str(file))
            assert config.optim_wrapper.optimizer == demo.optim_wrapper.optimizer
            last = config.param_scheduler[-1]
            assert (last.type, last.T_max) == ('CosineAnnealingLR', config.train_cfg.max_epochs)
            with DefaultScope.overwrite_default_scope('mmdet'):
                model = model_of_config(config)
            if config.load_from:
                model.load_state_dict(read_content(config.load_from)['state_dict'], strict=False)
            model.state_dict()  # which starts new layers
            for norm in find_norms(model).values():
                assert hasattr(norm, 'shift') == arm.startswith('psBN')
                assert norm.bias.mean().item() == pytest.approx(start)


@pytest.mark.parametrize('arm', ['BN', 'psBN'])
def test_what_is_taken_away_puts_out_nothing_and_what_is_constant_its_bias(arm):
    import cifar

    network = cifar.build(8, arm, 0).eval()
    norm = network.layer1[0].bn1
    norm.weight.data[2:4] = 1e-9
    norm.bias.data[2:4] = 0.3
    image = torch.randn(2, 3, 32, 32)
    seen = []
    norm.register_forward_hook(lambda _, inputs, output: seen.append(output[:, 2:4].detach()))
    whole = network(image)
    mask = np.isin(np.arange(8), [2, 3])
    take_away.make_constant(network.state_dict(), {'layer1.0.bn1': mask})
    torch.testing.assert_close(network(image), whole)
    take_away.take_away(network.state_dict(), {'layer1.0.bn1': mask})
    assert not torch.allclose(network(image), whole)
    assert seen[0].min() > 0 and torch.equal(seen[1], seen[1][:1].expand_as(seen[1]))
    assert seen[2].abs().max() < 1e-7


def test_images_are_shifted_and_flipped_whole():
    torch.manual_seed(0)
    image = torch.arange(1, 32 * 32 + 1).view(1, 1, 32, 32).expand(40, 3, 32, 32)
    seen = cifar10.augmented(image)
    assert seen.shape == image.shape
    steps = set()
    for i in range(40):
        inner = seen[i, 0, 10:20, 10:20]
        steps.add(int(inner[0, 1] - inner[0, 0]))
        assert (inner[1:] - inner[:-1] == 32).all()
    assert steps == {-1, 1}


def test_a_contrast_is_paired_and_says_what_it_could_have_found():
    better = {0: 0.51, 1: 0.62, 2: 0.73, 9: 0.0}
    found = study.contrast('a over b', better, {0: 0.5, 1: 0.6, 2: 0.7})
    half = 4.3027 * 0.01 / 3**0.5
    assert (found['seeds'], found['mean']) == (3, pytest.approx(0.02))
    assert (found['low'], found['high']) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-3)
    assert found['verdict'] == 'no difference seen'
    # Such differences, centred on what is called detectable, have an interval above 0 in 80 %.
    found['detectable'] = found['detectable'] * 3**0.5 / 0.01
    draws = np.random.default_rng(0).normal(found['detectable'] / 3**0.5, 1, (4000, 3))
    above = np.mean([mean_ci(row)[1] > 0 for row in draws])
    assert above == pytest.approx(0.8, abs=0.1)
    assert study.contrast('', {0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.1})['verdict'] == 'higher'
    assert study.contrast('', {0: 0.0, 1: 0.1}, {0: 1.0, 1: 1.1})['verdict'] == 'lower'
