"""One of two ranks over gloo: trains a network with closed filters under DDP, with recovery.

python recovery_ranks.py RANK FOLDER: joins through a file in FOLDER, and saves what came out there.
Filter 2 of the first norm is closed on rank 0 and open on rank 1, and gets no gradient on either.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psbn_mmdet.collapse import Recovery, trace_rectifiers
from psbn_mmdet.layers import PostShiftedBatchNorm2d

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
    assert trace_rectifiers(net, images) == {'1': 'relu'}
    model = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def failed(error: Exception) -> None:
        raise error

    recovery = Recovery(
        [optimizer], {'1': norm}, {'1': norm}.get, 20, 3, lambda _: (net[0], [net[3]]), failed
    )
    collectives, wait = [], dist.barrier
    for name in ('all_reduce', 'broadcast', 'all_gather', 'barrier', 'all_gather_object'):
        setattr(dist, name, lambda *args, _name=name, **kwargs: collectives.append(_name))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        is_open = net[:3](images).amax((0, 2, 3)) > 0
    content = dict(
        state=net.state_dict(),
        opened=recovery.opened()['1'],
        is_open=is_open,
        collectives=collectives,
    )
    torch.save(content, folder / f'rank_{rank}.pth')
    wait()
    os._exit(0)  # gloo's threads now and then abort an exit of the interpreter


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
