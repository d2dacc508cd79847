"""Arrays in the form that kernels take, and results in the form that callers get."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np

from pydeform.cpu.core import half

FLOAT64, FLOAT32 = np.dtype(np.float64), np.dtype(np.float32)
MOST_KEPT = 3 << 18  # bytes of a workspace
ALIGNMENT = 64  # a cache line, the widest vector, and what JAX takes without a copy
# Between what one thread writes and what the next one does: a processor that reads ahead of the one, behind its end,
# would take these lines from the other, again and again.
APART = 2048
Part = tuple[tuple[int, ...], Any]  # shape and dtype of an array


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for the rest: Numba has no half types, and their sums are float32."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Like numpy.empty, aligned to a cache line."""
    block, origin = _aligned(math.prod(shape) * dtype.itemsize)
    return np.ndarray(shape, dtype, block, origin)


def _aligned(size: int) -> tuple[Any, int]:
    """A block of bytes, and where in it `size` aligned bytes begin."""
    block: Any = np.empty(size + ALIGNMENT, np.uint8)
    return block, -ctypes.addressof(ctypes.c_char.from_buffer(block)) % ALIGNMENT


def workspace(*parts: Part) -> list[Any]:
    """An uninitialised array for each (shape, dtype), aligned to a cache line, all of them in one allocation."""
    total, starts = _layout(parts)
    block, origin = _aligned(total)
    make = np.ndarray
    return [make(shape, dtype, block, origin + start) for (shape, dtype), start in zip(parts, starts, strict=True)]


@functools.lru_cache(maxsize=256)
def _layout(parts: tuple[Part, ...]) -> tuple[int, tuple[int, ...]]:
    """Bytes of all arrays, and where each begins."""
    starts, start = [], 0
    for shape, dtype in parts:
        size = math.prod(shape) * dtype.itemsize
        starts.append(start)
        # A cache line more between them: arrays a power of two apart would share the same cache sets.
        start += size + -size % ALIGNMENT + ALIGNMENT
    return start, tuple(starts)


def _of_threads(threads: int, shape: tuple[int, ...], dtype: Any) -> Part:
    """An array for each thread, in one. The first axis is longer than was asked for, and what it has more lies between
    two threads."""
    row = math.prod(shape[1:]) * dtype.itemsize
    between = -(-APART // row) if threads > 1 and shape[0] * row else 0
    return (threads, shape[0] + between, *shape[1:]), dtype


class Workspace:
    """The workspace of problems of one kind: `parts`, which threads share, and behind them, for each thread, its `own`,
    given as one thread's. A small workspace is kept for the next call."""

    def __init__(self, *parts: Part, threads: int = 1, own: tuple[Part, ...] = ()) -> None:
        self._parts = (*parts, *(_of_threads(threads, *part) for part in own))
        self._spare = list[list[Any]]()
        self._size, _ = _layout(self._parts)

    def take(self) -> list[Any]:
        try:
            return self._spare.pop()
        except IndexError:  # the one that is kept is in use, or there is none yet
            return workspace(*self._parts)

    def give_back(self, arrays: list[Any]) -> None:
        if self._size <= MOST_KEPT and not self._spare:
            self._spare.append(arrays)


class _Alias:
    """The memory of an array under the buffer protocol of NumPy, without its read-only flag."""

    def __init__(self, array: Any) -> None:
        self._array = array  # keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def contiguous(array: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """`array` as an aligned C-contiguous array of this dtype and shape; copied only if it is not one."""
    flags = array.flags
    if array.dtype == dtype and flags.carray:  # the usual case: aligned, contiguous, and writeable as well
        return array.reshape(shape)
    if array.dtype == np.float16 and dtype == np.float32:
        return widened(array).reshape(shape)
    if array.dtype != dtype or not (flags.c_contiguous and flags.aligned):
        array = np.require(array, dtype, ("C", "A"))
    elif not flags.writeable:
        # Kernels are compiled for one array type. They write to no input: a read-only flag needs no second type.
        array = np.asarray(_Alias(array))
    return array.reshape(shape)


def widened(array: Any) -> Any:
    """A half type as float32."""
    if array.dtype != np.float16:
        return array.astype(np.float32)
    wide = empty(array.shape, np.dtype(np.float32))
    half.widen(contiguous(array, array.dtype, (array.size,)), wide.reshape(-1))
    return wide


def rounded(array: Any, dtype: Any) -> Any:
    """An array, or a scalar that NumPy made of one, in another dtype."""
    array = np.asarray(array)
    result = empty(array.shape, dtype)
    if dtype == np.float16 and array.dtype == np.float32:
        half.round_to_half(contiguous(array, array.dtype, (array.size,)), result.reshape(-1))
    else:
        result[...] = array
    return result


def to_result(array: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """What the caller gets: rounded to his dtype, aligned, in his shape."""
    if array.dtype != dtype:
        array = rounded(array, dtype)
    return array.reshape(shape)
