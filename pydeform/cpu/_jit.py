"""Compile a kernel once per dtype and keep it on disk, wherever the machine lets us."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba.core.typing.typeof import typeof

from pydeform.cpu._kernel_cache import KernelCache, cache_directory, say_once

_lock = threading.RLock()

# Without Numba's runtime: kernels allocate nothing, and their callers hold all arrays, so nobody needs to count who
# uses them, by atomic additions in the midst of loops.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def inline(function: Callable[..., Any]) -> Any:
    """A function called by kernels; compiled into them."""
    return numba.njit(**_OPTIONS)(function)


def inline_always(function: Callable[..., Any]) -> Any:
    """The same for a small step in a hot loop: where a call would be left, its arrays and records are copied word by
    word, which takes longer than the step."""
    return numba.njit(forceinline=True, **_OPTIONS)(function)


class Kernel:
    """An entry point: a Numba function that runs without the GIL, compiled at its first call for a dtype."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.call = numba.njit(**_OPTIONS)(function)
        self._compiled: set[Any] = set()

    def prepare(self, key: Any, arguments: tuple[Any, ...]) -> None:
        """Compile for the types of `arguments`, or load from disk; `key` stands for those types."""
        if key in self._compiled:
            return
        with _lock:
            if key in self._compiled:
                return
            function = self.call.py_func
            folder = cache_directory()
            # Kernels of others (tests, say) are not kept: nobody would see an edit in their sources.
            if not self._compiled and folder is not None and function.__module__.startswith("pydeform."):
                self.call._cache = KernelCache(function, folder)
            with _announced():
                self.call.compile(tuple(typeof(argument) for argument in arguments))
            self._compiled.add(key)


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Say what is going on when it takes longer than a second."""
    where = cache_directory()
    kept = f"kept in {where}" if where else "not kept: no writable cache folder"
    timer = threading.Timer(1.0, say_once, [f"compiling kernels for this machine ({kept})"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
