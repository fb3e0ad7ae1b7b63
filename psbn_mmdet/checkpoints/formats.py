"""Reading and writing checkpoint files: PyTorch, safetensors, ONNX. Nobody's pickle runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..layers import entry_key, find_norm_states
from ..records import STATE_INFO, parse_ranges
from ..records.atomic import replacing
from .claims import ClaimError, check_claims, unpacked_size
from .onnx import read_onnx
from .safe_globals import load_plain

# What wraps a network and puts its name before every key.
_WRAPPERS = ('module.', '_orig_mod.')


class CheckpointError(ValueError):
    """Why a checkpoint file cannot be read or written, in one sentence."""


@dataclass(frozen=True)
class Weights:
    """A network's parameters, as found in a file.

    Attributes:
        state_dict (Mapping[str, Any]): By name, without the ``module.`` of a wrapper.
        key (str): Where in the file they stand, such as 'state_dict'; '' for the file itself.
        others (list[str]): Where further state dicts stand, such as 'ema_state_dict'.
        roles (dict[str, str]): What the state dicts are, where an average is among them.
        rectifiers (dict[str, str]): What follows each layer, where the file tells (ONNX).
        unstarted (dict[str, np.ndarray]): Channels that have not begun, bool of shape (C,) by
            layer, where the file tells (CollapseHook has been in the run that saved it).
    """

    state_dict: Mapping[str, Any]
    key: str = ''
    others: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    rectifiers: dict[str, str] = field(default_factory=dict)
    unstarted: dict[str, np.ndarray] = field(default_factory=dict)


class SafetensorsContent(dict):
    """The tensors of a safetensors file by name, with the file's own ``metadata``."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def read_content(path: str | os.PathLike) -> Any:
    """Read a PyTorch or safetensors file.

    Args:
        path (str | PathLike): The file. The ending ``.safetensors`` tells that format.

    Returns:
        Any: What is in it, on the CPU.

    Raises:
        CheckpointError: If there is no such file, if it is broken, or if it asks for more than
            tensors and plain values.
    """
    path = _existing(path)
    if not path.endswith('.safetensors'):
        return read_torch(path)
    try:
        with safe_open(path, 'pt') as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return SafetensorsContent(tensors, file.metadata())
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} cannot be read as a safetensors file ({error}): replace the file'
        ) from error


def read_torch(path: str | os.PathLike) -> Any:
    """Read a PyTorch file; tensors are mapped, not read, where that is possible.

    Args:
        path (str | PathLike): The file, with any extension.

    Returns:
        Any: What is in it, on the CPU.

    Raises:
        CheckpointError: See :func:`read_content`.
    """
    path = _existing(path)
    try:
        size = unpacked_size(path)
        content = load_plain(path)
        check_claims(content, size)
        return content
    except ClaimError as error:
        raise CheckpointError(f'{path} {error}') from error
    except Exception as error:  # a broken or hostile file may raise anything
        unsafe = re.search(r'GLOBAL (\S+)', str(error))
        if unsafe:
            raise CheckpointError(
                f'{path} is not loaded since it asks for {unsafe[1]}, which may run any code: use '
                'a file of tensors and plain values, or, if you trust it, allow this by '
                'torch.serialization.add_safe_globals in a module that is imported before (when '
                'training, one of custom_imports)'
            ) from error
        raise CheckpointError(
            f'{path} cannot be read as a PyTorch file of tensors and plain values, perhaps since '
            'it is incomplete: replace the file'
        ) from error


def _existing(path: str | os.PathLike) -> str:
    if not os.path.isfile(path):
        raise CheckpointError(f'{os.fspath(path)} does not exist: give the path of a checkpoint')
    return os.fspath(path)


def write_content(content: Any, path: str | os.PathLike) -> None:
    """Write a PyTorch or safetensors file, whole or not at all.

    Args:
        content (Any): What to write; for safetensors a dict of tensors.
        path (str | PathLike): A file that does not exist yet. The ending ``.safetensors`` tells
            that format.

    Raises:
        CheckpointError: If the file exists, or the format cannot hold the content.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise CheckpointError(f'{path} exists and is not overwritten: give another name')
    is_safetensors = path.suffix == '.safetensors'
    if is_safetensors and not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f'{path}: safetensors files hold tensors only, this checkpoint has more: write a '
            '.pth file'
        )
    try:
        with replacing(path) as part:
            if is_safetensors:
                save_file(_apart(content), part, getattr(content, 'metadata', None))
            else:
                torch.save(content, part)
                if not is_zipfile(part):  # torch 2.1 does not look whether the disk was full
                    raise CheckpointError(
                        f'{path} cannot be written (only its beginning was): make room or give '
                        'another place'
                    )
    except (RuntimeError, SafetensorError) as error:  # torch's and safetensors' for a full disk
        raise CheckpointError(
            f'{path} cannot be written ({error}): make room or give another place'
        ) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own: safetensors files cannot hold tied ones."""
    apart, seen = {}, set()
    for key, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        apart[key] = (value.clone() if memory in seen else value).contiguous()
        seen.add(memory)
    return apart


def find_state_dicts(content: Any, path: str = '') -> Iterator[tuple[str, dict]]:
    """Find the dicts in a file's content that hold BN layers, each with its path."""
    seen: set[int] = set()  # a dict may be in itself, or in many places
    waiting = [(path, content)]
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        if find_norm_states(value):
            yield path, value
            continue
        seen.add(id(value))
        inner = [(f'{path}.{k}' if path else k, v) for k, v in value.items() if isinstance(k, str)]
        waiting += reversed(inner)


def read_weights(path: str | os.PathLike, key: str | None = None) -> Weights:
    """Read a network's parameters from a checkpoint of any origin.

    A file may hold several networks, such as an average (EMA) beside the trained one. What is
    taken is what loading the file gives: the first whose name does not speak of an average. Where
    MMEngine's EMAHook has saved the file that is nevertheless the average, since it swaps the two.

    Args:
        path (str | PathLike): PyTorch, safetensors (``.safetensors``) or ONNX (``.onnx``) file.
        key (str, optional): Which of the file's state dicts to take. Defaults to None.

    Returns:
        Weights: The parameters.

    Raises:
        CheckpointError: If the file cannot be read, or has no BN layer.
    """
    if os.fspath(path).endswith('.onnx'):
        try:
            state_dict, rectifiers = read_onnx(_existing(path))
        except ValueError as error:
            raise CheckpointError(f'{path} {error}') from error
        return Weights(state_dict, rectifiers=rectifiers)
    content = read_content(path)
    found = dict(find_state_dicts(content))
    if not found:
        raise CheckpointError(
            f'{path} has no BN layer, that is no key ending with running_var: give a '
            'checkpoint of a network with BN that is not fused'
        )
    if key is None:
        key = next((name for name in found if 'ema' not in name.lower()), next(iter(found)))
    elif key not in found:
        raise CheckpointError(
            f'{path} has no state dict {key!r} with BN: give one of {", ".join(found)}'
        )
    others = [name for name in found if name != key]
    wrapper = wrapper_of(found[key])
    names = {str(name).removeprefix(wrapper): value for name, value in found[key].items()}
    unstarted = _unstarted(content, names)
    return Weights(names, key, others, _roles(found), unstarted=unstarted)


def _unstarted(content: dict, state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    info: Any = content
    for key in ('message_hub', 'runtime_info', STATE_INFO, 'unstarted'):
        info = info.get(key) if isinstance(info, dict) else None
    if not isinstance(info, dict):
        return {}
    found = {}
    for name, unknown in find_norm_states(state_dict).items():
        if not unknown:
            channels = len(state_dict[entry_key(name, 'weight')])
            with suppress(ValueError):  # ranges that are none of this layer tell nothing
                found[name] = parse_ranges(str(info.get(name, '')), channels)
    return found


def _roles(found: Mapping[str, dict]) -> dict[str, str]:
    averages = [key for key in found if 'ema' in key.lower()]
    if 'state_dict' in found and averages == ['ema_state_dict']:
        ema = found['ema_state_dict']
        # MMEngine's averaged model counts its steps, and has the network as its `module`. Its
        # hook saves the average as `state_dict`, so that testing and deploying take it.
        if 'steps' in ema and all(
            str(name).startswith('module.') for name in ema.keys() - {'steps'}
        ):
            return {
                'state_dict': "the average of MMEngine's EMAHook",
                'ema_state_dict': 'the weights in training',
            }
    return dict.fromkeys(averages, 'an average, by its name')


def wrapper_of(state_dict: Mapping[str, Any]) -> str:
    """What wrappers, such as DDP's, put before each name: 'module.', or '' where there is none."""
    wrapper = ''
    dotted = [str(key) for key in state_dict if '.' in str(key)]
    while dotted:
        prefix = next((p for p in _WRAPPERS if all(n.startswith(p) for n in dotted)), None)
        if prefix is None:
            break
        wrapper += prefix
        dotted = [name.removeprefix(prefix) for name in dotted]
    return wrapper
