"""Which filters of a network are collapsed, and why.

There are four facts about a BN or psBN channel with gamma and bias b:

- *vanished*: ``|gamma| <= tau``. The filter's response no longer reaches the output. In training
  gamma must also be at rest: a healthy gamma that crosses 0 has not vanished.
- *dead*: ``b + k * |gamma| <= 0``, predicted from the parameters of a BN whose output goes
  straight into a rectifier. With xhat ~ N(0, 1) and k = 3 the rectifier then passes something for
  at most Phi(-3) = 0.135 % of the inputs.
- *trapped*: no gradient reached gamma or bias in a window of steps in which one reached the layer.
  Measured in training (see :mod:`.gradients`), exact for any activation, wherever it stands.
- *broken*: gamma or b is not a finite number.

In a *folded* layer vanished and dead are unknown. Its running statistics are 0 and 1, as at
initialization, but its gammas are trained: the statistics were folded into them, as in the Caffe
weights of MMDetection's ResNets. There xhat is not normalized, so gamma and b say nothing. (A layer
in training mode normalizes by batch statistics and is not folded.)

*Collapsed* is vanished, dead, trapped or broken, as far as each is known for the layer.

An *unstarted* filter has not begun to train and is not vanished, dead or trapped. Filters are
unstarted in a layer that is still as initialized: all gammas are equal, all biases are equal, and
its running statistics, if any, are 0 and 1. One example is ``zero_init_residual``, where gamma
starts at 0. In training a filter begins once a gradient has reached
it and its gamma is, or was at the start, larger than ten times tau. In a trained
layer, such as one of a checkpoint, all filters have begun unless the training recorded otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from mmengine.model import is_model_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import (
    PostShiftedBatchNorm,
    entry_key,
    find_norm_states,
    rectifier_closed,
)
from ..layers.state_dict import has_plain_values
from ..records import KINDS, stage_of

RECTIFIERS = ('relu', 'leaky_relu')  # of what may follow a layer
# Unknown, and assumed to be a rectifier.
ASSUMED = 'assumed'
FOLDED = (
    'their running statistics are 0 and 1, as where they were folded into gamma and bias, so '
    'nothing follows from these'
)
_ENTRIES = ('weight', 'bias', 'running_mean', 'running_var')
MOST_K = 10**6  # standard deviations; with far more, float32 overflows


@dataclass(frozen=True)
class LayerCensus:
    """Facts about the channels of one BN or psBN layer.

    Attributes:
        name (str): The layer's name in the network.
        norm (str): 'BN' or 'psBN'; always 'BN' in a state dict, which cannot tell.
        gamma (np.ndarray): Scale, shape (C,).
        bias (np.ndarray): The bias b, shape (C,).
        frozen (bool): Whether neither gamma nor bias is trained.
        rectifier (str, optional): What follows the layer: 'relu', 'leaky_relu', 'other' for
            anything else, None if unknown, 'assumed' if it is assumed to be a rectifier.
        unstarted (np.ndarray): Bool, shape (C,).
        folded (bool): Whether gamma and b say nothing about the filters.
        vanished (np.ndarray, optional): Bool, shape (C,), None in a folded layer.
        dead (np.ndarray, optional): Bool, shape (C,), None in a folded layer, and if no rectifier
            is known or assumed to follow.
        trapped (np.ndarray, optional): Bool, shape (C,), None if not observed.
        broken (np.ndarray): Bool, shape (C,).
    """

    name: str
    norm: str
    gamma: np.ndarray
    bias: np.ndarray
    frozen: bool
    rectifier: str | None
    unstarted: np.ndarray
    folded: bool
    vanished: np.ndarray | None
    dead: np.ndarray | None
    trapped: np.ndarray | None
    broken: np.ndarray

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return len(self.gamma)

    @property
    def rectified(self) -> bool | None:
        """Whether a rectifier follows the layer, None if it is not known."""
        return None if self.rectifier in (None, ASSUMED) else self.rectifier in RECTIFIERS

    @property
    def collapsed(self) -> np.ndarray:
        """Vanished, dead, trapped or broken as far as known; bool, shape (C,)."""
        known = [mask for mask in (getattr(self, kind) for kind in KINDS) if mask is not None]
        return np.logical_or.reduce(known)

    @property
    def stage(self) -> str:
        """The part of the network that the layer belongs to, such as 'backbone.layer1'."""
        return stage_of(self.name)


@dataclass(frozen=True)
class Census:
    """The layers of a network and the thresholds they were judged by.

    Attributes:
        layers (list[LayerCensus]): In the order of the network's modules.
        tau (float): Threshold of vanished.
        k (float): Threshold of dead, in standard deviations.
    """

    layers: list[LayerCensus]
    tau: float
    k: float
    _index: dict[str, LayerCensus] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, '_index', {layer.name: layer for layer in self.layers})

    def __getitem__(self, name: str) -> LayerCensus:
        return self._index[name]

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def count(self, kind: str) -> int | None:
        """Number of channels of a kind, such as 'vanished', 'collapsed' or 'unstarted'.

        Returns:
            int, optional: None if the kind is not known for any layer.
        """
        masks = [getattr(layer, kind) for layer in self.layers]
        known = [mask for mask in masks if mask is not None]
        return int(sum(mask.sum() for mask in known)) if known else None

    @property
    def channels(self) -> int:
        """Number of channels of all layers."""
        return sum(layer.channels for layer in self.layers)

    @property
    def frozen(self) -> int:
        """Number of channels in frozen layers."""
        return sum(layer.channels for layer in self.layers if layer.frozen)

    def values(self, what: str) -> np.ndarray:
        """The 'gamma' or 'bias' of all channels, shape (channels,)."""
        return np.concatenate([getattr(layer, what) for layer in self.layers])

    def stages(self) -> dict[str, Census]:
        """The census of each stage, in the order of the network."""
        stages: dict[str, list[LayerCensus]] = {}
        for layer in self.layers:
            stages.setdefault(layer.stage, []).append(layer)
        return {name: Census(layers, self.tau, self.k) for name, layers in stages.items()}

    def judged(
        self,
        rectifiers: Mapping[str, str] | None = None,
        trapped: Mapping[str, np.ndarray] | None = None,
        unstarted: Mapping[str, np.ndarray] | None = None,
        moving: Mapping[str, np.ndarray] | None = None,
    ) -> Census:
        """Judge the same parameters again; for the arguments see :func:`census_of_model`.

        Layers not in ``unstarted`` keep their unstarted filters. Filters whose gamma is ``moving``
        have not vanished.
        """
        return Census(
            [
                _judge(
                    layer.name,
                    layer.norm,
                    layer.gamma,
                    layer.bias,
                    layer.frozen,
                    self.tau,
                    self.k,
                    (rectifiers or {}).get(layer.name),
                    (trapped or {}).get(layer.name),
                    (unstarted or {}).get(layer.name, layer.unstarted),
                    layer.folded,
                    (moving or {}).get(layer.name, False),
                )
                for layer in self.layers
            ],
            self.tau,
            self.k,
        )


def compare(before: Census, after: Census) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which filters are newly collapsed and which revived, from one census to another.

    Args:
        before (Census): The earlier one.
        after (Census): The later one.

    Returns:
        dict[str, tuple[np.ndarray, np.ndarray]]: New and revived, bool masks of shape (C,), by
        layer; layers that are not in both, or not with as many channels, are absent.
    """
    old = {layer.name: layer.collapsed for layer in before.layers}
    return {
        layer.name: (layer.collapsed & ~old[layer.name], ~layer.collapsed & old[layer.name])
        for layer in after.layers
        if layer.name in old and len(old[layer.name]) == layer.channels
    }


def check_thresholds(tau: float, k: float) -> None:
    """Check the thresholds of a census.

    Raises:
        ValueError: If ``tau`` is not in [0, 1) or ``k`` not from 0 to a million.
    """
    if not (_is_number(tau) and 0 <= tau < 1):
        raise ValueError(
            f'tau, the largest |gamma| called vanished, must be in [0, 1), got {tau!r}'
        )
    if not (_is_number(k) and 0 <= k <= MOST_K):
        raise ValueError(
            f'k, in standard deviations, must be a number from 0 to {MOST_K:,}, got {k!r}'
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a wrapper such as DistributedDataParallel, or the model itself."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


def find_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the BN and psBN layers that have a gamma, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }


@torch.no_grad()
def census_of_model(
    model: nn.Module,
    *,
    tau: float = 1e-3,
    k: float = 3.0,
    rectifiers: Mapping[str, str] | None = None,
    trapped: Mapping[str, np.ndarray] | None = None,
    unstarted: Mapping[str, np.ndarray] | None = None,
) -> Census:
    """Count the collapsed filters of a network.

    Args:
        model (nn.Module): Any network; its BN and psBN layers with a gamma are counted.
        tau (float): Largest ``|gamma|`` of a vanished filter. Defaults to 1e-3: with inputs of
            unit variance the response is then below what float16 resolves beside a bias of 1.
        k (float): A filter is dead if its rectifier opens only beyond k standard deviations.
            Defaults to 3: 0.135 % of inputs with a normal distribution.
        rectifiers (Mapping[str, str], optional): What follows each layer, from
            :func:`.trace_rectifiers`. In layers that are not in it ``dead`` is None; 'assumed'
            has a layer judged as if a rectifier followed. Defaults to None.
        trapped (Mapping[str, np.ndarray], optional): Trapped channels by layer, from
            :class:`.GradientWatch`; layers not in it were not observed. Defaults to None.
        unstarted (Mapping[str, np.ndarray], optional): Channels that have not begun, by layer. In
            layers not in it all have begun, unless the layer is as its initialization left it.
            Defaults to None.

    Returns:
        Census: With one entry per layer.

    Raises:
        ValueError: If ``tau`` or ``k`` is out of range.

    Examples:
        >>> from torch import nn
        >>> from psbn_mmdet.collapse import census_of_model
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> nn.init.zeros_(model[1].weight[:2]).shape
        torch.Size([2])
        >>> census_of_model(model).count('vanished')
        2
    """
    check_thresholds(tau, k)
    norms = find_norms(model)
    sizes = [norm.num_features for norm in norms.values()]
    gammas = _split(_to_numpy(norm.weight for norm in norms.values()), sizes)
    biases = _split(
        _to_numpy(
            torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            for norm in norms.values()
        ),
        sizes,
    )
    layers = []
    for (name, norm), gamma, bias in zip(norms.items(), gammas, biases):
        fresh = _is_fresh(norm.running_mean, norm.running_var, len(gamma))
        kind = 'psBN' if isinstance(norm, PostShiftedBatchNorm) else 'BN'
        params = (norm.weight, norm.bias)
        frozen = not any(p is not None and p.requires_grad for p in params)
        layers.append(
            _judge(
                name,
                kind,
                gamma,
                bias,
                frozen,
                tau,
                k,
                (rectifiers or {}).get(name),
                (trapped or {}).get(name),
                _unstarted(name, gamma, bias, fresh, unstarted),
                _is_folded(gamma, fresh, norm.running_mean) and not norm.training,
            )
        )
    return Census(layers, tau, k)


def census_of_state_dict(
    state_dict: Mapping[str, Any],
    *,
    tau: float = 1e-3,
    k: float = 3.0,
    rectifiers: Mapping[str, str] | None = None,
    unstarted: Mapping[str, np.ndarray] | None = None,
) -> Census:
    """Count the collapsed filters in a state dict, from the parameters alone.

    Args:
        state_dict (Mapping[str, Any]): With BN layers, see
            :func:`psbn_mmdet.layers.find_norm_states`.
        tau (float): See :func:`census_of_model`.
        k (float): See :func:`census_of_model`.
        rectifiers (Mapping[str, str], optional): See :func:`census_of_model`.
        unstarted (Mapping[str, np.ndarray], optional): See :func:`census_of_model`.

    Returns:
        Census: With one entry per layer, in the order of the file; no layer counts as frozen.

    Raises:
        ValueError: If ``tau`` or ``k`` is out of range.
    """
    check_thresholds(tau, k)
    layers = []
    for name, unknown in find_norm_states(state_dict).items():
        if unknown:
            continue
        if any(
            isinstance(value, torch.Tensor) and value.is_meta
            for value in (state_dict.get(entry_key(name, entry)) for entry in _ENTRIES)
        ):
            raise ValueError(f'{name} is on the meta device, without values: give a whole file')
        gamma = _to_numpy([state_dict[entry_key(name, 'weight')]])
        bias = _to_numpy([state_dict[entry_key(name, 'bias')]])
        rectifier = (rectifiers or {}).get(name)
        mean, var = (state_dict.get(entry_key(name, f'running_{what}')) for what in ('mean', 'var'))
        fresh = _is_fresh(mean, var, len(gamma))
        begins = _unstarted(name, gamma, bias, fresh, unstarted)
        folded = _is_folded(gamma, fresh, mean)
        layers.append(
            _judge(name, 'BN', gamma, bias, False, tau, k, rectifier, None, begins, folded)
        )
    return Census(layers, tau, k)


def _judge(
    name: str,
    norm: str,
    gamma: np.ndarray,
    bias: np.ndarray,
    frozen: bool,
    tau: float,
    k: float,
    rectifier: str | None,
    trapped: np.ndarray | None,
    unstarted: np.ndarray,
    folded: bool,
    moving: np.ndarray | bool = False,
) -> LayerCensus:
    begun = ~unstarted
    # NaN and infinity are only broken. If k makes a product infinite, its sign is still right.
    with np.errstate(invalid='ignore', over='ignore'):
        vanished = (np.abs(gamma) <= tau) & begun & np.logical_not(moving)
        dead = rectifier_closed(gamma, bias, k) & begun
    return LayerCensus(
        name=name,
        norm=norm,
        gamma=gamma,
        bias=bias,
        frozen=frozen,
        rectifier=rectifier,
        unstarted=unstarted,
        folded=folded,
        vanished=None if folded else vanished,
        dead=dead if rectifier in (*RECTIFIERS, ASSUMED) and not folded else None,
        trapped=None if frozen or trapped is None else trapped & begun,
        broken=~(np.isfinite(gamma) & np.isfinite(bias)),
    )


def _unstarted(
    name: str,
    gamma: np.ndarray,
    bias: np.ndarray,
    fresh: bool,
    known: Mapping[str, np.ndarray] | None,
) -> np.ndarray:
    """The channels that have not begun: those that are known, or all of a layer as initialized."""
    if known is not None and name in known:
        return known[name]
    # A single channel is no evidence.
    return np.full(len(gamma), fresh and len(gamma) > 1 and _are_alike(gamma, bias))


def _is_folded(gamma: np.ndarray, fresh: bool, mean: Any) -> bool:
    """Gammas differ if trained and are mostly equal in a new layer (some may be set by hand)."""
    return fresh and mean is not None and len(np.unique(gamma)) > max(1, len(gamma) / 2)


def _are_alike(gamma: np.ndarray, bias: np.ndarray) -> bool:
    return bool((gamma == gamma[0]).all() and (bias == bias[0]).all())


def _is_fresh(mean: Any, var: Any, channels: int) -> bool:
    """Whether running statistics are as they are initialized, if there are any."""
    if mean is None or var is None:
        return True
    return _all_equal(mean, 0, channels) and _all_equal(var, 1, channels)


def _all_equal(values: Any, wanted: float, channels: int) -> bool:
    """Whether statistics are all equal; those of a file may have any type and shape."""
    return (
        isinstance(values, torch.Tensor)
        and values.shape == (channels,)
        and has_plain_values(values)
        and bool((values == wanted).all())
    )


def _to_numpy(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    """All values in float32 behind one another: one copy from each device, not one per layer."""
    tensors = [t.detach().float() for t in tensors]
    if not tensors:
        return np.empty(0, np.float32)
    if len({t.device for t in tensors}) > 1:
        tensors = [t.cpu() for t in tensors]
    return torch.cat(tensors).cpu().numpy()


def _split(values: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
