"""What SSD with MobileNetV2 needs here. Imported by configs.

Since 3.1 MMDetection asks heads for a loss when it tests, which SSD's lacks: see
open-mmlab/mmdetection, issue 11780.
"""

import torch
from mmdet.models.dense_heads import SSDHead
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

SSDHead.loss_cls = None


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Lay the weights out with the channels last: depthwise convolutions on CPUs are faster so."""

    def before_train(self, runner: Runner) -> None:
        """Before the first step."""
        runner.model.to(memory_format=torch.channels_last)
