"""The hook that compares data, heads, evaluators and weights before a run."""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from ..collapse import unwrapped
from ..configs.reading import ConfigError, datasets_of, is_pretrained, named

LARGEST = 200e6  # bytes of an annotation file that is read once more
SAMPLES = 50  # images that are looked for
SHOWN = 6  # names in a sentence
# Heads whose outputs are the classes of the data.
_HEADS = {'bbox_head', 'mask_head', 'mask_iou_head', 'point_head', 'head_module', 'panoptic_head'}


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Refuse a run whose result is certain to be meaningless, before any of it.

    MMDetection drops annotations of classes that it does not know, numbers labels by the order of
    the categories in the annotation file, and names them by the order of ``metainfo.classes``.
    What has been built is compared: the data sets, the files that they have read, the heads, the
    evaluators, and the weights that are loaded. What is unusual, and may be meant, is one line of
    the log; unknown parts are skipped. ``tools/train.py`` and ``tools/test.py`` add it.

    Examples:
        >>> custom_imports = dict(imports=['psbn_mmdet'], allow_failed_imports=False)
        >>> custom_hooks = [dict(type='DataCheckHook')]
    """

    def before_run(self, runner: Runner) -> None:
        """Compare the data, the heads, the evaluators and the pretrained weights.

        Raises:
            ConfigError: If they do not fit.
        """
        try:
            for warning in compare(unwrapped(runner.model), _built(runner)):
                runner.logger.warning(f'DataCheckHook: {warning}.')
        except ConfigError:
            raise
        except Exception as error:  # custom datasets and heads may raise anything
            runner.logger.warning(f'DataCheckHook: not compared to the end. Cause: {named(error)}')

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the weights with the model.

        Raises:
            ConfigError: If none fits.
        """
        _check_weights(checkpoint, unwrapped(runner.model), f'checkpoint {runner._load_from}')


def _built(runner: Runner) -> dict[str, tuple[Any, Sequence[Any]]]:
    """Of the loops of this run; those of others are configs."""
    loops = {stage: getattr(runner, f'_{stage}_loop') for stage in ('train', 'val', 'test')}
    return {
        stage: (loop.dataloader.dataset, () if stage == 'train' else loop.evaluator.metrics)
        for stage, loop in loops.items()
        if isinstance(loop, BaseLoop) and hasattr(loop, 'dataloader')
    }


def explain(error: Exception, cfg: Config) -> ConfigError | None:
    """One sentence for what MMDetection raises where data cannot be read, such as an empty list.

    Args:
        error (Exception): What building the Runner or its data sets has raised.
        cfg (Config): The config.

    Returns:
        ConfigError | None: None if it was something else.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        dataset = frame.f_locals.get('self')
        if isinstance(dataset, BaseDataset) and frame.f_code.co_name == 'full_init':
            name, file = type(dataset).__name__, getattr(dataset, 'ann_file', None)
            paths = [
                path
                for stage in ('train', 'val', 'test')
                for path, given in datasets_of(
                    (cfg.get(f'{stage}_dataloader') or {}).get('dataset'),
                    f'{stage}_dataloader.dataset',
                )
                if file == os.path.join(given.get('data_root') or '', given.get('ann_file') or '')
            ]
            path = paths[0] if paths else name
            try:
                list(_Source(path, dataset).check())
            except Exception as found:
                if isinstance(found, ConfigError):
                    return found
            return ConfigError(
                f'{path}: {file} cannot be read, or no image of it is taken '
                f'({named(error)}): check whether it is what {name} '
                'reads, its annotations, metainfo.classes and filter_cfg'
            )
    return None


def compare(network: nn.Module, built: Mapping[str, tuple[Any, Sequence[Any]]]) -> Iterator[str]:
    """Compare what the parts of a run take classes, labels and images for.

    Args:
        network (nn.Module): The model.
        built (Mapping[str, tuple[Dataset, Sequence[BaseMetric]]]): For each of 'train', 'val' and
            'test' that is run, the data set and the metrics.

    Yields:
        str: What is unusual.

    Raises:
        ConfigError: If a part cannot go with another.
    """
    meanings: list[tuple[str, dict[int, str]]] = []  # of labels, and where they have them
    trained: dict[int, str] = {}
    is_by_text = hasattr(network, 'language_model')  # which has other classes with each text
    for stage, (dataset, metrics) in built.items():
        sources = list(_sources(dataset, f'{stage}_dataloader.dataset'))
        for source in sources:
            yield from source.check()
            own = (f'{source.path}.metainfo.classes', dict(enumerate(source.classes)))
            _check_meanings([own, (source.file, source.names)])
            meanings += [own, (source.file, source.names)]
            if stage == 'train':
                trained.update(source.names)
            if stage == next(iter(built)) and not is_by_text:
                yield from _check_heads(network, source)
        if stage == 'train' and not any(source.has_instances() for source in sources):
            raise ConfigError(
                f'{sources[0].path}: no image has an annotation that is taken from '
                f'{sources[0].file}: check its annotations (category_id, bbox, area), '
                'metainfo.classes and filter_cfg'
            )
        for number, metric in enumerate(metrics):
            if getattr(metric, '_coco_api', None) is None or len(sources) != 1:
                continue
            place = f'{stage}_evaluator.{number}'
            names = _check_metric(place, metric._coco_api, sources[0])
            meanings.append((f'the file of {place}', names))
            missed = [name for label, name in trained.items() if label not in names]
            if names and missed and not is_by_text:
                raise ConfigError(
                    f'{place}: {_listed(missed)}, which are trained, are not among the categories '
                    f'of its file and {sources[0].path}.metainfo.classes, and the validation fails '
                    'once one is detected: add them to both'
                )
    if not is_by_text:
        _check_meanings(meanings)
    if 'train' in built:
        _check_pretrained(network)


class _Source:
    """A data set that reads files.

    Attributes:
        path (str): Its place in the config.
        classes (tuple[str, ...]): By ``metainfo``.
        names (dict[int, str]): By label, the name in the annotation file, where it is known.
        dropped (list[str]): Names in the file whose annotations are not taken.
    """

    def __init__(self, path: str, dataset: Any) -> None:
        self.path = path
        self.dataset = dataset
        self.metainfo = getattr(dataset, 'metainfo', {})
        self.classes: Any = self.metainfo.get('classes') or ()
        self.is_default = self.classes == getattr(type(dataset), 'METAINFO', {}).get('classes')
        self.file = str(getattr(dataset, 'ann_file', ''))
        self.labels: dict[int, int] = getattr(dataset, 'cat2label', None) or {}
        content = _content_of(self.file) if hasattr(dataset, 'cat_ids') else {}
        self._of_id = {c['id']: c['name'] for c in content.get('categories', ())}
        annotations = content.get('annotations', ())  # panoptic ones are of images
        self._annotated = Counter(a['category_id'] for a in annotations if 'category_id' in a)
        self.names = {k: self._of_id[i] for i, k in self.labels.items() if i in self._of_id}
        self.dropped = [n for i, n in self._of_id.items() if self._annotated[i]]
        self.dropped = [name for name in self.dropped if name not in self.classes]
        self.advice = f'set {path}.metainfo=dict(classes={tuple(self._of_id.values())!r})'

    def samples(self) -> list[dict]:
        """What the data set knows of images from all parts of it."""
        count = len(self.dataset) if hasattr(self.dataset, 'get_data_info') else 0
        return [self.dataset.get_data_info(i) for i in range(0, count, max(count // SAMPLES, 1))]

    def check(self) -> Iterator[str]:
        """Refuse what cannot be meant, and tell what may be."""
        if isinstance(self.classes, str):
            raise ConfigError(
                f'{self.path}.metainfo.classes={self.classes!r} is a text, not a tuple of names: '
                f'write ({self.classes!r},) with a comma'
            )
        default = ', which it has by default,' if self.is_default else ''
        classes = f'{self.path}.metainfo.classes ({_listed(self.classes)}){default}'
        has = f'the categories of {self.file} ({_listed(self._of_id.values())})'
        unknown = [name for name in self.classes if name not in self._of_id.values()]
        lost = [i for i in self._annotated if i not in self._of_id]
        if self._of_id and self.classes and len(unknown) == len(self.classes):
            raise ConfigError(f'{classes} has none of {has}: {self.advice}')
        if self._of_id and self.is_default and self.dropped:
            yield f'{classes} is without {_listed(self.dropped)} of {has}: {self.advice}'
        elif self._of_id and unknown and not self.is_default:
            yield f'{classes} has {_listed(unknown)}, not among {has}'
        if self._of_id and lost:
            yield f'{self.file} has annotations of a category_id that is no category: {lost[0]!r}'
        paths = [info.get('img_path') for info in self.samples()]
        files = [path for path in paths if isinstance(path, str) and '://' not in path]
        if files and self._is_on_disk() and not any(map(os.path.exists, files)):
            raise ConfigError(
                f'{self.path}: none of {len(files)} images that were looked for is there, such as '
                f'{files[0]}: set {self.path}.data_prefix.img'
            )

    def has_instances(self) -> bool:
        """Whether there is anything to learn; most sets have it in the first image."""
        if not hasattr(self.dataset, 'get_data_info'):
            return True
        infos = map(self.dataset.get_data_info, range(len(self.dataset)))
        return any(info.get('instances', True) for info in infos)  # other tasks have none

    def _is_on_disk(self) -> bool:
        transforms = getattr(getattr(self.dataset, 'pipeline', None), 'transforms', ())
        given = [getattr(x, 'backend_args', None) or {} for x in (self.dataset, *transforms)]
        return all(args.get('backend', 'local') in ('local', 'disk') for args in given)


def _content_of(file: str) -> dict:
    """A file of COCO's format, {} if it is another's, not at hand, or too large to read again."""
    if os.path.isfile(file) and os.path.getsize(file) <= LARGEST:
        with open(file, encoding='utf-8') as stream, suppress(ValueError):
            content = json.load(stream)
            if isinstance(content, dict) and isinstance(content.get('categories'), list):
                return content
    return {}


def _sources(dataset: Any, path: str) -> Iterator[_Source]:
    """Go through wrappers down to what reads files."""
    if hasattr(dataset, 'datasets'):
        for number, part in enumerate(dataset.datasets):
            yield from _sources(part, f'{path}.datasets.{number}')
    elif hasattr(dataset, 'dataset'):
        yield from _sources(dataset.dataset, f'{path}.dataset')
    else:
        yield _Source(path, dataset)


def _check_metric(path: str, api: Any, source: _Source) -> dict[int, str]:
    """COCO's evaluation looks images and labels up in a file of its own."""
    known = [info for info in source.samples() if 'img_id' in info]
    pairs = [(api.imgs.get(info['img_id']), info) for info in known]
    strange = [info['img_id'] for image, info in pairs if image is None]
    names = [(i.get('file_name', ''), o.get('img_path') or '') for i, o in pairs if i is not None]
    if strange or (names and all(os.path.basename(i) != os.path.basename(o) for i, o in names)):
        image = repr(strange[0]) if strange else f'{names[0][1]} of that id'
        raise ConfigError(
            f'{path} evaluates another file than that of {source.path}: it has no image {image}: '
            f'set its ann_file to {source.file}'
        )
    ids = api.get_cat_ids(cat_names=source.classes) if source.names else ()
    return {label: api.cats[i]['name'] for label, i in enumerate(ids)}


def _check_meanings(meanings: Iterable[tuple[str, dict[int, str]]]) -> None:
    """A class has one label, and what is trained can be evaluated."""
    seen: dict[str, tuple[int, str]] = {}
    for place, names in meanings:
        for label, name in names.items():
            first, where = seen.setdefault(name, (label, place))
            if first != label:
                raise ConfigError(
                    f'{name!r} is class {first} of {where}, but class {label} of {place}: labels '
                    'go by the categories in the files, so have them in one order everywhere, and '
                    'metainfo.classes in the same'
                )


def _check_heads(network: nn.Module, source: _Source) -> Iterator[str]:
    """A head has an output for each label."""
    classes = source.metainfo.get('thing_classes', source.classes)  # the others have no instances
    is_known = classes is source.classes and source.labels
    needed = max(source.labels.values()) + 1 if is_known else len(classes)
    for name, module in network.named_modules():
        own_name = [part for part in name.split('.') if not part.isdigit()][-1:]
        key = 'num_things_classes' if hasattr(module, 'num_things_classes') else 'num_classes'
        given = getattr(module, key, None)
        is_agnostic = getattr(module, 'class_agnostic', False) or 'RPN' in type(module).__name__
        if _HEADS.isdisjoint(own_name) or is_agnostic or not isinstance(given, int):
            continue
        has = f'model.{name}.{key}={given}, but {source.path} has {len(classes)} classes'
        fix = f'({_listed(classes)}): set it to {len(classes)}'
        if classes and given != len(classes) and source.is_default and source.dropped:
            raise ConfigError(
                f'{has} by default, without {_listed(source.dropped)} of {source.file}: '
                f'{source.advice}'
            )
        if classes and given < needed:
            raise ConfigError(f'{has} {fix}')
        if classes and given != len(classes):
            yield f'{has} {fix}, if that is not meant'


def _check_pretrained(network: nn.Module) -> None:
    for name, module in network.named_modules():
        # Networks that convert weights of others do it in a method of their own.
        is_plain = getattr(type(module), 'init_weights', None) is BaseModule.init_weights
        given = getattr(module, 'init_cfg', None) if is_plain else None
        for init_cfg in given if isinstance(given, list) else [given or {}]:
            if is_pretrained(init_cfg):
                content = None
                with suppress(Exception):  # MMEngine loads it next, and says what is wrong
                    content = _load_checkpoint(init_cfg['checkpoint'], 'cpu')
                what = f'model.{name}.init_cfg.checkpoint {init_cfg["checkpoint"]}'
                _check_weights(content, module, what, init_cfg.get('prefix') or '')


def _check_weights(checkpoint: Any, module: nn.Module, what: str, prefix: str = '') -> None:
    content = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    own = {name: value.shape for name, value in module.state_dict().items() if value.dim()}
    if not isinstance(content, dict) or not own:
        return
    prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
    for name, value in content.items():
        name = name.removeprefix('module.')
        is_there = name.startswith(prefix) and name.removeprefix(prefix) in own
        if is_there and own[name.removeprefix(prefix)] == getattr(value, 'shape', None):
            return
    raise ConfigError(
        f'{what}: none of its weights has name and shape of one of {type(module).__name__}: give '
        'weights of this network' + (f', or another prefix than {prefix!r}' if prefix else '')
    )


def _listed(names: Iterable[Any]) -> str:
    shown = [repr(name) for name in names]
    more = f' and {len(shown) - SHOWN} more' if len(shown) > SHOWN else ''
    return ', '.join(shown[:SHOWN]) + more
