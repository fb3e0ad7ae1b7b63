"""BN in ONNX graphs, and what follows it there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_export import export
from torch import nn
from torch.nn import functional as F

from psbn_mmdet.checkpoints import CheckpointError, read_weights
from psbn_mmdet.collapse import census_of_model, census_of_state_dict, trace_rectifiers

pytest.importorskip('onnx')


class Network(nn.Module):
    """Each of what can follow a BN."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        for name in ('relu', 'relu6', 'leaky', 'added', 'returned'):
            setattr(self, name, nn.BatchNorm2d(8))
        generator = torch.Generator().manual_seed(0)
        for norm in self.children():
            norm.weight.data.normal_(generator=generator)
            norm.bias.data.normal_(0, 3, generator=generator)
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(generator=generator)
        self.relu.weight.data[0] = 0

    def forward(self, x):
        x = F.relu(self.relu(self.conv(x)))
        x = F.relu6(self.relu6(x))
        x = F.leaky_relu(self.leaky(x))
        return self.returned(F.relu(x + self.added(x)))


@pytest.mark.parametrize('dynamo', [False, True])
def test_an_exported_graph_is_audited_like_the_network(dynamo, tmp_path):
    model = Network().eval()
    image = torch.randn(1, 3, 16, 16)
    expected = census_of_model(model, rectifiers=trace_rectifiers(model, image))
    options = (
        dict(dynamo=True, optimize=False)
        if dynamo
        else dict(
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    )
    export(model, (image,), str(tmp_path / 'model.onnx'), **options)
    weights = read_weights(tmp_path / 'model.onnx')
    found = census_of_state_dict(weights.state_dict, rectifiers=weights.rectifiers)
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for layer, wanted in zip(found.layers, expected.layers):
        assert layer.rectifier == wanted.rectifier, layer.name
        assert np.allclose(layer.bias, wanted.bias, atol=1e-6)
        assert np.array_equal(layer.vanished, wanted.vanished)
        assert (layer.dead is None) == (wanted.dead is None)
        assert layer.dead is None or np.array_equal(layer.dead, wanted.dead)
    assert found.count('dead') > 0 and found.count('vanished') == 1


def test_a_graph_without_bn_is_an_error(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    path = tmp_path / 'fused.onnx'
    export(model, (torch.randn(1, 3, 4, 4),), str(path), dynamo=False)
    with pytest.raises(CheckpointError, match=r'fused\.onnx has no BatchNormalization node'):
        read_weights(path)
