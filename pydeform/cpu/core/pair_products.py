"""Products of bfloat16 numbers, two at a time, where the processor multiplies them faster than float32.

Samples are blended in float32 and rounded to bfloat16, as the weights are already; products are summed in float32.
Two kinds of instruction do that, and the dtype under which the kernels keep the numbers says which, so that each has
its compiled kernel: dot products of two pairs (AVX512-BF16, at about twice the speed of float32 on AMD, no faster than
it on Intel), and products of whole tiles (AMX). Both treat subnormal numbers as zeros.

In the second factor of a product two rows lie number by number: number (k, j) at [k // 2][j][k % 2].
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

from pydeform.cpu.core import simd
from pydeform.cpu.core.simd import _INT, _LANE, VECTOR_BYTES, BFloat, _const, _loop, _put_sums, _shuffle, _Vectors

DOTS, TILES = np.dtype(np.uint16), np.dtype(np.int16)
DEPTH = 32  # the depth of a product is a multiple: of a tile's
_TILE = 16  # rows of a tile, each of 64 bytes
_BYTE = ir.IntType(8)
_PAIRS = (types.uint16, types.int16)  # Numba's names of the two


@functools.cache
def pair_dtype() -> Any:
    """DOTS, TILES, or None where products of bfloat16 would be no faster than those of float32."""
    features = simd.host_features()
    if VECTOR_BYTES != 64 or "avx512bf16" not in features:
        return None
    if {"amx-tile", "amx-bf16"} <= features and _may_use_tiles():
        return TILES
    name = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    return DOTS if name.startswith("znver") else None


def _may_use_tiles() -> bool:
    """Ask Linux to let all threads of this process use tiles: else the first tile instruction would end the process."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, require, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, require, tile_data) == 0)


def rows_of(dtype: Any) -> tuple[int, int, int]:
    """Rows of a block of `multiply_wide`, `multiply_tile` and `multiply_narrow`."""
    return (2 * _TILE,) * 3 if dtype == TILES else (simd.WIDE_ROWS, simd.ROWS, simd.NARROW_ROWS)


def multiply(rows: int, vectors: int, vector_bytes: int, native: bool, of_floats: Any = None) -> Any:
    """The intrinsic for pointers to either kind of pairs; for pointers to floats it is `of_floats`. `native`: the
    processor has dot products."""

    @intrinsic  # type: ignore[misc]
    def multiply_pairs(
        typing_context: Any,
        a: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        depth: Any,
        c: Any,
        c_row: Any,
        accumulate: Any,
    ) -> Any:
        """c[r*c_row + j] (+)= sum_k a[r*a_row + k] * b[k//2*2*b_step + 2*j + k%2], j < vectors * lanes; the depth is a
        multiple of DEPTH, a_step is 1."""
        if a.dtype not in _PAIRS:
            return of_floats._defn(typing_context, a, a_row, a_step, b, b_step, depth, c, c_row, accumulate)
        count = types.int64
        signature = types.void(a, count, count, b, count, count, c, count, types.boolean)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v = _Vectors(builder, types.float32, vector_bytes)
            if a.dtype == types.int16:
                for first in range(0, vectors, 2):
                    _multiply_tiles(v, first, min(vectors, first + 2), *arguments)
            else:
                _multiply_dots(v, rows, vectors, native, *arguments)
            return context.get_dummy_value()

        return signature, codegen

    return multiply_pairs


def _multiply_dots(
    v: Any,
    rows: int,
    vectors: int,
    native: bool,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    depth: Any,
    c: Any,
    c_row: Any,
    accumulate: Any,
) -> None:
    builder = v.builder
    a_rows = [_as_lanes(v, v.offset(a, builder.mul(a_row, _const(r)))) for r in range(rows)]
    b = _as_lanes(v, b)
    lanes = ir.VectorType(_LANE, v.lanes)
    places = [_const(j * v.lanes) for j in range(vectors)]

    def load(pointer: Any) -> Any:
        value = builder.load(builder.bitcast(pointer, lanes.as_pointer()))
        value.align = 2
        return value

    def one(pointer: Any) -> Any:
        value = builder.load(pointer)
        value.align = 2
        undefined = ir.Constant(lanes, ir.Undefined)
        first = builder.insert_element(undefined, value, ir.Constant(_LANE, 0))
        return _shuffle(builder, first, undefined, [0] * v.lanes)

    def body(k: Any, sums: list[Any]) -> list[Any]:
        b_k = v.offset(b, builder.mul(k, b_step))
        columns = [load(v.offset(b_k, place)) for place in places]
        out = []
        for r in range(rows):
            pair = one(v.offset(a_rows[r], k))
            out += [_dot(v, sums[vectors * r + j], pair, columns[j], native) for j in range(vectors)]
        return out

    sums = _loop(builder, builder.sdiv(depth, _const(2)), [v.zero] * (vectors * rows), body)
    _put_sums(v, sums, c, c_row, places, accumulate)


def _as_lanes(v: Any, pointer: Any) -> Any:
    return v.builder.bitcast(pointer, _LANE.as_pointer())


def _dot(v: Any, total: Any, x: Any, y: Any, native: bool) -> Any:
    """total + x[2i] * y[2i] + x[2i + 1] * y[2i + 1]; without that instruction, by two multiply-adds."""
    builder = v.builder
    if native:
        pairs = ir.VectorType(BFloat(), 2 * v.lanes)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * v.lanes}"
        dot = _function(builder, name, v.type, [v.type, pairs, pairs])
        return builder.call(dot, [total, builder.bitcast(x, pairs), builder.bitcast(y, pairs)])
    for part in (_low, _high):
        total = v.fma(part(v, x), part(v, y), total)
    return total


def _low(v: Any, pairs: Any) -> Any:
    return v.builder.bitcast(v.builder.shl(pairs, ir.Constant(pairs.type, [16] * v.lanes)), v.type)


def _high(v: Any, pairs: Any) -> Any:
    return v.builder.bitcast(v.builder.and_(pairs, ir.Constant(pairs.type, [0xFFFF0000] * v.lanes)), v.type)


def _multiply_tiles(
    v: Any,
    first: int,
    last: int,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    depth: Any,
    c: Any,
    c_row: Any,
    accumulate: Any,
) -> None:
    """Vectors `first` to `last` of the sums, in tiles 0 to 3 (2 x 2); tiles 4 and 5 hold numbers of a, 6 and 7 of b."""
    builder, vectors = v.builder, last - first
    b, c = v.offset(b, _const(2 * _TILE * first)), v.offset(c, _const(_TILE * first))
    sums = [(row, j, 2 * row + j) for row in range(2) for j in range(vectors)]
    a_bytes, b_bytes, c_bytes = (
        builder.mul(a_row, _const(2)),
        builder.mul(b_step, _const(4)),
        builder.mul(c_row, _const(4)),
    )
    a_halves = [v.offset(a, builder.mul(a_row, _const(_TILE * row))) for row in range(2)]
    targets = [
        v.offset(c, builder.add(builder.mul(c_row, _const(_TILE * row)), _const(_TILE * j))) for row, j, _ in sums
    ]
    with builder.if_else(accumulate) as (add, replace):
        with add:
            for (_, _, tile), target in zip(sums, targets, strict=True):
                _tile_memory(builder, "llvm.x86.tileloadd64", tile, target, c_bytes)
        with replace:
            for _, _, tile in sums:
                _tile_call(builder, "llvm.x86.tilezero", tile)

    def body(k: Any, _: list[Any]) -> list[Any]:
        a_k = builder.mul(k, _const(DEPTH))
        b_k = v.offset(b, builder.mul(builder.mul(k, _const(DEPTH)), b_step))
        for j in range(vectors):
            _tile_memory(builder, "llvm.x86.tileloadd64", 6 + j, v.offset(b_k, _const(2 * _TILE * j)), b_bytes)
        for row in range(2):
            _tile_memory(builder, "llvm.x86.tileloadd64", 4 + row, v.offset(a_halves[row], a_k), a_bytes)
            for j in range(vectors):
                _tile_call(builder, "llvm.x86.tdpbf16ps", 2 * row + j, 4 + row, 6 + j)
        return []

    _loop(builder, builder.sdiv(depth, _const(DEPTH)), [], body)
    for (_, _, tile), target in zip(sums, targets, strict=True):
        _tile_memory(builder, "llvm.x86.tilestored64", tile, target, c_bytes)


def _tile_memory(builder: Any, name: str, tile: int, pointer: Any, row_bytes: Any) -> None:
    function = _function(builder, name, ir.VoidType(), [_BYTE, _BYTE.as_pointer(), _INT])
    builder.call(function, [ir.Constant(_BYTE, tile), builder.bitcast(pointer, _BYTE.as_pointer()), row_bytes])


def _tile_call(builder: Any, name: str, *tiles: int) -> None:
    function = _function(builder, name, ir.VoidType(), [_BYTE] * len(tiles))
    builder.call(function, [ir.Constant(_BYTE, tile) for tile in tiles])


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    known = builder.module.globals
    return known[name] if name in known else ir.Function(builder.module, ir.FunctionType(result, arguments), name=name)


@intrinsic  # type: ignore[misc]
def begin_products(typing_context: Any, columns: Any) -> Any:
    """A thread calls it before its first product of numbers like those of `columns`. Where these are multiplied in
    tiles, it says how large tiles are: 16 rows of 64 bytes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if columns.dtype == types.int16:
            # Palette 1; bytes of a row from byte 16 on, for each of 8 tiles; rows from byte 48 on.
            content = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[_TILE] * 8, *[0] * 8]
            kind = ir.ArrayType(_BYTE, len(content))
            place = builder.alloca(kind)
            builder.store(ir.Constant(kind, content), place)
            load = _function(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [_BYTE.as_pointer()])
            builder.call(load, [builder.bitcast(place, _BYTE.as_pointer())])
        return context.get_dummy_value()

    return types.void(columns), codegen


@intrinsic  # type: ignore[misc]
def end_products(typing_context: Any, columns: Any) -> Any:
    """To be called after the last product: a thread with tiles in use takes longer to switch."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if columns.dtype == types.int16:
            builder.call(_function(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(columns), codegen


@intrinsic  # type: ignore[misc]
def pick(typing_context: Any, columns: Any, of_floats: Any, of_pairs: Any) -> Any:
    """`of_pairs` where `columns` points to pairs, else `of_floats`: constants, so the compiler knows the result."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[2 if columns.dtype in _PAIRS else 1]

    return types.int64(columns, types.int64, types.int64), codegen


@intrinsic  # type: ignore[misc]
def put(typing_context: Any, out: Any, index: Any, value: Any) -> Any:
    """out[index] = value, rounded to bfloat16 where `out` points to pairs."""
    wide = types.float32 if out.dtype in _PAIRS else out.dtype

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = builder.gep(arguments[0], [arguments[1]]), arguments[2]
        if out.dtype in _PAIRS:
            number = builder.bitcast(builder.fptrunc(number, BFloat()), ir.IntType(16))
        builder.store(number, pointer)
        return context.get_dummy_value()

    return types.void(out, types.int64, wide), codegen


@intrinsic  # type: ignore[misc]
def pack_rows(typing_context: Any, out: Any, first: Any, second: Any) -> Any:
    """One vector of a product's second factor, as `multiply_tile` reads it: the numbers at `first` or, of pairs, those
    at `first` and `second` in turns."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = _Vectors(builder, first.dtype, VECTOR_BYTES)
        target, *sources = arguments
        if out.dtype not in _PAIRS:
            v.store(v.load(sources[0]), target)
            return context.get_dummy_value()
        lanes = ir.VectorType(_LANE, v.lanes)
        low, high = (builder.zext(v.rounded(v.load(source)), lanes) for source in sources)
        high = builder.shl(high, ir.Constant(lanes, [16] * v.lanes))
        builder.store(builder.or_(low, high), builder.bitcast(target, lanes.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.void(out, first, second), codegen


_HAS_DOTS = VECTOR_BYTES == 64 and "avx512bf16" in simd.host_features()
multiply_wide = multiply(simd.WIDE_ROWS, simd.PANEL, VECTOR_BYTES, _HAS_DOTS, simd.multiply_wide)
multiply_tile = multiply(simd.ROWS, 2, VECTOR_BYTES, _HAS_DOTS, simd.multiply_tile)
multiply_narrow = multiply(simd.NARROW_ROWS, 1, VECTOR_BYTES, _HAS_DOTS, simd.multiply_narrow)
