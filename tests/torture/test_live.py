"""A record that is read while it is being written."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cases
import numpy as np
import pytest
from attempts import attempt
from cases import count

from psbn_mmdet.records import Records, read_records
from psbn_mmdet.report import read_run

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / 'benchmarks/results/compare/bn/collapse.jsonl'  # of a real training
DATA = SOURCE.read_bytes()
WHOLE = read_records(SOURCE)
NOTHING_YET = re.compile('no header line|no report yet')
CHANNELS = sum(layer['channels'] for layer in WHOLE.header['layers'])

TORN_WRITER = """
import os, random, sys, time
source, target, rng = sys.argv[1], sys.argv[2], random.Random(int(sys.argv[3]))
data = open(source, 'rb').read()
file = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while data:
    data = data[os.write(file, data[: rng.choice([1, 10, 300, 1000, 1600, 4096])]) :]
    time.sleep(rng.choice([0, 0, 0.01]))
"""

# A score is logged in two pieces, then come the report of its iteration and the snapshot, as in a
# training: a snapshot in the report is beside all reports up to it.
TRAINING = """
import json, os, pathlib, random, sys, time
import numpy as np
from psbn_mmdet.records import RecordWriter, read_records, write_snapshot
source, run, rng = sys.argv[1], pathlib.Path(sys.argv[2]), random.Random(int(sys.argv[3]))
whole = read_records(source)
(run / 'vis_data').mkdir(parents=True)
writer = RecordWriter(run / 'collapse.jsonl', whole.header)
values = np.zeros(sum(layer['channels'] for layer in whole.header['layers']))
write_snapshot(run, 0, values, values)
for step, report in enumerate(whole.reports, start=1):
    writer.append(report)
    write_snapshot(run, report['iter'], values, values)
    line = json.dumps({'coco/bbox_mAP': step / 100, 'step': step}) + '\\n'
    for part in line[:20], line[20:]:
        with open(run / 'vis_data' / 'scalars.json', 'a') as file:
            file.write(part)
        time.sleep(rng.choice([0, 0.005, 0.02]))
"""


@contextmanager
def writing(script: str, target: Path, seed: int) -> Iterator[subprocess.Popen]:
    """Another process that writes the record."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', script, str(SOURCE), str(target), str(seed)]
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def check_records(found: Records, reports: int) -> None:
    assert (found.header, found.reports) == (WHOLE.header, WHOLE.reports[:reports])


def check_run(path: Path, at_least: int = 0) -> int:
    """Number of reports that are read of a run, all of them right; 0 if there is none yet."""
    run, error = attempt(read_run, path, 'run')
    if error:
        assert NOTHING_YET.search(error)
        return 0
    reports = WHOLE.reports[: len(run.iterations)]
    assert len(reports) >= at_least
    assert run.iterations.tolist() == [report['iter'] for report in reports]
    for kind in ('collapsed', 'dead', 'trapped', 'vanished'):
        counts = [report['total'][kind] for report in reports]
        assert np.array_equal(run.counts[kind], np.array(counts, float), True), kind
    assert run.last == reports[-1]
    assert np.array_equal(run.collapsed, collapsed(run.last))
    for snapshot in run.snapshots:
        told = [report for report in WHOLE.reports if report['iter'] <= snapshot.iteration]
        state = collapsed(told[-1]) if told else np.zeros(CHANNELS, bool)
        assert np.array_equal(snapshot.collapsed, state), 'of its own iteration'
    steps, values = run.scores.get('AP', ([], []))
    assert values == [step / 100 for step in steps]
    assert len(steps) <= len(reports), 'no score is of a report that is not there'
    return len(reports)


def collapsed(report: dict) -> np.ndarray:
    layers = range(len(WHOLE.header['layers']))
    return np.concatenate([WHOLE.mask(report, 'collapsed', layer) for layer in layers])


def cuts() -> list[int]:
    """Lengths of a record that is cut off: around each line's end, and elsewhere."""
    ends = [place + 1 for place, byte in enumerate(DATA) if byte == ord('\n')]
    around = {end + step for end in ends for step in (-2, -1, 0, 1)}
    others = range(0, len(DATA), 5) if cases.FULL else random.Random(0).sample(range(len(DATA)), 30)
    return sorted({cut for cut in {*around, *others} if cut <= len(DATA)})


@pytest.mark.parametrize('tail', [b'', b'\x00' * 300], ids=['cut off', 'not filled yet'])
def test_cut_off_anywhere_all_whole_reports_are_read(tmp_path, tail):
    path = tmp_path / 'collapse.jsonl'
    for cut in cuts():
        path.write_bytes(DATA[:cut] + tail)
        reports = DATA[:cut].count(b'\n') - 1
        if reports < 0:
            for read in (read_records, lambda path: read_run(path, 'run')):
                with pytest.raises(ValueError, match='no header line'):
                    read(path)
        else:
            check_records(read_records(path), reports)
            assert check_run(path) == reports
        count()


@pytest.mark.parametrize('seed', range(2))
def test_beside_a_process_that_writes_in_pieces_all_whole_reports_are_read(tmp_path, seed):
    for number in range(25 if cases.FULL else 1):
        path = tmp_path / f'{number}.jsonl'
        path.touch()
        reports = 0
        with writing(TORN_WRITER, path, 100 * number + seed) as writer:
            while reports < len(WHOLE.reports):
                alive = writer.poll() is None
                least = DATA[: path.stat().st_size].count(b'\n') - 1
                found, error = attempt(read_records, path)
                if error:
                    assert NOTHING_YET.search(error)
                    reports = -1
                else:
                    reports = len(found.reports)
                    check_records(found, reports)
                assert least <= reports <= DATA[: path.stat().st_size].count(b'\n') - 1
                check_run(path, at_least=reports)
                assert alive or reports == len(WHOLE.reports)
                count()


@pytest.mark.parametrize('seed', range(2))
def test_beside_a_training_reports_snapshots_and_scores_agree(tmp_path, seed):
    for number in range(25 if cases.FULL else 1):
        run = tmp_path / f'{number}' / '20260101_000000'
        reports = 0
        with writing(TRAINING, run, 100 * number + seed) as writer:
            while True:
                alive = writer.poll() is None
                try:
                    reports = check_run(run.parent, at_least=reports)
                except FileNotFoundError:
                    time.sleep(0.01)
                count()
                if not alive:
                    break
            assert reports == len(WHOLE.reports)
            assert writer.returncode == 0
