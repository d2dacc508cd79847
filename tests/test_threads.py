"""Threads, processes and caches change no bit of a result and stop nothing from working."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.core import jit, kernel_cache, memory, parallel
from pydeform.cpu.roi import plan as roi_plan
from tests.cases.deform_conv2d import ARRAYS, Case, make, make_grad_output
from tests.conftest import arrays_in, assert_same_bits, times_helped
from tests.test_waits import PROBLEMS as PROBLEMS_OF_KERNELS

ROOT = Path(pydeform.__file__).parents[1]

# Different enough that no two threads are ever at the same place of the same loop.
PROBLEMS = (
    Case(2, 12, 11, 7, 4, (3, 2), (2, 1), ((1, 1), (0, 0)), (2, 1), groups=2, offset_groups=3),
    Case(1, 34, 25, 23, 18, (3, 3), padding=((1, 1), (1, 1)), groups=2, offset_groups=2),
    Case(3, 16, 18, 17, 40, (1, 3), mask=False),
    Case(5, 6, 9, 12, 6, (3, 3), groups=6, bias=False),
    Case(1, 3, 40, 31, 8, (5, 5), padding=((2, 2), (2, 2))),
    Case(7, 8, 6, 5, 9, (1, 1), offset_groups=4),
    Case(1, 70, 13, 14, 66, (2, 2), mask=False, bias=False),
    Case(2, 20, 1, 50, 10, (1, 4), groups=5, offset_groups=2),
)


def solve(case: Case, dtype: str) -> dict[str, object]:
    arrays = make(case, dtype)
    grads = pydeform.deform_conv2d_backward(make_grad_output(case, dtype), **arrays, **case.options)
    return {"output": pydeform.deform_conv2d(**arrays, **case.options), **grads._asdict()}


def assert_same_results(got, want):
    for name in ("output", *ARRAYS):
        if want[name] is None:
            assert got[name] is None
        else:
            assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    threads(1)
    assert pydeform.get_num_threads() == 1
    want = [solve(case, dtype) for case in PROBLEMS]
    for count in (2, 3, 7):  # more than there are processors, too
        threads(count)
        assert pydeform.get_num_threads() == count
        for case, results in zip(PROBLEMS, want, strict=True):
            assert_same_results(solve(case, dtype), results)


def at_once(count, work):
    """work(number) in so many Python threads that start together; what fails in one fails here."""
    barrier, failures = threading.Barrier(count), []

    def begin(number):
        try:
            barrier.wait(60)
            work(number)
        except BaseException as error:
            failures.append((number, error))

    workers = [threading.Thread(target=begin, args=(number,), daemon=True) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive(), "still running: the threads wait for each other"
    assert not failures, failures


def test_eight_threads_at_once(threads):
    """Each Python thread works on its own problem, several times, starting together."""
    threads.together = False
    threads(1)
    want = [solve(case, "float32") for case in PROBLEMS]
    threads(2)

    def work(number):
        for _ in range(4):
            assert_same_results(solve(PROBLEMS[number], "float32"), want[number])

    with_helpers(threads, lambda: at_once(len(PROBLEMS), work))


def with_helpers(threads, run):
    """Again where no helper came, as on a busy machine."""
    deadline = time.monotonic() + 60
    run()
    while not threads.had_others() and time.monotonic() < deadline:
        run()


def test_every_operator_at_once(threads):
    """Each Python thread works on another operator, forward and backward."""
    threads.together = False
    operators = _selfcheck.operators()
    problems, backend = {operator: _selfcheck.problem(operator) for operator in operators}, _selfcheck.backends()[0]

    def solved(operator):
        return _selfcheck.run(operator, problems[operator], backend, np.float32)

    threads(1)
    want = {operator: solved(operator) for operator in operators}
    threads(2)

    def work(number):
        operator = operators[number]
        for _ in range(8):
            for name, result in solved(operator).items():
                assert_same_bits(result, want[operator][name], f"{operator}: {name}")

    with_helpers(threads, lambda: at_once(len(operators), work))


def test_the_same_problem_in_four_threads_at_once(threads):
    """They share its plan, and not the workspace that is kept for it."""
    threads.together = False
    threads(1)
    case = PROBLEMS[0]
    want = solve(case, "float32")
    threads(2)

    def work(number):
        for _ in range(30):
            assert_same_results(solve(case, "float32"), want)

    with_helpers(threads, lambda: at_once(4, work))


def test_a_workspace_is_kept_where_it_is_small_and_lent_to_one_call():
    one = np.dtype(np.uint8)
    small = memory.Workspace(((3, 5), one), ((100,), np.dtype(np.float32)))
    first, second = small.take(), small.take()
    assert [a.shape for a in first] == [(3, 5), (100,)] and not np.shares_memory(first[0], second[0])
    small.give_back(second)
    small.give_back(first)  # one is enough
    assert small.take() is second and small.take() is not first
    large = memory.Workspace(((memory.MOST_KEPT + 1,), one))
    arrays = large.take()
    large.give_back(arrays)
    assert large.take() is not arrays


def end_of(array: np.ndarray) -> int:
    return array.ctypes.data + array.nbytes


def test_what_threads_write_lies_apart():
    asked = (
        ((3, 5), np.float32),
        ((7,), np.int64),
        ((2, 3, 33), np.float64),
        ((1000, 80), np.float32),
        ((0, 9), np.int32),
    )
    own = tuple((shape, np.dtype(dtype)) for shape, dtype in asked)
    shared = ((11,), np.dtype(np.uint8))
    for threads in (2, 3, 8):
        first, *arrays = memory.Workspace(shared, threads=threads, own=own).take()
        assert first.shape == (11,)
        ends = [end_of(first)]
        for array, (shape, dtype) in zip(arrays, own, strict=True):
            assert array.dtype == dtype and array.flags.c_contiguous
            assert len(array) == threads and array.shape[2:] == shape[1:] and array.shape[1] >= shape[0]
            for thread in range(threads if array.size else 0):
                mine = array[thread, : shape[0]]
                assert mine.ctypes.data - ends[-1] >= (memory.APART if thread else memory.ALIGNMENT)
                ends.append(end_of(mine))
            ends[-1] = end_of(array)
    for array, (shape, _) in zip(memory.Workspace(own=own).take(), own, strict=True):
        assert array.shape == (1, *shape)


def test_plans_ask_for_the_memory_of_one_thread():
    """What all threads have side by side, `Workspace` alone makes."""
    for path in Path(memory.__file__).parents[1].rglob("*.py"):
        if path.name != "memory.py":
            assert not re.search(r"\(\(threads\b", path.read_text()), path


def test_no_helper_keeps_the_memory_of_a_call(threads):
    threads(2)
    rng = np.random.default_rng(0)
    shapes = ((1, 64, 40, 40), (1, 18, 40, 40), (64, 64, 3, 3))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for _ in range(20):
        output = pydeform.deform_conv2d(*arrays, padding=1)
        memory = weakref.ref(output.base)
        del output
        assert memory() is None


# How many threads, and what becomes of errors ---------------------------------------------------------------------


@pytest.fixture
def no_helpers(monkeypatch):
    """As after the start of a process; no problem is too small for threads, of which a call may have eight."""
    monkeypatch.setattr(parallel, "_helpers", [])
    monkeypatch.setattr(conv_plan, "SERIAL_FLOPS", 0)
    monkeypatch.setattr(roi_plan, "SERIAL_FLOPS", 0)
    monkeypatch.setattr(parallel, "get_num_threads", lambda: 8)


@pytest.mark.parametrize("name", PROBLEMS_OF_KERNELS)
def test_a_million_threads_take_no_more_memory_than_there_is_work_and_processors(monkeypatch, no_helpers, name):
    asked = []

    def look(kernel, key, threads, *arguments):
        asked.append((threads, sum(a.nbytes for a in arrays_in(arguments))))

    monkeypatch.setattr(parallel, "run", look)
    PROBLEMS_OF_KERNELS[name][1]()
    monkeypatch.setattr(parallel, "get_num_threads", lambda: 10**6)
    PROBLEMS_OF_KERNELS[name][1]()
    (few, some_bytes), (many, more_bytes) = asked
    assert 1 < few <= 8
    assert few <= many <= max(8, 2 * os.cpu_count())
    assert more_bytes < some_bytes * many / few + 1


@pytest.mark.parametrize("backward", [False, True])
def test_no_more_threads_than_units_of_work(monkeypatch, no_helpers, backward):
    asked = []
    monkeypatch.setattr(parallel, "run", lambda kernel, key, threads, *arguments: asked.append(threads))
    x = np.ones((1, 1, 2, 2), np.float32)
    box, boxes = np.array([[0, 0, 0, 1, 1]], np.float32), {"output_size": 1, "sampling_ratio": 1}
    deep = np.ones((1, 5, 2, 2), np.float32)
    if backward:
        pydeform.conv2d_backward(x, x, np.ones((1, 1, 1, 1), np.float32))
        pydeform.roi_align_backward(x[..., :1, :1], x, box, **boxes)
        pydeform.roi_align_backward(deep[..., :1, :1], deep, box, **boxes)
    else:
        pydeform.conv2d(x, np.ones((1, 1, 1, 1), np.float32))
        pydeform.roi_align(x, box, **boxes)
        pydeform.roi_align(deep, box, **boxes)
    assert asked == [1, 1, 1]


@pytest.mark.parametrize("there_are", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), OSError(11, "temporarily unavailable")])
def test_fewer_helpers_than_asked_for_will_do(monkeypatch, capsys, no_helpers, error, there_are):
    start, started, calls = threading.Thread.start, [], []

    def start_some(thread):
        if thread.name == "pydeform":
            if len(started) == there_are:
                raise error
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    monkeypatch.setattr(kernel_cache, "_said", set())
    monkeypatch.setattr(parallel, "get_num_threads", lambda: 1)
    want = [solve(case, "float32") for case in PROBLEMS[:2]]
    monkeypatch.setattr(parallel, "get_num_threads", lambda: 8)
    for case, results in zip(PROBLEMS[:2], want, strict=True):
        assert_same_results(solve(case, "float32"), results)
    assert len(parallel._helpers) == len(started) == there_are
    assert [line for line in capsys.readouterr().err.splitlines() if "compiling" not in line] == [
        f"pydeform: a helper thread could not be started, calls do with fewer: {error}"
    ]
    run_all = parallel.run
    monkeypatch.setattr(parallel, "run", lambda kernel, *rest: calls.append(rest) or run_all(kernel, *rest))
    solve(PROBLEMS[1], "float32")
    assert {rest[1] for rest in calls} == {8}  # of which there are not so many


# Helpers ----------------------------------------------------------------------------------------------------------


@jit.Kernel
def _count(thread, counters, units, done, scratch):
    """Units that each thread has done, of some microseconds each."""
    parallel.call_helpers(thread, counters)
    unit = parallel.claim(counters, 0)
    while unit < units:
        x = unit
        for _ in range(3000):
            x = (5 * x + 1) & 1023
        scratch[thread] = x
        done[thread] += 1
        parallel.finish(counters, 0)
        unit = parallel.claim(counters, 0)
    parallel.wait_for(counters, 0, units)
    parallel.let_helpers_go(thread, counters)


def helped(helpers: int) -> int:
    """How many of so many helpers had a part in a call."""
    done, before = np.zeros(helpers + 1, np.int64), times_helped()
    parallel.run(_count, "n", helpers + 1, parallel.new_counters(1), 100, done, np.zeros_like(done))
    assert done.sum() == 100
    return times_helped() - before


def all_sleep() -> bool:
    return all(helper.place[parallel._ASLEEP] for helper in parallel._helpers)


def all_are_free() -> bool:
    return all(helper.place[parallel._STATE] == parallel._FREE for helper in parallel._helpers)


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_helpers_are_called_asleep_or_awake(no_helpers):
    for helpers in (1, 3, 2):
        until(lambda helpers=helpers: helped(helpers) == helpers)
        until(all_sleep)
        until(lambda helpers=helpers: helped(helpers) == helpers)
        assert all_are_free()
    assert len(parallel._helpers) == 3


def test_a_helper_that_is_expected_stays_awake_for_a_moment(no_helpers, monkeypatch):
    monkeypatch.setattr(parallel, "_PATIENCE", 300_000)  # of yields: a tenth of a second
    until(lambda: helped(1) == 1)
    (helper,) = parallel._helpers
    for _ in range(3):  # woken in vain
        helper._wakes.put(None)
    until(lambda: all_sleep() and helper._wakes.empty())
    assert helper.expect()
    until(lambda: not all_sleep())
    time.sleep(0.01)
    assert not all_sleep()  # from its sleep, and
    assert helper.expect()  # from now on: it looks at this after the patience that it has begun with
    until(lambda: not helper.place[parallel._EXPECTED])
    time.sleep(0.01)
    assert not all_sleep()
    until(all_sleep)


def test_who_does_not_come_is_done_without(no_helpers, monkeypatch):
    """It sleeps, and nobody wakes it; or another call has it."""
    until(lambda: helped(1) == 1)
    until(all_sleep)
    (helper,) = parallel._helpers
    with monkeypatch.context() as patch:
        patch.setattr(parallel._Helper, "expect", lambda helper: True)
        assert helped(1) == 0
    assert helper.place[parallel._PART] != 0 and all_are_free() and all_sleep()  # called, and let go
    for state in (parallel._TAKEN, 1 << 20, 1 << 20 | parallel._AT_WORK):  # taken, called, at work
        other = object.__new__(parallel._Helper)
        other.place = np.zeros(parallel._STRIDE, np.int64)
        other.address, other.thread_id = other.place.ctypes.data, threading.get_native_id()
        other.place[parallel._STATE] = state
        monkeypatch.setattr(parallel, "_helpers", [other])
        assert not other.expect() and helped(1) == 0
        with monkeypatch.context() as patch:
            patch.setattr(parallel._Helper, "expect", lambda helper: True)  # another call has been faster
            assert helped(1) == 0
        assert other.place[parallel._STATE] == state and not other.place[parallel._PART : parallel._DONE].any()


def test_helpers_are_free_after_an_error(no_helpers):
    helped(2)
    for bad in ("no array", 1.5):
        with pytest.raises(TypeError):
            parallel.run(_count, "n", 3, parallel.new_counters(1), 100, bad, bad)
    assert len(parallel._helpers) == 2 and all_are_free()
    until(lambda: helped(2) == 2)


def test_calls_at_once_share_the_helpers(no_helpers):
    """Nobody waits for one that another call has, and none works for two."""

    def work(number):
        for _ in range(50):
            done = np.zeros(3, np.int64)
            parallel.run(_count, "n", 3, parallel.new_counters(1), 100, done, np.zeros_like(done))
            assert done.sum() == 100

    at_once(4, work)
    assert len(parallel._helpers) == 2 and all_are_free()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_calls_that_are_interrupted_anywhere_lose_no_helper():
    code = """
import faulthandler, random, signal, time
faulthandler.dump_traceback_later(100, exit=True)
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.core import parallel
import pydeform
from tests.test_threads import PROBLEMS, all_are_free, assert_same_results, solve
conv_plan.SERIAL_FLOPS = 0
pydeform.set_num_threads(2)
want = solve(PROBLEMS[0], "float32")

class Interrupt(Exception):
    pass

def interrupt(*_):
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts, random = 0, random.Random(0)
while interrupts < 500:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.001))
        while True:
            solve(PROBLEMS[0], "float32")
    except Interrupt:
        interrupts += 1
assert len(parallel._helpers) == 1 and all_are_free()
(helper,) = parallel._helpers
calls, before = 0, int(helper.place[parallel._DONE])
while calls < 100 or helper.place[parallel._DONE] == before:  # on a busy machine it may miss a hundred
    assert_same_results(solve(PROBLEMS[0], "float32"), want)
    calls += 1
print("it helps")
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "it helps\n"), done.stderr


def test_one_thread_where_kernels_may_raise(monkeypatch, no_helpers):
    assert parallel.threads_for(5) == 5
    monkeypatch.setattr("numba.core.config.BOUNDSCHECK", 1)
    assert parallel.threads_for(5) == 1


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter that finds this pydeform and these tests."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# First use is by all threads at once, so that compiling or loading kernels is raced for, too; then a child process.
FIRST_USE_BY_THREADS_THEN_FORK = """
import faulthandler, os, signal, sys, threading
faulthandler.dump_traceback_later(120, exit=True)
import numpy as np, pydeform
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.core import parallel
conv_plan.SERIAL_FLOPS = 0
from tests.test_threads import PROBLEMS, assert_same_results, solve

def child(want):
    signal.alarm(60)  # a child that hangs dies of it
    try:
        assert not parallel._helpers
        for case, results in zip(PROBLEMS[:3], want):
            assert_same_results(solve(case, "float32"), results)
        assert parallel._helpers
    except BaseException as error:
        print("child:", repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

got = [None] * 3
barrier = threading.Barrier(3)
def work(number):
    barrier.wait()
    got[number] = solve(PROBLEMS[number], "float32")
workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
[w.start() for w in workers]
[w.join() for w in workers]
pydeform.set_num_threads(1)
want = [solve(case, "float32") for case in PROBLEMS[:3]]
for a, b in zip(got, want):
    assert_same_results(a, b)
pydeform.set_num_threads(2)
solve(PROBLEMS[1], "float32")
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        child(want)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_same_results(solve(PROBLEMS[1], "float32"), want[1])  # and the parent goes on
assert parallel._helpers
print("all the same")
"""


# pydeform brings its own threads, so a layer that Numba lacks on this machine must not matter either.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_threads_and_fork(layer):
    done = run_python(FIRST_USE_BY_THREADS_THEN_FORK, NUMBA_THREADING_LAYER=layer)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all the same\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_fork_while_other_threads_compute():
    """The child must not inherit a lock that a thread of the parent held."""
    code = """
import faulthandler, os, signal, threading
faulthandler.dump_traceback_later(120, exit=True)
import pydeform
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.core import parallel
from tests.test_threads import PROBLEMS, assert_same_results, solve
conv_plan.SERIAL_FLOPS = 0
pydeform.set_num_threads(2)
want = solve(PROBLEMS[0], "float32")
stop = threading.Event()
def busy():
    while not stop.is_set():
        solve(PROBLEMS[1], "float32")
workers = [threading.Thread(target=busy) for _ in range(3)]
[w.start() for w in workers]
codes = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            assert_same_results(solve(PROBLEMS[0], "float32"), want)
        except BaseException:
            os._exit(1)
        os._exit(0 if parallel._helpers else 2)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
[w.join() for w in workers]
print(codes)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[0] * 8}\n"


def compile_without_cache(folder: str) -> subprocess.CompletedProcess[str]:
    code = """
import numpy as np, pydeform
x = np.arange(12.0, dtype=np.float32).reshape(1, 1, 3, 4)
print(pydeform.deform_conv2d(x, np.full((1, 2, 3, 4), 0.5, np.float32), np.ones((1, 1, 1, 1), np.float32))[0, 0, 0, 0])
"""
    return run_python(code, HOME=folder, NUMBA_CACHE_DIR=folder, XDG_CACHE_HOME=folder, LOCALAPPDATA=folder)


def test_a_cache_that_cannot_be_written(tmp_path):
    """Below a regular file nobody can make a folder, not even root."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = compile_without_cache(str(blocker / "below"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2.5\n"
    said = [line for line in done.stderr.splitlines() if "not writable" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("pydeform: no compiled kernels are kept")
    assert blocker.read_text() == ""
