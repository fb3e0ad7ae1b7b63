"""The ResNets for CIFAR-10 that the public checkpoints were trained as, named as in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions and a shortcut, which pads with zeros where it gets wider."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """ResNet-20 with 3 blocks in each of its three stages, ResNet-32 with 5, or narrower ones."""

    def __init__(self, blocks: int, width: int = 16):
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        for stage, (inputs, outputs, stride) in enumerate(
            ((w, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2))
        ):
            layer = [Block(inputs, outputs, stride)]
            layer += [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
            setattr(self, f'layer{stage + 1}', nn.Sequential(*layer))
        self.linear = nn.Linear(4 * w, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, (2, 3)))
