"""A model of a convolution, a norm and a ReLU for tools that want a config."""

from __future__ import annotations

from pathlib import Path

from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module(force=True)
class TinyModel(nn.Sequential):
    """Its layers are '0' to '2'."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor, mode: str = 'tensor') -> Tensor:
        return super().forward(x)


def tiny_config(folder: Path, channels: int = 4) -> Path:
    """Write its config."""
    path = folder / 'tiny.py'
    path.write_text(
        "default_scope = 'mmengine'\n"
        "custom_imports = dict(imports=['tiny_model'], allow_failed_imports=False)\n"
        f"model = dict(type='TinyModel', channels={channels})\n"
    )
    return path
