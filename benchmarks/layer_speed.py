"""What psBN costs beside BN, and beside the naive ``BN(x) + 0.1``: time and memory.

The layers run over the BN shapes of ResNet-50, forward + backward in training mode and forward in
evaluation mode. In each round all three run once, in an order that changes from round to round, on
the same input; each round gives a ratio to BN, of which the median and the quartiles are reported.
By default two images of 800 x 800 px, the size at which MMDetection trains on COCO.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import hardware, side_by_side, spread, timed, write  # noqa: E402

from psbn_mmdet.layers import PostShiftedBatchNorm2d  # noqa: E402


class BNPlusShift(nn.BatchNorm2d):
    """The naive way: one more pass over the activations."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """BN, then the constant."""
        return super().forward(input) + 0.1


LAYERS = {'BN': nn.BatchNorm2d, 'psBN': PostShiftedBatchNorm2d, 'BN(x) + 0.1': BNPlusShift}


def resnet50_shapes(height: int, width: int) -> Counter:
    """The (channels, height, width) of ResNet-50's 53 BN layers, with how often each occurs."""
    shapes = Counter({(64, -(-height // 2), -(-width // 2)): 1})
    size = -(-height // 4), -(-width // 4)
    for stage, (blocks, channels) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512))):
        for block in range(blocks):
            before = size
            if stage and not block:
                size = -(-size[0] // 2), -(-size[1] // 2)
            shapes[(channels, *before)] += 1
            shapes[(channels, *size)] += 1
            shapes[(4 * channels, *size)] += 1 + (not block)  # and the shortcut's
    return shapes


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes allocated at the peak of a run, beyond what is there before it."""
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    level = np.zeros(0)
    while not level.any():  # a short run may fall out of the profiler's window
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            run()
        changes = [
            (event.start_ns(), event.nbytes())
            for event in prof.profiler.kineto_results.events()
            if event.name() == '[memory]'
        ]
        level = np.cumsum([change for _, change in sorted(changes)])
    return int(level.max())


def time_shape(
    channels: int, side: int, args: argparse.Namespace, device: torch.device
) -> dict[str, dict]:
    """Ratios to BN of all layers, for one shape."""
    x = torch.randn(args.batch_size, channels, side, side, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    layers = {name: layer(channels).to(device) for name, layer in LAYERS.items()}
    # psBN looks at its bias until the first step.
    torch.optim.SGD(layers['psBN'].parameters(), lr=0.0).step()

    def train(name: str) -> None:
        layers[name].train()
        layers[name](x).backward(gradient)
        layers[name].zero_grad()
        x.grad = None

    def evaluate(name: str) -> None:
        layers[name].eval()
        with torch.no_grad():
            layers[name](x)

    result = {}
    for mode, run in (('train', train), ('eval', evaluate)):
        once = max(timed(partial(run, 'BN'), 3, device) for _ in range(3))
        repeats = max(1, round(args.slot / once))
        runs = {name: partial(run, name) for name in LAYERS}
        times = side_by_side(runs, args.rounds, repeats, device)
        memory = {name: peak_memory(runs[name], device) for name in LAYERS}
        result[mode] = {
            'bn_ms': 1e3 * float(np.median(times['BN'])),
            **{
                name: {
                    'ratio': list(spread(times[name] / times['BN']).values()),
                    'memory_ratio': memory[name] / memory['BN'],
                }
                for name in LAYERS
                if name != 'BN'
            },
        }
    return result


def main() -> None:
    """Time all shapes, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--image', type=int, default=800, help='side of the input image')
    parser.add_argument('--rounds', type=int, default=24)
    parser.add_argument('--slot', type=float, default=0.03, help='seconds per measurement')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', help='JSON file, else benchmarks/results/layer_speed_DEVICE.json')
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rows = []
    print(f'{"channels":>8} {"side":>5} {"layers":>6}   ratio to BN: median [quartiles]')
    for (channels, side, _), count in resnet50_shapes(args.image, args.image).items():
        row = {'channels': channels, 'side': side, 'layers': count}
        row.update(time_shape(channels, side, args, device))
        rows.append(row)
        for mode in ('train', 'eval'):
            cells = []
            for name in ('psBN', 'BN(x) + 0.1'):
                q25, median, q75 = row[mode][name]['ratio']
                cells.append(f'{name} {median:.3f} [{q25:.3f}, {q75:.3f}]')
            print(
                f'{channels:>8} {side:>5} {count:>6}   {mode:<5} BN {row[mode]["bn_ms"]:8.3f} ms   '
                + '   '.join(cells),
                flush=True,
            )
    summary = {
        f'{mode}: {name}': {
            'median_ratio': float(np.median([row[mode][name]['ratio'][1] for row in rows])),
            'largest_memory_ratio': max(row[mode][name]['memory_ratio'] for row in rows),
        }
        for mode in ('train', 'eval')
        for name in LAYERS
        if name != 'BN'
    }
    for name, values in summary.items():
        print(
            f'{name:<20} median over shapes {values["median_ratio"]:.4f} of BN, peak memory '
            f'{values["largest_memory_ratio"]:.4f} of BN at most'
        )
    result = {
        'hardware': hardware(device),
        'torch': torch.__version__,
        'arguments': {k: v for k, v in vars(args).items() if k != 'out'},
        'summary': summary,
        'shapes': rows,
    }
    write(result, f'layer_speed_{device.type}', args.out)


if __name__ == '__main__':
    main()
