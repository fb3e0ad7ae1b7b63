"""Plot the collapsed filters of one or more training runs over iterations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.report import find_record, plot_collapse


def main() -> int:
    """Parse the arguments, draw, say where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dirs', nargs='+', help="work dirs of runs, or 'collapse.jsonl' files")
    parser.add_argument('--labels', nargs='+', help='a label for each run, else its name')
    parser.add_argument('--title', help='the title, else one that states the outcome')
    parser.add_argument(
        '-o', '--out', help='the picture to write (png, svg or pdf), else one beside the record'
    )
    args = parser.parse_args()
    labels = args.labels or [Path(work_dir).resolve().name for work_dir in args.work_dirs]
    try:
        if len(set(labels)) != len(args.work_dirs):
            raise ValueError(
                f'{len(args.work_dirs)} runs need as many labels, all different, '
                f'got {", ".join(labels)}: give --labels'
            )
        out = args.out or find_record(args.work_dirs[0]).with_name('collapse.png')
        out = plot_collapse(dict(zip(labels, args.work_dirs)), out, args.title)
    except (OSError, ValueError) as error:
        print(f'plot_collapse: {error}', file=sys.stderr)
        return 1
    print(f'The plot of collapsed filters is in {out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
