"""Look up the collapsed filters in a checkpoint, or what changed between two.

Reads PyTorch, safetensors and ONNX files of any library. Exit code: 0 if all went well, 1 for an
error, 3 if more filters are collapsed than --fail-above allows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

from ..checkpoints import read_weights
from ..collapse import ASSUMED, census_of_state_dict, compare
from ..configs.model import structure_of_config
from ..configs.norm_switch import switch_config
from ..configs.reading import load_config, one_line, psbn_of_config
from ..layers import find_norm_states
from ..records.atomic import is_among
from ..recovery.forecast import forecast_of_config
from . import complain, say
from .audit_tables import Audit, audit_to_csv, audit_to_dict, audit_to_text, plot_audit


def percent(text: str) -> float:
    """A number from 0 to 100."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f'must be from 0 to 100, got {text}')
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, audit, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT', help='one, or two to diff')
    parser.add_argument(
        '--config',
        help='tells which layers feed a rectifier, and what psBN will do in its training',
    )
    parser.add_argument('--format', choices=('table', 'json', 'csv'), default='table')
    parser.add_argument('--tau', type=float, default=1e-3, help='largest |gamma| of a vanished one')
    parser.add_argument('--k', type=float, default=3.0, help='dead: b + k * |gamma| <= 0')
    parser.add_argument('--key', help='which state dict of the file, such as ema_state_dict')
    parser.add_argument('--plot', metavar='OUT.png', help='draw gamma against bias')
    parser.add_argument(
        '--fail-above', type=percent, metavar='PERCENT', help='exit with 3 if more are collapsed'
    )
    args = parser.parse_args(argv)
    if len(args.checkpoints) > 2:
        parser.error(f'got {len(args.checkpoints)} checkpoints: give one, or two to compare')
    try:
        if args.plot and is_among(args.plot, filter(None, (*args.checkpoints, args.config))):
            raise ValueError(f'{args.plot} is read and is not overwritten: name another file')
        with redirect_stdout(StringIO()):  # MMEngine logs what it builds, data sets what they load
            audit = make_audit(args)
        if args.plot:
            plot_audit(audit, args.plot)
        if args.format == 'json':
            say(json.dumps(audit_to_dict(audit), indent=1))
        else:
            say(audit_to_csv(audit) if args.format == 'csv' else audit_to_text(audit))
    except (OSError, ValueError) as error:
        return complain('audit', error)
    if args.fail_above is not None and audit.percent > args.fail_above:
        print(
            f'audit: {audit.percent:.2f} % of the filters are collapsed, more than '
            f'{args.fail_above:g} %',
            file=sys.stderr,
        )
        return 3
    return 0


def make_audit(args: argparse.Namespace) -> Audit:
    """Read what was asked for and count."""
    read = [read_weights(path, args.key) for path in args.checkpoints]
    of_config: dict[str, str] | None = None
    cfg = load_config(args.config) if args.config else None
    if cfg is not None:
        names = {name for weights in read for name in find_norm_states(weights.state_dict)}
        of_config = structure_of_config(cfg, sorted(names)).rectifiers
    counted = []
    for path, weights in zip(args.checkpoints, read):
        known = weights.rectifiers if of_config is None else of_config
        rectifiers = dict.fromkeys(find_norm_states(weights.state_dict), ASSUMED) | known
        census = census_of_state_dict(
            weights.state_dict,
            tau=args.tau,
            k=args.k,
            rectifiers=rectifiers,
            unstarted=weights.unstarted,
        )
        if not census.layers:
            why = ', '.join(sorted(map(str, set(find_norm_states(weights.state_dict).values()))))
            raise ValueError(
                f'{path} has only BN that cannot be audited ({why}): give another file'
            )
        counted.append(census)
    weights, after = read[-1], counted[-1]
    before = counted[0] if len(counted) == 2 else None
    if before and not compare(before, after):
        raise ValueError(
            f'{args.checkpoints[0]} and {args.checkpoints[1]} have no layer in common: give two '
            'checkpoints of one network'
        )

    def described(key: str) -> str:
        return f'{key} ({weights.roles[key]})' if key in weights.roles else key

    forecast, no_forecast, switched = None, '', False
    if cfg is not None:
        try:
            forecast = forecast_of_config(cfg, after)
            if forecast is None and not psbn_of_config(cfg):
                switch_config(cfg, 'psBN')
                forecast, switched = forecast_of_config(cfg, after), True
            no_forecast = '' if forecast else 'the config trains no psBN'
        except Exception as error:  # custom datasets and optimizers may raise anything
            no_forecast = one_line(error)
    source = args.checkpoints[-1] + (f', {described(weights.key)}' if weights.key else '')
    if weights.others:
        source += f' (also in the file, for --key: {", ".join(map(described, weights.others))})'
    if before:
        source += f', against {args.checkpoints[0]}'
    return Audit(source, after, before, forecast, no_forecast, switched)
