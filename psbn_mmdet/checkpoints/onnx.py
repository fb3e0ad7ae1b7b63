"""BN layers of ONNX graphs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np
import torch

from ..collapse import what_follows

_ENTRIES = ('weight', 'bias', 'running_mean', 'running_var')  # inputs 1 to 4 of the operator
# What computes parameters from constants in exported graphs. Other operators could make arrays of
# any size from next to nothing.
_FOLLOWED = {
    *('Add', 'Cast', 'Constant', 'Div', 'Identity', 'Mul', 'Neg', 'Sqrt', 'Sub'),
    *('Reshape', 'Squeeze', 'Unsqueeze'),
}
_DEEPEST = 32  # nodes behind each other
_MOST_VALUES = 10_000_000  # of all results together, whatever is spread over what


def read_onnx(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the BatchNormalization nodes of an ONNX file and what follows each.

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
        graph = onnx.load(os.fspath(path), load_external_data=False).graph
    except Exception as error:  # protobuf's and onnx's own, by version
        raise ValueError(f'cannot be read as an ONNX file ({error}): replace the file') from error
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    makers = {output: node for node in graph.node for output in node.output}
    readers_of: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers_of.setdefault(name, []).append(node)
    constants: dict[str, np.ndarray | None] = {}
    left = _MOST_VALUES

    def array(name: str, depth: int = 0) -> np.ndarray | None:
        """The value of a constant, also where nodes compute it from constants; else None."""
        if name not in constants:
            constants[name] = None
            if name in initializers:
                _check_location(initializers[name], folder)
                try:
                    constants[name] = numpy_helper.to_array(initializers[name], folder)
                except Exception as error:  # sizes that do not fit, files that are not there
                    raise ValueError(
                        f'has no values of {name} that can be read ({error}): replace the file'
                    ) from error
            elif name in makers and depth < _DEEPEST:
                constants[name] = computed(name, makers[name], depth)
        return constants[name]

    def computed(name: str, node: Any, depth: int) -> np.ndarray | None:
        nonlocal left
        if node.op_type == 'CastLike':  # like the data, in type only
            return array(node.input[0], depth + 1)
        elsewhere = any(attribute.t.data_location for attribute in node.attribute)
        if node.op_type not in _FOLLOWED or elsewhere:
            return None
        values = {source: array(source, depth + 1) for source in node.input}
        sizes = [value.size for value in values.values() if value is not None]
        if len(sizes) < len(values) or math.prod(sizes) > left:
            return None
        try:
            results: Any = ReferenceEvaluator(node).run([name], values)
        except Exception:  # onnx's own, for types and shapes that do not go together
            return None
        left -= np.size(results[0])
        return results[0]

    try:
        return _norms(graph, array, readers_of)
    except IndexError:
        raise ValueError('has a node without its inputs or its output: replace the file') from None


def _check_location(tensor: Any, folder: str) -> None:
    """Refuse to read values from outside the file's folder, which old versions of onnx do."""
    for entry in tensor.external_data:
        if entry.key == 'location':
            file = os.path.realpath(os.path.join(folder, entry.value))
            if os.path.commonpath([folder, file]) != folder:
                raise ValueError(
                    f'has values of {tensor.name} in {entry.value}, outside its folder, which is '
                    'not read: put them beside the file'
                )


def _norms(
    graph: Any,
    array: Callable[[str], np.ndarray | None],
    readers_of: Mapping[str, list[Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    outputs = {output.name for output in graph.output}
    state_dict: dict[str, Any] = {}
    rectifiers: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != 'BatchNormalization':
            continue
        arrays = [array(name) for name in node.input[1:5]]
        if any(values is None for values in arrays):
            raise ValueError(
                f'computes the parameters of node {node.name or node.output[0]} from more than '
                'constants, or in no simple way: audit the checkpoint it was made from'
            )
        name = _name(node, rectifiers)
        for source, entry, values in zip(node.input[1:], _ENTRIES, arrays):
            if np.asarray(values).dtype.kind in 'cOSU':
                raise ValueError(
                    f'has values of {source} that are no real numbers: replace the file'
                )
            state_dict[f'{name}.{entry}'] = torch.from_numpy(np.array(values, np.float32))
        readers = {
            _rectifier(reader, array)
            for reader in readers_of.get(node.output[0], ())
            if reader.op_type not in ('CastLike', 'Shape')
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


def _name(node: Any, taken: Container[str]) -> str:
    """That of the layer it was exported from. Exporters share equal initializers among layers."""
    stem = node.input[1].removesuffix('.weight')
    names = ([] if stem == node.input[1] else [stem]) + [node.name, node.output[0]]
    for name in names:
        if name and name not in taken:
            return name
    raise ValueError(f'has several layers of the name {names[-1]}: replace the file')


def _rectifier(node: Any, array: Any) -> str:
    if node.op_type == 'Relu':
        return 'relu'
    if node.op_type == 'LeakyRelu':
        return 'leaky_relu'
    if node.op_type == 'Clip' and len(node.input) > 1:
        low = array(node.input[1])
        return 'relu' if low is not None and low.size == 1 and low.item() == 0 else 'other'
    return 'other'
