"""Files that mean harm: none runs code, fills the memory, or is read where it should not be."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from cases import count
from limits import HANG
from mmengine.config import Config
from tiny_model import tiny_config
from torch import nn

from psbn_mmdet.checkpoints import read_content, read_weights
from psbn_mmdet.commands import audit, report, revive
from psbn_mmdet.commands.preflight import check_test_config, check_train_config
from psbn_mmdet.configs.reading import ConfigError
from psbn_mmdet.layers import find_norm_states
from psbn_mmdet.records import COUNTS, RecordWriter, write_snapshot
from psbn_mmdet.report import read_run

ROOT = Path(__file__).resolve().parents[2]
GB = 1024**3


def state_dict() -> dict:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.normal_(model[1].weight)
    return model.state_dict()


# Pickles that would run code, in every place of a file


def saved(path, content, **options):
    torch.save(content, path, **options)


def zip_with_another_pickle(path, bomb, name):
    saved(path, dict(state_dict=state_dict()))
    with zipfile.ZipFile(path, 'a') as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of names that are there already
        root = archive.namelist()[0].partition('/')[0]
        archive.writestr(f'{root}/{name}', pickle.dumps(bomb))


def torchscript(path, bomb):
    torch.jit.script(nn.BatchNorm2d(4)).save(str(path))
    with zipfile.ZipFile(path, 'a') as archive:
        root = archive.namelist()[0].partition('/')[0]
        archive.writestr(f'{root}/extra/bomb.pkl', pickle.dumps(bomb))


def bare(path, bomb):
    path.write_bytes(pickle.dumps(dict(state_dict=bomb), protocol=2))


def with_state(bomb):
    """A dict of an allowed class whose state, set after it is made, is the bomb."""
    made = OrderedDict(state_dict())
    made._metadata = bomb
    return made


SHAPES = {
    'in meta': lambda path, bomb: saved(path, dict(state_dict=state_dict(), meta=bomb)),
    'in meta, legacy': lambda path, bomb: saved(
        path, dict(state_dict=state_dict(), meta=bomb), _use_new_zipfile_serialization=False
    ),
    'alone': lambda path, bomb: saved(path, bomb),
    'bare pickle': bare,
    'in the message hub': lambda path, bomb: saved(
        path,
        dict(state_dict=state_dict(), message_hub=dict(runtime_info={'collapse/record': bomb})),
    ),
    'in the optimizer': lambda path, bomb: saved(
        path, dict(state_dict=state_dict(), optimizer=dict(state={0: bomb}))
    ),
    'as an entry': lambda path, bomb: saved(
        path, dict(state_dict=state_dict() | {'1.weight': bomb})
    ),
    'as a key': lambda path, bomb: saved(path, dict(state_dict=state_dict(), other={bomb: 1})),
    'as metadata': lambda path, bomb: saved(path, dict(state_dict=with_state(bomb))),
    'two data.pkl': lambda path, bomb: zip_with_another_pickle(path, bomb, 'data.pkl'),
    'TorchScript': torchscript,
}
HARMLESS = {'another pickle': lambda path, bomb: zip_with_another_pickle(path, bomb, 'bomb.pkl')}


@pytest.fixture(scope='module')
def loaded_cfg(shrink) -> Config:
    cfg = Config.fromfile(ROOT / 'configs/psbn/retinanet_r50_fpn_psbn_1x_coco.py')
    shrink(cfg)
    return cfg


@pytest.fixture
def cfg(loaded_cfg, tmp_path) -> Config:
    cfg = deepcopy(loaded_cfg)
    cfg.work_dir = str(tmp_path / 'work')
    return cfg


def tool(main, *arguments) -> str:
    """The one sentence of a tool that stops, '' if it does not."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', stdout)
        patch.setattr(sys, 'stderr', stderr)
        code = main([str(argument) for argument in arguments])
    if code == 0:
        assert stderr.getvalue() == ''
        return ''
    assert code == 1 and stdout.getvalue() == ''
    (line,) = stderr.getvalue().splitlines()
    return line


def check(function, *arguments) -> str:
    """The one sentence of a check before a run, '' if it passes."""
    try:
        function(*arguments)
    except ConfigError as error:
        (line,) = str(error).splitlines()
        return line
    return ''


def resumed(cfg, path):
    Path(cfg.work_dir).mkdir()
    Path(cfg.work_dir, 'last_checkpoint').write_text(str(path))
    cfg.resume = True
    return check(check_train_config, cfg)


def pretrained(cfg, path):
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    return check(check_train_config, cfg)


def loaded(cfg, path):
    cfg.load_from = str(path)
    return check(check_train_config, cfg)


def good(path):
    saved(path.parent / 'good.pth', dict(state_dict=state_dict()))
    return path.parent / 'good.pth'


ENTRIES = {
    'audit': lambda cfg, path: tool(audit.main, path),
    'audit, second': lambda cfg, path: tool(audit.main, good(path), path),
    'revive': lambda cfg, path: tool(
        revive.main, path, path.with_name('out.pth'), '--config', tiny_config(path.parent)
    ),
    'train, load_from': loaded,
    'train, --resume': resumed,
    'train, init_cfg': pretrained,
    'test': lambda cfg, path: check(check_test_config, cfg, str(path)),
}


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('shape', SHAPES | HARMLESS)
def test_no_pickle_runs_at_any_entry(shape, entry, cfg, bomb, tmp_path):
    count()
    path = tmp_path / 'bad.pth'
    (SHAPES | HARMLESS)[shape](path, bomb)
    sentence = ENTRIES[entry](cfg, path)
    assert not bomb.path.exists()
    if 'has weights, but no state of a training' in sentence:
        sentence = ''  # it was read
    if shape == 'two data.pkl' and not sentence:
        return  # torch has taken the first
    assert bool(sentence) == (shape in SHAPES), sentence
    if shape in SHAPES:
        assert 'bad.pth' in sentence
        assert re.search(r'asks for \w+\.mkdir|TorchScript program|cannot be read', sentence)
        assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('entry', ['audit', 'audit, second', 'revive'])
def test_a_pickle_is_no_safetensors_or_onnx_file(entry, cfg, bomb, tmp_path):
    for ending in ('safetensors', 'onnx'):
        count()
        bare(tmp_path / f'bad.{ending}', bomb)
        assert f'bad.{ending}' in ENTRIES[entry](cfg, tmp_path / f'bad.{ending}')
    assert not bomb.path.exists()


def test_the_pickles_would_run_where_pickles_do(bomb, tmp_path):
    """Or the tests above would tell nothing."""
    for shape in SHAPES:
        if shape not in ('two data.pkl', 'TorchScript', 'bare pickle', 'as a key'):
            count()
            SHAPES[shape](tmp_path / 'bad.pth', bomb)
            torch.load(tmp_path / 'bad.pth', weights_only=False)
            bomb.path.rmdir()


# Records and snapshots


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's log folder with two reports and a snapshot."""
    folder = tmp_path / 'work/20260101_000000'
    make_run(folder)
    return folder


def make_run(folder: Path, **header) -> None:
    layers = [dict(name='a.bn', channels=4, norm='BN', shift=0, rectifier='relu', frozen=False)]
    common = dict(interval=50, window=50, tau=1e-3, k=3.0, continues=None)
    writer = RecordWriter(folder / 'collapse.jsonl', dict(layers=layers) | common | header)
    for iteration in (50, 100):
        writer.append(
            dict(
                **dict(iter=iteration, epoch=1, lr=dict(lr=0.1), steps=50),
                channels={key: [''] for key in COUNTS},
            )
        )
    write_snapshot(folder, 0, np.ones(4), np.zeros(4))


def log_ap(folder: Path, ap: float) -> None:
    (folder / 'vis_data').mkdir()
    line = json.dumps({'coco/bbox_mAP': ap, 'step': 1})
    (folder / 'vis_data/scalars.json').write_text(f'{line}\n')


def report_on(run: Path) -> str:
    return tool(report.main, run.parent, '-o', run.parent / 'report.html')


def test_a_line_without_an_end_is_not_read_to_it(run):
    for path, sentence in (
        (run / 'vis_data/scalars.json', 'line 1'),
        (run / 'collapse.jsonl', 'line 4'),
    ):
        count()
        path.parent.mkdir(exist_ok=True)
        with path.open('ab') as file:
            file.truncate(path.stat().st_size + 20 * GB)  # of zeros that take no room
        said = report_on(run)
        assert f'{sentence} is damaged' in said and 'it has 8,388,608 bytes or more' in said
        path.unlink()


def test_a_pipe_is_no_record(run):
    for name in ('20250101_000000', '20270101_000000'):
        count()
        (run.parent / name).mkdir()
        os.mkfifo(run.parent / name / 'collapse.jsonl')
    header, *reports = (run / 'collapse.jsonl').read_text().splitlines()
    header = json.dumps(json.loads(header) | dict(continues='../20250101_000000'))
    (run / 'collapse.jsonl').write_text('\n'.join([header, *reports, '']))
    assert report_on(run) == ''


def npy(shape, descr: str = '<f2', data: bytes = b'') -> bytes:
    file = io.BytesIO()
    header = dict(descr=descr, fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def test_no_pickle_runs_from_a_run_s_files(run, bomb):
    pickled = io.BytesIO()
    np.save(pickled, np.array([[bomb] * 4] * 2, dtype=object), allow_pickle=True)
    zipped = io.BytesIO()
    np.savez(zipped, a=np.array([bomb], dtype=object))
    for content in (pickled.getvalue(), pickle.dumps(bomb), zipped.getvalue()):
        count()
        (run / 'snapshots/iter_0.npy').write_bytes(content)
        assert 'iter_0.npy is no snapshot of this run' in report_on(run)
    (run / 'snapshots/iter_0.npy').unlink()
    for name in ('collapse.jsonl', 'vis_data/scalars.json'):  # the second is read first
        count()
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(pickle.dumps(bomb, protocol=0) + b'\n')
        assert f'{name}, line 1 is damaged' in report_on(run)
    assert not bomb.path.exists()


@pytest.mark.parametrize('damage', [10**12, 10**30, -1, '8', 1e3, True, None, []])
def test_channels_that_cannot_be_are_refused(run, damage):
    count()
    make_run(run, layers=[dict(name='a', channels=damage, norm='BN')])
    assert re.search('line 1 is damaged .*(no integer|1000000000000 channels)', report_on(run))


@pytest.mark.parametrize(
    'line',
    [
        '[' * 200_000,
        '{"iter": 150, "epoch": 1}',
        '{"iter": 4611686018427387904}',
        '{"iter": true}',
    ],
)
def test_lines_that_cannot_be_are_refused(run, line):
    count()
    with open(run / 'collapse.jsonl', 'a') as file:
        file.write(f'{line}\n')
    assert 'line 4 is damaged' in report_on(run)


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('terabytes', npy((2, 10**12))),
        ('more than a number holds', npy((2, 10**30))),
        ('of the right shape, and empty', npy((2, 4))),
        ('negative', npy((2, -4))),
        ('terabytes in a value', npy((2, 4), '|V1000000000', b'a' * 64)),
        ('text', npy((2, 4), '<U4', b'a' * 128)),
        ('complex', npy((2, 4), '<c8', b'a' * 64)),
        ('an object', npy((2, 4), '|O', b'cos\nsystem\n')),
    ],
)
def test_snapshots_that_cannot_be_are_refused(run, name, content):
    count()
    (run / 'snapshots/iter_0.npy').write_bytes(content)
    assert 'iter_0.npy is no snapshot of this run' in report_on(run)


def test_a_snapshot_that_is_no_file_is_passed_over(run):
    for make in (os.mkfifo, lambda path: path.symlink_to('/dev/zero'), Path.mkdir):
        count()
        path = run / 'snapshots/iter_0.npy'
        path.unlink() if not path.is_dir() else path.rmdir()
        make(path)
        assert read_run(run, 'run').snapshots == []


@pytest.mark.parametrize('how', ['parent', 'absolute', 'link'])
def test_a_record_that_continues_one_elsewhere_is_read_alone(tmp_path, how):
    count()
    elsewhere = tmp_path / 'elsewhere/20260101_000000'
    make_run(elsewhere)
    log_ap(elsewhere, 0.5)
    folder = tmp_path / 'work/20260102_000000'
    claims = dict(parent='../../elsewhere/20260101_000000', absolute=str(elsewhere), link='../link')
    make_run(folder, continues=claims[how])
    (tmp_path / 'work/link').symlink_to(elsewhere)
    assert read_run(folder, 'run').scores == {}
    (tmp_path / 'work/link').unlink()
    elsewhere.rename(tmp_path / 'work/20260101_000000')
    make_run(folder, continues='../20260101_000000')
    assert read_run(folder, 'run').scores == {'AP': ([1], [0.5])}, 'one in the work dir is'


# Files that claim more than they have


def inflating(path: Path, name: str, size: int) -> None:
    """A checkpoint in whose archive the file ``name`` is compressed zeros of ``size`` bytes."""
    saved(path.with_suffix('.whole'), dict(state_dict=state_dict()))
    piece = 2**24
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = packed * (size // piece) + packer.flush()
    with zipfile.ZipFile(path.with_suffix('.whole')) as old, zipfile.ZipFile(path, 'w') as new:
        for part in old.infolist():
            if part.filename.endswith(name):
                # By hand, since the sum of gigabytes takes seconds: nothing gets that far.
                bad = zipfile.ZipInfo(part.filename)
                bad.compress_type, bad.CRC, bad.file_size = zipfile.ZIP_DEFLATED, 0, size
                bad.compress_size, bad.header_offset = len(packed), new.fp.tell()
                new.fp.write(bad.FileHeader() + packed)
                new.filelist.append(bad)
                new.start_dir, new._didModify = new.fp.tell(), True
            else:
                new.writestr(part, old.read(part))


def spread(path: Path, values: int) -> None:
    """A layer of ``values`` channels, all of which are one value in the file."""
    one = torch.ones(1).expand(values)
    names = ('weight', 'bias', 'running_mean', 'running_var')
    saved(path, dict(state_dict={f'1.{name}': one for name in names}))


def many_spread(path: Path) -> None:
    """Thousands of layers, each as large as the whole file, together 8 GB."""
    one, names = torch.ones(1).expand(250_000), ('weight', 'bias', 'running_mean', 'running_var')
    layers = {f'{i}.{name}': one for i in range(2000) for name in names}
    saved(path, dict(state_dict=layers, padding=torch.rand(250_000)))


def legacy(path: Path) -> None:
    """A tensor of 2^31 - 1 values by its pickle, which are not in the file."""
    saved(path, {'1.weight': torch.ones(123_457)}, _use_new_zipfile_serialization=False)
    small, large = (number.to_bytes(4, 'little') for number in (123_457, 2**31 - 1))
    path.write_bytes(path.read_bytes().replace(small, large)[:4000])


def doubling(kind):
    value = kind(state_dict())
    for _ in range(45):
        value = dict(a=value, b=value) if kind is dict else [value, value]
    return value


def endless():
    content = dict(state_dict=state_dict())
    content['self'] = content
    return content


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def array(*shape):
    core = getattr(np, '_core', None) or np.core  # NumPy 2, and 1
    return Call(core.multiarray._reconstruct, np.ndarray, shape, b'b')


def plain(**more) -> dict:
    return dict(state_dict=state_dict(), **more)


def gigabytes_of(entry, **more) -> dict:
    return dict(state_dict=state_dict() | {'1.weight': entry}, **more)


def hidden(path: Path) -> None:
    """Python looks for the end of an archive where torch does not."""
    inflating(path, 'data/0', 2 * GB)
    with path.open('ab') as file:
        file.write(b'PK\x05\x06abcde')


CLAIMS = {
    'pickle': lambda path: inflating(path, 'data.pkl', 2 * GB),
    'storage': lambda path: inflating(path, 'data/0', 2 * GB),
    'storage that Python does not see': hidden,
    'tensors of terabytes': lambda path: spread(path, 10**12),
    'tensors of 10 GB': lambda path: spread(path, 2_500_000_000),
    'many tensors': many_spread,
    'legacy': legacy,
    'no values': lambda path: saved(path, gigabytes_of(torch.ones(10**12, device='meta'))),
    'arrays of terabytes': lambda path: saved(path, plain(meta=array(10**13))),
    'arrays of 10 GB': lambda path: saved(path, plain(meta=array(10**10))),
    'bytes': lambda path: saved(path, plain(meta=Call(bytearray, 10**10))),
    'doubling dicts': lambda path: saved(path, doubling(dict)),
    'doubling lists': lambda path: saved(path, plain(more=doubling(list))),
    'endless': lambda path: saved(path, endless()),
}
LIMITED = """
import contextlib, io, json, re, resource, sys
from psbn_mmdet.checkpoints import read_content
from psbn_mmdet.commands import audit, revive

def memory(what):
    return int(re.search(what + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024

# So that a test that fails takes no more than itself down.
resource.setrlimit(resource.RLIMIT_AS, (memory('VmSize') + 6 * 1024**3,) * 2)
before = memory('VmHWM')
config, *paths = sys.argv[1:]
for path in paths:
    for main, more in ((audit.main, []), (revive.main, [path + '.out', '--config', config])):
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                code = main([path, *more])
            except BaseException as error:
                code = repr(error)
        print(json.dumps(dict(path=path, code=code, said=stderr.getvalue(),
                              bytes=memory('VmHWM') - before)), flush=True)
"""


def test_what_claims_more_than_it_has_takes_no_memory(tmp_path):
    for index, make in enumerate(CLAIMS.values()):
        make(tmp_path / f'{index}.pth')
    paths = [str(tmp_path / f'{index}.pth') for index in range(len(CLAIMS))]
    command = [sys.executable, '-c', LIMITED, str(tiny_config(tmp_path)), *paths]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT / 'tests')}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tried = list(map(json.loads, result.stdout.splitlines()))
    assert len(tried) == 2 * len(CLAIMS)
    for one in tried:
        count()
        name = list(CLAIMS)[int(Path(one['path']).stem)]
        assert one['code'] == 1, (name, one)
        assert one['path'] in one['said'] and one['said'].count('\n') == 1, (name, one)
        assert one['bytes'] < 1.5 * GB, (name, one)
    assert not list(tmp_path.glob('*.out*'))


def test_a_compressed_checkpoint_is_read_rightly(tmp_path):
    weights = state_dict()
    saved(tmp_path / 'a.pth', weights)
    deflated = zipfile.ZIP_DEFLATED
    with (
        zipfile.ZipFile(tmp_path / 'a.pth') as old,
        zipfile.ZipFile(tmp_path / 'b.pth', 'w', deflated) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    found = read_content(tmp_path / 'b.pth')
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_safetensors_header_that_claims_terabytes(tmp_path):
    path = tmp_path / 'a.safetensors'
    for claimed, values in ((4 * 10**12, 10**12), (16, 10**12), (2**63, 2**61)):
        count()
        header = json.dumps(
            {
                f'1.{name}': dict(dtype='F32', shape=[values], data_offsets=[0, claimed])
                for name in ('weight', 'bias', 'running_mean', 'running_var')
            }
        ).encode()
        for length in (len(header), 2**40, 2**64 - 1):
            path.write_bytes(length.to_bytes(8, 'little') + header + bytes(64))
            sentence = tool(audit.main, path)
            assert 'a.safetensors cannot be read as a safetensors file' in sentence


def test_entries_that_are_no_plain_numbers(tmp_path):
    path = tmp_path / 'a.pth'
    for entry in (
        torch.ones(4).to_sparse(),
        torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (10**12,)),
        torch.ones(4, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        'text',
        None,
    ):
        count()
        saved(path, gigabytes_of(entry))
        said = tool(audit.main, path)
        refused = torch.__version__.startswith('2.1.') and getattr(entry, 'is_quantized', False)
        why = 'is not loaded since' if refused else 'has only BN that cannot be audited'
        assert f'a.pth {why}' in said


# ONNX


def graph(path: Path, bias, nodes=()) -> None:
    """A graph of one BN whose bias is an initializer ``b``, or what ``nodes`` make of it."""
    onnx = pytest.importorskip('onnx')
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    ones = [onnx.numpy_helper.from_array(np.ones(4, np.float32), name) for name in 'smv']
    name = nodes[-1].output[0] if nodes else 'b'
    norm = helper.make_node('BatchNormalization', ['x', 's', name, 'm', 'v'], ['y'], name='bn')
    whole = helper.make_graph(
        [*nodes, norm],
        'graph',
        [helper.make_tensor_value_info('x', float32, None)],
        [helper.make_tensor_value_info('y', float32, None)],
        [*ones, bias],
    )
    path.write_bytes(helper.make_model(whole).SerializeToString())


def external(location: str):
    onnx = pytest.importorskip('onnx')
    tensor = onnx.TensorProto(name='b', data_type=1, dims=[4], data_location=1)
    entry = tensor.external_data.add()
    entry.key, entry.value = 'location', location
    return tensor


def test_onnx_values_outside_the_folder_are_not_read(tmp_path):
    (tmp_path / 'secret').write_bytes(np.full(4, 4711, np.float32).tobytes())
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'link').symlink_to(tmp_path / 'secret')
    (folder / 'up').symlink_to(tmp_path)
    for location in ('../secret', str(tmp_path / 'secret'), 'link', 'up/secret', './../secret'):
        count()
        graph(folder / 'a.onnx', external(location))
        assert f'in {location}, outside its folder' in tool(audit.main, folder / 'a.onnx')
    graph(folder / 'a.onnx', external('none'))
    assert 'has no values of b that can be read' in tool(audit.main, folder / 'a.onnx')
    (folder / 'beside').write_bytes(bytes(16))
    graph(folder / 'a.onnx', external('beside'))
    assert tool(audit.main, folder / 'a.onnx') == ''


def test_onnx_graphs_that_would_fill_the_memory(tmp_path):
    onnx = pytest.importorskip('onnx')
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    size = tensor(np.array([10**12]), 'b')
    row = tensor(np.ones((1, 10**5), np.float32), 'b')
    column = node('Reshape', ['b', 'shape'], ['column'])
    shape = node('Constant', [], ['shape'], value=tensor(np.array([10**5, 1])))
    rows = tensor(np.ones((1, 3000), np.float32), 'b')
    rest = node('Constant', [], ['d'], value=tensor(np.ones((3000, 1), np.float32)))
    one = node('Constant', [], ['one'], value=tensor(np.ones(1, np.float32)))
    chain = [node('Identity', [f'c{i}' if i else 'b'], [f'c{i + 1}']) for i in range(3000)]
    for bias, nodes in (
        (size, [node('ConstantOfShape', ['b'], ['c'])]),
        (size, [node('NoSuchOperator', ['b'], ['c'])]),
        (row, [shape, column, node('Add', ['b', 'column'], ['c'])]),
        (rows, [rest, one, node('Add', ['b', 'd'], ['e']), node('Add', ['e', 'one'], ['c'])]),
        (tensor(np.ones(4, np.float32), 'b'), chain),
        (tensor(np.ones(4, np.float32), 'b'), [node('Add', ['b', 'c'], ['c'])]),
    ):
        count()
        graph(tmp_path / 'a.onnx', bias, nodes)
        assert 'computes the parameters of node bn' in tool(audit.main, tmp_path / 'a.onnx')
    graph(tmp_path / 'a.onnx', row, [node('CastLike', [], ['c'])])
    assert 'has a node without its inputs or its output' in tool(audit.main, tmp_path / 'a.onnx')
    claiming = tensor(np.ones(4, np.float32), 'b')
    claiming.dims[0] = 10**12
    graph(tmp_path / 'a.onnx', claiming)
    assert 'has no values of b that can be read' in tool(audit.main, tmp_path / 'a.onnx')


def test_onnx_values_that_are_no_numbers(tmp_path):
    onnx = pytest.importorskip('onnx')
    for values in (np.ones(4, np.complex64), np.array(['a'] * 4, object)):
        count()
        graph(tmp_path / 'a.onnx', onnx.numpy_helper.from_array(values, 'b'))
        assert 'has values of b that are no real numbers' in tool(audit.main, tmp_path / 'a.onnx')


def test_onnx_layers_of_one_name(tmp_path):
    onnx = pytest.importorskip('onnx')
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    for scale in ('s', 'bn.weight', '.weight'):
        count()
        names = [scale, 'b', 'm', 'v']
        ones = [onnx.numpy_helper.from_array(np.ones(4, np.float32), name) for name in names]
        edges = ['x', 'y', 'z', 'out']
        norms = [
            helper.make_node('BatchNormalization', [before, *names], [after], name='bn')
            for before, after in zip(edges, edges[1:])
        ]
        ends = [helper.make_tensor_value_info(name, float32, None) for name in ('x', 'out')]
        whole = helper.make_graph(norms, 'graph', ends[:1], ends[1:], ones)
        (tmp_path / 'a.onnx').write_bytes(helper.make_model(whole).SerializeToString())
        found = read_weights(tmp_path / 'a.onnx')
        assert list(found.rectifiers) == ['bn', 'z', 'out']
        assert len(find_norm_states(found.state_dict)) == 3
    whole.node.append(norms[2])
    (tmp_path / 'a.onnx').write_bytes(helper.make_model(whole).SerializeToString())
    assert 'has several layers of the name out' in tool(audit.main, tmp_path / 'a.onnx')


# Names


def test_names_do_not_steer_the_terminal(tmp_path, capsys):
    name = '\x1b]0;hacked\x07\x1b[2J\u202ea\nb'
    weights = {f'{name}.{key}': value for key, value in nn.BatchNorm2d(4).state_dict().items()}
    weights[f'{name}.weight'][0] = 0
    saved(tmp_path / 'a.pth', {name: weights})
    for form in ('table', 'csv', 'json'):
        count()
        assert audit.main([str(tmp_path / 'a.pth'), '--format', form]) == 0
    more = ['--config', str(tiny_config(tmp_path))]
    assert revive.main([str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), *more]) == 1
    assert audit.main([str(tmp_path / 'a.pth'), '--key', 'none']) == 1
    said = ''.join(capsys.readouterr())
    assert 'hacked' in said and not re.search('[\x00-\x09\x0b-\x1f\u202e]', said)


# The tools themselves, each in a process of its own


@pytest.fixture(scope='module')
def config(loaded_cfg, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('config') / 'config.py'
    loaded_cfg.dump(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize('shape', ['in meta', 'as an entry', 'bare pickle', 'TorchScript'])
def test_the_scripts_run_no_pickle(shape, config, cfg, bomb, tmp_path):
    if shape != 'in meta' and not cases.FULL:
        pytest.skip('one is enough for the suite, where all are tried in one process')
    bad, good, work = tmp_path / 'bad.pth', tmp_path / 'good.pth', tmp_path / 'work'
    SHAPES[shape](bad, bomb)
    saved(good, dict(state_dict=state_dict()))
    pretrained = tmp_path / 'pretrained.py'
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(bad))
    cfg.dump(pretrained)
    work.mkdir()
    (work / 'last_checkpoint').write_text(str(bad))
    for arguments in (
        ['audit.py', bad],
        ['audit.py', good, bad],
        ['revive.py', bad, 'out.pth', '--config', config],
        ['train.py', config, '--work-dir', work, '--resume'],
        ['train.py', config, '--work-dir', work, '--resume', bad],
        ['train.py', config, '--work-dir', work, '--cfg-options', f'load_from={bad}'],
        ['train.py', pretrained, '--work-dir', work],
        ['test.py', config, bad],
    ):  # fmt: skip
        count()
        result = subprocess.run(
            [sys.executable, str(ROOT / 'tools' / arguments[0]), *map(str, arguments[1:])],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': ''},
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        assert not bomb.path.exists() and not (tmp_path / 'out.pth').exists()
        assert result.returncode == 1, (arguments, result.stderr)
        assert 'Traceback' not in result.stderr, (arguments, result.stderr)
        assert sum('bad.pth' in line for line in result.stderr.splitlines()) == 1
