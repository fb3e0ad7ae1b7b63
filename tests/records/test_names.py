"""Names of layers and stages."""

import pytest

from psbn_mmdet.records import stage_of


@pytest.mark.parametrize(
    ('name', 'stage'),
    [
        ('backbone.layer1.0.bn1', 'backbone.layer1'),
        ('backbone.bn1', 'backbone'),
        ('neck.fpn_convs.0.bn', 'neck'),
        ('roi_head.bbox_head.shared_convs.0.bn', 'roi_head'),
        ('layer4.2.downsample.1', 'layer4'),
        ('student.backbone.layer1.0.bn1', 'student.backbone.layer1'),
        ('teacher.neck.fpn_convs.0.bn', 'teacher.neck'),
        ('detector.backbone.bn1', 'detector.backbone'),
        ('reid.bn', 'reid'),
        ('bn', 'bn'),
    ],
)
def test_stages(name, stage):
    assert stage_of(name) == stage
