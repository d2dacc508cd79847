"""What our programs share: numbers on their command lines, and how they end when something goes wrong."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable


def count(text: str, least: int = 1) -> int:
    """An argument that is a whole number from `least` on; argparse prints the message."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return number


def _run_and_flush(run: Callable[[], int]) -> int:
    """What was printed is written here, where it can fail, and not when Python ends."""
    try:
        status = run()
    except SystemExit:  # argparse's, also after --help
        print(end="", flush=True)
        raise
    print(end="", flush=True)
    return status


def without_traceback(name: str, run: Callable[[], int]) -> int:
    """The exit status of `run`. What its user did, or lacks, is one line on stderr."""
    try:
        return _run_and_flush(run)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT  # as shells have it
    except BrokenPipeError:  # `pydeform info | head -1`
        sys.stdout = open(os.devnull, "w")  # else Python writes what is left, and fails once more
        return 1
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
