"""Share the work of one kernel call among threads.

A kernel divides its problem into units that each own what they write. Every thread that runs the kernel claims the
next unit from a counter until none is left, so the result depends on neither the number of threads nor their speed.
The calling thread starts at once and is never waiting for a helper to wake up: a helper that comes late finds less
work, or none. See docs/decisions/0005-threads.md.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydeform.cpu._jit import Kernel, inline

_STRIDE = 8  # counters lie a cache line apart
_CLAIMED, _FINISHED = 0, 1
_SPINS = 1 << 10
_HAS_YIELD = hasattr(os, "sched_yield")


def _pointer_to(context: Any, builder: Any, array_type: Any, arguments: Any) -> Any:
    array = context.make_array(array_type)(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic  # type: ignore[misc]
def _fetch_add(typing_context: Any, counters: Any, index: Any) -> Any:
    """counters[index]++ as one atomic step; returns the value before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer_to(context, builder, counters, arguments)
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(counters, types.int64), codegen


@intrinsic  # type: ignore[misc]
def _load(typing_context: Any, counters: Any, index: Any) -> Any:
    """counters[index], and with it everything that was written before it was last changed."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer_to(context, builder, counters, arguments)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(counters, types.int64), codegen


@intrinsic  # type: ignore[misc]
def _yield_processor(typing_context: Any) -> Any:
    """Let another thread have this processor."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _HAS_YIELD:
            name = "sched_yield"
            function = builder.module.globals.get(name) or ir.Function(
                builder.module, ir.FunctionType(ir.IntType(32), []), name=name
            )
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@inline
def advance_counter(counters: Any, index: int) -> None:
    """Count one up, after everything written before has become visible."""
    _fetch_add(counters, index)


@inline
def wait_until(counters: Any, index: int, value: int) -> None:
    """Wait until a counter has reached `value`."""
    spins = 0
    while _load(counters, index) < value:
        spins += 1
        if spins > _SPINS:
            _yield_processor()


@inline
def claim(counters: Any, phase: int) -> int:
    """The next unit of `phase` that nobody has taken; past the last one it goes on counting."""
    return _fetch_add(counters, (2 * phase + _CLAIMED) * _STRIDE)


@inline
def finish(counters: Any, phase: int) -> None:
    """Tell the others that one more unit of `phase` is done."""
    advance_counter(counters, (2 * phase + _FINISHED) * _STRIDE)


@inline
def wait_for(counters: Any, phase: int, units: int) -> None:
    """Wait until `units` units of `phase` are done: whoever has claimed one is at work on it."""
    wait_until(counters, (2 * phase + _FINISHED) * _STRIDE, units)


def new_counters(phases: int) -> Any:
    return np.zeros(2 * phases * _STRIDE, np.int64)


_queue: queue.SimpleQueue[tuple[Kernel, int, tuple[Any, ...]]] = queue.SimpleQueue()
_helpers = 0
_lock = threading.Lock()


def _help() -> None:
    while True:
        kernel, thread, arguments = _queue.get()
        kernel.call(thread, *arguments)
        del kernel, arguments  # hold no arrays while waiting


def _reset_in_child() -> None:
    """After fork() only the forking thread is left: start anew."""
    global _queue, _helpers, _lock
    _queue, _helpers, _lock = queue.SimpleQueue(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


def run(kernel: Kernel, key: Any, threads: int, *arguments: Any) -> None:
    """kernel(thread, *arguments) in the calling thread as number 0 and in up to threads - 1 helpers."""
    kernel.prepare(key, (0, *arguments))
    if threads > 1:
        _start_helpers(threads - 1)
        for thread in range(1, threads):
            _queue.put((kernel, thread, arguments))
    kernel.call(0, *arguments)


def _start_helpers(count: int) -> None:
    global _helpers
    if _helpers >= count:
        return
    with _lock:
        while _helpers < count:
            threading.Thread(target=_help, name="pydeform", daemon=True).start()
            _helpers += 1
