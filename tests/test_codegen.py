"""What LLVM makes of the SIMD primitives for processors that this machine need not be.

A vector that goes to the stack in an inner loop costs more than the arithmetic around it, and which processor's
scheduler sends it there shows nowhere else: with 12 rows, `multiply_tile` ran at half speed on one kind of AVX-512 and
at full speed on another.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from numba import types

from pydeform.cpu.core import product
from pydeform.cpu.core.bands import Band, band_dots, band_scatter, band_sum
from pydeform.cpu.core.simd import at
from pydeform.cpu.core.vector import fma, load_lanes, store
from tests.codegen import (
    PROCESSORS,
    Loop,
    assembly,
    assembly_of_kernel,
    loops,
    primitives,
    text_of_kernel,
)

NUMBER, FLAG, INDEX = types.int64, types.boolean, types.CPointer(types.int32)


def arguments_of(name: str, real: Any, lanes: int) -> tuple[list[Any], dict[int, int]]:
    """Types of a primitive's arguments, and those of them that kernels give as constants."""
    p = types.CPointer(real)
    cells = {axes: [types.Tuple((p, INDEX, p, NUMBER, NUMBER)), types.UniTuple(NUMBER, axes)] for axes in (2, 3)}
    pixels = types.Tuple((p, INDEX, p, NUMBER, NUMBER))
    listed = types.none if name in ("scatter_samples", "corner_dots") else types.CPointer(NUMBER)
    samples = types.Tuple((p, types.CPointer(NUMBER), p, NUMBER, NUMBER, listed))
    cell = types.UniTuple(NUMBER, 2)
    panel = product.panel_vectors(lanes * real.bitwidth // 8) * lanes
    found = {
        "multiply_wide": ([p, NUMBER, NUMBER, p, NUMBER, NUMBER, p, NUMBER, FLAG], {1: 208, 2: 1, 4: panel}),
        "multiply_wide transposed": ([p, NUMBER, NUMBER, p, NUMBER, NUMBER, p, NUMBER, FLAG], {1: 1, 8: 0}),
        "multiply_tile": ([p, NUMBER, NUMBER, p, NUMBER, NUMBER, p, NUMBER, FLAG], {1: 336, 2: 1, 4: 2 * lanes}),
        "multiply_tile of any rows": (
            [p, NUMBER, NUMBER, p, NUMBER, NUMBER, p, NUMBER, FLAG],
            {2: 1, 4: 2 * lanes},
        ),
        "multiply_narrow": ([p, NUMBER, NUMBER, p, NUMBER, NUMBER, p, NUMBER, FLAG], {1: 336, 2: 1, 4: 2 * lanes}),
        "copy_vectors": ([p, p, NUMBER], {}),
        "multiply_tile transposed": ([p, NUMBER, NUMBER, p, NUMBER, NUMBER, p, NUMBER, FLAG], {1: 1, 8: 0}),
        "blend": ([p, *cells[2], NUMBER], {}),
        "blend over three axes": ([p, *cells[3], NUMBER], {}),
        "blend_dots": ([p, p, p, *cells[2], NUMBER], {}),
        "blend_dots over three axes": ([p, p, p, *cells[3], NUMBER], {}),
        "blend_dots_scatter": ([p, p, p, *cells[2], NUMBER], {}),
        "blend_dots_scatter over three axes": ([p, p, p, *cells[3], NUMBER], {}),
        "transpose_block": ([p, NUMBER, p, NUMBER, p], {}),
        "transpose_block_shifted": ([p, NUMBER, p, NUMBER, p], {}),
        "sum_values": ([p, NUMBER], {}),
        "weighted_sum": ([p, pixels, NUMBER, real, FLAG], {}),
        "weighted_dots": ([p, types.Tuple((p, INDEX, types.UniTuple(p, 3), NUMBER, NUMBER)), NUMBER], {}),
        "scatter": ([p, p, INDEX, p, NUMBER, NUMBER, NUMBER, real], {}),
        "sum_samples": ([p, samples, types.UniTuple(NUMBER, 5), cell, p, NUMBER, NUMBER, NUMBER], {}),
        "scatter_samples": ([p, samples, types.UniTuple(NUMBER, 5), cell, p, NUMBER, NUMBER, NUMBER], {}),
        "corner_dots": ([p, NUMBER, p, samples, types.UniTuple(NUMBER, 5), cell, NUMBER, NUMBER], {}),
        "largest_pixel": ([p, INDEX, pixels, NUMBER, NUMBER, FLAG], {}),
        "largest_point": ([p, INDEX, pixels, NUMBER, NUMBER, FLAG], {}),
    }
    return found[name.removesuffix(" of shared places")]


PRIMITIVES = (
    "multiply_wide",
    "multiply_wide transposed",
    "multiply_tile",
    "multiply_narrow",
    "copy_vectors",
    "multiply_tile transposed",
    "blend",
    "blend over three axes",
    "blend_dots",
    "blend_dots over three axes",
    "blend_dots_scatter",
    "blend_dots_scatter over three axes",
    "transpose_block",
    "transpose_block_shifted",
    "sum_values",
    "weighted_sum",
    "weighted_dots",
    "scatter",
    "sum_samples",
    "scatter_samples",
    "scatter_samples of shared places",
    "corner_dots",
    "corner_dots of shared places",
    "largest_pixel",
    "largest_point",
)
# Loads for each multiply-add, where there is such an instruction, in the loop that does most of them. A block of r rows
# x v vectors has (r + v) / (v * r), a blend four loads for three and a product, and what a list of pixels is read with
# has its weights and places besides.
LOADS = {
    "multiply_wide": 0.67,
    "multiply_wide transposed": 0.67,
    "multiply_tile": 0.67,
    "multiply_narrow": 1.13,
    "multiply_tile transposed": 0.67,
    "blend": 1.34,
    "blend over three axes": 1.15,
    "blend_dots": 0.86,
    "blend_dots over three axes": 0.9,
}
LOADS |= {"blend_dots_scatter": 0.91, "blend_dots_scatter over three axes": 0.98}
LOADS |= {"weighted_sum": 1.13, "weighted_dots": 1.1, "scatter": 1.13}
# A run's gradient, four vectors for sixteen multiply-adds, is read before its loop, where it is counted too; sample by
# sample it is read again for each.
LOADS |= {"sum_samples": 1.34, "scatter_samples": 1.34, "corner_dots": 1.25}
LOADS |= {"scatter_samples of shared places": 1.57, "corner_dots of shared places": 1.32}
# Processors of 2008, in which a multiply-add takes one more register.
STACK_STORES = {("weighted_sum", "nehalem", 32): 1}
STACK_STORES |= {(name, "nehalem", bits): 4 for name in ("sum_samples", "corner_dots") for bits in (32, 64)}
STACK_STORES |= {("blend_dots_scatter", "nehalem", bits): most for bits, most in ((32, 7), (64, 3))}
# The dots of eight corners lie in memory: a few numbers for sixty multiply-adds and more.
STACK_STORES |= {("blend_dots over three axes", name, bits): 13 for name in PROCESSORS for bits in (32, 64)}
STACK_STORES |= {
    ("blend_dots_scatter over three axes", name, bits): most
    for name, most in (("nehalem", 25), ("neoverse-n1", 9))
    for bits in (32, 64)
}


@functools.cache
def found(name: str, processor: str, bits: int, rows: int | None = None) -> list[Loop]:
    on = PROCESSORS[processor]
    real = types.float32 if bits == 32 else types.float64
    primitive = getattr(primitives(on.vector_bytes, rows), name.split()[0])
    arguments, constants = arguments_of(name, real, on.vector_bytes * 8 // bits)
    return loops(assembly(primitive, arguments, constants, on), on)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_vectors_stay_in_registers(name, processor, bits):
    allowed = STACK_STORES.get((name, processor, bits), 0)
    assert max((loop.stack_stores for loop in found(name, processor, bits)), default=0) <= allowed


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("processor", [name for name in PROCESSORS if name != "nehalem"])
@pytest.mark.parametrize("name", LOADS)
def test_loads_for_each_multiply_add(name, processor, bits):
    busiest = max(found(name, processor, bits), key=lambda loop: loop.multiply_adds)
    assert busiest.multiply_adds >= 3
    assert busiest.loads_each <= LOADS[name]
    if name.startswith("multiply_wide") and PROCESSORS[processor].vector_bytes == 64:
        assert busiest.loads_each <= 0.42


load_many = load_lanes(640)


def _sum(plane, rows, y, x, out, width, room, columns):
    band = Band(at(plane, (0,)), at(rows, (0,)), rows.shape[0], width, room, columns)
    out[0] = band_sum(band, at(y, (0, 0)), at(x, (0, 0)))


def _dots(plane, rows, y, x, out, width, room, columns):
    band = Band(at(plane, (0,)), at(rows, (0,)), rows.shape[0], width, room, columns)
    out[0], out[1], out[2] = band_dots(band, at(y, (0, 0)), at(y, (1, 0)), at(x, (0, 0)), at(x, (1, 0)))


def _scatter(plane, rows, y, x, out, width, room, columns):
    band = Band(at(plane, (0,)), at(rows, (0,)), rows.shape[0], width, room, columns)
    band_scatter(band, at(y, (0, 0)), at(x, (0, 0)), out[0])


def _too_many(plane, rows, y, x, out, width, room, columns):
    """A sum that fills 40 registers of the widest."""
    total = load_many(at(plane, (0,)))
    for i in range(columns):
        total = fma(y[0, i], load_many(at(plane, (i,))), total)
    store(total, at(out, (0,)))


@functools.cache
def found_in_kernel(function: Any, processor: str, bits: int) -> list[Loop]:
    real, on = types.float32 if bits == 32 else types.float64, PROCESSORS[processor]
    vector, matrix = types.Array(real, 1, "C"), types.Array(real, 2, "C")
    arguments = [vector, types.Array(types.int32, 1, "C"), matrix, matrix, vector, NUMBER, NUMBER, NUMBER]
    return loops(assembly_of_kernel(_text(function, *arguments), on), on)


@functools.cache
def _text(function: Any, *arguments: Any) -> str:
    return text_of_kernel(function, list(arguments))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("function", [_sum, _dots, _scatter], ids=lambda function: function.__name__)
def test_vectors_as_values_stay_in_registers(function, processor, bits):
    found = found_in_kernel(function, processor, bits)
    assert found and max(loop.stack_stores for loop in found) == 0


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_values_that_do_not_fit_are_told(processor, bits):
    assert max(loop.stack_stores for loop in found_in_kernel(_too_many, processor, bits)) > 0


@pytest.mark.parametrize("processor", ["znver4", "znver5"])
def test_the_block_that_did_not_fit_is_told(processor):
    """12 rows x 2 vectors of 64 bytes: 24 sums of 32 registers, but this scheduler loads all factors first."""
    name = "multiply_tile of any rows"  # whose distance the compiler does not know
    busiest = max(found(name, processor, 32, rows=12), key=lambda loop: loop.multiply_adds)
    assert busiest.stack_stores > 10 and busiest.loads_each > 0.9
    assert found(name, "skylake-avx512", 32, rows=12)[0].stack_stores == 0


def test_every_primitive_is_looked_at():
    assert {name for name, value in vars(primitives(32)).items() if hasattr(value, "_defn")} <= set(PRIMITIVES)
