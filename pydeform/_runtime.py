"""How many CPU threads an operator may use. Speed only: no result depends on it."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

_threads: int | None = None
_here: ContextVar[int | None] = ContextVar("pydeform.num_threads", default=None)


def get_num_threads() -> int:
    """Threads that one call on NumPy arrays may use.

    The first of: the innermost `with num_threads(...)`; what `set_num_threads` or threadpoolctl said; the environment
    variables NUMBA_NUM_THREADS and OMP_NUM_THREADS; the processors of this process.

    Examples
    --------
    >>> import pydeform
    >>> pydeform.get_num_threads() >= 1
    True
    """
    here = _here.get()
    if here is not None:
        return here
    if _threads is not None:
        return _threads
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        asked = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP: one number for each level of nesting
        if asked.isdecimal() and int(asked) > 0:
            return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_num_threads(count: int) -> None:
    """Let every later call in this process use up to `count` threads. Results stay the same, bit for bit.

    Examples
    --------
    >>> import pydeform
    >>> before = pydeform.get_num_threads()
    >>> pydeform.set_num_threads(1)
    >>> pydeform.get_num_threads()
    1
    >>> pydeform.set_num_threads(before)
    """
    global _threads
    _threads = _checked("set_num_threads", count)


def num_threads(count: int) -> AbstractContextManager[None]:
    """A context in which calls use up to `count` threads: those of this Python thread or task, nobody else's.

    Examples
    --------
    >>> import pydeform
    >>> with pydeform.num_threads(1):
    ...     pydeform.get_num_threads()
    1
    """
    return _limited(_checked("num_threads", count))


@contextmanager
def _limited(count: int) -> Iterator[None]:
    token = _here.set(count)
    try:
        yield
    finally:
        _here.reset(token)


def _checked(op: str, count: int) -> int:
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"{op}: count must be an int >= 1, got {count!r}") from None
    if isinstance(count, bool) or number < 1:
        raise ValueError(f"{op}: count must be an int >= 1, got {count!r}")
    return number


def _register_with_threadpoolctl() -> None:
    """Let `threadpoolctl.threadpool_limits` limit us as it limits BLAS, wherever it is installed.

    It knows libraries by the files that a process has loaded: NumPy's stands for this package, which has none.
    """
    if find_spec("threadpoolctl") is None:
        return
    import threadpoolctl

    if not hasattr(threadpoolctl, "register"):  # before 3.2
        return

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = internal_api = "pydeform"
        filename_prefixes = ("_multiarray_umath",)

        def get_num_threads(self) -> int:
            return get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            set_num_threads(num_threads)

        def get_version(self) -> Any:
            return None

    threadpoolctl.register(Controller)


_register_with_threadpoolctl()
