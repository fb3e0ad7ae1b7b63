"""The law: do gamma and beta drift towards sparser under noise, as lr^2 and as 1/gamma^2?

Measured on a BN + ReLU layer of thousands of independent channels, into whose output pure gradient
noise is fed, so that gamma and beta get it through the rectifier, and none where it is closed. Then
on the gradients of small networks in training.

With e = lr * sigma / |gamma| and z ~ N(0, 1), a step moves log|gamma| by E log|1 + e z| =
-e^2/2 - 3 e^4/4 - 15 e^6/6 - ... (asymptotic), which is in closed form

    g(0) + sqrt(2) * integral from 0 to 1/e of Dawson(t / sqrt 2) dt + log e,
    g(0) = -(Euler's constant + log 2) / 2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Experiment,
    local_slopes,
    mean_ci,
    share_ci,
    slope_ci,
    table,
)
from digits import Nets, by_net, draw_batches, load_data, loss_of, structure_of, train
from matplotlib.figure import Figure
from scipy import integrate, optimize, special
from torch import nn

from psbn_mmdet.collapse import RECTIFIERS, find_norms
from psbn_mmdet.layers import rectifier_closed

PARAMETERS = np.geomspace(0.002, 4, 23)  # e of the one-step drift
SPREADS = (
    0.25,
    0.3,
    0.35,
    0.42,
    0.5,
    0.7,
    1,
    1.4,
    2,
    2.8,
    4,
    8,
    16,
    32,
)  # lr sigma sqrt(N) / gamma


def expected_drift(e: float) -> float:
    """E log|1 + e z| for z ~ N(0, 1)."""
    start = -(np.euler_gamma + np.log(2)) / 2
    u = 1 / (e * np.sqrt(2))
    if u > 3:  # the same from the other end, where nothing large cancels
        return -integrate.quad(lambda t: 2 * special.dawsn(t) - 1 / t, u, np.inf)[0]
    return start + 2 * integrate.quad(special.dawsn, 0, u)[0] + np.log(e)


def noisy_gradients(
    layer: nn.BatchNorm1d, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gamma and beta when noise of variance 2 / batch arrives behind the ReLU.

    Half of the inputs are let through at beta = 0, so that sigma is 1 there.
    """
    shape = (batch, layer.num_features)
    kind = dict(generator=generator, dtype=layer.weight.dtype)
    output = layer(torch.randn(shape, **kind)).relu()
    noise = torch.randn(shape, **kind) * (2 / batch) ** 0.5
    return torch.autograd.grad(output, (layer.weight, layer.bias), noise)


def one_step(lr: float, gamma: float, channels: int, seed: int) -> list[dict]:
    """The change of log|gamma| in one step; with each noise its opposite, which halves the work."""
    layer = nn.BatchNorm1d(channels, eps=1e-12).double()
    nn.init.constant_(layer.weight, gamma)
    grad, _ = noisy_gradients(layer, 64, torch.Generator().manual_seed(seed))
    e = lr * grad / gamma
    change = ((1 + e).abs().log() + (1 - e).abs().log()) / 2
    smaller = (((1 + e).abs() < 1).double() + ((1 - e).abs() < 1).double()).mean() / 2
    return [
        {
            'lr': lr,
            'gamma': gamma,
            'sigma': float(grad.square().mean().sqrt()),
            'drift': float(change.mean()),
            'standard_error': float(change.std() / channels**0.5),
            'steps_to_smaller': float(smaller),
        }
    ]


def walk(lr: float, gamma: float, steps: int, channels: int, seed: int) -> list[dict]:
    """How many channels have been in the non-trainable region, after N steps."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm1d(channels, eps=1e-12)
    nn.init.constant_(layer.weight, gamma)
    entered = torch.zeros(channels, dtype=torch.bool)
    rows = []
    for step in range(1, steps + 1):
        grads = noisy_gradients(layer, 32, generator)
        with torch.no_grad():
            layer.weight -= lr * grads[0]
            layer.bias -= lr * grads[1]
            inside = rectifier_closed(layer.weight, layer.bias)
            entered |= inside
        if step in (steps // 16, steps // 4, steps):
            row = {'lr': lr, 'gamma': gamma, 'steps': step, 'channels': channels}
            size = float(layer.weight.detach().abs().log().mean().exp())
            rows.append(
                {
                    **row,
                    'entered': int(entered.sum()),
                    'inside': int(inside.sum()),
                    'geometric_mean_gamma': size,
                }
            )
    return rows


def real_noise(
    arch: str, spread: str, seeds: Sequence[int], steps: int, batches: int
) -> list[dict]:
    """The drift by a trained network's own gradient noise: one SGD step on each of many batches.

    The scales are fixed while the rest is trained. They are drawn log-uniform from [0.05, 1], for
    each filter by itself ('filters'), or are the same in a whole layer and differ between the
    networks, all layers but the last alike ('layers').
    """
    data = load_data()
    nets = Nets(arch, 'BN', 'relu', seeds)
    n = len(seeds)
    norms = list(nets.norms) if spread == 'filters' else list(nets.norms)[:-1]
    for place, norm in enumerate(norms):
        drawn = torch.rand(norm.num_features, generator=torch.Generator().manual_seed(place))
        if spread == 'layers':
            drawn = torch.linspace(0, 1, n).repeat_interleave(norm.num_features // n)
        norm.weight.data = 0.05 ** (1 - drawn)
    rest = [p for module in (nets.convs, nets.head) for p in module.parameters()]
    train(
        nets,
        data,
        torch.optim.SGD(rest, lr=0.02, momentum=0.9),
        draw_batches(data, seeds, steps),
    )
    gammas = [norm.weight for norm in norms]
    gradients = torch.stack(
        [
            torch.cat(torch.autograd.grad(loss_of(nets, data, batch), gammas))
            for batch in draw_batches(data, seeds, batches, first=1)
        ]
    ).double()
    gamma = torch.cat(gammas).detach().double()
    noise = gradients - gradients.mean(0)
    sigma = noise.std(0)
    usable = (sigma > 1e-6).numpy()  # a filter that is closed has no noise

    def drift_at(lr: float) -> torch.Tensor:
        e = lr * noise / gamma
        return ((1 + e).abs().log() + (1 - e).abs().log()).mean(0)[usable] / 2

    over_lr = [
        {
            'lr': float(lr),
            'e': float((lr * sigma / gamma)[usable].square().mean().sqrt()),
            'drift': float(drift_at(lr).mean()),
        }
        for lr in np.geomspace(1e-3, 100, 26)
    ]
    # At a rate small enough for the square law: each filter's drift over its gamma, by layer.
    x, y = gamma.log().numpy()[usable], (-drift_at(1e-2)).log().numpy()
    layer = np.repeat(np.arange(len(gammas)), [len(g) for g in gammas])[usable]
    for values in (x, y):
        for place in np.unique(layer):
            values[layer == place] -= values[layer == place].mean()
    # Where noise moves log|gamma| as far as the mean gradient does: lr sigma^2 / 2 gamma^2 = |mean|
    # / gamma. The mean itself is known up to sigma / sqrt(batches).
    even = (2 * gradients.mean(0).abs() * gamma / sigma.square())[usable]
    return [
        {
            'over_lr': over_lr,
            'over_gamma': slope_ci(np.exp(x), np.exp(y)),
            'filters': int(usable.sum()),
            'sigma': float(sigma[usable].median()),
            'lr_where_noise_equals_mean': [float(q) for q in np.percentile(even, [25, 50, 75])],
        }
    ]


def real_walk(arch: str, lr: float, gamma: float, steps: int, seeds: Sequence[int]) -> list[dict]:
    """How many filters before a ReLU come into the region, by plain SGD without weight decay.

    A quarter of each layer's filters starts at ``gamma``, all others at 1; only that quarter is
    counted, whatever gamma is.
    """
    data = load_data()
    nets = Nets(arch, 'BN', 'relu', seeds)
    n = len(seeds)
    rectifiers = structure_of(nets, data).rectifiers
    norms = [norm for name, norm in find_norms(nets).items() if rectifiers.get(name) in RECTIFIERS]
    chosen = []
    for norm in norms:
        mask = torch.arange(norm.num_features) % 4 == 0
        norm.weight.data[mask] = gamma
        chosen.append(mask)
    entered = [torch.zeros(norm.num_features, dtype=torch.bool) for norm in norms]

    def look(step: int) -> None:
        with torch.no_grad():
            for seen, norm in zip(entered, norms):
                seen |= rectifier_closed(norm.weight, norm.bias)

    optimizer = torch.optim.SGD(nets.parameters(), lr=lr)
    train(nets, data, optimizer, draw_batches(data, seeds, steps), after_step=look)
    counted = by_net([(e & c).numpy() for e, c in zip(entered, chosen)], n).sum(1)
    filters = sum(int(c.sum()) for c in chosen) // n
    return [
        {'seed': seed, 'entered': int(count), 'filters': filters}
        for seed, count in zip(seeds, counted)
    ]


def settings(quick: bool) -> list[dict]:
    """All runs; 'part' says of what."""
    channels, steps, seeds = (500, 64, [0, 1]) if quick else (20000, 1000, list(range(10)))
    parameters = PARAMETERS[::4] if quick else PARAMETERS
    spreads = SPREADS[2::5] if quick else SPREADS
    archs = ('vgg',) if quick else ('vgg', 'resnet')
    root = steps**0.5
    walks = channels // 5
    runs = [
        dict(part='one_step', lr=lr, gamma=gamma, channels=channels, seed=seed)
        for seed, (lr, gamma) in enumerate(
            [(e, 1.0) for e in parameters.tolist()] + [(0.1, 0.1 / e) for e in parameters.tolist()]
        )
    ]
    runs += [
        dict(part='walk', lr=lr, gamma=gamma, steps=steps, channels=walks, seed=seed)
        for seed, (lr, gamma) in enumerate(
            [(s / root, 1.0) for s in spreads] + [(0.03, 0.03 * root / s) for s in spreads]
        )
    ]
    runs += [
        dict(
            part='real_noise', arch=arch, spread=spread, seeds=seeds, steps=steps // 3, batches=256
        )
        for arch in archs
        for spread in ('filters', 'layers')
    ]
    lrs = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    gammas = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    pairs = [(lr, 0.1) for lr in lrs] + [(0.1, gamma) for gamma in gammas if gamma != 0.1]
    runs += [
        dict(part='real_walk', arch=arch, lr=lr, gamma=gamma, steps=steps // 3, seeds=seeds)
        for arch in archs
        for lr, gamma in (pairs[::3] if quick else pairs)
    ]
    return runs


def run(part: str, **setting) -> list[dict]:
    """One run of one part."""
    parts = {'one_step': one_step, 'walk': walk, 'real_noise': real_noise, 'real_walk': real_walk}
    return parts[part](**setting)


def slopes_of_drift(rows: list[dict], over: str) -> dict:
    """The power of the one-step drift in the regime of the law, and from point to point."""
    rows = sorted(rows, key=lambda row: row[over])
    law = [row for row in rows if row['lr'] / row['gamma'] <= 0.1]
    inner = [row for row in rows if row['lr'] / row['gamma'] <= 0.7]
    return {
        'slope': slope_ci([row[over] for row in law], [-row['drift'] for row in law]),
        'local': local_slopes(
            [row[over] for row in inner],
            [-row['drift'] for row in inner],
            [row['standard_error'] for row in inner],
        ),
    }


def slopes_of_walk(rows: list[dict], over: str) -> dict:
    """The power of the share that entered, from point to point and over all of them."""
    rows = [row for row in sorted(rows, key=lambda row: row[over]) if row['entered'] >= 5]
    shares = [row['entered'] / row['channels'] for row in rows]
    errors = [(p * (1 - p) / row['channels']) ** 0.5 for p, row in zip(shares, rows)]
    x = [row[over] for row in rows]
    return {
        'slope': slope_ci(x, shares),
        'local': local_slopes(x, shares, errors),
        'shares': [share_ci(row['entered'], row['channels']) for row in rows],
    }


def share_by_run(runs: list[tuple[dict, list[dict]]]) -> list[dict]:
    """Of the real networks: mean share of the counted filters that entered, over seeds."""
    rows = []
    for setting, seeds in runs:
        shares = [row['entered'] / row['filters'] for row in seeds]
        mean, low, high = mean_ci(shares)
        row = {key: setting[key] for key in ('arch', 'lr', 'gamma')}
        error = float(np.std(shares, ddof=1) / len(shares) ** 0.5)
        rows.append({**row, 'share': mean, 'low': low, 'high': high, 'standard_error': error})
    return rows


def summarise(finished: list[tuple[dict, list[dict]]]) -> dict:
    """Tables of all runs, slopes and the regime's boundaries."""
    parts: dict[str, list] = {}
    for setting, rows in finished:
        parts.setdefault(setting['part'], []).append((setting, rows))
    steps = [row for _, rows in parts['one_step'] for row in rows]
    walks = [row for _, rows in parts['walk'] for row in rows]
    shares = share_by_run(parts['real_walk'])
    last = max(row['steps'] for row in walks)
    ends = [row for row in walks if row['steps'] == last]
    slopes = {
        'drift over lr': slopes_of_drift([row for row in steps if row['gamma'] == 1], 'lr'),
        'drift over gamma': slopes_of_drift([row for row in steps if row['gamma'] != 1], 'gamma'),
        'entering over lr': slopes_of_walk([row for row in ends if row['gamma'] == 1], 'lr'),
        'entering over gamma': slopes_of_walk([row for row in ends if row['gamma'] != 1], 'gamma'),
    }
    for arch in dict.fromkeys(row['arch'] for row in shares):
        for over, fixed in (('lr', 'gamma'), ('gamma', 'lr')):
            rows = [
                row
                for row in shares
                if row['arch'] == arch and row[fixed] == 0.1 and row['share'] > 0
            ]
            rows.sort(key=lambda row: row[over])
            x, y = ([row[key] for row in rows] for key in (over, 'share'))
            slopes[f'{arch}: entering over {over}'] = {
                'slope': slope_ci(x, y) if len(x) > 1 else None,
                'local': local_slopes(x, y, [row['standard_error'] for row in rows]),
            }
    noises = []
    curves = []
    for setting, (row,) in parts['real_noise']:
        kind = {'arch': setting['arch'], 'spread': setting['spread']}
        low = [point for point in row['over_lr'] if point['e'] <= 0.05]
        over_lr = slope_ci([p['lr'] for p in low], [-p['drift'] for p in low])
        noises.append({**kind, **row, 'over_lr': over_lr})
        curves += [{**kind, **point} for point in row['over_lr']]
    local = np.array(slopes['entering over lr']['local'])[::-1]
    spread = np.exp(np.interp(2, local[:, 1], np.log(local[:, 0] * last**0.5)))
    steepest = optimize.minimize_scalar(expected_drift, bounds=(0.3, 1.5), method='bounded')
    return {
        'law': {
            'steepest_at_e': round(steepest.x, 4),
            'steepest_drift': round(steepest.fun, 4),
            'no_drift_at_e': round(optimize.brentq(expected_drift, 1, 4), 4),
            'entering_has_power_2_at': round(float(spread), 2),
        },
        'slopes': slopes,
        'real_noise': noises,
        'one_step': table(steps),
        'walk': table(walks),
        'real_walk': table(shares),
        'real_drift': table(curves),
    }


def draw(summary: dict) -> Figure:
    """Drift, entering, its power, and real networks."""
    figure = Figure(figsize=(10, 8), layout='constrained')
    axes = figure.subplots(2, 2)
    steps, walks, shares, curves = (
        [dict(zip(summary[name]['columns'], row)) for row in summary[name]['rows']]
        for name in ('one_step', 'walk', 'real_walk', 'real_drift')
    )
    ax = axes[0, 0]
    e = np.geomspace(1e-3, 4, 400)
    exact = np.array([expected_drift(value) for value in e])
    ax.plot(e, e**2 / 2, '--', color=GREY, label='$e^2/2$')
    ax.plot(e, np.where(exact < 0, -exact, np.nan), color='black', lw=1, label='exact, to sparser')
    ax.plot(e, np.where(exact > 0, exact, np.nan), ':', color='black', label='exact, to larger')
    for colour, chosen, label in (
        (BLUE, [row for row in steps if row['gamma'] == 1], 'BN + ReLU, lr varied'),
        (ORANGE, [row for row in steps if row['gamma'] != 1], 'BN + ReLU, gamma varied'),
    ):
        x = [row['lr'] / row['gamma'] for row in chosen]
        ax.plot(x, [abs(row['drift']) for row in chosen], 'o', ms=4, color=colour, label=label)
    real = [row for row in curves if row['spread'] == 'filters' and 1e-3 < row['e'] < 4]
    x, y = [row['e'] for row in real], [abs(row['drift']) for row in real]
    ax.plot(x, y, 'x', ms=4, color=GREEN, label='trained networks, e as r.m.s.')
    ax.set(xscale='log', yscale='log', ylim=(1e-7, 3))
    ax.set_xlabel('e = lr sigma / |gamma|')
    ax.set_ylabel('|drift of log |gamma|| per step')
    slope = summary['slopes']['drift over lr']['slope']
    law = summary['law']
    ax.set_title(
        f'Drift: lr to the power {slope[0]:.2f} up to e = 0.1, '
        f'\nto larger beyond e = {law["no_drift_at_e"]:.2f}',
        fontsize=10,
    )
    ax.legend(fontsize=7)

    ax = axes[0, 1]
    counts = sorted({row['steps'] for row in walks})
    for number, marker in zip(counts, 'v^o'):
        for colour, varied in ((BLUE, 'lr'), (ORANGE, 'gamma')):
            chosen = [
                row
                for row in walks
                if row['steps'] == number and (row['gamma'] == 1) == (varied == 'lr')
            ]
            x = [row['lr'] * number**0.5 / row['gamma'] for row in chosen]
            y = [row['entered'] / row['channels'] or np.nan for row in chosen]
            label = f'N = {number}, {varied} varied'
            ax.plot(x, y, marker, ms=4, color=colour, label=label, mfc='none')
    x = np.array([0.3, 1.2])
    ax.plot(x, 0.3 * x**2, '--', color=GREY, label='slope 2')
    ax.set(xscale='log', yscale='log', xlabel='lr sigma sqrt(N) / |gamma| at the start')
    ax.set_ylabel('share of filters that entered')
    ax.set_title(
        'Entering the non-trainable region:\na function of lr sqrt(N) / gamma', fontsize=10
    )
    ax.legend(fontsize=7)

    ax = axes[1, 0]
    power = summary['slopes']['entering over lr']
    last = counts[-1] ** 0.5
    for name, colour, sign in (('lr', BLUE, 1), ('gamma', ORANGE, -1)):
        local = np.array(summary['slopes'][f'entering over {name}']['local'])
        x = local[:, 0] * last if name == 'lr' else 0.03 * last / local[:, 0]
        middle, low, high = sign * local[:, 1], local[:, 2], local[:, 3]
        spread = (high - low) / 2
        ax.errorbar(x, middle, spread, fmt='o-', ms=4, color=colour, label=f'over {name}')
    ax.axhline(2, ls='--', color=GREY, label='2, as claimed')
    ax.set(xscale='log', xlabel='lr sigma sqrt(N) / |gamma| at the start')
    ax.set_ylabel('local power (of 1 / gamma for gamma)')
    first, final = power['local'][0][1], power['local'][-1][1]
    ax.set_title(f'Its power falls from {first:.1f} to {final:.1f}: no power law', fontsize=10)
    ax.legend(fontsize=7)

    ax = axes[1, 1]
    for arch, marker in zip(dict.fromkeys(row['arch'] for row in shares), 'os'):
        for colour, fixed, name in ((BLUE, 'gamma', 'lr'), (ORANGE, 'lr', 'gamma')):
            chosen = [
                row
                for row in shares
                if row['arch'] == arch and row[fixed] == 0.1 and row['share'] > 0
            ]
            x = [row['lr'] / row['gamma'] for row in chosen]
            y = np.array([row['share'] for row in chosen])
            bars = np.array(
                [[row['share'] - row['low'], row['high'] - row['share']] for row in chosen]
            )
            bars = np.minimum(bars, y[:, None] * 0.95).T if len(y) else None
            ax.errorbar(
                x,
                y,
                bars,
                fmt=marker,
                ms=4,
                color=colour,
                mfc='none',
                label=f'{arch}, {name} varied',
            )
    x = np.array([0.5, 3])
    ax.plot(x, 0.02 * x**2, '--', color=GREY, label='slope 2')
    ax.set(xscale='log', yscale='log', xlabel='lr / |gamma| at the start')
    ax.set_ylabel('share of filters that entered')
    slopes = [
        value['slope'][0]
        for name, value in summary['slopes'].items()
        if ': entering over lr' in name and value['slope']
    ]
    ax.set_title(
        'Small networks in training: lr to the power '
        + ' and '.join(f'{slope:.1f}' for slope in slopes),
        fontsize=10,
    )
    ax.legend(fontsize=7)
    for ax in axes.flat:
        ax.grid(alpha=0.3, lw=0.5)
    return figure


if __name__ == '__main__':
    experiment = Experiment('law', __doc__)
    summary = summarise(experiment.run(settings(experiment.quick), run))
    experiment.write(**summary)
    experiment.save(draw(summary))
    for name, value in summary['slopes'].items():
        print(f'{name}: {value["slope"]}')
