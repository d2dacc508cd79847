"""Products of matrices, in blocks whose sums stay in registers."""

from __future__ import annotations

from typing import Any

from numba import types

from pydeform.cpu.core.lanes import Vectors
from pydeform.cpu.core.primitive import const, loop, primitive
from pydeform.cpu.core.simd import VECTOR_BYTES


def rows_for(vector_bytes: int) -> tuple[int, int, int]:
    """Rows of a register block that is as wide as a panel, two vectors, and one vector wide. Its sums have room in the
    registers, of which there are 32 or 16, with a row of the panel and a broadcast. Not in all of the 32: schedulers
    that load many factors first would spill."""
    return (6, 8, 16) if vector_bytes == 64 else (6, 6, 8)


def panel_vectors(vector_bytes: int) -> int:
    """Vectors of a panel of a product's second factor: the wider, the fewer numbers of the first are loaded."""
    return 4 if vector_bytes == 64 else 2


PANEL = panel_vectors(VECTOR_BYTES)
WIDE_ROWS, ROWS, NARROW_ROWS = rows_for(VECTOR_BYTES)


def multiply(rows: int, vectors: int, vector_bytes: int = VECTOR_BYTES) -> Any:
    @primitive
    def multiply_tile(
        a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, depth: Any, c: Any, c_row: Any, accumulate: Any
    ) -> Any:
        """c[r*c_row + j] (+)= sum_k a[r*a_row + k*a_step] * b[k*b_step + j], r < rows, j < vectors * lanes."""

        def emit(builder: Any, *values: Any) -> None:
            a_, a_row_, a_step_, b_, b_step_, depth_, c_, c_row_, accumulate_ = values
            v = Vectors(builder, a.dtype, vector_bytes)
            places = [const(j * v.lanes) for j in range(vectors)]
            a_rows = [v.offset(a_, builder.mul(a_row_, const(r))) for r in range(rows)]

            def body(k: Any, sums: list[Any]) -> list[Any]:
                b_k = v.offset(b_, builder.mul(k, b_step_))
                columns = [v.load(v.offset(b_k, place)) for place in places]
                a_k = builder.mul(k, a_step_)
                out = []
                for r in range(rows):
                    factor = v.load_splat(a_rows[r], a_k)
                    out += [v.fma(factor, columns[j], sums[vectors * r + j]) for j in range(vectors)]
                return out

            sums = loop(builder, depth_, [v.zero] * (vectors * rows), body)
            put_sums(v, sums, c_, c_row_, places, accumulate_)

        return types.void(a, a_row, a_step, b, b_step, depth, c, c_row, accumulate), emit

    return multiply_tile


def put_sums(v: Vectors, sums: list[Any], c: Any, c_row: Any, places: list[Any], accumulate: Any) -> None:
    """The sums of a block, row by row, each at `places` of its row of c, in place of or added to what is there."""
    builder, targets = v.builder, []
    for r in range(len(sums) // len(places)):
        c_r = v.offset(c, builder.mul(c_row, const(r)))
        targets += [v.offset(c_r, place) for place in places]
    with builder.if_else(accumulate) as (add, replace):
        with add:
            for target, total in zip(targets, sums, strict=True):
                v.store(builder.fadd(v.load(target), total), target)
        with replace:
            for target, total in zip(targets, sums, strict=True):
                v.store(total, target)


multiply_wide, multiply_tile, multiply_narrow = multiply(WIDE_ROWS, PANEL), multiply(ROWS, 2), multiply(NARROW_ROWS, 1)
