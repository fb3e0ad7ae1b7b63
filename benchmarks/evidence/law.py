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

import math
from collections.abc import Sequence

import numpy as np
import torch
from digits import Nets, by_net, draw_batches, loss_of, structure_of, train
from matplotlib.figure import Figure
from scipy import integrate, optimize, special, stats
from study import Study, group_by, lines, markdown_table, mean_ci, rows_of, table
from torch import nn

from psbn_mmdet.collapse import RECTIFIERS, find_norms
from psbn_mmdet.layers import rectifier_closed

STUDY = Study('law', __doc__)
PARAMETERS = np.geomspace(0.002, 4, 23)  # e of the one-step drift
# lr sigma sqrt(N) / gamma
SPREADS = (0.25, 0.3, 0.35, 0.42, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 8, 16, 32)


def slope_ci(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Slope of log y over log x by least squares, and its 95 % confidence interval."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr if len(x) > 2 else math.nan
    return _rounded(fit.slope, fit.slope - half, fit.slope + half)


def local_slopes(
    x: Sequence[float], y: Sequence[float], standard_error: Sequence[float]
) -> list[list[float]]:
    """Slopes of log y over log x from each point to the next: x between, slope, interval."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    relative = np.asarray(standard_error, float) / np.exp(y)
    slope = np.diff(y) / np.diff(x)
    half = 1.96 * np.hypot(relative[1:], relative[:-1]) / np.abs(np.diff(x))
    rows = zip(np.exp((x[1:] + x[:-1]) / 2), slope, slope - half, slope + half)
    return [_rounded(*row) for row in rows]


def _rounded(*values: float) -> list[float]:
    return [float(f'{value:.5g}') if math.isfinite(value) else None for value in values]


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
            rows.append(
                {
                    'steps': step,
                    'entered': int(entered.sum()),
                    'inside': int(inside.sum()),
                    'geometric_mean_gamma': float(layer.weight.detach().abs().log().mean().exp()),
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
    nets = Nets(arch, 'BN', 'relu', seeds)
    n = len(seeds)
    norms = list(nets.norms) if spread == 'filters' else list(nets.norms)[:-1]
    for place, norm in enumerate(norms):
        drawn = torch.rand(norm.num_features, generator=torch.Generator().manual_seed(place))
        if spread == 'layers':
            drawn = torch.linspace(0, 1, n).repeat_interleave(norm.num_features // n)
        norm.weight.data = 0.05 ** (1 - drawn)
    rest = [p for module in (nets.convs, nets.head) for p in module.parameters()]
    train(nets, torch.optim.SGD(rest, lr=0.02, momentum=0.9), draw_batches(seeds, steps))
    gammas = [norm.weight for norm in norms]
    gradients = torch.stack(
        [
            torch.cat(torch.autograd.grad(loss_of(nets, batch), gammas))
            for batch in draw_batches(seeds, batches, first=1)
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
    nets = Nets(arch, 'BN', 'relu', seeds)
    n = len(seeds)
    rectifiers = structure_of(nets).rectifiers
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
    train(nets, optimizer, draw_batches(seeds, steps), look)
    counted = by_net([(e & c).numpy() for e, c in zip(entered, chosen)], n).sum(1)
    filters = sum(int(c.sum()) for c in chosen) // n
    return [
        {'seed': seed, 'entered': int(count), 'filters': filters}
        for seed, count in zip(seeds, counted)
    ]


def settings(quick: bool) -> list[dict]:
    """All runs; 'part' says of what."""
    channels, steps, seeds = (500, 64, [0, 1]) if quick else (20000, 1000, list(range(10)))
    parameters = (PARAMETERS[::4] if quick else PARAMETERS).tolist()
    spreads = SPREADS[2::5] if quick else SPREADS
    archs = ('vgg',) if quick else ('vgg', 'resnet')
    root = steps**0.5
    drifts = [(e, 1.0) for e in parameters] + [(0.1, 0.1 / e) for e in parameters]
    walks = [(s / root, 1.0) for s in spreads] + [(0.03, 0.03 * root / s) for s in spreads]
    pairs = [(lr, 0.1) for lr in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    pairs += [(0.1, gamma) for gamma in (0.01, 0.02, 0.05, 0.2, 0.5)]
    short = dict(seeds=seeds, steps=steps // 3)
    runs = [
        dict(part='one_step', lr=lr, gamma=gamma, channels=channels, seed=seed)
        for seed, (lr, gamma) in enumerate(drifts)
    ]
    runs += [
        dict(part='walk', lr=lr, gamma=gamma, steps=steps, channels=channels // 5, seed=seed)
        for seed, (lr, gamma) in enumerate(walks)
    ]
    runs += [
        dict(part='real_noise', arch=arch, spread=spread, batches=256, **short)
        for arch in archs
        for spread in ('filters', 'layers')
    ]
    runs += [
        dict(part='real_walk', arch=arch, lr=lr, gamma=gamma, **short)
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
    law = [(row[over], -row['drift']) for row in rows if row['lr'] / row['gamma'] <= 0.1]
    inner = [
        (row[over], -row['drift'], row['standard_error'])
        for row in rows
        if row['lr'] / row['gamma'] <= 0.7
    ]
    return {'slope': slope_ci(*zip(*law)), 'local': local_slopes(*zip(*inner))}


def slopes_of_walk(rows: list[dict], over: str) -> dict:
    """The power of the share that entered, over all of them and from point to point."""
    rows = [row for row in sorted(rows, key=lambda row: row[over]) if row['entered'] >= 5]
    x, shares = [row[over] for row in rows], [row['entered'] / row['channels'] for row in rows]
    errors = [(p * (1 - p) / row['channels']) ** 0.5 for p, row in zip(shares, rows)]
    return {'slope': slope_ci(x, shares), 'local': local_slopes(x, shares, errors)}


def share_by_run(records: list[dict]) -> list[dict]:
    """Of the real networks: mean share of the counted filters that entered, over seeds."""
    rows = []
    for (arch, lr, gamma), seeds in group_by(records, 'arch', 'lr', 'gamma').items():
        shares = [row['entered'] / row['filters'] for row in seeds]
        mean, low, high = mean_ci(shares)
        row = {'arch': arch, 'lr': lr, 'gamma': gamma, 'share': mean, 'low': low, 'high': high}
        rows.append({**row, 'standard_error': float(np.std(shares, ddof=1) / len(shares) ** 0.5)})
    return rows


def powers(steps: list[dict], walks: list[dict], shares: list[dict]) -> dict:
    """The slopes of everything measured; of walks those at their end."""
    last = max(row['steps'] for row in walks)
    ends = [row for row in walks if row['steps'] == last]
    slopes = {
        'drift over lr': slopes_of_drift([row for row in steps if row['gamma'] == 1], 'lr'),
        'drift over gamma': slopes_of_drift([row for row in steps if row['gamma'] != 1], 'gamma'),
        'entering over lr': slopes_of_walk([row for row in ends if row['gamma'] == 1], 'lr'),
        'entering over gamma': slopes_of_walk([row for row in ends if row['gamma'] != 1], 'gamma'),
    }
    for (arch,), rows in group_by(shares, 'arch').items():
        for over, fixed in (('lr', 'gamma'), ('gamma', 'lr')):
            found = [row for row in rows if row[fixed] == 0.1 and row['share'] > 0]
            found.sort(key=lambda row: row[over])
            x, y = ([row[key] for row in found] for key in (over, 'share'))
            slopes[f'{arch}: entering over {over}'] = {
                'slope': slope_ci(x, y) if len(x) > 1 else None,
                'local': local_slopes(x, y, [row['standard_error'] for row in found]),
            }
    return slopes


def power_over_lr(points: list[dict]) -> list[float]:
    """Of the drift by a network's own noise, where e is small."""
    low = [point for point in points if point['e'] <= 0.05]
    return slope_ci([p['lr'] for p in low], [-p['drift'] for p in low])


def boundaries(slopes: dict, steps: int) -> dict:
    """Where the law of the drift ends, and where entering follows a square."""
    local = np.array(slopes['entering over lr']['local'])[::-1]
    spread = np.exp(np.interp(2, local[:, 1], np.log(local[:, 0] * steps**0.5)))
    steepest = optimize.minimize_scalar(expected_drift, bounds=(0.3, 1.5), method='bounded')
    return {
        'steepest_at_e': round(steepest.x, 4),
        'steepest_drift': round(steepest.fun, 4),
        'no_drift_at_e': round(optimize.brentq(expected_drift, 1, 4), 4),
        'entering_has_power_2_at': round(float(spread), 2),
    }


def summarise(records: list[dict]) -> dict:
    """Tables of all runs, slopes and the regime's boundaries."""
    parts = {part: rows for (part,), rows in group_by(records, 'part').items()}
    walks, shares = parts['walk'], share_by_run(parts['real_walk'])
    slopes = powers(parts['one_step'], walks, shares)
    noises, curves = [], []
    for row in parts['real_noise']:
        kind = {'arch': row['arch'], 'spread': row['spread']}
        curves += [{**kind, **point} for point in row['over_lr']]
        keys = ('over_gamma', 'filters', 'sigma', 'lr_where_noise_equals_mean')
        measured = {key: row[key] for key in keys}
        noises.append({**kind, 'over_lr': power_over_lr(row['over_lr']), **measured})
    return {
        'law': boundaries(slopes, max(row['steps'] for row in walks)),
        'slopes': slopes,
        'real_noise': noises,
        'one_step': table(parts['one_step']),
        'walk': table(walks),
        'real_walk': table(shares),
        'real_drift': table(curves),
    }


def tell(result: dict) -> str:
    """The table of the page: the powers of the drift in trained networks."""
    rows = [
        [f'{row["arch"]}, {"each filter" if row["spread"] == "filters" else "each layer"}']
        + ['{:.2f} [{:.2f}, {:.2f}]'.format(*row[over]) for over in ('over_lr', 'over_gamma')]
        + [f'{row["lr_where_noise_equals_mean"][1]:.1f}']
        for row in result['real_noise']
    ]
    heads = ['networks, gamma drawn for', 'power over lr', 'power over gamma']
    return markdown_table([*heads, 'median lr where noise equals the mean gradient'], rows)


def draw(result: dict) -> Figure:
    """Drift, entering, its power, and real networks."""
    steps, walks, shares, curves = (
        rows_of(result[name]) for name in ('one_step', 'walk', 'real_walk', 'real_drift')
    )
    drift = '|drift of log |gamma|| per step,\nover e = lr sigma / |gamma|'
    enter = 'share that entered the region,\nover lr sigma sqrt(N) / |gamma|'
    power = 'its local power,\nover lr sigma sqrt(N) / |gamma|'
    networks = 'small networks: share that entered,\nover lr / |gamma|'
    e = np.geomspace(1e-3, 4, 400)
    points = [(drift, 'square law', '--', x, x**2 / 2) for x in e]
    points += [(drift, 'exact', '-', x, abs(expected_drift(x))) for x in e]
    points += [
        (drift, f'{varied(row)} varied', 'o', row['lr'] / row['gamma'], abs(row['drift']))
        for row in steps
    ]
    points += [
        (drift, 'trained networks, e as r.m.s.', 'o', row['e'], abs(row['drift']))
        for row in curves
        if row['spread'] == 'filters' and 1e-3 < row['e'] < 4
    ]
    points += [
        (
            enter,
            f'{varied(row)} varied, N = {row["steps"]}',
            'o',
            x,
            row['entered'] / row['channels'],
        )
        for row in walks
        for x in [row['lr'] * row['steps'] ** 0.5 / row['gamma']]
        if row['entered']
    ]
    root = max(row['steps'] for row in walks) ** 0.5
    for name in ('lr', 'gamma'):
        for at, *slope in result['slopes'][f'entering over {name}']['local']:
            x = at * root if name == 'lr' else 0.03 * root / at
            y = slope if name == 'lr' else [-slope[0], -slope[2], -slope[1]]
            points.append((power, f'{name} varied', 'o-', x, y))
    points += [
        (networks, f'{row["arch"]}, {name} varied', 'o', row['lr'] / row['gamma'], y)
        for row in shares
        for name, fixed in (('lr', 'gamma'), ('gamma', 'lr'))
        for y in [[row['share'], max(row['low'], 0.05 * row['share']), row['high']]]
        if row[fixed] == 0.1 and row['share'] > 0
    ]
    keys = ('panel', 'line', 'style', 'x', 'y')
    scales = {drift: 'xy', enter: 'xy', power: 'x', networks: 'xy'}
    return lines([dict(zip(keys, point)) for point in points], scales, columns=2)


def varied(row: dict) -> str:
    """Which of the two was varied, in a row with noise alone."""
    return 'lr' if row['gamma'] == 1 else 'gamma'


def main() -> None:
    """Measure, write."""
    STUDY.start()
    result = summarise(STUDY.run(settings(STUDY.quick), run))
    STUDY.publish(result, tell(result), draw(result))
    for name, value in result['slopes'].items():
        print(f'{name}: {value["slope"]}')


if __name__ == '__main__':
    main()
