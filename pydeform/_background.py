"""What must never be left half done: importing a backend, compiling a kernel.

An import or a compile that stops midway (Ctrl-C, the signal of a timeout) leaves modules and registries that later
calls trip over for ever. Python raises the exceptions of signals in the main thread alone, so such work runs in a
thread of its own: what interrupts the caller ends his waiting, not the work, and the next call finds it done.

A child process has only the thread that forked, so a lock that another one held stays locked there. Hence fork() waits
until no such work is under way.
"""

from __future__ import annotations

import contextlib

# Not used here. logging takes its lock before a fork; a module that registers later is asked earlier, and must be:
# whoever forks would else hold that lock and wait for work that needs it.
import logging  # noqa: F401
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")
_PATIENCE = 1.0  # seconds
_at_work = threading.RLock()
_held_at_fork: list[Any] = [_at_work]
_taken = threading.local()


class _Worker(threading.Thread):
    """Not a daemon: at exit Python waits for it, rather than tear down what it is using."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="pydeform work")
        self._work: Callable[[], Any] | None = work
        self.outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run(self) -> None:
        work, self._work = self._work, None
        assert work is not None
        try:
            with _at_work:
                outcome = work(), None
            del work  # what it refers to belongs to the caller again
        except BaseException as error:
            self.outcome.put((None, error))
        else:
            self.outcome.put(outcome)


def complete(work: Callable[[], _T], waiting: Callable[[], None] = lambda: None) -> _T:
    """work(), one at a time and to its end, even if the caller is interrupted; waiting() each second until then."""
    if isinstance(threading.current_thread(), _Worker):  # work that calls an operator
        return work()
    worker = _Worker(work)
    try:
        worker.start()
    except RuntimeError:  # the system has no thread left, or Python is about to end
        with _at_work:
            return work()
    while True:
        with contextlib.suppress(queue.Empty):
            result, error = worker.outcome.get(timeout=_PATIENCE)
            break
        waiting()
    if error is None:
        return result  # type: ignore[no-any-return]
    try:
        raise error
    finally:
        del error  # its traceback holds this frame


def hold_at_fork(*locks: Any) -> None:
    """Locks that work takes, in the order in which it takes them: whoever forks takes them too, after ours."""
    _held_at_fork.extend(locks)


def _before_fork() -> None:
    _taken.locks = []
    for lock in _held_at_fork:
        lock.__enter__()
        _taken.locks.append(lock)


def _after_fork() -> None:
    while _taken.locks:
        _taken.locks.pop().__exit__(None, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
