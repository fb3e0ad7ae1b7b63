"""The first part of gpu.py: that psBN and the hooks compute what they should, on this device.

psBN is compared with the naive layer in one step from each of 200 states along a training of the
naive layer, 20 in the rehearsal. Over many steps rounding would grow, and a rectifier that flips
ends any likeness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cifar10 import CifarResNet
from hook_overhead import DETECTORS, attach, close, ready, step
from mmengine.hooks import Hook
from naive import ALPHA, NaivePSBN2d
from small_run import Classifier, run
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from psbn_mmdet.hooks import CollapseHook
from psbn_mmdet.layers import (
    PostShiftedBatchNorm2d,
    PostShiftedSyncBatchNorm,
    bn_to_psbn,
    psbn_to_bn,
)
from psbn_mmdet.pruning import ChannelTrace, cut_out, plan
from psbn_mmdet.pruning.compare import largest_difference

BATCHES = 8
_ADAM: dict[str, Any] = dict(lr=1e-3, weight_decay=0.5)
_sgd = partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.2)


@dataclass(frozen=True)
class Case:
    """A way of training."""

    optimizer: Callable[..., Optimizer] = _sgd
    autocast: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False
    compiled_step: bool = False
    graph: bool = False  # a CUDA graph of the whole step
    cuda: bool = False  # whether only CUDA has it


_FP16, _BF16 = torch.float16, torch.bfloat16
CASES = {
    'SGD': Case(),
    'AdamW': Case(partial(AdamW, **_ADAM)),
    'SGD, fused': Case(partial(_sgd, fused=True)),
    'AdamW, fused': Case(partial(AdamW, fused=True, **_ADAM)),
    'Adam, capturable': Case(partial(Adam, capturable=True, **_ADAM), cuda=True),
    'autocast fp16, GradScaler': Case(autocast=_FP16),
    'autocast fp16, GradScaler, AdamW fused': Case(partial(AdamW, fused=True, **_ADAM), _FP16),
    'autocast bf16': Case(autocast=_BF16),
    'channels_last': Case(channels_last=True),
    'channels_last, autocast fp16': Case(autocast=_FP16, channels_last=True),
    'torch.compile, network': Case(compiled=True),
    "torch.compile, optimiser's step": Case(compiled_step=True),
    'CUDA graph of the step': Case(graph=True, cuda=True),
    'CUDA graph of the step, AdamW fused': Case(
        partial(AdamW, capturable=True, fused=True, **_ADAM), graph=True, cuda=True
    ),
    'CUDA graph of the step, autocast bf16': Case(autocast=_BF16, graph=True, cuda=True),
}


def checks(context: Any) -> Iterator[tuple[str, Callable[[], dict]]]:
    """All checks: their names, and what does them."""
    device = context.device
    torch.backends.cudnn.allow_tf32 = False  # which rounds so much that rectifiers flip
    for name, case in CASES.items():
        if context.small and case.cuda:
            yield f'psBN as BN(x) + {ALPHA}: {name}', lambda: {'text': 'only CUDA has it'}
        else:
            steps = 20 if context.small else 200
            yield f'psBN as BN(x) + {ALPHA}: {name}', partial(compare, case, device, steps)
    yield 'psBN: steps that GradScaler skips', partial(skipped_steps, device)
    yield 'psSyncBN as psBN, in DDP, one process', partial(sync_bn, device, context.folder)
    yield 'psBN fused into convolutions', partial(fused, device)
    for name in ('faster-rcnn', 'retinanet'):
        do = partial(detector, name, context.drawn, context.folder)
        yield f'{name} with psBN trains', do
    yield 'a pruned detector as the whole one', partial(as_whole, context)
    do = partial(counts, device, context.drawn, context.folder)
    yield "CollapseHook's counts as on the CPU", do
    yield 'RecoveryHook until a filter opens', partial(recovery, device, context.folder)
    do = partial(recovery, device, context.folder, amp=True)
    yield 'RecoveryHook with AMP and skipped steps', do
    torch.backends.cudnn.allow_tf32 = True


# psBN against the naive layer


def network(norm: type[nn.BatchNorm2d], device: torch.device) -> nn.Sequential:
    """Three convolutions with norms; those that are BN start at a bias of alpha."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), norm(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), norm(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    for layer in norms_of(net):
        if type(layer) is nn.BatchNorm2d:
            nn.init.constant_(layer.bias, ALPHA)
    return net.to(device)


def norms_of(net: nn.Module) -> list[nn.BatchNorm2d]:
    """The norms of a network."""
    return [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Noise and labels that can be learned."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCHES, 32, 3, 16, 16, generator=generator)
    labels = (images.mean((2, 3, 4)) * 100).long().clamp(-5, 4) + 5
    return list(zip(images.to(device), labels.to(device)))


class Training:
    """A network, its optimiser, and steps in the way of a case."""

    def __init__(self, case: Case, norm: type[nn.BatchNorm2d], device: torch.device) -> None:
        self.case, self.device = case, device
        self.net = network(norm, device)
        self.shift = ALPHA if norm is not NaivePSBN2d else 0.0
        if case.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.forward = torch.compile(self.net) if case.compiled else self.net
        self.optimizer = case.optimizer(self.net.parameters())
        step = self.optimizer.step
        self.update = torch.compile(step) if case.compiled_step else step
        self.scaler = None
        if case.autocast is torch.float16:
            self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        self.images, self.labels = batches(device)[0]  # where a graph reads
        if case.channels_last:
            self.images = self.images.to(memory_format=torch.channels_last)
        self.done = 0
        self.graph: Any = None

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train by a step, and give beta of all layers."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        if not self.case.graph:
            self._step()
        elif self.done < 3:  # these make moments and the libraries' workspaces
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._step()
            torch.cuda.current_stream().wait_stream(beside)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._step()
            self.graph.replay()
        self.done += 1
        return self.beta()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.case.graph)
        dtype = self.case.autocast
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            loss = F.cross_entropy(self.forward(self.images).float(), self.labels)
        if self.scaler is None:
            loss.backward()
            self.update()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def beta(self) -> Tensor:
        """Of all layers."""
        return torch.cat([norm.bias.detach() for norm in norms_of(self.net)]) - self.shift

    @torch.no_grad()
    def take_over(self, naive: Training) -> None:
        """Start from the state of the naive layer's training; all tensors stay where they are."""
        self.net.load_state_dict(naive.net.state_dict())
        for norm in norms_of(self.net):
            norm.bias += self.shift
        for mine, other in zip(self.net.parameters(), naive.net.parameters()):
            for key, value in naive.optimizer.state[other].items():
                if isinstance(value, Tensor):
                    self.optimizer.state[mine][key].copy_(value)


def compare(case: Case, device: torch.device, steps: int) -> dict:
    """Difference of beta from the naive layer's after a step: psBN's, and that of BN."""
    eager = Case(case.optimizer, case.autocast, case.channels_last)
    naive = Training(eager, NaivePSBN2d, device)
    others = {
        'psBN': Training(case, PostShiftedBatchNorm2d, device),
        'BN': Training(eager, nn.BatchNorm2d, device),
    }
    seen = batches(device)
    apart: dict[str, list[Tensor]] = {name: [] for name in others}
    for number in range(steps):
        for other in others.values():
            other.take_over(naive)
        beta = naive.step(*seen[number % BATCHES])
        for name, other in others.items():
            apart[name].append((other.step(*seen[number % BATCHES]) - beta).abs())
    mean = {name: float(torch.stack(values).mean()) for name, values in apart.items()}
    most = {name: float(torch.stack(values).max()) for name, values in apart.items()}
    # A rectifier may flip by rounding, which a few channels show: so not the largest is judged. In
    # half precision the naive layer rounds once more.
    ok = mean['psBN'] <= (2e-5 if case.autocast else 1e-6) and 10 * mean['psBN'] < mean['BN']
    text = 'beta apart by {psBN:.0e} in the mean, BN by {BN:.0e}'.format(**mean)
    return {'ok': ok, 'text': f'{text}, at most {most["psBN"]:.0e}', 'mean': mean, 'most': most}


def skipped_steps(device: torch.device) -> dict:
    """That a bias is bit for bit what it was after steps that are skipped."""
    kept = []
    for fused_step in (False, True):
        net = network(PostShiftedBatchNorm2d, device)
        optimizer = AdamW(net.parameters(), fused=fused_step, **_ADAM)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        for number, (images, labels) in enumerate(batches(device)):
            before = [layer.bias.detach().clone() for layer in norms_of(net)]
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels) * (math.inf if number in (0, 5) else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(layer.bias, old) for layer, old in zip(norms_of(net), before))
            kept.append(same == (number in (0, 5)))
    return {'ok': all(kept), 'text': 'biases kept bit for bit, and moved by the other steps'}


def sync_bn(device: torch.device, folder: Path) -> dict:
    """PsSyncBN in DistributedDataParallel, by NCCL on a GPU, against psBN."""
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    init = f'file://{folder}/{backend}'
    torch.distributed.init_process_group(backend, init_method=init, rank=0, world_size=1)
    try:
        betas = []
        for norm in (PostShiftedBatchNorm2d, PostShiftedSyncBatchNorm):
            net: Any = network(norm, device)
            layers = [layer for layer in net if isinstance(layer, norm)]
            if norm is PostShiftedSyncBatchNorm:
                net = nn.parallel.DistributedDataParallel(net)
            optimizer = _sgd(net.parameters())
            for images, labels in batches(device):
                optimizer.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                optimizer.step()
            betas.append(torch.cat([layer.bias.detach() for layer in layers]))
        apart = float((betas[0] - betas[1]).abs().max())
        return {'ok': apart <= 1e-5, 'text': f'{backend}: biases apart by {apart:.0e} at most'}
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def fused(device: torch.device) -> dict:
    """A network for inference, as it is and with its norms in the convolutions."""
    torch.manual_seed(0)
    net = bn_to_psbn(CifarResNet(3)).to(device)
    images = torch.randn(64, 3, 32, 32, device=device)
    net(images)  # gives it statistics
    whole = net.eval()(images)
    apart = float((fuse(psbn_to_bn(net))(images) - whole).abs().max() / whole.abs().max())
    return {'ok': apart <= 1e-5, 'text': f'logits apart by {apart:.0e} of the largest'}


# Detectors and the hooks


def detector(name: str, drawn: Path, folder: Path) -> dict:
    """A detector of this repository's configs on this device, over 10 steps of one batch."""
    path = f'configs/psbn/{name}_r50_fpn_psbn_1x_coco.py'
    runner, batch = ready(path, (128, 128), f'{drawn}/', f'{folder}/{name}', lr=1e-3)
    losses = []
    for _ in range(10):
        loss = runner.model.train_step(batch, runner.optim_wrapper)['loss']
        losses.append(loss.item())
    moved = [
        bool((norm.bias != norm.shift).any())
        for norm in runner.model.modules()
        if isinstance(norm, PostShiftedBatchNorm2d) and norm.bias.requires_grad
    ]
    # A residual block starts with a gamma of 0, which keeps the gradients from its other norms.
    ok = all(map(math.isfinite, losses)) and any(moved)
    text = f'loss {losses[0]:.2f}, after 10 steps {losses[-1]:.2f}'
    return {'ok': ok, 'text': f'{text}; {sum(moved)} of {len(moved)} biases have moved'}


@torch.no_grad()
def pruned(context: Any, multiple: int = 1) -> tuple[nn.Module, nn.Module, dict]:
    """A detector with a third of the channels of each norm closed, what is left of it, a batch.

    ``multiple`` is what the widths that are left are multiples of.
    """
    path, scale = (
        DETECTORS['demo'] if context.small else (DETECTORS['faster-rcnn_r50'][0], (1333, 800))
    )
    folder = f'{context.folder}/pruned_{multiple}'
    runner, batch = ready(path, scale, f'{context.drawn}/', folder, lr=0.0)
    model: Any = runner.model.eval()
    for norm in model.backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            closed = norm.num_features // 3 // multiple * multiple
            norm.weight.fill_(0.1)
            norm.bias.fill_(0.1)
            norm.bias[:closed] = -9.0
    data = model.data_preprocessor(batch, False)
    with ChannelTrace(model) as trace:
        model(**data, mode='predict')
    return model, cut_out(model, trace, plan(trace, model)), batch


@torch.no_grad()
def as_whole(context: Any) -> dict:
    """What the neck and the first head put out, whole and pruned."""
    whole, less, batch = pruned(context)
    apart = largest_difference(whole, less, batch)
    sizes = [sum(p.numel() for p in model.backbone.parameters()) for model in (whole, less)]
    text = f'outputs apart by {apart:.0e} of the largest, parameters {sizes[0]:,} -> {sizes[1]:,}'
    return {'ok': apart <= 1e-5 and sizes[1] < 0.6 * sizes[0], 'text': text}


def counts(device: torch.device, drawn: Path, folder: Path) -> dict:
    """CollapseHook's counts of a detector with closed filters, here and on the CPU."""
    found = {}
    for place in ('cpu', device.type):
        with patch('mmengine.runner.runner.get_device', return_value=place):
            work_dir = f'{folder}/counts_{len(found)}'
            runner, batch = ready(*DETECTORS['demo'], f'{drawn}/', work_dir, lr=0.0)
            close(runner.model, 60)
            hook = CollapseHook(interval=20, window=20)
            attach(runner, [hook])
            for _ in range(40):
                step(runner, batch, [hook])
        scalars = runner.message_hub.log_scalars
        names = [name for name in scalars if name.startswith('train/collapse/')]
        found[place, len(found)] = {name: scalars[name].current() for name in names}
    mine, other = found.values()
    told = ', '.join(f'{value:g} {name.split("/")[-1]}' for name, value in mine.items())
    return {'ok': mine == other and bool(mine['train/collapse/trapped'] > 0), 'text': told}


class Losses(Hook):
    """The losses of all iterations, and the first in which a closed filter is open."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.opened: int | None = None

    def before_train(self, runner: Any) -> None:
        """Look at what the closed filters put out."""
        closed = {'stem': [0, 3, 4], 'head': [7]}

        def look(channels: list[int], module: nn.Module, args: Any, out: Tensor) -> None:
            if self.opened is None and out.detach()[:, channels].any():
                self.opened = len(self.losses)

        for name, channels in closed.items():
            runner.model.get_submodule(name).register_forward_hook(partial(look, channels))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Keep the loss."""
        self.losses.append(outputs['loss'].detach().clone())


def recovery(device: torch.device, folder: Path, amp: bool = False) -> dict:
    """Losses with RecoveryHook and without, bit for bit the same until a filter opens."""
    if amp and device.type == 'cpu':
        return {'text': "only CUDA has MMEngine's AmpOptimWrapper with fp16"}
    kept = {}
    for name in ('with', 'without'):
        losses = Losses()
        hooks: list[Any] = [losses]
        if name == 'with':
            hooks.append(dict(type='RecoveryHook', steps=60, window=3))
        wrapper: dict = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
        if amp:  # the first steps overflow and are skipped
            wrapper.update(
                type='AmpOptimWrapper', dtype='float16', loss_scale=dict(init_scale=2.0**30)
            )
        run(
            folder / f'recovery_{name}_{amp}',
            Classifier(PostShiftedBatchNorm2d),
            epochs=20,
            optim_wrapper=wrapper,
            custom_hooks=hooks,
            randomness=dict(seed=0, deterministic=True),
            log_level='ERROR',
        )
        kept[name] = losses
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    first, end = kept['with'].opened, len(kept['with'].losses)
    same = 0
    for ours, plain in zip(kept['with'].losses, kept['without'].losses):
        if not torch.equal(ours, plain):
            break
        same += 1
    ok = first is not None and kept['without'].opened is None and first <= same < end
    text = f'losses bit for bit the same for {same} steps, a filter opened in step {first}'
    return {'ok': ok, 'text': text}
