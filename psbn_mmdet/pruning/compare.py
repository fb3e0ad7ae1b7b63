"""Two networks side by side: outputs, scores, multiply-adds, times, parameters by stage."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..collapse import find_norms
from ..configs.reading import datasets_of
from ..records import stage_of

ROUNDS = 20


def dataset_of(cfg: Config, stage: str) -> Any:
    """The data set of a stage, whose images come as they are tested."""
    loader = cfg.get(f'{stage}_dataloader') or {}
    dataset, tested = loader.get('dataset'), (cfg.get('val_dataloader') or {}).get('dataset')
    if not dataset or not tested:
        raise ValueError(f'{cfg.filename} has no {stage}_dataloader and val_dataloader: add them')
    _, tested = next(datasets_of(tested, 'val_dataloader.dataset'))
    return DATASETS.build(_with_pipeline(dataset, tested['pipeline']))


def _with_pipeline(dataset: Mapping, pipeline: list) -> dict:
    """Without the wrappers that repeat or mix images."""
    if 'datasets' in dataset:
        return {**dataset, 'datasets': [_with_pipeline(d, pipeline) for d in dataset['datasets']]}
    if 'dataset' in dataset:
        return _with_pipeline(dataset['dataset'], pipeline)
    return {**dataset, 'pipeline': pipeline}


def images_of(data: Any, count: int) -> Iterator[dict]:
    """At most so many of its images, evenly chosen."""
    step = max(len(data) / count, 1)
    for index in range(min(count, len(data))):
        yield pseudo_collate([data[int(index * step)]])


def largest_difference(whole: Any, pruned: Any, data: dict) -> float:
    """The largest difference of the outputs of neck and dense heads, relative to the largest value.

    Outputs of the neck are left out if the heads lost some of their channels.
    """
    outputs = []
    for model in (whole, pruned):
        inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
        features = model.extract_feat(inputs)
        heads = [getattr(model, name, None) for name in ('rpn_head', 'bbox_head')]
        found = [features, *(head(features) for head in heads if head is not None)]
        outputs.append([v for v in tree_flatten(found)[0] if isinstance(v, Tensor)])
    return max(
        float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))
        for one, other in zip(*outputs)
        if one.shape == other.shape
    )


def scores_of(cfg: Config, val: Any, model: Any) -> dict[str, float]:
    """What the config's evaluators say of a model on a data set: the main scores."""
    evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = val.metainfo
    for data in images_of(val, len(val)):
        evaluator.process(data_samples=model.test_step(data), data_batch=data)
    found = evaluator.evaluate(len(val))
    return {k: v for k, v in found.items() if k.endswith(('mAP', 'mAP_50', '/AP'))}


class _OfTensors(nn.Module):
    """A model with the data samples that belong to its input."""

    def __init__(self, model: nn.Module, samples: list) -> None:
        super().__init__()
        self.model = model
        self._samples = samples

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs, self._samples, mode='tensor')


def multiply_adds(model: Any, data: dict) -> int:
    """Those of a model for the images of ``data``, as MMEngine counts them."""
    prepared = model.data_preprocessor(copy.deepcopy(data), False)
    info = get_model_complexity_info(
        _OfTensors(model, prepared['data_samples']),
        inputs=(prepared['inputs'],),
        show_table=False,
        show_arch=False,
    )
    return info['flops']


def time_ratio(run: Callable[[Any], Any], pruned: nn.Module, whole: nn.Module) -> np.ndarray:
    """Quartiles of the pruned model's time over the whole one's, measured in turns."""
    ratios = [_seconds(run, pruned) / _seconds(run, whole) for _ in range(ROUNDS)]
    return np.percentile(ratios, (25, 50, 75))


def _seconds(run: Callable[[Any], Any], model: nn.Module) -> float:
    start = time.perf_counter()
    run(model)
    return time.perf_counter() - start


def by_stage(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Channels of norms, and parameters."""
    found: dict[str, tuple[int, int]] = {}
    norms = find_norms(model)
    for name, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own:
            filters, parameters = found.get(stage_of(name), (0, 0))
            filters += norms[name].num_features if name in norms else 0
            found[stage_of(name)] = filters, parameters + own
    return found
