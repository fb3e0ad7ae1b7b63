"""Run the scripts of the installed MMDetection after checking the config."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.device import get_device

from ..configs.norm_switch import add_hook
from ..configs.reading import ConfigError, load_config, one_line
from ..hooks.data_check_hook import explain
from . import printable


def run_script(
    name: str,
    check: Callable[[Namespace, Config], None],
    own: ArgumentParser | None = None,
    then: Callable[[Namespace, Config], None] | None = None,
) -> None:
    """Run a script of the installed MMDetection after checking the config.

    If the check fails, the process prints one sentence and exits with code 1.

    Args:
        name (str): File name of the script, e.g. ``train.py``.
        check (Callable): Called with the parsed options and the loaded config, which it may
            change. The script gets the changed config.
        own (ArgumentParser, optional): Of options beyond the script's, made without ``--help``.
            Defaults to None.
        then (Callable, optional): Called with the same arguments after the script succeeds.
            Defaults to None.
    """
    # Read before the script parses its options, which sets LOCAL_RANK to 0 where it is missing.
    local_rank = os.getenv('LOCAL_RANK') or os.getenv('SLURM_LOCALID') or '0'
    cfg = Config()
    try:
        script = _load_script(name)
        args = Namespace()
        if own is not None:
            args, rest = own.parse_known_args()
            sys.argv[1:] = rest
            if {'-h', '--help'} & set(rest):
                print(own.format_help())
        vars(args).update(vars(script.parse_args()))
        cfg = load_config(args.config, args.cfg_options)
        check(args, cfg)
        add_hook(cfg, 'DataCheckHook')
        # The script reads the file again, and merges the options, which could undo a change.
        script.Config = SimpleNamespace(fromfile=lambda path: cfg)  # type: ignore[attr-defined]
        args.cfg_options = None
        script.parse_args = lambda: args  # type: ignore[attr-defined]
        has_cpus_only = args.launcher == 'pytorch' and get_device() == 'cpu'
        if has_cpus_only:  # MMEngine would set a CUDA device first, but takes what is initialized
            torch.distributed.init_process_group('gloo')
        script.main()
        if then is not None:
            then(args, cfg)
    except Exception as error:
        known = error if isinstance(error, ConfigError) else explain(error, cfg)
        if known is None:
            raise
        # Once on each machine, since a file may be missing on one of them only.
        sys.exit(f'error: {printable(str(known))}' if local_rank == '0' else 1)
    if not has_cpus_only:
        return
    torch.distributed.barrier()  # a rank that leaves early aborts the others
    # Not by the interpreter's exit: gloo's threads abort it now and then.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _load_script(name: str) -> ModuleType:
    try:
        import mmdet
    except (ImportError, AssertionError) as error:  # it asserts the versions of the others
        raise ConfigError(
            f'MMDetection cannot be imported ({one_line(error)}): install it with '
            "`pip install --no-build-isolation -e '.[onedl]'` in a checkout of psbn_mmdet"
        ) from error
    package = Path(mmdet.__file__).parent
    # `.mim` is there in what pip installs, also with -e; its content stands beside the package
    # in a bare checkout.
    path = package / '.mim' / 'tools' / name
    if not path.is_file() and (package.parent / 'setup.py').is_file():
        path = package.parent / 'tools' / name
    if not path.is_file():
        raise ConfigError(
            f'tools/{name} of MMDetection is neither in {package / ".mim"} nor beside it: install '
            'MMDetection with pip'
        )
    spec = importlib.util.spec_from_file_location(f'mmdet_{path.stem}', path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script
