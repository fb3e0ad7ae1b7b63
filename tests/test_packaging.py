"""What a user meets before the package runs: metadata, pins, commands, a missing MMEngine."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import mmengine
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from subprocesses import ENV, ROOT, run

STACKS = ('onedl', 'openmmlab', 'oldest')
EXTRAS = {'onedl': 'onedl', 'openmmlab': 'openmmlab', 'oldest': 'openmmlab'}
MMCV = {'onedl': 'onedl-mmcv', 'openmmlab': 'mmcv', 'oldest': 'mmcv'}


@pytest.fixture(scope='module')
def egg_info(tmp_path_factory) -> Path:
    """What setuptools writes of the package."""
    out = tmp_path_factory.mktemp('egg')
    result = run(sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(out))
    assert result.returncode == 0, result.stderr
    return out / 'psbn_mmdet.egg-info'


@pytest.fixture(scope='module')
def metadata(egg_info) -> dict[str, list[str]]:
    """The package's metadata by field."""
    fields: dict[str, list[str]] = {}
    for line in (egg_info / 'PKG-INFO').read_text().split('\n\n')[0].splitlines():
        name, _, value = line.partition(': ')
        fields.setdefault(name, []).append(value)
    return fields


def pins(name: str) -> dict[str, str]:
    """Versions by package in a requirements file and those that it includes."""
    found: dict[str, str] = {}
    for line in (ROOT / f'requirements/{name}.txt').read_text().splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            included = pins(line[3:].removesuffix('.txt'))
            assert not included.keys() & found.keys()
            found.update(included)
        elif line:
            package, version = line.split('==')
            assert canonicalize_name(package) not in found
            found[canonicalize_name(package)] = version
    return found


def hard_requirements(metadata) -> dict[str, Requirement]:
    """What any installation needs, by package."""
    found = map(Requirement, metadata['Requires-Dist'])
    return {canonicalize_name(r.name): r for r in found if r.marker is None}


def requirements(metadata, extra: str) -> dict[str, Requirement]:
    """An extra's own requirements by package."""
    found = map(Requirement, metadata['Requires-Dist'])
    return {
        canonicalize_name(r.name): r
        for r in found
        if r.marker is not None and r.marker.evaluate({'extra': extra})
    }


def test_version_is_the_packages_own(metadata):
    import psbn_mmdet

    assert metadata['Version'] == [psbn_mmdet.__version__]
    assert metadata['Name'] == ['psbn_mmdet']
    assert metadata['License'] == ['Apache-2.0']
    assert mmengine.load(ROOT / 'CITATION.cff', 'yaml')['version'] == psbn_mmdet.__version__


def test_files_that_are_no_code_are_packaged(egg_info):
    packaged = (egg_info / 'SOURCES.txt').read_text().splitlines()
    for path in (ROOT / 'psbn_mmdet').rglob('*'):
        if path.is_file() and path.suffix != '.pyc':
            assert str(path.relative_to(ROOT)) in packaged


def test_neither_stack_is_a_hard_requirement(metadata):
    hard = hard_requirements(metadata)
    assert {'torch', 'numpy', 'jinja2'} <= hard.keys()
    assert not {name for name in hard if 'mm' in name}


def test_every_extra_has_its_packages_and_no_others_stack(metadata):
    assert set(metadata['Provides-Extra']) == {'onedl', 'openmmlab', 'dev'}
    assert {'onedl-mmcv', 'onedl-mmengine', 'onedl-mmdetection'} < set(
        requirements(metadata, 'onedl')
    )
    assert {'mmcv', 'mmengine', 'mmdet'} < set(requirements(metadata, 'openmmlab'))
    assert {'pytest', 'ruff'} < set(requirements(metadata, 'dev'))


@pytest.mark.parametrize('stack', STACKS)
def test_pins_satisfy_what_setup_py_asks_for(stack, metadata):
    tested = pins(stack)
    asked = hard_requirements(metadata) | requirements(metadata, EXTRAS[stack])
    for name, requirement in asked.items():
        assert requirement.specifier.contains(tested[name]), requirement


def test_the_oldest_pins_are_the_lower_bounds_in_setup_py(metadata):
    tested = pins('oldest')
    asked = hard_requirements(metadata) | requirements(metadata, 'openmmlab')
    for name, requirement in asked.items():
        [bound] = [s.version for s in requirement.specifier if s.operator == '>=']
        assert tested[name] == bound or tested[name] == f'{bound}.0', requirement
    assert metadata['Requires-Python'] == ['>=3.9']


@pytest.mark.parametrize('stack', STACKS)
def test_dev_pins_do_not_repeat_those_of_a_stack(stack):
    assert not pins(f'dev-{stack}').keys() & pins(stack).keys()


def test_importing_without_mmengine_names_both_installs():
    code = """if True:
        import sys

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition('.')[0] == 'mmengine':
                    raise ModuleNotFoundError(f'No module named {name!r}', name=name)

        sys.meta_path.insert(0, Hide())
        try:
            import psbn_mmdet
        except ImportError as error:
            print(error)
    """
    result = run(sys.executable, '-c', code)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert '[onedl]' in result.stdout
    assert '[openmmlab]' in result.stdout


@pytest.mark.parametrize(
    'target',
    [
        *['setup', 'demo', 'demo-compare', 'figures', 'docs'],
        *['test', 'lint', 'format', 'bench', 'evidence'],
    ],
)
def test_make_target_exists_and_sets_up_first(target):
    result = run('make', '--dry-run', target)
    assert result.returncode == 0, result.stderr
    commands = result.stdout.splitlines()
    assert commands[0].startswith('scripts/setup.sh onedl')
    for command in commands[1:]:
        assert command.startswith('.venv/bin/')
        assert all((ROOT / path).is_file() for path in re.findall(r'\S+/\w+\.py', command))


@pytest.mark.parametrize('stack', ['openmmlab', 'oldest'])
def test_make_uses_the_stack_that_it_is_told(stack):
    commands = run('make', '--dry-run', 'test', f'STACK={stack}', 'ARGS=-k x').stdout.splitlines()
    assert commands[0] == f'scripts/setup.sh {stack} dev'
    assert commands[1].startswith(f'.venv-{stack}/bin/python -m pytest ')
    assert commands[1].endswith(' -k x')
    assert len(commands) == 2


def fake(folder: Path, **scripts: str) -> None:
    """Put commands into a folder."""
    for name, script in scripts.items():
        path = folder / name.replace('_', '-')
        path.write_text(f'#!/bin/sh\n{script}\n')
        path.chmod(0o755)


@pytest.mark.parametrize(
    ('arguments', 'python', 'message'),
    [
        (['mmlab'], sys.executable, "STACK must be onedl, openmmlab or oldest, got 'mmlab'."),
        (['onedl'], 'no-such-python', "no 'no-such-python' found: install Python 3.11"),
        (['onedl'], './python2.7', 'Python 2.7 does not go with the onedl stack: name Python 3.11'),
        (['onedl'], './python3.9', 'Python 3.9 does not go with the onedl stack: name Python 3.11'),
        (['oldest'], './python3.11', 'Python 3.11 does not go with the oldest stack: name Python'),
        (['oldest'], './python3.9', 'python3.9 has no venv module'),
    ],
)
def test_setup_says_in_one_sentence_what_is_wrong(arguments, python, message, tmp_path):
    (tmp_path / 'scripts').mkdir()
    for path in ('scripts/setup.sh', 'setup.py', 'requirements'):
        (tmp_path / path).symlink_to(ROOT / path)
    for version in ('2.7', '3.9', '3.11'):
        script = f'case $2 in *version_info*) echo {version} ;; *) exit 1 ;; esac'
        fake(tmp_path, **{f'python{version}': script})
    result = run('bash', 'scripts/setup.sh', *arguments, cwd=tmp_path, PYTHON=python)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ci_runs_lint_and_tests_and_keeps_pips_own_links(tmp_path):
    """With a `make` that only tells what it was called with."""
    fake(tmp_path, make='echo "make $* links=$PIP_FIND_LINKS"; exit 7', chromedriver='')
    env = {'PATH': f'{tmp_path}:{ENV["PATH"]}', 'PIP_FIND_LINKS': '/some/links'}
    for wheels in (False, True):
        clone = tmp_path / f'{wheels}/clone'
        (clone / '.ci').mkdir(parents=True)
        if wheels:
            (clone.parent / 'shared/wheels').mkdir(parents=True)
        (clone / '.ci/run').symlink_to(ROOT / '.ci/run')
        result = run(clone / '.ci/run', cwd=tmp_path, **env)
        expected = '/some/links ../shared/wheels' if wheels else '/some/links'
        assert result.stdout == f'make --keep-going lint test links={expected}\n'
        assert result.returncode == 7


@pytest.mark.parametrize(
    ('user', 'apt_get', 'said'),
    [
        (0, 'echo "apt-get $*"', 'apt-get -qq install -y --no-install-recommends chromium'),
        (0, 'exit 100', 'its tests will be skipped'),
        (1000, 'echo "apt-get $*"', ''),
    ],
)
def test_ci_installs_chromium_where_it_can_and_goes_on_where_not(tmp_path, user, apt_get, said):
    fake(tmp_path, make='echo tested', id=f'echo {user}', apt_get=apt_get)
    for name in ('bash', 'dirname'):
        (tmp_path / name).symlink_to(shutil.which(name))
    result = run(ROOT / '.ci/run', cwd=tmp_path, PATH=str(tmp_path))
    assert result.stdout == 'tested\n' and result.returncode == 0
    assert said in result.stderr if said else result.stderr == ''


def test_mmcv_is_compiled_at_the_pinned_version():
    """setup.sh finds the pin by this pattern; a second match would confuse it."""
    for stack in STACKS:
        text = (ROOT / f'requirements/{stack}.txt').read_text()
        assert re.findall(r'^((?:onedl-)?mmcv)==', text, re.MULTILINE) == [MMCV[stack]]


def test_mmcvs_sources_are_grouped_into_five_unless_they_are_others(tmp_path):
    csrc = tmp_path / 'mmcv/ops/csrc/pytorch'
    alone = {'cpu/roi_align.cpp', 'cpu/roi_align_rotated.cpp', 'cpu/rotated_feature_align.cpp'}
    others = ('nms.cpp', 'roi_align.cpp', 'cpu/nms.cpp', 'cpu/sparse.cpp', 'cuda/nms.cpp')
    for name in (*others, *alone):
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(f'{name}\n')
    shutil.copytree(tmp_path, tmp_path / 'other')
    (csrc / 'cpu/psamask.cpp').write_text('cpu/psamask.cpp\n')

    def included(line: str) -> str:
        return (csrc / line.split('"')[1]).read_text().strip()

    group = ROOT / 'scripts/group_mmcv.py'
    result = run(sys.executable, group, tmp_path)
    assert result.returncode == 0, result.stderr
    # Those that MMCV's setup.py compiles, without and with CUDA.
    assert {str(p.relative_to(csrc)) for p in csrc.glob('*.cpp')} == {'grouped.cpp'}
    found = {str(p.relative_to(csrc)) for p in csrc.glob('c*/*.cpp')}
    assert found == {'cpu/grouped.cpp', 'cuda/nms.cpp', *alone}
    lines = (csrc / 'grouped.cpp').read_text().splitlines()
    assert [included(line) for line in lines] == ['nms.cpp', 'roi_align.cpp']
    csrc /= 'cpu'
    lines = (csrc / 'grouped.cpp').read_text().splitlines()
    members = ['cpu/nms.cpp', 'cpu/sparse.cpp', 'cpu/psamask.cpp']
    assert [included(line) for line in lines] == members

    assert run(sys.executable, group, tmp_path / 'other').returncode == 1


def test_what_an_index_shows_has_no_broken_links(egg_info):
    text = (egg_info / 'PKG-INFO').read_text()
    assert not re.findall(r'\]\((?!https?:)', text)
    assert 'make demo' in text


PAGES = [*sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('docs/*.md')), *ROOT.glob('configs/*/*.md')]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_resolve(page):
    for link in re.findall(r'\]\((?!https?:)([^)\s]+)\)', page.read_text()):
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_stays_short():
    assert len((ROOT / 'README.md').read_text().split()) <= 900
