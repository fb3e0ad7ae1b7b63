"""Where the experiments are found, and weights as somebody else writes them."""

from __future__ import annotations

import itertools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / 'evidence')]


@pytest.fixture
def torchvisions() -> Callable:
    """Gives a MobileNetV2's weights as in a file of torchvision: same order, other names."""

    def torchvisions(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {
            f'features.{i}.{key.rpartition(".")[2]}': value
            for i, (key, value) in enumerate(state.items())
        }
        return {**renamed, 'classifier.1.weight': torch.zeros(1000, 1280)}

    return torchvisions


@pytest.fixture(scope='module')
def cifar(tmp_path_factory) -> Path:
    """Noise in the folders of CIFAR-10's classes."""
    folder = tmp_path_factory.mktemp('cifar')
    pixels = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    for name in ('train', 'test'):
        with zipfile.ZipFile(folder / f'{name}.zip', 'w') as file:
            for label, i in itertools.product(range(10), range(len(pixels))):
                with file.open(f'{label}/{i:04}.jpg', 'w') as image:
                    Image.fromarray(pixels[i]).save(image, 'JPEG')
    return folder
