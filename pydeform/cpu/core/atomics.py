"""Atomic steps in LLVM's instructions: counting, changing and waiting, with what threads see of each other's writes."""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir

from pydeform.cpu.core.primitive import const, function_of

_HAS_YIELD = hasattr(os, "sched_yield")


def count_up(builder: Any, pointer: Any) -> Any:
    """Add one in one atomic step, after everything written before has become visible; gives the value before."""
    return builder.atomic_rmw("add", pointer, const(1), "acq_rel")


def change(builder: Any, pointer: Any, old: Any, new: Any) -> Any:
    """Whether *pointer was `old`; then it is `new` now, and sees and shows what was written before."""
    return builder.extract_value(builder.cmpxchg(pointer, old, new, "acq_rel", "acquire"), 1)


def let_others_run(builder: Any) -> None:
    if _HAS_YIELD:
        builder.call(function_of(builder, "sched_yield", ir.IntType(32), []), [])


def wait(builder: Any, pointer: Any, comparison: str, value: Any) -> None:
    """Until the comparison of *pointer holds: let others run, and then see everything that was written before."""
    waiting, again, done = (builder.append_basic_block(name) for name in ("wait", "again", "done"))
    builder.branch(waiting)
    builder.position_at_end(waiting)
    now = builder.load_atomic(pointer, "acquire", 8)
    builder.cbranch(builder.icmp_signed(comparison, now, value), done, again)
    builder.position_at_end(again)
    let_others_run(builder)
    builder.branch(waiting)
    builder.position_at_end(done)
