"""Share the work of one kernel call among threads.

A kernel divides its problem into units that each own what they write. Every thread that runs the kernel claims the
next unit from a counter until none is left, so the result depends on neither the number of threads nor their speed.
The calling thread starts at once and is never waiting for a helper to wake up: a helper that comes late finds less
work, or none. See docs/decisions/0005-threads.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydeform._runtime import get_num_threads
from pydeform.cpu._jit import Kernel
from pydeform.cpu._kernel_cache import say_once

_STRIDE = 8  # counters lie a cache line apart
_CLAIMED, _FINISHED = 0, 1
_FAR = 1 << 62  # more units than any phase has
# Each thread has a workspace, and more threads than processors save nothing. Eight are no burden on any machine.
_MOST_THREADS = max(2 * (os.cpu_count() or 1), 8)
_INT = ir.IntType(64)
_HAS_YIELD = hasattr(os, "sched_yield")


def _pointer_to(context: Any, builder: Any, counters_type: Any, counters: Any, index: Any) -> Any:
    array = context.make_array(counters_type)(context, builder, counters)
    return builder.gep(array.data, [index])


def _emit_count_up(builder: Any, pointer: Any) -> Any:
    """Add one in one atomic step, after everything written before has become visible; gives the value before."""
    return builder.atomic_rmw("add", pointer, ir.Constant(_INT, 1), "acq_rel")


def _emit_wait(builder: Any, pointer: Any, value: Any) -> None:
    """Until *pointer >= value: let other threads run, and then see everything that was written before."""
    wait, again, done = (builder.append_basic_block(name) for name in ("wait", "again", "done"))
    builder.branch(wait)
    builder.position_at_end(wait)
    builder.cbranch(builder.icmp_signed(">=", builder.load_atomic(pointer, "acquire", 8), value), done, again)
    builder.position_at_end(again)
    if _HAS_YIELD:
        name = "sched_yield"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(ir.IntType(32), []), name=name
        )
        builder.call(function, [])
    builder.branch(wait)
    builder.position_at_end(done)


def _phase_pointer(context: Any, builder: Any, signature: Any, arguments: Any, which: int) -> Any:
    index = builder.add(builder.mul(arguments[1], ir.Constant(_INT, 2 * _STRIDE)), ir.Constant(_INT, which * _STRIDE))
    return _pointer_to(context, builder, signature.args[0], arguments[0], index)


@intrinsic  # type: ignore[misc]
def claim(typing_context: Any, counters: Any, phase: Any) -> Any:
    """The next unit of `phase` that nobody has taken; past the last one it goes on counting."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _emit_count_up(builder, _phase_pointer(context, builder, signature, arguments, _CLAIMED))

    return types.int64(counters, types.int64), codegen


@intrinsic  # type: ignore[misc]
def finish(typing_context: Any, counters: Any, phase: Any) -> Any:
    """Tell the others that one more unit of `phase` is done."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_count_up(builder, _phase_pointer(context, builder, signature, arguments, _FINISHED))
        return context.get_dummy_value()

    return types.void(counters, types.int64), codegen


@intrinsic  # type: ignore[misc]
def wait_for(typing_context: Any, counters: Any, phase: Any, units: Any) -> Any:
    """Wait until `units` units of `phase` are done: whoever has claimed one is at work on it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_wait(builder, _phase_pointer(context, builder, signature, arguments, _FINISHED), arguments[2])
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), codegen


@intrinsic  # type: ignore[misc]
def advance_counter(typing_context: Any, counters: Any, index: Any) -> Any:
    """counters[index] += 1, for the others to see after everything written before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_count_up(builder, _pointer_to(context, builder, signature.args[0], *arguments))
        return context.get_dummy_value()

    return types.void(counters, types.int64), codegen


@intrinsic  # type: ignore[misc]
def wait_until(typing_context: Any, counters: Any, index: Any, value: Any) -> Any:
    """Wait until counters[index] has reached `value`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_wait(builder, _pointer_to(context, builder, signature.args[0], *arguments[:2]), arguments[2])
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), codegen


def own_counters(phases: int) -> int:
    """Index of the first of a kernel's own counters, behind those of its phases."""
    return 2 * phases * _STRIDE


def new_counters(phases: int, own: int = 0) -> Any:
    return np.zeros(own_counters(phases) + own, np.int64)


def threads_for(units: int) -> int:
    """Threads of a call that has so many units of work to share."""
    return max(1, min(get_num_threads(), units, _MOST_THREADS))


class _Task:
    """A helper's part of one call. Whoever pops `parts` has it: a helper to do it, or the caller to withdraw it."""

    def __init__(self, *parts: Any) -> None:
        self.parts = [parts]
        self.left: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def end(self) -> BaseException | None:
        """Withdraw, or wait for the helper; the error that it met."""
        try:
            self.parts.pop()  # of a helper that is busy elsewhere
        except IndexError:
            return self.left.get()
        return None


_queue: queue.SimpleQueue[_Task] = queue.SimpleQueue()
_helpers: list[int] = []  # thread ids, as the system numbers them
_avoided = -1  # the processor that helpers keep off
_lock = threading.Lock()

# On few processors a scheduler often wakes a helper on that of the caller, where it waits for the call to end.
_FEW_PROCESSORS = 8
_current_processor = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


def _take_part(kernel: Any, thread: int, counters: Any, arguments: tuple[Any, ...]) -> None:
    try:
        kernel.call(thread, counters, *arguments)
    except BaseException:
        counters[...] = _FAR  # what this thread has claimed nobody finishes: no other waits for it, nor claims more
        raise


def _help() -> None:
    while True:
        task = _queue.get()
        with contextlib.suppress(IndexError):  # withdrawn
            parts = task.parts.pop()
            error: BaseException | None = None
            try:
                _take_part(*parts)
            except BaseException as caught:  # the caller's to raise
                error = caught
            del parts
            task.left.put(error)
            del error
        del task  # hold nothing while waiting


def _reset_in_child() -> None:
    """After fork() only the forking thread is left: start anew."""
    global _queue, _helpers, _avoided, _lock
    _queue, _helpers, _avoided, _lock = queue.SimpleQueue(), [], -1, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


def run(kernel: Kernel, key: Any, threads: int, counters: Any, *arguments: Any) -> None:
    """kernel(thread, counters, *arguments) in the calling thread as number 0 and in up to threads - 1 helpers.

    When it returns, no helper holds any of the arguments: else memory of a call would still be in use at the next one,
    which would have to get its own from the system. An error in one thread ends the others' work, and is raised here.
    """
    if not kernel.prepare(key, (0, counters, *arguments)):
        return
    helpers = _start_helpers(threads - 1) if threads > 1 else 0
    tasks = [_Task(kernel, thread, counters, arguments) for thread in range(1, helpers + 1)]
    if tasks:
        _keep_helpers_off_this_processor()
    try:
        for task in tasks:
            _queue.put(task)
        _take_part(kernel, 0, counters, arguments)
    finally:
        errors = [task.end() for task in tasks]
    for error in errors:
        if error is not None:
            raise error


def _start_helpers(count: int) -> int:
    """How many there are, up to `count`. Where the system gives no more, calls do with those there are."""
    global _avoided
    if len(_helpers) < count:
        with _lock, _fewer_will_do():
            while len(_helpers) < count:
                helper = threading.Thread(target=_help, name="pydeform", daemon=True)
                helper.start()
                _helpers.append(cast(int, helper.native_id))
                _avoided = -1
    return min(count, len(_helpers))


@contextlib.contextmanager
def _fewer_will_do() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        say_once(f"a helper thread could not be started, calls do with fewer: {error}")


def _keep_helpers_off_this_processor() -> None:
    """A hint only: it fails in silence, and nothing depends on it but speed."""
    global _avoided
    if _current_processor is None or (here := _current_processor()) == _avoided:
        return
    with contextlib.suppress(OSError):
        allowed = os.sched_getaffinity(0)
        if 1 < len(allowed) <= _FEW_PROCESSORS:
            for helper in _helpers:
                os.sched_setaffinity(helper, allowed - {here})
    _avoided = here
