"""Conversion of a whole checkpoint between BN and psBN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..collapse import Structure, revive
from ..layers import bn_to_psbn, entry_key, find_norm_states, psbn_to_bn
from .config_text import config_to_bn, config_to_psbn
from .formats import CheckpointError, SafetensorsContent, find_state_dicts, wrapper_of


@dataclass
class Conversion:
    """What was done to a checkpoint.

    Attributes:
        converted (dict[str, list[str]]): Layers by state dict.
        left (dict[str, str]): Layers left alone, and why.
        opened (dict[str, list[int]]): Closed channels that were opened, by layer.
        renamed (int): Entries of optimiser states that go by the parameters' names.
        configs (int): Texts of configs whose norm types were replaced.
    """

    converted: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    opened: dict[str, list[int]] = field(default_factory=dict)
    renamed: int = 0
    configs: int = 0


def convert_checkpoint(
    content: Any,
    to: str,
    shift: float = 0.1,
    structure: Structure | None = None,
) -> tuple[Any, Conversion]:
    """Convert all state dicts in a checkpoint, and what else speaks of their layers.

    Averages (EMA) are converted like the network. The optimiser's state needs no change where it
    goes by the parameters' order, since beta stands where bias stood; where it goes by names, they
    are replaced. The momentum of beta is that of bias. The texts of configs that MMEngine puts into
    its checkpoints become those of the converted model; they are not run.

    Args:
        content (Any): What :func:`.read_content` returned; not changed.
        to (str): 'psbn' or 'bn'.
        shift (float): See :func:`psbn_mmdet.layers.bn_to_psbn`. Defaults to 0.1.
        structure (Structure, optional): To revive: what stands around each layer, by the names
            without those of wrappers (``module.``); closed filters are then opened, see
            :func:`psbn_mmdet.collapse.revive`. Defaults to None.

    Returns:
        tuple[Any, Conversion]: The converted content and what was done.

    Raises:
        CheckpointError: If there is nothing to convert.
        ValueError: If ``shift`` is not valid.
    """
    done = Conversion()
    old_kind = 'BN' if to == 'psbn' else 'psBN'
    old_entry, new_entry = ('bias', 'beta') if to == 'psbn' else ('beta', 'bias')
    new_dicts: dict[int, Any] = {}  # and lists, by the identity of the old one
    names: dict[str, str] = {}
    found = dict(find_state_dicts(content))
    for key, state_dict in found.items():
        layers = find_norm_states(state_dict)
        for name, kind in layers.items():
            if kind == old_kind:
                done.converted.setdefault(key, []).append(name)
                names[entry_key(name, old_entry)] = entry_key(name, new_entry)
            elif kind not in ('BN', 'psBN'):
                done.left[name] = kind
        if to == 'psbn':
            new = bn_to_psbn(state_dict, shift)
            if structure is not None:
                new, opened = revive(new, structure.renamed('', wrapper_of(state_dict)))
                done.opened |= opened
        else:
            new = psbn_to_bn(state_dict)
        new_dicts[id(state_dict)] = new
    if not done.converted:
        held = {kind for sd in found.values() for kind in find_norm_states(sd).values()}
        raise CheckpointError(
            f'there is no {old_kind} to convert ({", ".join(sorted(held)) or "no norm layer"} is '
            'all there is): give another checkpoint'
        )

    def rebuilt(value: Any, key: Any = None) -> Any:
        if id(value) in new_dicts:
            return new_dicts[id(value)]
        if isinstance(value, dict):
            new = value.copy()  # of the same class
            new.clear()
            new_dicts[id(value)] = new  # which may be in itself
            new.update((rebuilt(k), rebuilt(v, k)) for k, v in value.items())
            return new
        if type(value) is list:
            items = new_dicts[id(value)] = []
            items.extend(map(rebuilt, value))
            return items
        if type(value) is tuple:
            return tuple(map(rebuilt, value))
        if isinstance(value, str):
            if value in names:
                done.renamed += 1
                return names[value]
            if key == 'cfg':
                return _config(value)
        return value

    def _config(text: str) -> str:
        try:
            new = config_to_psbn(text, shift) if to == 'psbn' else config_to_bn(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # no Python, or hostile
            return text
        done.configs += new != text
        return new

    try:
        new_content = rebuilt(content)
    except RecursionError:
        raise CheckpointError(
            'it is nested too deep to be copied: save the state dict alone'
        ) from None
    if isinstance(content, SafetensorsContent):
        new_content = SafetensorsContent(new_content, content.metadata)
    return new_content, done
