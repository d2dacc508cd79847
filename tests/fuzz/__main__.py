"""Differential fuzzing: random problems against the float64 oracles, for as long as asked.

    python -m tests.fuzz --minutes 10               # fresh seeds, on every core
    python -m tests.fuzz --seed 1234 --backend cpu  # one problem again

Problems run in batches, each in a process of its own, so that one which crashes or hangs is a failure with its seed,
and the others go on.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import secrets
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

BATCH = {"cpu": 400, "emulated": 40}  # problems in one process
LIMIT = 600  # seconds that a batch may take: where kernels are not compiled yet, that counts
MOST_FAILURES = 5  # that are printed


class Outcome(NamedTuple):
    problems: collections.Counter[str]
    failures: list[str]


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.seed is not None:
        return run_here(options.backend[0], options.seed, options.count)
    deadline = time.monotonic() + 60 * options.minutes
    first = options.first if options.first is not None else secrets.randbelow(1 << 48)
    print(f"fuzz: {options.minutes:g} minutes from seed {first} on", file=sys.stderr, flush=True)
    outcome = run_batches(deadline, first, options.backend, options.jobs)
    report(outcome)
    return 1 if outcome.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--first", type=int, help="the first seed (default: a fresh one)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--backend", action="append", choices=list(BATCH), help="may be given twice (default: all)")
    parser.add_argument("--seed", type=int, help="run this problem alone, in this process")
    parser.add_argument("--count", type=int, default=1, help="with --seed: so many from there on")

    def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
        options = argparse.ArgumentParser.parse_args(parser, argv)
        options.backend = options.backend or ["cpu", *(["emulated"] if shutil.which("g++") else [])]
        return options

    parser.parse_args = parse_args  # type: ignore[method-assign, assignment]
    return parser


def run_batches(deadline: float, first: int, backends: list[str], jobs: int) -> Outcome:
    """Batches until the deadline; those at work then are finished."""
    total = Outcome(collections.Counter(), [])
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def work(job: int) -> None:
            number = job
            while time.monotonic() < deadline and len(total.failures) < MOST_FAILURES:
                # One in four on the emulated device, where a problem takes far longer.
                backend = backends[-1] if number % 4 == 3 else backends[0]
                outcome = run_apart(backend, first + number * max(BATCH.values()), BATCH[backend])
                total.problems.update(outcome.problems)
                total.failures.extend(outcome.failures)
                print(f"fuzz: {total.problems.total()} problems, {len(total.failures)} failures", file=sys.stderr)
                number += jobs

        for future in [pool.submit(work, job) for job in range(jobs)]:
            future.result()
    return total


def run_apart(backend: str, seed: int, count: int) -> Outcome:
    """A batch in its own process. It says what it begins with, so that its last word names what it died of."""
    command = [sys.executable, "-m", "tests.fuzz", "--backend", backend, "--seed", str(seed), "--count", str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        code, said, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, said, errors = -1, (late.stdout or b"").decode(), f"no end after {LIMIT} s"
    begun = [line for line in said.splitlines() if line.startswith("problem ")]
    problems = collections.Counter(" ".join(line.split()[2:]) for line in begun)
    if code == 0 and len(begun) == count:
        return Outcome(problems, [])
    last = begun[-1].split()[1] if begun else str(seed)
    again = f"python -m tests.fuzz --backend {backend} --seed {last}"
    end = f"ended by signal {-code}" if code < -1 else ""
    return Outcome(problems, [f"{begun[-1] if begun else 'no problem begun'} {end}\n{errors.strip()[-3000:]}\n{again}"])


def run_here(backend: str, seed: int, count: int) -> int:
    if backend == "emulated":  # before anything imports the real CuPy
        from tests.cuda_emulation import device

        device.install()
    import numpy as np

    from tests import conftest
    from tests.fuzz import check, problems

    for number in range(seed, seed + count):
        rng = np.random.default_rng(number)
        problem = problems.draw(rng, problems.ON_CUDA if backend == "emulated" else tuple(problems.MAKERS))
        print(f"problem {number} {backend} {problem.operator} {problem.dtype} {problem.kind}", flush=True)
        way = str(rng.choice(list(conftest.WAYS))) if backend == "emulated" else ""
        take_way(backend + way, problem.operator)
        check.check(problem, rng, conftest.Backend(backend))
    return 0


def take_way(backend: str, operator: str) -> None:
    """Which kernels convolutions on CUDA go through, those for few channels or those for many; what is promised."""
    from tests import conftest

    for way, most_channels in conftest.WAYS.items():
        if backend.endswith(way):
            from pydeform.cuda.core import sizes

            sizes.DIRECT_CHANNELS = most_channels
    conftest._tolerance = conftest.tolerance_of(backend, "conv" in operator)


def report(outcome: Outcome) -> None:
    by_operator: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, count in outcome.problems.items():
        backend, operator, _, kind = name.split()
        by_operator[f"{operator} {backend}"][kind] += count
    for name in sorted(by_operator):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(by_operator[name].items()))
        print(f"{name:30} {by_operator[name].total():7}: {kinds}")
    for failure in outcome.failures:
        print(f"\nFAILED {failure}")
    print(f"fuzz: {outcome.problems.total()} problems, {len(outcome.failures)} failures")


if __name__ == "__main__":
    sys.exit(main())
