"""A rank of the test of psBN's decay on two processes: ``python decay_rank.py INDEX FOLDER``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

import psbn_mmdet  # noqa: F401
from psbn_mmdet.layers.decay import PASSES

STEPS = 8
SETTINGS = dict(lr=0.05, weight_decay=0.1)


def network(norm: str | type[nn.Module]) -> nn.Module:
    """Two blocks and a linear layer; by name MMCV's blocks, which set all biases to 0."""
    torch.manual_seed(0)
    if isinstance(norm, str):
        cfg = dict(type=norm)
        blocks = [ConvModule(3, 6, 3, norm_cfg=cfg), ConvModule(6, 6, 3, norm_cfg=cfg)]
    else:
        blocks = [
            nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), norm(6), nn.ReLU()),
        ]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(96, 3))
    torch.manual_seed(1)
    for name, param in net.named_parameters():
        if param.dim() > 1 or name.startswith('3'):  # the blocks draw them in different ways
            nn.init.normal_(param, std=0.2)
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """On the same batches on all ranks, as one process would."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def biases(net: nn.Module) -> torch.Tensor:
    """Those of all norms, whole."""
    found = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            bias = module.bias.detach()
            found.append(bias.full_tensor() if hasattr(bias, 'full_tensor') else bias)
    return torch.cat(found)


def ddp(net: nn.Module) -> torch.Tensor:
    wrapped = nn.parallel.DistributedDataParallel(net)
    return biases(train(wrapped, SGD(wrapped.parameters(), **SETTINGS)).module)


def zero(net: nn.Module, **kwargs) -> torch.Tensor:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = nn.parallel.DistributedDataParallel(net)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), SGD, **SETTINGS, **kwargs)
    return biases(train(wrapped, optimizer).module)


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh('cpu', (2,))
    for block in net[:2]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def fsdp2(net: nn.Module) -> torch.Tensor:
    net = sharded(net)
    return biases(train(net, SGD(net.parameters(), **SETTINGS)))


def fsdp2_from_bn(net: nn.Module) -> torch.Tensor:
    """What loading BN weights with ``strict=False`` makes of the biases."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    bn = network('BN')
    for module in bn.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    net = sharded(net)
    options = StateDictOptions(strict=False, full_state_dict=True)
    set_model_state_dict(net, bn.state_dict(), options=options)
    return biases(net)


def fsdp1(net: nn.Module) -> list[str]:
    """What is said where the optimizer has flat parameters only."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(net, device_id=torch.device('cpu'))
    optimizer = AdamW(wrapped.parameters(), lr=1e-3)
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for step in range(PASSES + 1):
            y = wrapped(x).sum()
            if step == 0:
                y.backward()
                optimizer.step()
    return [str(w.message) for w in said if 'psBN' in str(w.message)]


# Trained as one process would; the others are asked something else.
CASES: dict[str, Callable] = {
    'DDP': ddp,
    'ZeRO': zero,
    'ZeRO, buckets': lambda net: zero(net, parameters_as_bucket_view=True),
    'FSDP2': fsdp2,
}
OTHERS: dict[str, Callable] = {'FSDP2 from BN': fsdp2_from_bn, 'FSDP1': fsdp1}


def rank(index: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/group', rank=index, world_size=2
    )
    found = {}
    for name, case in (CASES | OTHERS).items():
        try:
            found[name] = case(network('psBN'))
        except (ImportError, TypeError) as error:  # torch 2.1 has no FSDP on CPUs
            found[name] = error
    torch.save(found, folder / f'{index}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    rank(int(sys.argv[1]), Path(sys.argv[2]))
