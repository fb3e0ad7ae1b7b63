"""The report: one HTML file that opens from disk, and its figures beside it."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..records.atomic import is_among, replacing
from .figures import FIGURES
from .runs import Run, input_files, read_run
from .stage_table import COLUMNS, stage_rows
from .style import COLORS, STYLE, printable

DPI = 150
TEMPLATES = Environment(
    loader=PackageLoader('psbn_mmdet.report'),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    work_dirs: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Path:
    """Write the report of one or more runs.

    The page is one self-contained HTML file. The same figures are written as PNG and SVG into a
    folder beside it, ``report_figures`` for ``report.html``.

    Args:
        work_dirs (Mapping[str, str | PathLike]): Work dirs, run folders or records, by label.
        out (str | PathLike): The page to write.
        progress (Callable[[str, float], None]): Called with what is done, and the share of it
            that is done, from 0 to 1.

    Returns:
        Path: ``out``.

    Raises:
        FileNotFoundError: If a work dir has no record.
        ValueError: If there are more runs than colors, if a label is empty, if ``out`` is a
            folder or a file that is read, if a record has no report yet, or if a file is damaged.

    Examples:
        >>> from psbn_mmdet.report import write_report
        >>> runs = {'BN': 'work_dirs/bn', 'psBN': 'work_dirs/psbn'}
        >>> write_report(runs, 'report.html')  # doctest: +SKIP
    """
    out = Path(out)
    _check_request(work_dirs, out)
    runs = []
    for label, path in work_dirs.items():
        what = f'reading {printable(label)}'
        progress(what, 0)
        runs.append(read_run(path, printable(label), lambda share: progress(what, share)))  # noqa: B023
    figures, files = _draw(runs, progress)

    folder = out.with_name(f'{out.stem}_figures')
    page = TEMPLATES.get_template('report.html.j2').render(
        runs=[_facts(run, color) for run, color in zip(runs, COLORS)],
        figures=figures,
        folder=printable(folder.name),
        columns=COLUMNS,
    )
    with ExitStack() as stack:  # no file is replaced before all are written
        for path, content in ((out, page.encode()), *((folder / n, c) for n, c in files.items())):
            stack.enter_context(replacing(path)).write_bytes(content)
    for name in FIGURES:
        for ending in ('png', 'svg'):
            if f'{name}.{ending}' not in files:  # of an earlier report
                (folder / f'{name}.{ending}').unlink(missing_ok=True)
    return out


def _check_request(work_dirs: Mapping[str, str | os.PathLike], out: Path) -> None:
    """Refuse bad arguments before reading any run."""
    if not 1 <= len(work_dirs) <= len(COLORS):
        raise ValueError(
            f'{len(work_dirs)} runs cannot be told apart by color: give 1 to {len(COLORS)}'
        )
    if not all(isinstance(label, str) for label in work_dirs):
        raise ValueError(f'the labels {list(work_dirs)} are not all texts: give each run a name')
    if not all(label.strip() for label in work_dirs):
        raise ValueError("a label is empty, '': give each run a name")
    if out.is_dir():
        raise ValueError(f'{out} is a folder: name a file, such as {out / "report.html"}')
    if any(is_among(out, input_files(path)) for path in work_dirs.values()):
        raise ValueError(f'{out} is of the run itself and is not overwritten: name another file')


def _draw(
    runs: Sequence[Run], progress: Callable[[str, float], None]
) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """What the page shows of each figure, and the figures' files by name."""
    shown, files = [], {}
    for number, (name, entry) in enumerate(FIGURES.items()):
        progress('drawing', number / len(FIGURES))
        section = {'name': name, 'heading': entry.heading, 'text': entry.text}
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box; the page has the name in full.
            warnings.filterwarnings('ignore', r'Glyph .* missing from font')
            figure = entry.draw(runs)
            if isinstance(figure, Figure):
                for ending, content in _render(figure).items():
                    files[f'{name}.{ending}'] = content
                section['title'] = figure.get_suptitle().replace('\n', ' ')
                section['svg'] = base64.b64encode(files[f'{name}.svg']).decode()
            else:
                section['missing'] = figure
        shown.append(section)
    progress('drawing', 1)
    return shown, files


def _render(figure: Figure) -> dict[str, bytes]:
    """A figure as PNG and SVG, by the ending of the file's name."""
    written = {}
    for ending, canvas, metadata in (
        ('png', FigureCanvasAgg, None),
        ('svg', FigureCanvasSVG, {'Date': None}),
    ):
        content = io.BytesIO()
        canvas(figure).print_figure(content, format=ending, dpi=DPI, metadata=metadata)
        written[ending] = content.getvalue()
    return written


def _facts(run: Run, color: str) -> dict[str, Any]:
    """What the page says of a run in words and tables."""
    layers, last = run.header['layers'], run.last
    by_layer = zip(layers, last['layers']['collapsed'], last['channels']['collapsed'])
    return {
        'label': run.label,
        'color': color,
        'path': printable(str(run.path)),
        'norms': ', '.join(dict.fromkeys(printable(str(layer['norm'])) for layer in layers)),
        'layers': len(layers),
        'filters': int(run.sizes.sum()),
        'iterations': int(run.iterations[-1]),
        'reports': len(run.iterations),
        'header': run.header,
        'stages': [[printable(cell) for cell in row] for row in stage_rows(run)],
        'collapsed': [(printable(layer['name']), n, ranges) for layer, n, ranges in by_layer if n],
    }
