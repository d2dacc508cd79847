"""`pydeform demo`: watch deformable networks learn real digits, against a plain one of the same size."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pydeform._program import count

OUTPUT = Path("demo_output")
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with these command line arguments; returns the exit status."""
    options = _parser().parse_args(argv)
    # What --quick learns is worth nothing: it must not take the place of a real run's networks and pictures.
    options.output = options.output or (OUTPUT / "quick" if options.quick else OUTPUT)
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        print(
            f"pydeform demo: needs {', '.join(missing)}: install the extra `demo`: pip install '.[demo]'",
            file=sys.stderr,
        )
        return 1
    from pydeform.demo import run

    try:
        if options.parts:
            return run.roi_parts(options)
        return run.photograph(options) if options.image is not None else run.digits(options)
    except OSError as error:
        print(f"pydeform demo: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pydeform demo",
        description="Train three networks of equal size (plain, deformable v1, modulated v2) on handwritten digits of "
        "many sizes; print accuracy, time and effective dilation; draw where they sample.",
    )
    parser.add_argument("--epochs", type=count, default=None, help="passes over the digits (default: 12)")
    parser.add_argument("--seeds", type=count, default=None, help="how often to train each network (default: 3)")
    parser.add_argument(
        "--seed", type=functools.partial(count, least=0), default=0, help="the first seed (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few digits, one epoch, one seed: does it run?")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"default: {OUTPUT}, and {OUTPUT / 'quick'} for --quick"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--image",
        nargs="?",
        const="",
        metavar="FILE",
        help="instead of training, draw sampling points on a photograph (without FILE: scikit-learn's flower.jpg)",
    )
    instead.add_argument(
        "--parts",
        action="store_true",
        help="instead of training, move the parts of a box, class by class, on two photographs of scikit-learn",
    )
    return parser
