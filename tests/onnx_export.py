"""torch.onnx.export by the exporter that is asked for, or a skipped test where torch lacks it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HAS_DYNAMO = 'dynamo' in inspect.signature(torch.onnx.export).parameters


def export(model: nn.Module, inputs: tuple[Tensor, ...], path: str, dynamo: bool, **options: Any):
    """Write an ONNX file."""
    if dynamo and not HAS_DYNAMO:
        pytest.skip('torch.onnx.export(dynamo=True) needs torch >= 2.5')
    if dynamo:
        pytest.importorskip('onnxscript')
    if HAS_DYNAMO:
        options['dynamo'] = dynamo
    torch.onnx.export(model, inputs, path, **options)
