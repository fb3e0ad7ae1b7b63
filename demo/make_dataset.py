"""Generate the demo's detection set: drawn shapes in COCO format.

Discs, squares, triangles and crosses of many sizes, tilted, shaded and partly
hidden behind each other, on textured and noisy backgrounds. Color says nothing
about the class. The same arguments give the same files, byte for byte.

    python demo/make_dataset.py data/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

CLASSES = ('disc', 'square', 'triangle', 'cross')

# In the annotation files' info: names this generator's own folders, and the
# version of the drawing, to be raised when the same arguments draw other images.
DESCRIPTION = 'Drawn shapes (psbn_mmdet demo)'
VERSION = '1'

DIAMETERS = (0.07, 0.9)  # of the circumscribed circle, as fractions of the image's side
NUM_OBJECTS = (3, 9)  # at least, at most; some of them are left out again
MAX_TILT = 0.4  # radians
MIN_VISIBLE = 0.35  # fraction of each object that stays in sight
MIN_CONTRAST = 60  # distance of mean colors, object to what lies behind it
SUPERSAMPLING = 4  # masks are drawn this much larger, for smooth edges


def make_dataset(
    out_dir: str | Path,
    num_train: int = 360,
    num_val: int = 80,
    image_size: int = 192,
    seed: int = 0,
) -> Path:
    """Write the set to ``out_dir``, unless it stands there already.

    The images are drawn into ``<out_dir>.partial``, which takes the place of
    ``out_dir`` once complete: an interrupted run leaves nothing that passes for a
    data set.

    Args:
        out_dir: Folder to create, with ``annotations/{train,val}.json``,
            ``train/*.jpg`` and ``val/*.jpg``.
        num_train: Number of training images.
        num_val: Number of validation images.
        image_size: Side of the square images in pixels, at least 32.
        seed: Seed of everything drawn, not negative.

    Returns:
        ``out_dir`` as a path.

    Raises:
        ValueError: If a number is out of its range.
        FileExistsError: If ``out_dir`` holds something that is not such a set.
    """
    limits = dict(num_train=1, num_val=1, image_size=32, seed=0)
    values = dict(num_train=num_train, num_val=num_val, image_size=image_size, seed=seed)
    for name, lowest in limits.items():
        if values[name] < lowest:
            raise ValueError(f'make_dataset: {name} must be at least {lowest}, got {values[name]}')

    out_dir = Path(out_dir)
    info = dict(description=DESCRIPTION, version=VERSION, arguments=values)
    if _is_complete(out_dir, info):
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()) and not _is_own(out_dir):
        raise FileExistsError(
            f'{out_dir} holds files that are not a generated set: give a new or empty folder'
        )

    partial = out_dir.with_name(out_dir.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    (partial / 'annotations').mkdir(parents=True)
    for index, (split, count) in enumerate((('train', num_train), ('val', num_val))):
        coco = _write_images(partial / split, count, image_size, (seed, index))
        text = json.dumps(dict(info=info, licenses=[], **coco))
        (partial / 'annotations' / f'{split}.json').write_text(text)

    if out_dir.exists():
        shutil.rmtree(out_dir)
    partial.rename(out_dir)
    return out_dir


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Draw one image.

    Args:
        rng: Source of everything random.
        size: Side of the image in pixels.

    Returns:
        The image (size, size, 3) in uint8, the objects' indices in ``CLASSES``,
        and their visible pixels (num_objects, size, size) as booleans.
    """
    image = _background(rng, size)
    labels: list[int] = []
    areas: list[int] = []
    owner = np.full((size, size), -1)  # which object is seen at each pixel
    for _ in range(rng.integers(*NUM_OBJECTS, endpoint=True)):
        label = int(rng.integers(len(CLASSES)))
        diameter = size * np.exp(rng.uniform(*np.log(DIAMETERS)))
        outline = _outline(rng, CLASSES[label], diameter / 2)
        center = rng.uniform(diameter / 4, size - diameter / 4, 2)
        alpha = _rasterise(outline + center, size)
        whole_area = cv2.contourArea(outline.astype(np.float32))

        new_owner = np.where(alpha > 0.5, len(labels), owner)
        visible = np.bincount(new_owner[new_owner >= 0], minlength=len(labels) + 1)
        if (visible < MIN_VISIBLE * np.array([*areas, whole_area])).any():
            continue  # out of the image, or hiding another object: leave it out
        owner = new_owner
        labels.append(label)
        areas.append(whole_area)
        _paint(rng, image, alpha)

    image += rng.normal(0, rng.uniform(2, 10), image.shape)
    masks = owner == np.arange(len(labels))[:, None, None]
    return np.clip(image, 0, 255).astype(np.uint8), labels, masks


def _is_own(out_dir: Path) -> bool:
    return _read_info(out_dir / 'annotations' / 'train.json').get('description') == DESCRIPTION


def _is_complete(out_dir: Path, info: dict) -> bool:
    """Whether both splits were made with these arguments and lack no image."""
    arguments = info['arguments']
    return all(
        _read_info(out_dir / 'annotations' / f'{split}.json') == info
        and len(list((out_dir / split).glob('*.jpg'))) == arguments[f'num_{split}']
        for split in ('train', 'val')
    )


def _read_info(path: Path) -> dict:
    try:
        return json.loads(path.read_text())['info']
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _write_images(folder: Path, count: int, size: int, seed: tuple[int, int]) -> dict:
    """Draw and save the images of one split; return its part of the COCO file."""
    folder.mkdir()
    images, annotations = [], []
    for i in tqdm(range(count), desc=f'drawing {folder.name}'):
        # One generator per image: a longer set begins with the shorter one.
        image, labels, masks = draw_scene(np.random.default_rng([*seed, i]), size)
        file_name = f'{i:05d}.jpg'
        if not cv2.imwrite(str(folder / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f'cannot write {folder / file_name}: check the space and the permissions')
        images.append(dict(id=i, file_name=file_name, width=size, height=size))
        for label, mask in zip(labels, masks):
            annotations.append(
                dict(
                    id=len(annotations) + 1,  # COCOeval takes id 0 for "no match"
                    image_id=i,
                    category_id=label + 1,
                    bbox=list(cv2.boundingRect(mask.astype(np.uint8))),
                    area=int(mask.sum()),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
    return dict(images=images, annotations=annotations, categories=categories)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A color gradient, clouds, perhaps stripes or checks: (size, size, 3), float."""
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    image = rng.uniform(40, 215, 3) + along[..., None] * rng.uniform(-60, 60, 3)
    cells = int(rng.integers(3, 17))
    clouds = rng.normal(0, rng.uniform(5, 30), (cells, cells, 3))
    image += cv2.resize(clouds, (size, size), interpolation=cv2.INTER_CUBIC)

    frequency = 2 * np.pi * rng.uniform(4, 20)
    stripes = np.sin(frequency * along)
    checks = np.sign(stripes * np.sin(frequency * across))
    pattern = (np.zeros_like(stripes), stripes, checks)[rng.integers(3)]
    image += pattern[..., None] * rng.uniform(-20, 20, 3)
    return image


def _outline(rng: np.random.Generator, shape: str, radius: float) -> np.ndarray:
    """The corners of a tilted, slightly squeezed shape around the origin: (n, 2)."""
    if shape == 'cross':
        thickness = rng.uniform(0.25, 0.4)
        arm = [[1, -thickness], [1, thickness], [thickness, thickness]]
        turns = np.arange(4) * np.pi / 2
        corners = np.concatenate([arm @ _rotation(turn) for turn in turns])
    else:
        num_corners = dict(disc=64, square=4, triangle=3)[shape]
        turns = (np.arange(num_corners) + 0.5) * 2 * np.pi / num_corners + np.pi / 2
        corners = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    squeeze = np.array([1, rng.uniform(0.85, 1)])
    return radius * (corners * squeeze) @ _rotation(rng.uniform(-MAX_TILT, MAX_TILT))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _rasterise(corners: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel the polygon covers, 0 to 1: (size, size)."""
    canvas = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    # fillPoly takes pixel centres as whole numbers, hence the half pixel.
    points = np.round(corners * SUPERSAMPLING - 0.5).astype(np.int32)
    cv2.fillPoly(canvas, [points], 255)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA) / 255


def _paint(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray) -> None:
    """Lay a shaded color over the image, in place, where ``alpha`` says so."""
    y, x = np.nonzero(alpha)
    cover = alpha[y, x, None]
    behind = (cover * image[y, x]).sum(axis=0) / cover.sum()
    color = rng.uniform(20, 235, 3)
    while np.linalg.norm(color - behind) < MIN_CONTRAST:
        color = rng.uniform(20, 235, 3)
    angle = rng.uniform(0, 2 * np.pi)
    shade = (x * np.cos(angle) + y * np.sin(angle)) / len(image) * rng.uniform(0, 80)
    grain = rng.normal(0, rng.uniform(0, 12), len(x))
    surface = color + (shade - shade.mean() + grain)[:, None]
    image[y, x] += cover * (surface - image[y, x])


def main() -> None:
    """Read the command line and generate the set."""
    parser = argparse.ArgumentParser(description='Generate the COCO-format demo set.')
    parser.add_argument('out_dir', type=Path, help='folder to create, e.g. data/demo')
    parser.add_argument('--num-train', type=int, default=360, help='default: %(default)s')
    parser.add_argument('--num-val', type=int, default=80, help='default: %(default)s')
    parser.add_argument('--image-size', type=int, default=192, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    try:
        out_dir = make_dataset(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from None
    print(f'{out_dir} is ready')


if __name__ == '__main__':
    main()
