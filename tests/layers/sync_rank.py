"""A rank of the test of psSyncBN over CPUs: ``python sync_rank.py INDEX FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from psbn_mmdet.layers import PostShiftedSyncBatchNorm

SIZES = (3, 1)  # of the ranks' batches
SHAPES = [(4, 5, 6, 3), (4, 5), (4, 5, 2, 3, 2)]
SETTINGS = {
    'plain': {},
    'average': dict(momentum=None),
    'frozen': dict(momentum=0.0),
    'no statistics': dict(track_running_stats=False),
    'no gamma': dict(affine=False),
}


def made(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, the whole batch, and the gradient of its output."""
    torch.manual_seed(0)
    layer = PostShiftedSyncBatchNorm(5, shift=0.2, **SETTINGS[name])
    for param in layer.parameters():
        nn.init.normal_(param)
    return layer, 3 + 2 * torch.randn(shape), torch.randn(shape)


def result(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """After two steps: what it put out, and what else it left."""
    x = x.clone().requires_grad_()
    layer(x.detach() + 1)
    y = layer(x)
    y.backward(gradient)
    found = {'y': y.detach(), 'dx': x.grad}
    found |= {f'd{name}': param.grad for name, param in layer.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def rank(index: int, folder: Path) -> None:
    """One of the ranks: each case, and what is refused."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/group', rank=index, world_size=2
    )
    begin = sum(SIZES[:index])
    mine = slice(begin, begin + SIZES[index])
    found: dict = {}
    for name in SETTINGS:
        for shape in SHAPES:
            layer, x, gradient = made(name, shape)
            found[name, shape] = result(layer, x[mine], gradient[mine])
    layer, x, gradient = made('plain', SHAPES[0])
    x, gradient = x[mine].bfloat16(), gradient[mine].bfloat16()
    found['half'] = result(layer, x, gradient)
    found['eval'] = layer.eval()(x.float()).detach()
    layer = PostShiftedSyncBatchNorm(5)
    try:
        layer(torch.zeros(1 - index, 5, 1, 1))
    except ValueError as error:
        found['refused'] = str(error)
    torch.save(found, folder / f'{index}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    rank(int(sys.argv[1]), Path(sys.argv[2]))
