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
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config

from pydeform.cpu.core import product, simd
from pydeform.cpu.core.lanes import LANE, BFloat, Vectors, bfloat16_bits, in_lanes
from pydeform.cpu.core.primitive import INT, const, function_of, loop, primitive
from pydeform.cpu.core.product import put_sums
from pydeform.cpu.core.simd import VECTOR_BYTES

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
    return (2 * _TILE,) * 3 if dtype == TILES else (product.WIDE_ROWS, product.ROWS, product.NARROW_ROWS)


class Product(NamedTuple):
    """What `multiply_tile` multiplies, as LLVM's values."""

    a: Any
    a_row: Any
    a_step: Any
    b: Any
    b_step: Any
    depth: Any
    c: Any
    c_row: Any
    accumulate: Any


def multiply(rows: int, vectors: int, vector_bytes: int, native: bool, of_floats: Any = None) -> Any:
    """The primitive for pointers to either kind of pairs; `of_floats` for others. `native`: there are dot products."""

    @primitive
    def multiply_pairs(
        a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, depth: Any, c: Any, c_row: Any, accumulate: Any
    ) -> Any:
        """c[r*c_row + j] (+)= sum_k a[r*a_row + k] * b[k//2*2*b_step + 2*j + k%2], j < vectors * lanes; the depth is a
        multiple of DEPTH, a_step is 1."""
        kinds = a, a_row, a_step, b, b_step, depth, c, c_row, accumulate
        if a.dtype not in _PAIRS:
            return of_floats.define(*kinds)

        def emit(builder: Any, *values: Any) -> None:
            v = Vectors(builder, types.float32, vector_bytes)
            if a.dtype == types.int16:
                for first in range(0, vectors, 2):
                    _multiply_tiles(v, first, min(vectors, first + 2), Product(*values))
            else:
                _multiply_dots(v, rows, vectors, native, Product(*values))

        return types.void(*kinds), emit

    return multiply_pairs


def _multiply_dots(v: Vectors, rows: int, vectors: int, native: bool, of: Product) -> None:
    builder = v.builder
    a_rows = [_as_lanes(v, v.offset(of.a, builder.mul(of.a_row, const(r)))) for r in range(rows)]
    b = _as_lanes(v, of.b)
    places = [const(j * v.lanes) for j in range(vectors)]

    def load(pointer: Any) -> Any:
        value = builder.load(pointer)
        value.align = 2
        return value

    def body(k: Any, sums: list[Any]) -> list[Any]:
        b_k = v.offset(b, builder.mul(k, of.b_step))
        lanes = ir.VectorType(LANE, v.lanes).as_pointer()
        columns = [load(builder.bitcast(v.offset(b_k, place), lanes)) for place in places]
        out = []
        for r in range(rows):
            pair = in_lanes(builder, load(v.offset(a_rows[r], k)), v.lanes)
            out += [_dot(v, sums[vectors * r + j], pair, columns[j], native) for j in range(vectors)]
        return out

    sums = loop(builder, builder.sdiv(of.depth, const(2)), [v.zero] * (vectors * rows), body)
    put_sums(v, sums, of.c, of.c_row, places, of.accumulate)


def _as_lanes(v: Any, pointer: Any) -> Any:
    return v.builder.bitcast(pointer, LANE.as_pointer())


def _dot(v: Any, total: Any, x: Any, y: Any, native: bool) -> Any:
    """total + x[2i] * y[2i] + x[2i + 1] * y[2i + 1]; without that instruction, by two multiply-adds."""
    builder = v.builder
    if native:
        pairs = ir.VectorType(BFloat(), 2 * v.lanes)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * v.lanes}"
        dot = function_of(builder, name, v.type, [v.type, pairs, pairs])
        return builder.call(dot, [total, builder.bitcast(x, pairs), builder.bitcast(y, pairs)])
    for part in (_low, _high):
        total = v.fma(part(v, x), part(v, y), total)
    return total


def _low(v: Any, pairs: Any) -> Any:
    return v.builder.bitcast(v.builder.shl(pairs, ir.Constant(pairs.type, [16] * v.lanes)), v.type)


def _high(v: Any, pairs: Any) -> Any:
    return v.builder.bitcast(v.builder.and_(pairs, ir.Constant(pairs.type, [0xFFFF0000] * v.lanes)), v.type)


def _multiply_tiles(v: Vectors, first: int, last: int, of: Product) -> None:
    """Vectors `first` to `last` of the sums, in tiles 0 to 3 (2 x 2); tiles 4 and 5 hold numbers of a, 6 and 7 of b."""
    builder, vectors = v.builder, last - first
    b, c = v.offset(of.b, const(2 * _TILE * first)), v.offset(of.c, const(_TILE * first))
    sums = [(row, j, 2 * row + j) for row in range(2) for j in range(vectors)]
    rows = (of.a_row, 2), (of.b_step, 4), (of.c_row, 4)
    a_bytes, b_bytes, c_bytes = (builder.mul(row, const(size)) for row, size in rows)
    a_halves = [v.offset(of.a, builder.mul(of.a_row, const(_TILE * row))) for row in range(2)]
    targets = [
        v.offset(c, builder.add(builder.mul(of.c_row, const(_TILE * row)), const(_TILE * j))) for row, j, _ in sums
    ]
    with builder.if_else(of.accumulate) as (add, replace):
        with add:
            for (_, _, tile), target in zip(sums, targets, strict=True):
                _tile_memory(builder, "llvm.x86.tileloadd64", tile, target, c_bytes)
        with replace:
            for _, _, tile in sums:
                _tile_call(builder, "llvm.x86.tilezero", tile)

    def body(k: Any, _: list[Any]) -> list[Any]:
        a_k = builder.mul(k, const(DEPTH))
        b_k = v.offset(b, builder.mul(builder.mul(k, const(DEPTH)), of.b_step))
        for j in range(vectors):
            _tile_memory(builder, "llvm.x86.tileloadd64", 6 + j, v.offset(b_k, const(2 * _TILE * j)), b_bytes)
        for row in range(2):
            _tile_memory(builder, "llvm.x86.tileloadd64", 4 + row, v.offset(a_halves[row], a_k), a_bytes)
            for j in range(vectors):
                _tile_call(builder, "llvm.x86.tdpbf16ps", 2 * row + j, 4 + row, 6 + j)
        return []

    loop(builder, builder.sdiv(of.depth, const(DEPTH)), [], body)
    for (_, _, tile), target in zip(sums, targets, strict=True):
        _tile_memory(builder, "llvm.x86.tilestored64", tile, target, c_bytes)


def _tile_memory(builder: Any, name: str, tile: int, pointer: Any, row_bytes: Any) -> None:
    function = function_of(builder, name, ir.VoidType(), [_BYTE, _BYTE.as_pointer(), INT])
    builder.call(function, [ir.Constant(_BYTE, tile), builder.bitcast(pointer, _BYTE.as_pointer()), row_bytes])


def _tile_call(builder: Any, name: str, *tiles: int) -> None:
    function = function_of(builder, name, ir.VoidType(), [_BYTE] * len(tiles))
    builder.call(function, [ir.Constant(_BYTE, tile) for tile in tiles])


@primitive
def begin_products(columns: Any) -> Any:
    """A thread calls it before its first product of numbers like those of `columns`. Where these are multiplied in
    tiles, it says how large tiles are: 16 rows of 64 bytes."""

    def emit(builder: Any, _columns: Any) -> None:
        if columns.dtype == types.int16:
            # Palette 1; bytes of a row from byte 16 on, for each of 8 tiles; rows from byte 48 on.
            content = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[_TILE] * 8, *[0] * 8]
            kind = ir.ArrayType(_BYTE, len(content))
            place = builder.alloca(kind)
            builder.store(ir.Constant(kind, content), place)
            load = function_of(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [_BYTE.as_pointer()])
            builder.call(load, [builder.bitcast(place, _BYTE.as_pointer())])

    return types.void(columns), emit


@primitive
def end_products(columns: Any) -> Any:
    """To be called after the last product: a thread with tiles in use takes longer to switch."""

    def emit(builder: Any, _columns: Any) -> None:
        if columns.dtype == types.int16:
            builder.call(function_of(builder, "llvm.x86.tilerelease", ir.VoidType(), []), [])

    return types.void(columns), emit


@primitive
def pick(columns: Any, of_floats: Any, of_pairs: Any) -> Any:
    """`of_pairs` where `columns` points to pairs, else `of_floats`: constants, so the compiler knows the result."""
    signature = types.int64(columns, of_floats, of_pairs)
    return signature, lambda _builder, _columns, *constants: constants[columns.dtype in _PAIRS]


@primitive
def put(out: Any, index: Any, value: Any) -> Any:
    """out[index] = value, rounded to bfloat16 where `out` points to pairs."""

    def emit(builder: Any, out_: Any, index_: Any, value_: Any) -> None:
        if out.dtype in _PAIRS:
            value_ = bfloat16_bits(builder, value_)
        builder.store(value_, builder.gep(out_, [index_]))

    return types.void(out, index, value), emit


@primitive
def pack_rows(out: Any, first: Any, second: Any) -> Any:
    """One vector of a product's second factor, as `multiply_tile` reads it: the numbers at `first` or, of pairs, those
    at `first` and `second` in turns."""

    def emit(builder: Any, out_: Any, *sources: Any) -> None:
        v = Vectors(builder, first.dtype, VECTOR_BYTES)
        if out.dtype not in _PAIRS:
            v.store(v.load(sources[0]), out_)
            return
        lanes = ir.VectorType(LANE, v.lanes)
        low, high = (builder.zext(bfloat16_bits(builder, v.load(source)), lanes) for source in sources)
        high = builder.shl(high, ir.Constant(lanes, [16] * v.lanes))
        builder.store(builder.or_(low, high), builder.bitcast(out_, lanes.as_pointer())).align = 2

    return types.void(out, first, second), emit


_HAS_DOTS = VECTOR_BYTES == 64 and "avx512bf16" in simd.host_features()
multiply_wide = multiply(product.WIDE_ROWS, product.PANEL, VECTOR_BYTES, _HAS_DOTS, product.multiply_wide)
multiply_tile = multiply(product.ROWS, 2, VECTOR_BYTES, _HAS_DOTS, product.multiply_tile)
multiply_narrow = multiply(product.NARROW_ROWS, 1, VECTOR_BYTES, _HAS_DOTS, product.multiply_narrow)
