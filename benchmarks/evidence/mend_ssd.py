"""Lets SSD be tested: since 3.1 MMDetection asks its heads for a loss, which SSD's lacks.

See open-mmlab/mmdetection, issue 11780. Imported by configs.
"""

from mmdet.models.dense_heads import SSDHead

SSDHead.loss_cls = None
