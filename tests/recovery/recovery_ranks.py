"""One of two ranks over gloo: trains a network with closed filters under DDP, with recovery.

python recovery_ranks.py RANK FOLDER: joins through a file in FOLDER, and saves what came out there.
Filter 2 of the first norm is closed on rank 0 and open on rank 1, and gets no gradient on either.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psbn_mmdet.collapse import trace_structure
from psbn_mmdet.layers import PostShiftedBatchNorm2d
from psbn_mmdet.recovery import Recovery

STEPS = 60


def main(rank: int, folder: Path) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/join', rank=rank, world_size=2)
    torch.manual_seed(0)
    norm = PostShiftedBatchNorm2d(6).eval()  # so that what is open depends on the batch
    net = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.ReLU(), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        norm.weight[:2], norm.bias[:2] = 0.05, -0.7  # closed on both
        norm.weight[2], norm.bias[2] = 1.0, -2.9
        net[0].weight[:2] *= 1e-3  # as after a long time
        net[3].weight[:, :2] *= 1e-2
        net[3].weight[:, 2] = 0  # no gradient comes to filter 2
        net[0].weight[2], net[0].bias[2] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1), 0.0
    net[3].weight.register_hook(
        lambda grad: grad * torch.tensor([1, 1, 0, 1, 1, 1.0]).view(6, 1, 1)
    )
    generator = torch.Generator().manual_seed(rank)
    images = torch.rand(4, 3, 5, 5, generator=generator)
    images[:, 0] = 5.0 * rank
    structure = trace_structure(net, images)
    assert structure.rectifiers == {'1': 'relu'}
    model = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    errors = []

    def failed(error: Exception | None) -> None:
        errors.append(f'{type(error).__name__}: {error}' if error else 'None')

    recovery = Recovery(net, [optimizer], structure, 20, 3, failed, list)
    collectives, reduce = [], dist.all_reduce

    def counted(*args, **kwargs):
        collectives.append(args[0].numel())
        return reduce(*args, **kwargs)

    dist.all_reduce = counted
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    opened = recovery.opened()['1']
    ended = [recovery.ended]
    if rank == 0:
        recovery._fail(RuntimeError('on this rank'))
    for _ in range(4):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    ended.append(recovery.ended)
    with torch.no_grad():
        is_open = net[:3](images).amax((0, 2, 3)) > 0
    content = dict(
        state=net.state_dict(),
        opened=opened,
        is_open=is_open,
        collectives=collectives,
        ended=ended,
        errors=errors,
    )
    torch.save(content, folder / f'rank_{rank}.pth')
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an exit of the interpreter


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
