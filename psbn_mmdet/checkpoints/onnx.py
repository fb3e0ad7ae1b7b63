"""BN layers of ONNX graphs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from ..collapse import what_follows

_ENTRIES = ('weight', 'bias', 'running_mean', 'running_var')  # inputs 1 to 4 of the operator


def read_onnx(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the BatchNormalization nodes of an ONNX file and what follows each.

    An exported psBN is a BatchNormalization whose bias is beta + shift.

    Args:
        path (str | PathLike): The file.

    Returns:
        tuple: A state dict of BN layers, named by their scale's initializer, else by the node,
        and what follows each layer, in the words of
        :attr:`psbn_mmdet.collapse.RectifierTrace.rectifiers`.

    Raises:
        ValueError: If onnx is not installed, the file is broken, or no such node is left.
    """
    try:
        import onnx
        from onnx import numpy_helper
        from onnx.reference import ReferenceEvaluator
    except ImportError as error:
        raise ValueError('needs the package onnx: run `pip install onnx`') from error
    try:
        graph = onnx.load(os.fspath(path)).graph
    except Exception as error:  # protobuf's and onnx's own, by version
        raise ValueError(f'cannot be read as an ONNX file ({error}): replace the file') from error
    constants: dict[str, np.ndarray | None] = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
    }
    makers = {output: node for node in graph.node for output in node.output}

    def array(name: str) -> np.ndarray | None:
        """The value of a constant, also where nodes compute it from constants; else None."""
        if name not in constants:
            constants[name] = None
            node = makers.get(name)
            if node is not None and node.op_type == 'CastLike':  # like the data, in type only
                constants[name] = array(node.input[0])
            elif node is not None and (node.input or node.op_type == 'Constant'):
                values = {source: array(source) for source in node.input}
                if all(value is not None for value in values.values()):
                    results: Any = ReferenceEvaluator(node).run([name], values)
                    constants[name] = results[0]
        return constants[name]

    outputs = {output.name for output in graph.output}
    state_dict: dict[str, Any] = {}
    rectifiers = {}
    for node in graph.node:
        if node.op_type != 'BatchNormalization':
            continue
        arrays = [array(name) for name in node.input[1:5]]
        if any(values is None for values in arrays):
            raise ValueError(
                f'computes the parameters of node {node.name or node.output[0]} from the input: '
                'audit the checkpoint it was made from'
            )
        name = node.input[1].removesuffix('.weight')
        # Exporters share initializers that are equal: then two layers would have one name.
        if name == node.input[1] or name in rectifiers:
            name = node.name or node.output[0]
        for entry, values in zip(_ENTRIES, arrays):
            state_dict[f'{name}.{entry}'] = torch.from_numpy(np.array(values, np.float32))
        readers = {
            _rectifier(reader, array)
            for reader in graph.node
            if node.output[0] in reader.input and reader.op_type not in ('CastLike', 'Shape')
        }
        if node.output[0] in outputs:
            readers.add('other')
        rectifiers[name] = what_follows(readers)
    if not state_dict:
        raise ValueError(
            'has no BatchNormalization node: exporters fuse BN into convolutions by default, '
            'audit the checkpoint it was made from'
        )
    return state_dict, rectifiers


def _rectifier(node: Any, array: Any) -> str:
    if node.op_type == 'Relu':
        return 'relu'
    if node.op_type == 'LeakyRelu':
        return 'leaky_relu'
    if node.op_type == 'Clip' and len(node.input) > 1:
        low = array(node.input[1])
        return 'relu' if low is not None and low.size == 1 and low.item() == 0 else 'other'
    return 'other'
