"""Width of this machine's vectors, and pointers of kernels.

Pointers are made by `at(array, (i, j, ...))`, and nothing is checked: the kernels that use them own all bounds.
"""

from __future__ import annotations

import os
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import config

from pydeform.cpu.core.primitive import const, function_of, loop, primitive

CACHE_LINE = 64


def host_features() -> set[str]:
    """Of the processor, as far as Numba's code generator may use them."""
    if config.CPU_FEATURES is not None:
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    if config.CPU_NAME == "generic":
        return set()
    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


def host_vector_bytes() -> int:
    """Width of the vectors that Numba's code generator may use here."""
    features = host_features()
    if {"avx512f", "avx512vl"} <= features:
        return 64
    return 32 if {"avx2", "fma"} <= features else 16


VECTOR_BYTES = host_vector_bytes()


def second_level_cache() -> int:
    """Its bytes, of one core; 1 MB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (AttributeError, OSError, ValueError):
        return 1 << 20


@primitive
def at(array: Any, index: Any) -> Any:
    """Pointer to array[index] of a C-contiguous array; `index` is a tuple with one int per axis."""
    if not (isinstance(array, types.Array) and array.layout == "C" and len(index) == array.ndim):
        return None

    def emit(builder: Any, array_: Any, index_: Any) -> Any:
        flat = index_[0]
        for i, size in zip(index_[1:], array_.shape[1:], strict=True):
            flat = builder.add(builder.mul(flat, size), i)
        return builder.gep(array_.data, [flat])

    return types.CPointer(array.dtype)(array, index), emit


@primitive
def vectors_of(pointer: Any, count: Any) -> Any:
    """Vectors that hold `count` of the numbers that `pointer` points to."""
    lanes = 8 * VECTOR_BYTES // pointer.dtype.bitwidth

    def emit(builder: Any, _pointer: Any, count_: Any) -> Any:
        return builder.sdiv(builder.add(count_, const(lanes - 1)), const(lanes))

    return types.int64(pointer, count), emit


@primitive
def advance(pointer: Any, elements: Any) -> Any:
    """pointer + elements."""
    return pointer(pointer, elements), lambda builder, pointer_, elements_: builder.gep(pointer_, [elements_])


@primitive
def column(pointer: Any, step: Any, axes: Any) -> Any:
    """(pointer[0], pointer[step], ...), one for each corner of a cell with an axis for each item of `axes`, a tuple."""
    count = 2 ** len(axes)

    def emit(builder: Any, pointer_: Any, step_: Any, _axes: Any) -> Any:
        return [builder.load(builder.gep(pointer_, [builder.mul(step_, const(k))])) for k in range(count)]

    return types.UniTuple(pointer.dtype, count)(pointer, step, axes), emit


@primitive
def put_column(pointer: Any, step: Any, values: Any) -> Any:
    """pointer[k * step] = values[k]."""

    def emit(builder: Any, pointer_: Any, step_: Any, values_: Any) -> None:
        for k, value in enumerate(values_):
            builder.store(value, builder.gep(pointer_, [builder.mul(step_, const(k))]))

    return types.void(pointer, step, values), emit


@primitive
def times(numbers: Any, factor: Any) -> Any:
    """A tuple of integers, each times `factor`."""
    signature = numbers(numbers, factor)
    return signature, lambda builder, numbers_, factor_: [builder.mul(number, factor_) for number in numbers_]


@primitive
def corner_numbers(axes: Any) -> Any:
    """(0, 1, ...), one for each corner of a cell with an axis for each item of `axes`."""
    count = 2 ** len(axes)
    return types.UniTuple(types.int64, count)(axes), lambda _builder, _axes: [const(k) for k in range(count)]


@primitive
def use_widest_vectors() -> Any:
    """In a kernel: LLVM vectorises its plain loops, too, to vectors of `VECTOR_BYTES`, where it would take half of
    them on processors that once ran slower with the widest."""

    def emit(builder: Any) -> None:
        # llvmlite lets no attribute pass that has a value.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * VECTOR_BYTES}"')

    return types.void(), emit


def ask_for(builder: Any, pointer: Any, lines: Any) -> None:
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    prefetch = function_of(builder, "llvm.prefetch.p0i8", ir.VoidType(), [byte, flag, flag, flag])
    start = builder.bitcast(pointer, byte)
    to_read, second_level, data = flag(0), flag(2), flag(1)

    def body(i: Any, _: list[Any]) -> list[Any]:
        line = builder.gep(start, [builder.mul(i, const(CACHE_LINE))])
        builder.call(prefetch, [line, to_read, second_level, data])
        return []

    loop(builder, lines, [], body)


@primitive
def fetch_ahead(pointer: Any, lines: Any) -> Any:
    """Ask for so many cache lines from `pointer` on, which will be read soon, to come into the second-level cache.
    They may lie behind the end of an array: nothing is read."""

    return types.void(pointer, lines), ask_for
