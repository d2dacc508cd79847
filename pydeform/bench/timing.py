"""Time several ways of computing the same thing in one process, so that all of them meet the same weather.

Libraries keep threads that spin for a while after a call (OpenMP, OpenBLAS, onnxruntime), and those disturb whoever
comes next. So candidates run in blocks: a pause in which such threads fall asleep, one call that is not timed and
wakes the candidate's own, then the timed calls. The blocks go round among the candidates several times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pydeform._program import count
from pydeform._runtime import get_num_threads, set_num_threads
from pydeform._version import __version__

PAUSE = 0.06  # seconds; OpenBLAS's threads spin for about 30 ms
BLOCK = 0.12  # seconds of timed calls in one block
FEWEST, FEW, MOST = 2, 5, 60  # timed calls in one block; cold ones take longer to prepare
COLD_BYTES = 1 << 26
LIBRARIES = ("numpy", "numba", "llvmlite", "onnxruntime", "openvino", "torch", "torchvision", "scipy")


class Timing(NamedTuple):
    """Seconds, over all timed calls of all rounds."""

    median: float
    minimum: float
    calls: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[str], None] | None = None,
    *,
    cold: bool = False,
) -> dict[str, Timing]:
    """The timing of each candidate; the first call of each, which may compile, is not counted. `cold`: a block is a few
    calls, before each of which the caches are filled with other memory."""
    for call in candidates.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, call in candidates.items():
            if progress is not None:
                progress(f"round {number + 1}/{rounds}, {name}")
            seconds[name] += _cold_block(call) if cold else _block(call)
    return {name: Timing(float(np.median(s)), min(s), len(s)) for name, s in seconds.items()}


def _block(call: Callable[[], object]) -> list[float]:
    time.sleep(PAUSE)
    if _timed(call) > BLOCK:  # a long call needs no waking up
        return [_timed(call) for _ in range(FEWEST - 1)]
    seconds: list[float] = []
    while len(seconds) < FEWEST or (sum(seconds) < BLOCK and len(seconds) < MOST):
        seconds.append(_timed(call))
    return seconds


def _cold_block(call: Callable[[], object]) -> list[float]:
    other = np.zeros(COLD_BYTES // 8)
    time.sleep(PAUSE)
    call()
    seconds: list[float] = []
    while len(seconds) < FEWEST or (sum(seconds) < BLOCK and len(seconds) < FEW):
        other += 1
        seconds.append(_timed(call))
    return seconds


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def busy_elsewhere(seconds: float = 0.3) -> float | None:
    """How many processors' worth of work others do while we sleep: times taken beside that mean little."""
    before = _processor_ticks()
    if before is None:
        return None
    time.sleep(seconds)
    after = _processor_ticks() or before
    total, idle = (now - then for now, then in zip(after, before, strict=True))
    return (1 - idle / total) * (os.cpu_count() or 1) if total else 0.0


def begun(name: str, what: str, threads: int) -> tuple[dict[str, Any], Callable[[str], None]]:
    """What a measurement's result begins with, looked at while nothing of ours runs; what tells how far it has come."""
    time.sleep(PAUSE)
    result = {"what": what, "busy elsewhere": busy_elsewhere()}

    def progress(text: str) -> None:
        show_progress(f"{name}, threads {threads}: {text}")

    progress("setting up")
    return result, progress


def _processor_ticks() -> tuple[int, int] | None:
    """(all, idle) of this machine since it started, where the system tells."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    ticks = [int(word) for word in path.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]  # idle, and waiting for a disk


def thread_environment(threads: int) -> dict[str, str]:
    """The environment in which every library that we know uses this many threads. Read when a process starts."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def python(*arguments: str, env: Mapping[str, str] | None = None) -> str:
    """The standard output of this Python with these arguments. Its stderr, where progress goes, is ours."""
    done = subprocess.run([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def in_own_process(module: str, threads: int, *arguments: str) -> dict[str, Any]:
    """What a module of this package prints as its last line, all of whose libraries use that many threads."""
    output = python("-m", module, "--threads", str(threads), *arguments, env=thread_environment(threads))
    results: dict[str, Any] = json.loads(output.splitlines()[-1])
    return results


def show_progress(text: str) -> None:
    """One line on stderr that the next one overwrites; nothing where stderr is a file."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def cpu_name() -> str:
    """The processor's name as its maker prints it, where the system tells."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout
        if name.strip():
            return name.strip()
    return platform.processor() or platform.machine()


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Library -> version, for those that are installed; this one first."""
    found = {"pydeform": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Columns of text, aligned; the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Problems(NamedTuple):
    """What a module of this package measures, by name, and the command line that it has."""

    module: str  # its whole name
    known: Mapping[str, Any]
    measure: Callable[[str, int, int], dict[str, Any]]  # name, threads, rounds -> a JSON object with "times"
    ratios: Callable[[dict[str, Any]], dict[str, float]]  # of these times

    def main(self, argv: list[str] | None = None) -> int:
        """Prints one JSON object, name -> what was measured."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}")
        parser.add_argument("--threads", type=count, default=get_num_threads())
        parser.add_argument("--problems", default=",".join(self.known), type=names_among("problems", self.known))
        parser.add_argument("--rounds", type=count, default=7)
        options = parser.parse_args(argv)
        set_num_threads(options.threads)
        results = {name: self.measure(name, options.threads, options.rounds) for name in options.problems}
        show_progress("")
        print(json.dumps(results))
        return 0

    def run(self, threads: int, names: Iterable[str], rounds: int) -> dict[str, Any]:
        """`main` in a process of its own, all of whose libraries use that many threads."""
        return in_own_process(self.module, threads, "--problems", ",".join(names), "--rounds", str(rounds))

    def report(self, results: Mapping[str, Any]) -> str:
        """A table with a row for each problem: milliseconds, median and minimum, and the ratios."""
        columns = list(dict.fromkeys(name for result in results.values() for name in result["times"]))
        found = {problem: self.ratios(result["times"]) for problem, result in results.items()}
        named = list(dict.fromkeys(name for of_problem in found.values() for name in of_problem))
        rows = []
        for problem, result in results.items():
            cells = [_milliseconds(result["times"].get(column)) for column in columns]
            rows.append([problem, *cells, *[f"{found[problem][r]:.2f}" if r in found[problem] else "-" for r in named]])
        return table(["problem", *columns, *named], rows)


def _milliseconds(t: Mapping[str, float] | None) -> str:
    return f"{t['median'] * 1e3:.3g}/{t['minimum'] * 1e3:.3g}" if t else "-"


def names_among(what: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """For argparse: an option's names, with commas between them, each of them known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{what} must be among {','.join(known)}, got {name!r}")
        return names

    return parse
