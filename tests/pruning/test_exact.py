"""What is cut changes no output, whatever stands around it; and what can be cut is."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10 import CifarResNet
from mmdet.structures import DetDataSample
from PIL import Image
from pruned_blocks import BLOCKS, close_some, images
from torch import nn

from psbn_mmdet.checkpoints import read_weights
from psbn_mmdet.collapse import find_norms
from psbn_mmdet.configs.model import model_of_config
from psbn_mmdet.configs.reading import load_config
from psbn_mmdet.pruning import ChannelTrace, cut_out, plan
from psbn_mmdet.pruning.compare import largest_difference

DATA = Path(__file__).resolve().parents[3] / 'shared/data'


def pruned(net: nn.Module, x: torch.Tensor, margin: float = 0.0) -> tuple[nn.Module, dict]:
    """A network without its closed channels, and what is kept of each layer."""
    with torch.no_grad(), ChannelTrace(net) as trace:
        net(x)
        net(x[:1])
    cut = plan(trace, net, margin)
    return cut_out(net, trace, cut), cut.kept


def size_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('seed', range(3))
def test_outputs_are_equal_and_what_can_be_cut_is(name, seed):
    torch.manual_seed(seed)
    net, can_be_cut = BLOCKS[name]()
    close_some(net, seed)
    x = images(seed)
    less, kept = pruned(net, x)
    with torch.no_grad():
        y, z = net(x), less(x)
    assert torch.allclose(y, z, rtol=1e-4, atol=1e-5), (y - z).abs().max()
    assert bool(kept) == can_be_cut
    assert (size_of(less) < size_of(net)) == can_be_cut
    # As much is left as runs, in training, too.
    assert all(norm.num_features for norm in find_norms(less).values())
    less.train()(x).sum().backward()


def test_what_is_left_of_psbn_decays_towards_alpha():
    net, _ = BLOCKS['psBN']()
    close_some(net, 0)
    less, kept = pruned(net, images(0))
    norm = less.bn1
    assert 'bn1' in kept and norm.num_features < net.bn1.num_features
    optimizer = torch.optim.SGD([norm.bias], lr=1.0, weight_decay=0.5)
    before, norm.bias.grad = norm.bias.detach().clone(), torch.zeros_like(norm.bias)
    optimizer.step()
    assert torch.allclose(norm.bias - norm.shift, (before - norm.shift) / 2, atol=1e-6)


def cifar(count: int) -> torch.Tensor:
    """Images of CIFAR-10, as the public networks want them."""
    with zipfile.ZipFile(DATA / 'cifar10/test.zip') as file:
        names = sorted(name for name in file.namelist() if name.endswith('.jpg'))
        chosen = names[:: len(names) // count][:count]
        pictures = [np.asarray(Image.open(io.BytesIO(file.read(n))).convert('RGB')) for n in chosen]
    x = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.skipif(not (DATA / 'cifar10').is_dir(), reason='CIFAR-10 is not at hand')
@pytest.mark.skipif(not (DATA / 'checkpoints').is_dir(), reason='the checkpoints are not at hand')
@pytest.mark.parametrize(
    ('blocks', 'file', 'whole', 'most'),
    [(3, 'resnet20-12fca82f.th', 269722, 260480), (5, 'resnet32-d509ac18.th', 464154, 446400)],
)
def test_public_networks_get_narrower_and_give_the_same_logits(blocks, file, whole, most):
    net = CifarResNet(blocks)
    net.load_state_dict(read_weights(DATA / 'checkpoints' / file).state_dict)
    x = cifar(300)
    less, _ = pruned(net.eval(), x[:200])
    assert size_of(net) == whole and size_of(less) <= most
    with torch.no_grad():
        assert torch.allclose(net(x[200:]), less(x[200:]), atol=1e-5)


def test_a_detector_with_depthwise_convolutions_and_relu6():
    """SSDLite on MobileNetV2, of which half of the channels of each norm are closed."""
    cfg = load_config('mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py')
    torch.manual_seed(0)
    net = model_of_config(cfg).eval()
    with torch.no_grad():
        for norm in find_norms(net).values():
            norm.bias.uniform_(-0.3, 0.3)
            norm.weight[: norm.num_features // 2] = 0.01
            norm.bias[: norm.num_features // 2] = -9.0
        with ChannelTrace(net) as trace:
            net(torch.randn(2, 3, 160, 160), mode='tensor')
        less = cut_out(net, trace, plan(trace, net))
        x = torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8)
        sample = DetDataSample(metainfo=dict(img_shape=(160, 160)))
        apart = largest_difference(net, less, dict(inputs=[x], data_samples=[sample]))
    assert apart < 1e-5
    assert size_of(less) < size_of(net) / 3
