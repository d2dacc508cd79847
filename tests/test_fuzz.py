"""The fuzzer itself: it must find what is wrong, name the seed, and go on after a crash."""

from __future__ import annotations

import collections
import re
import subprocess
import sys

import numpy as np
import pytest

import pydeform
from tests import conftest
from tests.fuzz import __main__ as fuzz
from tests.fuzz import check, problems

CPU = conftest.Backend("cpu")
PLAIN = ("conv", "affine")  # operators that have no coordinates


def one(operator, kind):
    """The first problem of that kind in float32, and a generator in the state after it."""
    for seed in range(10_000):
        rng = np.random.default_rng(seed)
        problem = problems.MAKERS[operator](rng, operator)
        if (problem.kind, problem.dtype) == (kind, "float32") and problem.grad_output.size:
            return problem, rng
    raise AssertionError("no such problem")


def test_every_operator_dtype_and_kind_is_drawn():
    drawn = collections.Counter()
    for seed in range(3000):
        p = problems.draw(np.random.default_rng(seed), tuple(problems.MAKERS))
        drawn[p.operator, p.dtype] += 1
        drawn[p.operator, p.kind] += 1
    operators = {name for name in pydeform.__all__ if f"{name}_backward" in pydeform.__all__}
    assert set(problems.MAKERS) == operators
    for operator in operators:
        kinds = ["exact", "far", "real", "hostile" if "roi" in operator else "ulp"]
        for what in (*problems.DTYPES, *(["plain"] if operator.startswith(PLAIN) else kinds)):
            assert drawn[operator, what] > 10, (operator, what)


@pytest.mark.parametrize("operator", problems.MAKERS)
def test_results_of_ours_pass(monkeypatch, operator):
    monkeypatch.setattr("tests.conftest._tolerance", conftest.tolerance_of("cpu", "conv" in operator))
    for seed in range(20):
        rng = np.random.default_rng([seed, 5])
        check.check(problems.MAKERS[operator](rng, operator), rng, CPU)


@pytest.mark.parametrize("operator", problems.MAKERS)
@pytest.mark.parametrize("which", ["", "_backward"])
def test_a_wrong_number_is_found(monkeypatch, operator, which):
    right = getattr(pydeform, operator + which)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        array = result if not which else result[0]
        array.flat[array.size // 2] += 0.25
        return result

    monkeypatch.setattr(pydeform, operator + which, wrong)
    problem, rng = one(operator, "plain" if operator.startswith(PLAIN) else "exact")
    name = next(iter(problem.arrays)) if which else "output"
    with pytest.raises(AssertionError, match=name):
        check.check(problem, rng, CPU)


def test_what_another_way_changes_is_found(monkeypatch):
    """One bit that depends on threads, or on memory that nobody wrote."""
    from pydeform.cpu.core import memory

    right, problem = pydeform.conv2d, one("conv2d", "plain")[0]

    def unsteady(*arguments, **options):
        result = right(*arguments, **options)
        if not isinstance(memory.np, type(np)):  # memory is being poisoned
            result.flat[0] = np.nextafter(result.flat[0], np.asarray(9, result.dtype))
        return result

    monkeypatch.setattr(pydeform, "conv2d", unsteady)
    with pytest.raises(AssertionError, match="output in other layouts, on threads, in poisoned memory: bits differ"):
        check.check(problem, np.random.default_rng(0), CPU)
    assert isinstance(memory.np, type(np))  # and it is given back


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("raise AssertionError('output differs')", "AssertionError: output differs"),
        ("time.sleep(60)", "no end after"),
    ],
)
def test_a_batch_that_dies_names_its_seed(monkeypatch, fault, said):
    """The fourth problem of a batch fails in each of the ways in which code can."""
    program = (
        "import os, signal, time\n"
        "for seed in range(70, 80):\n"
        "    print(f'problem {seed} cpu conv2d float32 plain', flush=True)\n"
        f"    if seed == 73: {fault}\n"
    )
    run = subprocess.run
    monkeypatch.setattr(fuzz, "LIMIT", 5)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run([sys.executable, "-c", program], **options))
    outcome = fuzz.run_apart("cpu", 70, 10)
    assert outcome.problems == {"cpu conv2d float32 plain": 4}
    (failure,) = outcome.failures
    assert said in failure
    assert failure.endswith("python -m tests.fuzz --backend cpu --seed 73")


def test_a_run_ends_with_its_numbers(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "BATCH", {"cpu": 5})
    assert fuzz.main(["--minutes", "0.001", "--jobs", "2", "--backend", "cpu", "--first", "11"]) == 0
    captured = capsys.readouterr()
    assert "from seed 11 on" in captured.err
    assert re.search(r"^fuzz: (5|10) problems, 0 failures$", captured.out, re.MULTILINE)
    failed = fuzz.Outcome(collections.Counter({"cpu conv2d float32 plain": 3}), ["problem 5"])
    monkeypatch.setattr(fuzz, "run_apart", lambda *_: failed)
    assert fuzz.main(["--minutes", "0.001", "--jobs", "1", "--backend", "cpu"]) == 1
    assert "FAILED problem 5" in capsys.readouterr().out
