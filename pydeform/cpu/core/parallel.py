"""Share the work of one kernel call among threads.

A kernel divides its problem into units that each own what they write. Every thread that runs the kernel claims the
next unit from a counter until none is left, so the result depends on neither the number of threads nor their speed.
The calling thread starts at once and is never waiting for a helper to wake up: a helper that comes late finds less
work, or none. See docs/decisions/0005-threads.md.

Helpers are called and let go within the kernel, in machine code, without Python's lock (`call_helpers`): between two
calls they stay awake for a moment, and only then sleep until Python wakes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from pydeform import _background
from pydeform._runtime import get_num_threads
from pydeform.cpu.core import atomics
from pydeform.cpu.core.jit import Kernel
from pydeform.cpu.core.kernel_cache import say_once
from pydeform.cpu.core.memory import empty
from pydeform.cpu.core.primitive import INT, const, merged, primitive

_STRIDE = 8  # counters and helpers' places lie a cache line apart
_CLAIMED, _FINISHED = 0, 1
# Each thread has a workspace, and more threads than processors save nothing. Eight are no burden on any machine.
_MOST_THREADS = max(2 * (os.cpu_count() or 1), 8)
_TEAM = _MOST_THREADS + 1  # last counters: the number of a call's helpers, where its arguments are, helpers' places
# A helper's place is a cache line of numbers: its state, which calls compete for; the function that it is to run, and
# as which thread; how many calls it has run; whether it sleeps (the helper writes that), and whether a call is on its
# way (the caller writes that).
_STATE, _PART, _THREAD, _DONE, _ASLEEP, _EXPECTED = range(6)
# Its state: free; taken by a call that still writes to its place; called, which is the address of the call's arguments;
# at work, which is that address with the bit _AT_WORK.
_FREE, _TAKEN, _AT_WORK = range(3)
_PATIENCE = 1000  # looks for a call, some 0.3 us each, before a helper falls asleep
_BYTES = ir.IntType(8).as_pointer()
_PART_TYPE = ir.FunctionType(ir.VoidType(), [INT, _BYTES])


def _field(builder: Any, place: Any, which: int) -> Any:
    return builder.gep(place, [const(which)])


def _counter_of(builder: Any, counters: Any, phase: Any, which: int) -> Any:
    index = builder.add(builder.mul(phase, const(2 * _STRIDE)), const(which * _STRIDE))
    return builder.gep(counters.data, [index])


@primitive
def claim(counters: Any, phase: Any) -> Any:
    """The next unit of `phase` that nobody has taken; past the last one it goes on counting."""

    def emit(builder: Any, counters_: Any, phase_: Any) -> Any:
        return atomics.count_up(builder, _counter_of(builder, counters_, phase_, _CLAIMED))

    return types.int64(counters, phase), emit


@primitive
def claim_near(counters: Any, phase: Any, thread: Any, units: Any) -> Any:
    """A unit of `phase` that nobody has taken, `units` or more if there is none. Threads of even numbers begin at the
    first unit, the others at the last: in phase after phase, call after call, each works on what its cache has."""

    def emit(builder: Any, counters_: Any, phase_: Any, thread_: Any, units_: Any) -> Any:
        pointer = _counter_of(builder, counters_, phase_, _CLAIMED)
        claimed = atomics.count_up(builder, pointer)
        before = builder.block
        # A thread that is too late takes no step: each step stands for a unit, and nobody would do that one.
        with builder.if_then(builder.icmp_signed("<", claimed, units_)):
            is_odd = builder.and_(thread_, const(1))
            steps = atomics.count_up(builder, builder.gep(pointer, [builder.add(is_odd, const(1))]))
            from_last = builder.sub(builder.sub(units_, const(1)), steps)
            near = builder.select(builder.trunc(is_odd, ir.IntType(1)), from_last, steps)
            inside = builder.block
        return merged(builder, [units_], before, [near], inside)[0]

    return types.int64(counters, phase, thread, units), emit


@primitive
def finish(counters: Any, phase: Any) -> Any:
    """Tell the others that one more unit of `phase` is done."""

    def emit(builder: Any, counters_: Any, phase_: Any) -> None:
        atomics.count_up(builder, _counter_of(builder, counters_, phase_, _FINISHED))

    return types.void(counters, phase), emit


@primitive
def wait_for(counters: Any, phase: Any, units: Any) -> Any:
    """Wait until `units` units of `phase` are done: whoever has claimed one is at work on it."""

    def emit(builder: Any, counters_: Any, phase_: Any, units_: Any) -> None:
        atomics.wait(builder, _counter_of(builder, counters_, phase_, _FINISHED), ">=", units_)

    return types.void(counters, phase, units), emit


@primitive
def advance_counter(counters: Any, index: Any) -> Any:
    """counters[index] += 1, for the others to see after everything written before."""

    def emit(builder: Any, counters_: Any, index_: Any) -> None:
        atomics.count_up(builder, builder.gep(counters_.data, [index_]))

    return types.void(counters, index), emit


@primitive
def wait_until(counters: Any, index: Any, value: Any) -> Any:
    """Wait until counters[index] has reached `value`."""

    def emit(builder: Any, counters_: Any, index_: Any, value_: Any) -> None:
        atomics.wait(builder, builder.gep(counters_.data, [index_]), ">=", value_)

    return types.void(counters, index, value), emit


@contextlib.contextmanager
def _each_helper(builder: Any, thread: Any, counters: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Code for each helper of a call. Yields pointers to two counters, which hold where the call's arguments are and
    where the helper's place is, and the helper's number as a thread. Only thread 0 has helpers."""
    team = builder.gep(counters.data, [builder.sub(counters.shape[0], const(_TEAM))])
    is_caller = builder.icmp_signed("==", thread, const(0))
    count = builder.select(is_caller, builder.load(team), const(0))
    arguments = builder.gep(team, [const(1)])
    with cgutils.for_range(builder, count) as loop:
        yield arguments, builder.gep(team, [builder.add(loop.index, const(2))]), builder.add(loop.index, const(1))


@primitive
def call_helpers(thread: Any, counters: Any) -> Any:
    """First in a kernel: its helpers run it too, with the same arguments and their own number of the thread.

    The arguments, as machine code has them, are on the caller's stack until `let_helpers_go`.
    """

    def emit(builder: Any, thread_: Any, counters_: Any) -> None:
        kernel = builder.function  # whose arguments these are
        passed = ir.LiteralStructType([argument.type for argument in kernel.args])
        block = cgutils.alloca_once(builder, passed)
        for i, argument in enumerate(kernel.args):
            builder.store(argument, cgutils.gep_inbounds(builder, block, 0, i))
        part = _emit_part(kernel, passed)
        called = builder.ptrtoint(block, INT)
        with _each_helper(builder, thread_, counters_) as (of_call, noted, number):
            builder.store(called, of_call)
            place = builder.inttoptr(builder.load(noted), INT.as_pointer())
            with builder.if_else(atomics.change(builder, place, const(_FREE), const(_TAKEN))) as (is_ours, is_not):
                with is_ours:
                    builder.store(builder.ptrtoint(part, INT), _field(builder, place, _PART))
                    builder.store(number, _field(builder, place, _THREAD))
                    builder.store_atomic(called, place, "release", 8)
                with is_not:  # another call was faster
                    builder.store(const(0), noted)

    return types.void(thread, counters), emit


def _emit_part(kernel: Any, passed: Any) -> Any:
    """A function (thread, arguments) that calls the kernel as that thread. Kernels raise nothing."""
    part = ir.Function(kernel.module, _PART_TYPE, name=f"{kernel.name}.part")
    part.linkage = "internal"
    builder = ir.IRBuilder(part.append_basic_block())
    block = builder.bitcast(part.args[1], passed.as_pointer())
    arguments = [builder.load(cgutils.gep_inbounds(builder, block, 0, i)) for i in range(len(kernel.args))]
    # The kernel writes its result and its error through these two: each helper has room of its own for them.
    arguments[:2] = [builder.alloca(argument.type.pointee) for argument in kernel.args[:2]]
    arguments[[argument.name for argument in kernel.args].index("arg.thread")] = part.args[0]
    builder.call(kernel, arguments)
    builder.ret_void()
    return part


@primitive
def let_helpers_go(thread: Any, counters: Any) -> Any:
    """Last in a kernel: afterwards no helper uses its arguments. A helper that has not begun is let go."""

    def emit(builder: Any, thread_: Any, counters_: Any) -> None:
        with _each_helper(builder, thread_, counters_) as (of_call, noted, _):
            called, address = builder.load(of_call), builder.load(noted)
            with builder.if_then(builder.icmp_signed("!=", address, const(0))):
                place = builder.inttoptr(address, INT.as_pointer())
                with builder.if_then(builder.not_(atomics.change(builder, place, called, const(_FREE)))):
                    atomics.wait(builder, place, "!=", builder.or_(called, const(_AT_WORK)))

    return types.void(thread, counters), emit


@functools.cache
def _await_calls() -> Callable[[int, int], None]:
    """The machine code of a helper that is awake, a function (its place, patience). It runs what the helper is called
    for, and returns after `patience` looks in vain, if no call is on its way."""
    return cast(Callable[[int, int], None], _background.complete(_compile_await_calls))


@global_compiler_lock
def _compile_await_calls() -> Any:
    library = cpu_target.target_context.codegen().create_library("await_calls")
    module = library.create_ir_module(library.name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [INT.as_pointer(), INT]), name="await_calls")
    place, patience = function.args
    names = ("begin", "enter", "look", "take", "work", "idle", "sleep", "leave")
    begin, enter, look, take, work, idle, sleep, leave = map(function.append_basic_block, names)
    builder = ir.IRBuilder(begin)
    builder.branch(enter)
    builder.position_at_end(enter)
    asleep, expected = (_field(builder, place, which) for which in (_ASLEEP, _EXPECTED))
    builder.store_atomic(const(0), asleep, "seq_cst", 8)
    builder.branch(look)
    builder.position_at_end(look)
    left = builder.phi(INT)
    called = builder.load_atomic(place, "acquire", 8)
    builder.cbranch(builder.icmp_unsigned(">", called, const(_TAKEN)), take, idle)
    builder.position_at_end(take)
    at_work = builder.or_(called, const(_AT_WORK))
    builder.cbranch(atomics.change(builder, place, called, at_work), work, look)  # else it was let go
    builder.position_at_end(work)
    part, thread = (builder.load(_field(builder, place, which)) for which in (_PART, _THREAD))
    builder.call(builder.inttoptr(part, _PART_TYPE.as_pointer()), [thread, builder.inttoptr(called, _BYTES)])
    done = _field(builder, place, _DONE)
    builder.store(builder.add(builder.load(done), const(1)), done)
    builder.store_atomic(const(_FREE), place, "release", 8)
    builder.branch(look)
    builder.position_at_end(idle)
    atomics.let_others_run(builder)
    fewer = builder.sub(left, const(1))
    builder.cbranch(builder.icmp_signed(">", fewer, const(0)), look, sleep)
    builder.position_at_end(sleep)
    # The helper says that it sleeps, then looks for an announced call; a caller announces, then looks if it sleeps.
    builder.store_atomic(const(1), asleep, "seq_cst", 8)
    announced = builder.atomic_rmw("xchg", expected, const(0), "seq_cst")
    builder.cbranch(builder.icmp_signed("==", announced, const(0)), leave, enter)
    builder.position_at_end(leave)
    builder.ret_void()
    for value, block in ((patience, enter), (left, take), (patience, work), (fewer, idle)):
        left.add_incoming(value, block)
    library.add_ir_module(module)
    library.finalize()
    address = library.get_pointer_to_function(function.name)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(address)
    call.library = library  # type: ignore[attr-defined]  # lives as long
    return call


def own_counters(phases: int) -> int:
    """Index of the first of a kernel's own counters, behind those of its phases."""
    return 2 * phases * _STRIDE


def new_counters(phases: int, own: int = 0) -> Any:
    return np.zeros(own_counters(phases) + own + _TEAM, np.int64)


def threads_for(units: int) -> int:
    """Threads of a call that has so many units of work to share."""
    if config.BOUNDSCHECK:  # then a kernel may raise, while helpers use what is on its stack
        return 1
    return max(1, min(get_num_threads(), units, _MOST_THREADS))


class _Helper:
    """A thread that waits for calls."""

    def __init__(self, await_calls: Callable[[int, int], None]) -> None:
        self.place = empty((_STRIDE,), np.dtype(np.int64))
        self.place[...] = 0
        self.address = self.place.ctypes.data
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._help, args=(await_calls,), name="pydeform", daemon=True)
        thread.start()
        self.thread_id = cast(int, thread.native_id)

    def _help(self, await_calls: Callable[[int, int], None]) -> None:
        while True:
            await_calls(self.address, _PATIENCE)
            self._wakes.get()

    def expect(self) -> bool:
        """Announce a call: the helper wakes up, or stays awake for a while. False: another call has the helper."""
        self.place[_EXPECTED] = 1
        if self.place[_ASLEEP]:
            self._wakes.put(None)  # once too often, perhaps: then the helper is awake for a moment
        return bool(self.place[_STATE] == _FREE)


_helpers: list[_Helper] = []
_avoided = -1  # the processor that helpers keep off
_lock = threading.Lock()

# On few processors a scheduler often wakes a helper on the caller's, where the helper waits for the call to end.
_FEW_PROCESSORS = 8
_current_processor = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


def _reset_in_child() -> None:
    """After fork() only the forking thread is left: start anew."""
    global _helpers, _avoided, _lock
    _helpers, _avoided, _lock = [], -1, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)


def run(kernel: Kernel, key: Any, threads: int, counters: Any, *arguments: Any) -> None:
    """kernel(thread, counters, *arguments) in the calling thread as number 0 and in up to threads - 1 helpers.

    When it returns, no helper uses any of the arguments.
    """
    call = kernel.prepare(key, (0, counters, *arguments))
    if call is None:
        return
    if threads > 1:
        while len(_helpers) < threads - 1 and _start_helper(threads - 1):
            pass
        _keep_helpers_off_this_processor()
        count = 0
        for helper in _helpers:
            if count < threads - 1 and helper.expect():
                count += 1
                counters[count + 1 - _TEAM] = helper.address
        counters[-_TEAM] = count
    call(0, counters, *arguments)


def _start_helper(most: int) -> bool:
    """Start one more helper unless there are `most`. If the system gives no thread, calls do with those there are."""
    global _avoided
    try:
        with _lock:
            if len(_helpers) >= most:
                return False
            _helpers.append(_Helper(_await_calls()))
            _avoided = -1
    except (RuntimeError, OSError) as error:
        say_once(f"a helper thread could not be started, calls do with fewer: {error}")
        return False
    return True


def _keep_helpers_off_this_processor() -> None:
    """A hint only: it fails in silence, and nothing depends on it but speed."""
    global _avoided
    if _current_processor is None or (here := _current_processor()) == _avoided:
        return
    with contextlib.suppress(OSError):
        allowed = os.sched_getaffinity(0)
        if 1 < len(allowed) <= _FEW_PROCESSORS:
            for helper in _helpers:
                os.sched_setaffinity(helper.thread_id, allowed - {here})
    _avoided = here
