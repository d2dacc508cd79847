"""Compiled kernels and their launches. A kernel is one instance of a template, named by its C++ expression."""

from __future__ import annotations

import functools
import threading
from typing import Any

import cupy
import numpy as np

from pydeform.cuda._source import source

DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel has without asking
OLDEST = 75
_lock = threading.Lock()


def capability() -> int:
    """Of the current device, as 10 * major + minor: 90 for sm_90."""
    found = int(cupy.cuda.Device().compute_capability)
    if found < OLDEST:
        raise RuntimeError(
            f"pydeform needs a CUDA device of compute capability {OLDEST / 10} or newer, got {found / 10}"
        )
    return found


def multiprocessors() -> int:
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def shared_limit() -> int:
    """Bytes of shared memory that a block can ask for."""
    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


def geometry(g: Any) -> Any:
    """A NamedTuple of integers as a struct that goes to a kernel by value."""
    return np.array([tuple(g)], dtype=_struct(type(g)))


@functools.cache
def _struct(kind: Any) -> np.dtype:
    return np.dtype([(field, np.int32) for field in kind._fields], align=True)


def kernel(operator: str, expression: str, shared: int = 0) -> Any:
    """The compiled instance on the current device, allowed `shared` bytes of dynamic shared memory."""
    with _lock:  # two threads would compile it twice
        return _kernel(operator, expression, capability(), int(cupy.cuda.Device().id), shared)


@functools.cache
def _kernel(operator: str, expression: str, arch: int, device: int, shared: int) -> Any:
    # wgmma exists only for sm_90a, the features of sm_90 that no later device has.
    module = cupy.RawModule(
        code=source(operator),
        options=("-std=c++17", f"-arch=sm_{arch}{'a' if arch == 90 else ''}"),
        name_expressions=(expression,),
    )
    function = module.get_function(expression)
    if shared > DEFAULT_SHARED:
        function.max_dynamic_shared_size_bytes = shared
    return function


def launch(function: Any, grid: tuple[int, ...], block: int, arguments: tuple[Any, ...], shared: int = 0) -> None:
    """On the current stream. A grid without blocks is not launched: CuPy would make it one block."""
    if min(grid) > 0:
        function(grid, (block,), arguments, shared_mem=shared)
