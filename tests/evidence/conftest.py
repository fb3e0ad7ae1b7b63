"""Where the experiments are found, and weights as somebody else writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks/evidence'))


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
