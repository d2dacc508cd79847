"""Imports and compiles that are interrupted, and processes that fork while one is under way."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from pydeform import _background
from pydeform.cpu.core import jit, parallel
from tests.test_cpu_kernels import TINY, run_python

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
needs_signals = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends threads no signals")


@pytest.fixture(autouse=True, scope="module")
def ctrl_c() -> Iterator[None]:
    """A shell's background jobs ignore it, and so would whatever these tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_main() -> None:
    """What Ctrl-C does."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_what_work_returns_and_raises():
    def fail():
        raise LookupError("of the work")

    assert _background.complete(lambda: 42) == 42
    with pytest.raises(LookupError, match="of the work") as caught:
        _background.complete(fail)
    assert caught.traceback[-1].name == "fail"
    assert _background.complete(lambda: _background.complete(lambda: 42)) == 42  # work that calls an operator


def test_without_another_thread(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert _background.complete(lambda: _background.complete(lambda: 42)) == 42


def test_one_work_at_a_time():
    at_work, most = [], []

    def work():
        at_work.append(0)
        most.append(len(at_work))
        time.sleep(0.01)
        at_work.pop()

    callers = [threading.Thread(target=_background.complete, args=(work,)) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most == [1] * 8


def test_who_waits_is_told_again_and_again(monkeypatch):
    monkeypatch.setattr(_background, "_PATIENCE", 0.01)
    enough, told = threading.Event(), []

    def waiting():
        told.append(0)
        if len(told) == 3:
            enough.set()

    assert _background.complete(lambda: enough.wait(60), waiting)


@needs_signals
def test_an_interrupt_ends_the_waiting_and_not_the_work():
    go_on, steps = threading.Event(), []

    def work():
        steps.append("begun")
        interrupt_main()
        assert go_on.wait(60)
        steps.append("ended")

    with pytest.raises(KeyboardInterrupt):
        _background.complete(work)
    assert steps == ["begun"]
    go_on.set()
    assert _background.complete(lambda: steps) == ["begun", "ended"]


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np, pydeform

x = np.ones((1, 1, 3, 3), np.float32)
main = threading.main_thread().ident
interrupted = 0

def interrupt():
    signal.pthread_kill(main, signal.SIGINT)

def at_import(number):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event == "import":
            seen += 1
            if seen == number:
                interrupt()
    sys.addaudithook(hook)

def after(seconds):
    threading.Timer(seconds, interrupt).start()

def child(when, what):
    hit = 1
    try:
        when(what)
        pydeform.conv2d(x, x)
        hit = 0
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    assert [pydeform.conv2d(x, x).item() for _ in range(2)] == [9, 9]
    os._exit(hit)

moments = [(at_import, number) for number in (1, 2, 5, 20, 60, 150, 300, 370)]  # of 400
moments += [(after, 0.02 + 0.08 * n) for n in range(8)]
for when, what in moments:
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            child(when, what)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1), (when.__name__, what, code)
    interrupted += code
    assert code or when is after, what
print(interrupted)
"""


@needs_fork
@needs_signals
def test_ctrl_c_during_the_first_call():
    """While modules load, and later; afterwards the same process computes."""
    run_python(TINY)  # compiles, which would be said below
    done = run_python(INTERRUPTED)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 7 and done.stderr == ""


@needs_signals
def test_ctrl_c_while_a_kernel_compiles():
    """At one of Numba's passes, of which there are 27."""
    from numba.core import event

    class Interrupt(event.Listener):
        def __init__(self, when):
            self.left = when

        def on_start(self, _):
            self.left -= 1
            if self.left == 0:
                interrupt_main()

        def on_end(self, _):
            pass

    for when in range(1, 27, 4):

        def add_one(thread, values):
            for i in range(len(values)):
                values[i] += 1

        kernel, values = jit.Kernel(add_one), np.zeros(3)
        with event.install_listener("numba:run_pass", Interrupt(when)):
            with pytest.raises(KeyboardInterrupt):
                parallel.run(kernel, "test", 1, values)
                time.sleep(1)
            parallel.run(kernel, "test", 1, values)
        assert values.sum() in (3, 6)


UNCAUGHT = """
import os, signal, threading
import numpy as np, pydeform
import numba.core.event as event

class Interrupt(event.Listener):
    sent = False
    def on_start(self, _):
        if not self.sent:
            self.sent = True
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    def on_end(self, _):
        pass

# Not at "numba:compile", after which Numba imports modules: Python 3.11 forgets that it was interrupted when a module
# that it imports makes a named tuple.
event.register("numba:run_pass", Interrupt())
x = np.ones((1, 1, 3, 3), np.float32)
pydeform.conv2d(x, x)
"""


@needs_signals
def test_ctrl_c_ends_a_process_that_compiles(tmp_path):
    """By a traceback and nothing worse; the kernel is finished and kept."""
    done = run_python(UNCAUGHT, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt") and "Fatal" not in done.stderr
    assert len(list(tmp_path.rglob("*.nbc"))) == 1
    done = run_python(TINY, NUMBA_CACHE_DIR=str(tmp_path))
    assert (done.stdout, done.stderr) == ("9.0\n", "")


OWN, FINISHED = parallel.own_counters(1), parallel._FINISHED * parallel._STRIDE


@jit.Kernel
def each_waits(thread, counters, output):
    parallel.call_helpers(thread, counters)
    parallel.finish(counters, 0)
    parallel.wait_until(counters, OWN + thread, 1)
    output[thread] = 1
    parallel.let_helpers_go(thread, counters)


@needs_signals
def test_ctrl_c_during_a_kernel_waits_for_the_helpers():
    """Else they would go on with arrays of a call that has ended."""
    counters, output = parallel.new_counters(1, own=2), np.zeros(2)
    counters[OWN : OWN + 2] = 1
    parallel.run(each_waits, "test", 1, counters.copy(), output)  # compiles
    counters[OWN : OWN + 2], output[:] = 0, 0
    memory = weakref.ref(output)

    def steer():
        while counters[FINISHED] < 2:  # both are at work
            time.sleep(0.001)
        interrupt_main()
        counters[OWN] = 1  # the caller's part ends, and he would raise
        time.sleep(0.2)
        counters[OWN + 1] = 1

    steering = threading.Thread(target=steer)
    with pytest.raises(KeyboardInterrupt):
        steering.start()
        parallel.run(each_waits, "test", 2, counters, output)
    assert output.tolist() == [1, 1]
    steering.join()
    del output
    assert memory() is None


FORKED = """
import faulthandler, logging, os, signal, sys, threading, time
faulthandler.dump_traceback_later(100, exit=True)
import pydeform
import llvmlite.binding, numba, numpy as np
from numba.core import event
from pydeform.cpu.core import jit
from pydeform.cpu.core import parallel

class Slow(event.Listener):
    def on_start(self, _):
        started.set()
        time.sleep(0.2)
        logging.getLogger(f"new {time.time()}")  # takes a lock that logging, too, takes before a fork
    def on_end(self, _):
        pass

@jit.Kernel
def add_one(thread, x):
    x[0] += 1

@jit.Kernel
def add_two(thread, x):
    x[0] += 2

def plain(x):
    return x + 1

def hold_llvm():
    with llvmlite.binding.ffi.lib._lock:
        started.set()
        time.sleep(0.2)

event.register("numba:compile", Slow())
for work in (
    lambda: parallel.run(add_one, "test", 1, np.zeros(1)),
    lambda: numba.njit(plain)(3),
    hold_llvm,
):
    started = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        # A new thread may get the identity of one that is gone, and with it the locks that this one held.
        for _ in range(4):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        x = np.zeros(1)
        parallel.run(add_two, "test", 1, x)
        os._exit(int(x[0] != 2))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    thread.join()
"""


@needs_fork
def test_fork_while_another_thread_compiles():
    """By this package, by Numba for somebody else, or within LLVM."""
    done = run_python(FORKED)
    assert (done.returncode, done.stdout) == (0, "0\n0\n0\n"), done.stderr


FORKED_DURING_IMPORT = """
import faulthandler, os, signal, sys, threading, time
faulthandler.dump_traceback_later(100, exit=True)
import numpy as np, pydeform

x = np.ones((1, 1, 3, 3), np.float32)
reached = threading.Event()

def hook(event, arguments):
    if event == "import" and arguments[0] == MODULE and not reached.is_set():
        reached.set()
        time.sleep(0.1)

sys.addaudithook(hook)
thread = threading.Thread(target=lambda: (pydeform.conv2d(x, x), reached.set()))
thread.start()
reached.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    os._exit(int(pydeform.conv2d(x, x).item() != 9))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
thread.join()
"""


@needs_fork
@pytest.mark.parametrize("module", ["numba", "numba.core.types", "pydeform.cpu.conv.forward_kernel", "numpy.ma"])
def test_fork_while_another_thread_imports(module):
    done = run_python(FORKED_DURING_IMPORT.replace("MODULE", repr(module)))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
