"""CIFAR-10, the usual ways to train on it, and the ResNets made for it."""

from __future__ import annotations

import io
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those of the public ResNets
BATCH = 128
WEIGHT_DECAY = 5e-4
REGIMES = {
    'SGD 0.1': partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY),
    'SGD 0.5': partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=WEIGHT_DECAY),
    'Adam 0.03': partial(torch.optim.Adam, lr=0.03, weight_decay=WEIGHT_DECAY),
}


@cache
def load_images(path: Path, each: int | None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) of uint8, the first of each class, and their labels."""
    images, labels = [], []
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith('.jpg'))
        classes = sorted({name.split('/')[0] for name in names})
        taken = [0] * len(classes)
        for name in names:
            label = classes.index(name.split('/')[0])
            taken[label] += 1
            if each is None or taken[label] <= each:
                images.append(np.asarray(Image.open(io.BytesIO(file.read(name))).convert('RGB')))
                labels.append(label)
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


@cache
def _constants(device: torch.device) -> list[Tensor]:
    return [torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD)]


def normalised(images: Tensor) -> Tensor:
    """As floats with the mean 0 and the deviation 1, about."""
    mean, std = _constants(images.device)
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor) -> Tensor:
    """Each image shifted by up to 4 pixels, and half of them flipped."""
    padded = F.pad(images, (4, 4, 4, 4))
    count = len(images)
    arange, randint = (partial(f, device=images.device) for f in (torch.arange, torch.randint))
    across = arange(32).expand(count, 32) + randint(9, (count, 1))
    across = torch.where(torch.rand(count, 1, device=images.device) < 0.5, across, across.flip(1))
    down = arange(32).expand(count, 32) + randint(9, (count, 1))
    rows = arange(count)[:, None, None, None]
    channels = arange(3)[None, :, None, None]
    return padded[rows, channels, down[:, None, :, None], across[:, None, None, :]]


class Block(nn.Module):
    """Two convolutions and a shortcut, which pads with zeros where it gets wider."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.groups = groups
        self.padding = (outputs - inputs) // groups // 2

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (N, C, H, W)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            shortcut = shortcut.unflatten(1, (self.groups, -1))
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)).flatten(1, 2)
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """ResNet-20 with 3 blocks in each of its three stages, ResNet-32 with 5, or narrower ones.

    With groups it is as many networks side by side, their channels one after another: input of
    shape (N, 3 * groups, H, W), output (N, 10 * groups).
    """

    def __init__(self, blocks: int, width: int = 16, groups: int = 1):
        super().__init__()
        w = width * groups
        self.conv1 = nn.Conv2d(3 * groups, w, 3, 1, 1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(w)
        for stage, (inputs, outputs, stride) in enumerate(
            ((w, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2))
        ):
            layer = [Block(inputs, outputs, stride, groups)]
            layer += [Block(outputs, outputs, 1, groups) for _ in range(blocks - 1)]
            setattr(self, f'layer{stage + 1}', nn.Sequential(*layer))
        self.linear: nn.Module = nn.Linear(4 * w, 10)
        if groups > 1:
            linear = nn.Conv1d(4 * w, 10 * groups, 1, groups=groups)
            self.linear = nn.Sequential(nn.Unflatten(1, (-1, 1)), linear, nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """From images to logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, (2, 3)))
