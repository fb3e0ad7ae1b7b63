"""Group MMCV's C++ sources, so that the compiler parses torch's headers five times instead of 78.

    python scripts/group_mmcv.py MMCV_SOURCE

Each group is one file that includes its members. MMCV's setup.py compiles `*.cpp` of two folders,
so the members move into folders below them, where it does not look. CUDA sources stay as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

ALONE = {'roi_align.cpp', 'roi_align_rotated.cpp', 'rotated_feature_align.cpp'}  # same names inside
LAST = 'psamask.cpp'  # defines the macros min and max


def group(folder: Path, names: list[str]) -> None:
    """Replace files of a folder by one that includes them in this order."""
    (folder / 'grouped').mkdir()
    for name in names:
        (folder / name).rename(folder / 'grouped' / name)
    (folder / 'grouped.cpp').write_text(''.join(f'#include "grouped/{name}"\n' for name in names))


def main(source: str) -> None:
    """Group the sources in an unpacked MMCV; an error means that they are laid out differently."""
    pytorch = Path(source, 'mmcv/ops/csrc/pytorch')
    for folder, apart, last in ((pytorch, set(), []), (pytorch / 'cpu', ALONE, [LAST])):
        names = {path.name for path in folder.glob('*.cpp')} - apart - {*last}
        group(folder, sorted(names) + last)


if __name__ == '__main__':
    main(*sys.argv[1:])
