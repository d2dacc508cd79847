"""How many CPU threads an operator may use. Speed only: no result depends on it."""

from __future__ import annotations

import operator
import os

_threads: int | None = None


def get_num_threads() -> int:
    """Threads that one call on NumPy arrays may use.

    What `set_num_threads` said, else the environment variable NUMBA_NUM_THREADS, else the processors of this process.

    >>> import pydeform
    >>> pydeform.get_num_threads() >= 1
    True
    """
    if _threads is not None:
        return _threads
    asked = os.environ.get("NUMBA_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_num_threads(count: int) -> None:
    """Let every later call in this process use up to `count` threads. Results stay the same, bit for bit.

    >>> import pydeform
    >>> before = pydeform.get_num_threads()
    >>> pydeform.set_num_threads(1)
    >>> pydeform.get_num_threads()
    1
    >>> pydeform.set_num_threads(before)
    """
    global _threads
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"set_num_threads: count must be an int >= 1, got {count!r}") from None
    if isinstance(count, bool) or number < 1:
        raise ValueError(f"set_num_threads: count must be an int >= 1, got {count!r}")
    _threads = number
