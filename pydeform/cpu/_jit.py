"""Compile a kernel once per dtype and keep it on disk, wherever the machine lets us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding.ffi
import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typing.typeof import typeof

from pydeform import _background
from pydeform.cpu._kernel_cache import KernelCache, cache_directory, say_once

_background.hold_at_fork(global_compiler_lock, llvmlite.binding.ffi.lib._lock)

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
        if key not in self._compiled:
            _background.complete(lambda: self._compile(key, arguments), self._say_compiling)

    def _compile(self, key: Any, arguments: tuple[Any, ...]) -> None:
        if key in self._compiled:  # by another thread, meanwhile
            return
        function = self.call.py_func
        folder = cache_directory()
        # Kernels of others (tests, say) are not kept: nobody would see an edit in their sources.
        if not self._compiled and folder is not None and function.__module__.startswith("pydeform."):
            self.call._cache = KernelCache(function, folder)
        self.call.compile(tuple(typeof(argument) for argument in arguments))
        self._compiled.add(key)

    def _say_compiling(self) -> None:
        if self.call.stats.cache_misses.keys() - self.call.overloads:  # not loading, nor waiting for another kernel
            where = cache_directory()
            kept = f"kept in {where}" if where else "not kept: no writable cache folder"
            say_once(f"compiling kernels for this machine ({kept})")
