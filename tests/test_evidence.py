"""The experiments in benchmarks/evidence: their maths, and each script's quick form."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from cifar_resnet import CifarResNet
from mmdet.models.backbones import MobileNetV2
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image
from torch import nn

pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'benchmarks/evidence'
sys.path.insert(0, str(FOLDER))

import common  # noqa: E402
import digits  # noqa: E402

from psbn_mmdet.checkpoints import read_content  # noqa: E402
from psbn_mmdet.checkpoints.config_model import model_of_config  # noqa: E402
from psbn_mmdet.collapse import find_norms  # noqa: E402
from psbn_mmdet.layers import PostShiftedBatchNorm2d  # noqa: E402
from psbn_mmdet.preflight import load_config  # noqa: E402


def run(name: str, work_dir: Path, *options: str | Path) -> subprocess.CompletedProcess:
    """Run the quick form of a script."""
    result = subprocess.run(
        [sys.executable, FOLDER / f'{name}.py', '--quick', '--work-dir', work_dir, *options],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result


def rows_of(table: dict) -> list[dict]:
    return [dict(zip(table['columns'], row)) for row in table['rows']]


def test_mean_has_students_interval():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    mean, low, high = common.mean_ci(values)
    half = 2.7764 * np.std(values, ddof=1) / 5**0.5
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-4)
    assert common.mean_ci([1.0]) == [1, None, None]


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(2, 3, (1000, 6))
    intervals = [common.mean_ci(values) for values in draws]
    assert np.mean([low <= 2 <= high for _, low, high in intervals]) == pytest.approx(
        0.95, abs=0.02
    )


def test_slope_of_a_known_power_law_is_found():
    x = np.geomspace(0.01, 1, 20)
    noise = np.random.default_rng(0).normal(0, 0.05, 20)
    slope, low, high = common.slope_ci(x, 3 * x**2 * np.exp(noise))
    assert low < 2 < high
    assert high - low < 0.1
    assert slope == pytest.approx(2, abs=0.05)


def test_local_slopes_have_the_error_of_their_points():
    x = np.array([1.0, 2.0, 4.0])
    (_, slope, low, high), _ = common.local_slopes(x, x**-2, 0.01 * x**-2)
    assert slope == pytest.approx(-2)
    assert high - low == pytest.approx(2 * 1.96 * 0.01 * 2**0.5 / math.log(2), rel=1e-3)


def test_share_stays_within_0_and_1():
    share, low, high = common.share_ci(0, 50)
    assert share == low == 0
    assert 0 < high < 0.1


@pytest.mark.parametrize(
    ('momentum', 'gamma', 'reach'), [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 0.05, 3.0)]
)
def test_predicted_revival_is_when_a_layer_opens(momentum, gamma, reach):
    norm = PostShiftedBatchNorm2d(1)
    nn.init.constant_(norm.weight, gamma)
    nn.init.constant_(norm.beta, -0.4)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1, weight_decay=0.01, momentum=momentum)
    predicted = common.revival_steps(
        norm.bias.item(), 0.1, 0.1, 0.01, momentum, gamma=gamma, reach=reach
    )
    steps = 0
    while (norm.bias + reach * norm.weight.abs()).item() <= 0:
        norm.weight.grad, norm.beta.grad = torch.zeros(1), torch.zeros(1)
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
    assert common.revival_steps(-1, 0.1, 0.1, 0) == math.inf
    assert common.revival_steps(0.05, 0.1, 0.1, 0) == 0


def test_drift_by_noise_has_its_closed_form():
    import law

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
        digits.train(nets, data, optimizer, digits.draw_batches(data, seeds, 5))
        return nets.norms[2].weight.detach().view(len(seeds), -1), nets(
            data.test[:2].expand(-1, len(seeds), -1, -1)
        )

    gamma, logits = trained([3, 7])
    alone, logits_alone = trained([7])
    torch.testing.assert_close(gamma[1:], alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[:, 1:], logits_alone, rtol=1e-2, atol=1e-2)


def test_a_killed_run_goes_on_without_doing_finished_runs_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x', '--quick', '--work-dir', str(tmp_path)])
    settings = [dict(lr=lr) for lr in (0.1, 0.2, 0.3)]
    calls = []

    def do(lr: float) -> list[dict]:
        calls.append(lr)
        if lr == 0.3 and len(calls) == 3:
            raise KeyboardInterrupt
        return [{'twice': 2 * lr}]

    with pytest.raises(KeyboardInterrupt):
        common.Experiment('x', 'An x.').run(settings, do)
    with (tmp_path / 'x.jsonl').open('a') as file:
        file.write('{"setting": {"lr": 0.3}, "rows')  # torn
    runs = common.Experiment('x', 'An x.').run(settings, do)
    assert calls == [0.1, 0.2, 0.3, 0.3]
    assert [rows[0]['twice'] for _, rows in runs] == [0.2, 0.4, 0.6]
    assert len(common.read_finished(tmp_path / 'x.jsonl')) == 3


def test_a_script_goes_on_from_a_copy_of_the_kept_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'ROOT', tmp_path)
    done: list[int] = []
    for name, seeds in (('first', 2), ('second', 3)):
        monkeypatch.setattr(sys, 'argv', ['x', '--work-dir', str(tmp_path / name)])
        experiment = common.Experiment('x', 'An x.')
        kept = tmp_path / 'benchmarks/results/evidence/x.jsonl'
        if kept.exists():
            (experiment.work_dir / 'x.jsonl').write_text(kept.read_text())
        done.clear()
        experiment.run([{'seed': i} for i in range(seeds)], lambda seed: [done.append(seed) or {}])
        experiment.write()
    assert done == [2]
    assert len(kept.read_text().splitlines()) == 3
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--finished'])
    runs = common.Experiment('x', 'An x.').run([{'seed': i} for i in (1, 3)], None)
    assert [setting for setting, _ in runs] == [{'seed': 1}]


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('evidence')


def result_of(name: str, work_dir: Path) -> dict:
    result = json.loads((work_dir / f'{name}.json').read_text())
    assert result['command'] == f'python benchmarks/evidence/{name}.py --quick'
    assert result['hardware']
    assert result['versions']['torch'] == torch.__version__
    assert str(ROOT) not in json.dumps(result)
    assert (work_dir / f'evidence_{name}.png').stat().st_size < 150_000
    return result


def test_law(work_dir):
    run('law', work_dir)
    result = result_of('law', work_dir)
    assert result['law']['no_drift_at_e'] == pytest.approx(1.556, abs=1e-3)
    slope, low, high = result['slopes']['drift over lr']['slope']
    assert low < slope < high
    assert slope == pytest.approx(2, abs=0.2)
    assert {row['steps'] for row in rows_of(result['walk'])} == {4, 16, 64}


@pytest.fixture(scope='module')
def public(tmp_path_factory) -> tuple[Path, Path]:
    """A ResNet-20 with three dead filters, and noise in place of photographs of cells."""
    checkpoints, images = (tmp_path_factory.mktemp(name) for name in ('checkpoints', 'images'))
    torch.manual_seed(0)
    network = CifarResNet(3)
    with torch.no_grad():
        network.bn1.weight[:3], network.bn1.bias[:3] = 1e-4, -1e-3
    torch.save({'state_dict': network.state_dict()}, checkpoints / 'resnet20-12fca82f.th')
    (images / 'images').mkdir()
    (images / 'annotations').mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(images / 'images/0.png')
    boxes = [{'image_id': 0, 'category_id': 1 + i % 3, 'bbox': [i, i, 20, 20]} for i in range(24)]
    content = {'images': [{'id': 0, 'file_name': '0.png'}], 'annotations': boxes}
    for split in ('train', 'val'):
        (images / f'annotations/{split}.json').write_text(json.dumps(content))
    return checkpoints, images


def test_networks(work_dir, public, bomb, tmp_path):
    torch.save(bomb, tmp_path / 'mobilenet_v2-b0353104.pth')
    result = run('networks', work_dir, '--checkpoints', public[0], '--packages', tmp_path)
    assert 'no craft_mlt_25k.pth' in result.stdout
    found = result_of('networks', work_dir)
    (network,) = rows_of(found['networks'])
    assert network['network'] == 'ResNet-20'
    assert network['filters'] == 688
    assert network['vanished'] == network['dead'] == network['collapsed'] == 3
    assert network['most_in'] == 'bn1'
    (refused,) = found['refused']
    assert refused['why'].startswith('mobilenet_v2-b0353104.pth is not loaded since it asks for')


def test_when(work_dir):
    run('when', work_dir)
    result = result_of('when', work_dir)
    runs, cells = rows_of(result['runs']), rows_of(result['cells'])
    assert {(row['norm'], row['seed']) for row in runs} == {
        (norm, seed) for norm in ('BN', 'psBN') for seed in (0, 1)
    }
    for cell in cells:
        chosen = [r['collapsed'] for r in runs if r['lr'] == cell['lr'] and r['norm'] == 'BN']
        assert cell['collapsed: BN'] == pytest.approx(np.mean(chosen))
    assert max(row['collapsed'] for row in runs) > 0
    (worst,) = result['worst_that_work']
    assert worst in cells


def test_recovery(work_dir, public):
    run('recovery', work_dir, '--checkpoints', public[0], '--images', public[1])
    result = result_of('recovery', work_dir)
    cells = {(row['network'], row['arm']): row for row in rows_of(result['summary'])}
    assert {network for network, _ in cells} == {'vgg', 'resnet20'}
    for network in ('vgg', 'resnet20'):
        plain, psbn, revived = (cells[network, arm] for arm in ('BN', 'psBN', 'psBN, revive'))
        assert plain['closed'] == psbn['closed'] == revived['closed'] > 0
        assert plain['opened'] <= psbn['opened'] <= revived['opened']
    assert cells['resnet20', 'psBN, revive']['opened_at'] == [0, 0, 0]
    median = cells['vgg', 'psBN']['opened_by_predicted'][1]
    assert median == pytest.approx(1, abs=0.4)
    filters = rows_of(result['filters'])
    assert len(filters) == sum(row['closed'] for row in cells.values())


def test_recovery_without_public_data_says_what_it_skips(work_dir, public):
    """After the whole run, of which it needs the digits alone."""
    result = run('recovery', work_dir, '--checkpoints', 'nowhere', '--images', public[1])
    assert 'nowhere does not exist: the public ResNets are skipped' in result.stdout
    assert {row['network'] for row in rows_of(result_of('recovery', work_dir)['summary'])} == {
        'vgg'
    }


@pytest.fixture(scope='module')
def cells(coco_root, tmp_path_factory) -> Path:
    """The drawn set under the names and in the folders of the photographs of cells."""
    folder = tmp_path_factory.mktemp('cells')
    (folder / 'annotations').mkdir()
    (folder / 'images').mkdir()
    for split in ('train', 'val'):
        (folder / 'images' / split).symlink_to(coco_root / split)
        content = json.loads((coco_root / f'annotations/{split}.json').read_text())
        for image in content['images']:
            image['file_name'] = f'{split}/{image["file_name"]}'
        for category, name in zip(content['categories'], ('RBC', 'WBC', 'Platelets', 'none')):
            category['name'] = name
        (folder / f'annotations/{split}.json').write_text(json.dumps(content))
    return folder


def test_detection(work_dir, coco_root, cells):
    run('detection', work_dir, '--drawn', coco_root, '--images', cells)
    result = result_of('detection', work_dir)
    (pretrained,) = rows_of(result['pretrained'])
    assert pretrained['detector'] == 'retinanet'
    runs = rows_of(result['runs'])
    arms = ['BN', 'psBN', 'psBN, recovery', 'psBN, decay', 'psBN, revived']
    assert [row['arm'] for row in runs] == arms
    assert all(0 <= row['AP'] <= row['AP50'] <= 1 for row in runs)
    assert not list((work_dir / 'detection/retinanet').glob('BN*/*.pth'))


def torchvisions(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A MobileNetV2's weights as in a file of torchvision: in the same order, by other names."""
    renamed = {
        f'features.{i}.{key.rpartition(".")[2]}': value
        for i, (key, value) in enumerate(state.items())
    }
    return {**renamed, 'classifier.1.weight': torch.zeros(1000, 1280)}


def test_imagenet(work_dir, cells, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvisions(MobileNetV2().state_dict()), tmp_path / 'mobilenet_v2-b0353104.pth')
    run('imagenet', work_dir, '--packages', tmp_path, '--images', cells)
    result = result_of('imagenet', work_dir)
    (row,) = rows_of(result['runs'])
    assert (row['arm'], row['norm_eval'], row['times']) == ('psBN, recovery', True, 4)
    assert 0 <= row['AP'] <= row['AP50'] <= 1
    courses = rows_of(result['courses'])
    last = max(step['iter'] for step in courses)
    assert sum(s['collapsed'] for s in courses if s['iter'] == last) == row['collapsed']
    assert {s['stage'] for s in courses} >= {'backbone.conv1', 'neck', 'bbox_head'}


def test_settings_are_put_together_by_seed():
    """Runs of one seed are not independent: of all settings there are as many pairs as seeds."""
    import imagenet

    rows = [
        dict(arm=arm, times=times, norm_eval=False, seed=seed, AP=0.1 * times + 0.01 * seed * i)
        for times in (1, 4)
        for seed in range(3)
        for i, arm in enumerate(imagenet.ARMS)
    ]
    lonely = dict(rows[0], norm_eval=True, AP=0.9)  # BN alone is no pair
    late = [dict(row, seed=3) for row in rows if row['seed'] == 0 and row['times'] == 1]
    cells, contrasts = imagenet.compare([*rows, lonely, *late])
    assert len(cells) == 7
    found = [c for c in contrasts if c['contrast'].startswith('all settings')]
    assert [c['seeds'] for c in found] == [3, 3]
    assert [c['mean'] for c in found] == pytest.approx([0.01, 0.02])
    assert len([c for c in contrasts if 'lr x 4' in c['contrast']]) == 2


def test_the_start_of_new_layers_is_theirs_alone():
    import imagenet

    biases = imagenet.biases_of_new_layers()
    assert {name.split('.')[0] for name in biases} == {'neck', 'bbox_head'}
    assert all(name.endswith('.bias') and (b == 0.1).all() for name, b in biases.items())


def test_what_collapsed_with_bn_is_taken_away(tmp_path, monkeypatch):
    """BN is trained first where its record is of another work dir."""
    import imagenet

    trained = []
    monkeypatch.setattr(imagenet, 'train', lambda *args, **options: trained.append((args, options)))
    monkeypatch.setattr(imagenet, 'outcome', lambda work_dir: {})
    monkeypatch.setattr(imagenet, 'course', lambda work_dir: [])
    lost = {'neck.extra_layers.0.0.bn': np.array([True, False, True])}
    monkeypatch.setattr(imagenet, 'filters_of', lambda work_dir, kind: lost)
    finetuning = object.__new__(imagenet.Finetuning)
    finetuning.folder = finetuning.backbone = tmp_path
    finetuning.options = {}
    finetuning.run('psBN, without them', 4, True, 0)
    kinds = [options['model.neck.norm_cfg.type'] for _, options in trained]
    assert kinds == ['BN', 'psBN']
    hooks = load_config(str(trained[1][0][0])).custom_hooks
    assert [hook.type for hook in hooks] == ['CollapseHook', 'ChannelsLastHook', 'TakeAwayHook']
    assert hooks[-1].channels == {'neck.extra_layers.0.0.bn': [0, 2]}
    (tmp_path / 'BN_eval_4x_0').mkdir()
    (tmp_path / 'BN_eval_4x_0/last_checkpoint').touch()
    finetuning.run('psBN, without them', 4, True, 0)
    assert len(trained) == 3


def test_weights_of_imagenet_get_mmdetections_names():
    import imagenet

    torch.manual_seed(1)
    own = MobileNetV2().state_dict()
    named = imagenet.as_backbone(torchvisions(own))
    assert named.keys() == {key for key in own if 'num_batches' not in key}
    assert all(torch.equal(value, own[key]) for key, value in named.items())
    with pytest.raises(ValueError, match='not those of a MobileNetV2'):
        imagenet.as_backbone({'features.0': torch.zeros(3)})


def test_finetuning(work_dir, coco_root, cells):
    run('finetuning', work_dir, '--drawn', coco_root, '--images', cells)
    result = result_of('finetuning', work_dir)
    (row,) = rows_of(result['runs'])
    assert row['arm'] == 'psBN, recovery'
    assert all(0 <= row[key] <= 1 for key in ('AP', 'pruned', 'without_recovered'))
    assert [c['contrast'] for c in rows_of(result['contrasts'])] == [
        'whole over without the recovered filters',
        'whole over without as many others',
    ]
    assert '| psBN, recovery | 1 | 0.' in (work_dir / 'finetuning.md').read_text()


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, PostShiftedBatchNorm2d])
def test_what_is_taken_away_stays_away_in_a_training(tmp_path, norm):
    import take_away  # noqa: F401, which registers the hook

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
    others = common.as_many_others(masks, apart)
    assert others['a'].sum() == 2 and not (others['a'] & (masks['a'] | apart['a'])).any()
    assert others['b'].tolist() == [False, True, False, False]  # no more are there


def test_finetunings_are_paired_by_seed():
    import detection

    common_row = dict(detector='a', norm_eval=True, times=1, collapsed_first=9, trapped=3)
    rows = [
        dict(common_row, arm=arm, seed=seed, AP=ap, AP50=2 * ap, collapsed=5, new=1, revived=2)
        for arm, aps in (('BN', (0.1, 0.2, 0.3)), ('psBN', (0.11, 0.22, 0.33)))
        for seed, ap in enumerate(aps)
    ]
    bn, psbn = detection.compare(rows)
    assert bn['AP-BN'] == bn['AP-BN_low'] == 0
    half = 4.3027 * 0.01 / 3**0.5
    assert psbn['AP-BN'] == pytest.approx(0.02)
    assert psbn['AP-BN_low'] == pytest.approx(0.02 - half, rel=1e-3)
    assert psbn['seeds'] == 3
    detection.draw([bn, psbn])


def test_decay(work_dir, coco_root):
    run('decay', work_dir, '--drawn', coco_root)
    result = result_of('decay', work_dir)
    arms = ['BN x 20', 'psBN x 20', 'psBN x 20, without them']
    assert [row['arm'] for row in rows_of(result['cells'])] == arms
    assert all(0 <= row['AP'] <= row['AP50'] <= 1 for row in rows_of(result['runs']))
    _, worth, best = rows_of(result['contrasts'])
    assert worth['contrast'].startswith('what the filters are worth')
    assert best['contrast'].startswith('the best psBN') and best['verdict'] == 'one seed: open'
    told = (work_dir / 'decay.md').read_text()
    assert all(f'| {arm} | 1 | 0.' in told for arm in arms) and best['contrast'] in told


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
        decay.write_config(file, arm)
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
        for norm in find_norms(model).values():
            shift = getattr(norm, 'beta', norm.bias)
            found = decayed[id(norm.weight)] / plain, decayed[id(shift)] / plain
            assert (*found, norm.bias.mean().item()) == pytest.approx(expected, abs=1e-6), arm
            assert norm.weight.mean() == 1 and norm.running_var.mean() == 1


def test_scratch(work_dir, coco_root, cells):
    run('scratch', work_dir, '--drawn', coco_root, '--images', cells)
    result = result_of('scratch', work_dir)
    arms = ['BN x 20, starts at 0.1', 'psBN x 20']
    assert [row['arm'] for row in rows_of(result['runs'])] == arms
    (contrast,) = rows_of(result['contrasts'])
    assert contrast['contrast'] == (
        'RetinaNet, photographs, steps x 3: psBN x 20 over BN x 20 that starts at 0.1'
    )
    told = (work_dir / 'scratch.md').read_text()
    assert all(f'| RetinaNet, photographs, steps x 3 | {arm} | 1 | 0.' in told for arm in arms)


def test_the_best_arms_from_scratch_are_compared_once_all_seeds_were_run():
    import scratch

    rows = [
        dict(task='a', arm=arm, seed=seed, AP=0.1 * i + 0.01 * seed, collapsed=i, trapped=0)
        for i, arm in enumerate(scratch.ARMS)
        for seed in range(2)
    ]
    cells, contrasts = scratch.compare(rows)
    assert [cell['collapsed'] for cell in cells] == list(range(7))
    last = contrasts[-1]
    best = '(psBN x 20, recovery) over the best BN (BN x 20, starts at 0.1)'
    assert last['contrast'] == f'a: the best psBN {best}'
    assert (last['mean'], last['verdict']) == (pytest.approx(0.2), 'higher')
    _, contrasts = scratch.compare([row for row in rows if row['arm'] != 'psBN x 20'])
    assert contrasts and not any('best' in c['contrast'] for c in contrasts)
    _, contrasts = scratch.compare(rows[:-1])
    assert contrasts and not any('best' in c['contrast'] for c in contrasts)
    scratch.draw(rows)


def test_arms_from_scratch_differ_in_what_their_names_say_alone(tmp_path):
    """In all norm layers of each detector, with the demo's optimiser and schedule."""
    import decay
    import scratch

    file = tmp_path / 'arm.py'
    demo = load_config(str(decay.DEMO))
    for task in scratch.TASKS.values():
        for arm, start in {'BN': 0, 'BN, starts at 0.1': 0.1, 'psBN x 20, recovery': 0.1}.items():
            base = scratch.CONFIGS / f'{task.config}.py'
            decay.write_config(file, arm, base=base, more=task.schedule)
            config = load_config(str(file))
            assert config.optim_wrapper.optimizer == demo.optim_wrapper.optimizer
            last = config.param_scheduler[-1]
            assert (last.type, last.T_max) == ('CosineAnnealingLR', config.train_cfg.max_epochs)
            with DefaultScope.overwrite_default_scope('mmdet'):
                model = model_of_config(config)
            if config.load_from:
                model.load_state_dict(read_content(config.load_from)['state_dict'], strict=False)
            for norm in find_norms(model).values():
                assert hasattr(norm, 'shift') == arm.startswith('psBN')
                assert norm.bias.mean().item() == pytest.approx(start)


@pytest.fixture(scope='module')
def cifar(tmp_path_factory) -> Path:
    """Noise in the folders of CIFAR-10's classes."""
    folder = tmp_path_factory.mktemp('cifar')
    pixels = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    for name in ('train', 'test'):
        with zipfile.ZipFile(folder / f'{name}.zip', 'w') as file:
            for label, i in itertools.product(range(10), range(len(pixels))):
                with file.open(f'{label}/{i:04}.jpg', 'w') as image:
                    Image.fromarray(pixels[i]).save(image, 'JPEG')
    return folder


def test_cifar(work_dir, cifar):
    run('cifar', work_dir, '--cifar', cifar)
    result = result_of('cifar', work_dir)
    arms = ['BN', 'psBN, recovery', 'psBN, recovery, without them']
    assert [row['arm'] for row in rows_of(result['cells'])] == arms
    assert all(0 <= row['accuracy'] <= 1 for row in rows_of(result['runs']))
    assert [row['contrast'].split(': ')[1] for row in rows_of(result['contrasts'])] == [
        'what the filters are worth',
        'psBN with recovery over BN',
    ]
    told = (work_dir / 'cifar.md').read_text()
    assert all(f'| half | SGD 0.5 | {arm} |' in told for arm in arms)
    result = run('cifar', work_dir, '--cifar', 'nowhere')
    assert 'nowhere has no train.zip: skipped' in result.stdout


@pytest.mark.parametrize('arm', ['BN', 'psBN'])
def test_what_is_taken_away_puts_out_nothing_and_what_is_constant_its_bias(arm):
    import cifar

    network = cifar.build(8, arm, 0).eval()
    norm = network.layer1[0].bn1
    norm.weight.data[2:4] = 1e-9
    (norm.beta if arm == 'psBN' else norm.bias).data[2:4] = 0.3
    image = torch.randn(2, 3, 32, 32)
    seen = []
    norm.register_forward_hook(lambda _, inputs, output: seen.append(output[:, 2:4].detach()))
    whole = network(image)
    mask = np.isin(np.arange(8), [2, 3])
    common.make_constant(network.state_dict(), {'layer1.0.bn1': mask})
    torch.testing.assert_close(network(image), whole)
    common.take_away(network.state_dict(), {'layer1.0.bn1': mask})
    assert not torch.allclose(network(image), whole)
    assert seen[0].min() > 0 and torch.equal(seen[1], seen[1][:1].expand_as(seen[1]))
    assert seen[2].abs().max() < 1e-7


def test_images_are_shifted_and_flipped_whole():
    import cifar

    torch.manual_seed(0)
    image = torch.arange(1, 32 * 32 + 1).view(1, 1, 32, 32).expand(40, 3, 32, 32)
    seen = cifar.augmented(image)
    assert seen.shape == image.shape
    steps = set()
    for i in range(40):
        inner = seen[i, 0, 10:20, 10:20]
        steps.add(int(inner[0, 1] - inner[0, 0]))
        assert (inner[1:] - inner[:-1] == 32).all()
    assert steps == {-1, 1}


def test_a_contrast_is_paired_and_says_what_it_could_have_found():
    better = {0: 0.51, 1: 0.62, 2: 0.73, 9: 0.0}
    found = common.contrast('a over b', better, {0: 0.5, 1: 0.6, 2: 0.7})
    half = 4.3027 * 0.01 / 3**0.5
    assert (found['seeds'], found['mean']) == (3, pytest.approx(0.02))
    assert (found['low'], found['high']) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-3)
    assert found['verdict'] == 'no difference seen'
    # Such differences, centred on what is called detectable, have an interval above 0 in 80 %.
    found['detectable'] = found['detectable'] * 3**0.5 / 0.01
    draws = np.random.default_rng(0).normal(found['detectable'] / 3**0.5, 1, (4000, 3))
    above = np.mean([common.mean_ci(row)[1] > 0 for row in draws])
    assert above == pytest.approx(0.8, abs=0.1)
    assert common.contrast('', {0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.1})['verdict'] == 'higher'
    assert common.contrast('', {0: 0.0, 1: 0.1}, {0: 1.0, 1: 1.1})['verdict'] == 'lower'


@pytest.mark.parametrize('name', ['decay', 'scratch', 'finetuning', 'cifar', 'imagenet'])
def test_the_page_tells_what_the_kept_results_say(name):
    """Its tables and verdicts are put there by the script."""
    result = json.loads((ROOT / f'benchmarks/results/evidence/{name}.json').read_text())
    page = (ROOT / 'docs/evidence.md').read_text()
    told = page.split(f'<!-- {name} -->')[1].split(f'<!-- end of {name} -->')[0]
    contrasts = rows_of(result['contrasts'])
    assert contrasts
    for row in contrasts:
        (line,) = (line for line in told.splitlines() if f'| {row["contrast"]} |' in line)
        assert f'**{row["verdict"]}**' in line and f'{row["mean"]:+.3f}' in line


def test_costs(work_dir):
    """From the kept results of the other scripts, in points."""
    run('costs', work_dir)
    rows = rows_of(result_of('costs', work_dir)['networks'])
    decay = json.loads((ROOT / 'benchmarks/results/evidence/decay.json').read_text())
    of_decay = {row['contrast']: row['mean'] for row in rows_of(decay['contrasts'])}
    worth, gain = rows[:2]
    assert (worth['kind'], gain['kind']) == ('worth', 'gain')
    assert worth['mean'] == pytest.approx(100 * of_decay[worth['contrast']])
    assert gain['mean'] == pytest.approx(100 * of_decay['psBN x 20 over BN x 20'])
    (bn,) = (cell for cell in rows_of(decay['cells']) if cell['arm'] == 'BN x 20')
    assert worth['lost'] == bn['collapsed'] > 0


def test_alpha(work_dir):
    run('alpha', work_dir)
    result = result_of('alpha', work_dir)
    assert [row['shift'] for row in rows_of(result['scratch'])] == [0, 0.02, 0.5]
    slow, fast = rows_of(result['recovery'])
    assert slow['shift'] < fast['shift']
    assert slow['predicted_at'][1] > fast['predicted_at'][1]
