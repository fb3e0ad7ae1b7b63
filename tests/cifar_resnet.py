"""The ResNets for CIFAR-10 that the public checkpoints were trained as, named as in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, (2, 3)))
