"""Write a report of one or more training runs: an HTML page, and its figures as PNG and SVG."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psbn_mmdet.commands.report import main

if __name__ == '__main__':
    sys.exit(main())
