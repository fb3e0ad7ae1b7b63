"""MMCV's operators on a GPU for which they are not compiled: other forms of the three that count.

Faster R-CNN and RetinaNet use nms, RoIAlign and the focal loss. The first two are torchvision's
here, the third is MMDetection's own for CPUs. Importing this also lets MMDetection's data sets be
imported without imgaug, which one of its transforms, unused here, imports.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partialmethod
from typing import Any
from unittest.mock import MagicMock

import torch
from mmcv import _ext
from mmcv.ops import RoIAlign
from mmcv.ops.info import get_compiling_cuda_version
from mmdet.models.losses import focal_loss
from torch import Tensor
from torch.nn import functional as F

if importlib.util.find_spec('imgaug') is None:
    parts = ('', '.augmenters', '.augmentables', '.augmentables.lines', '.augmentables.segmaps')
    sys.modules.update({f'imgaug{part}': MagicMock() for part in parts})


def has_operators() -> bool:
    """Whether MMCV was compiled for GPUs."""
    return bool(get_compiling_cuda_version() != 'not available')


def replace_operators() -> None:
    """Have MMDetection use the other forms, in this process."""
    import torchvision  # which not every CPU build of torch has

    def nms_of_torchvision(
        boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int
    ) -> Tensor:
        # With an offset of 1 boxes are pixels, whose sides are longer by 1.
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    _ext.nms = nms_of_torchvision
    RoIAlign.__init__ = partialmethod(RoIAlign.__init__, use_torchvision=True)
    focal_loss.sigmoid_focal_loss = sigmoid_focal_loss


def sigmoid_focal_loss(pred: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The focal loss of classes.

    Args:
        pred (Tensor): Logits, shape (N, C).
        target (Tensor): Classes, shape (N,), C for the background.
        *args: Those of MMDetection's loss.
        **kwargs: Likewise.

    Returns:
        Tensor: The loss.
    """
    classes = pred.size(1)
    one_hot = F.one_hot(target, classes + 1)[:, :classes]
    return focal_loss.py_sigmoid_focal_loss(pred, one_hot, *args, **kwargs)
