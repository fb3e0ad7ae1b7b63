"""Packaging; the settings of the tools are in pyproject.toml, tested versions in requirements/."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read the version without importing the package, whose imports need MMEngine."""
    source = (ROOT / 'psbn_mmdet' / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'$", source, re.MULTILINE)
    if match is None:
        raise RuntimeError("psbn_mmdet/version.py has no line `__version__ = '...'`: restore it")
    return match.group(1)


def read_readme() -> str:
    """Read the README without what a package index cannot resolve: pictures and relative links."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    text = re.sub(r'^!\[[^]]*\]\([^)]*\)\n\n', '', text, flags=re.MULTILINE)
    return re.sub(r'\[([^]]*)\]\((?!https?:)[^)]*\)', r'\1', text)


class BuildWithMim(build_py):
    """Put what MIM looks for into ``psbn_mmdet/.mim``, as the packages of OpenMMLab do."""

    def run(self) -> None:
        """Build the package, then copy configs, tools and index into it."""
        super().run()
        if not getattr(self, 'editable_mode', False):
            mim = Path(self.build_lib, 'psbn_mmdet/.mim')
            unwanted = shutil.ignore_patterns('__pycache__')
            for name in ('configs', 'tools'):
                shutil.copytree(ROOT / name, mim / name, ignore=unwanted, dirs_exist_ok=True)
            shutil.copy(ROOT / 'model-index.yml', mim)


# The two stacks share the import names mmcv, mmengine and mmdet and collide in site-packages:
# neither can be a hard requirement, so each is an extra. Upper bounds are those that MMDetection
# itself holds its companions to, since it does not import beyond them.
EXTRAS = {
    'onedl': [
        'onedl-mmcv>=2.3.6',
        'onedl-mmengine>=0.10.12,<1',
        'onedl-mmdetection>=3.5.1',
        'pycocotools',
    ],
    'openmmlab': [
        'mmcv>=2.1.0,<2.2',
        'mmengine>=0.10.0,<1',
        'mmdet>=3.3.0',
        'pycocotools>=2.0.7',
    ],
    'dev': [
        'hypothesis',
        'mypy',
        'onnx',
        'onnxruntime',
        'onnxscript',
        'pre-commit',
        'pytest',
        'pytest-xdist',
        'ruff',
        'scikit-learn',
        'selenium',
        'tensorboard',
    ],
}

setup(
    name='psbn_mmdet',
    version=read_version(),
    description='Post-shifted batch normalization and collapse counting for MMDetection',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='The psbn_mmdet authors',
    project_urls={'Paper': 'https://arxiv.org/abs/2001.11216'},
    license='Apache-2.0',
    keywords='batch normalization, filter collapse, object detection, mmdetection, mmengine',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    cmdclass={'build_py': BuildWithMim},
    packages=find_packages(include=['psbn_mmdet', 'psbn_mmdet.*']),
    package_data={'psbn_mmdet': ['py.typed', 'report/templates/*.j2']},
    python_requires='>=3.9',
    install_requires=[  # from the oldest tested versions on: requirements/oldest.txt
        'torch>=2.1',
        'numpy>=1.26',
        'matplotlib>=3.8',
        'rich>=13.7',
        'jinja2>=3.1.3',
        'safetensors>=0.4.1',
    ],
    extras_require=EXTRAS,
    zip_safe=False,
)
