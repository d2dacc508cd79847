"""Squares of numbers: as many rows of a vector's length as a vector has lanes, one after the other in one long vector.

What is computed with a vector, for each of so many numbers, is computed with a square at once.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types

from pydeform.cpu.core.lanes import Vectors, shuffle, transposed
from pydeform.cpu.core.primitive import const, primitive
from pydeform.cpu.core.vector import Vector


@primitive
def rows_of(vector: Any) -> Any:
    """The square whose every row is the vector."""
    lanes = vector.lanes
    square = Vector(vector.element, lanes * lanes)
    return square(vector), lambda builder, value: shuffle(builder, value, value, [*range(lanes)] * lanes)


@primitive
def row_numbers(vector: Any) -> Any:
    """The square whose every number is that of its row."""
    lanes = vector.lanes
    square = Vector(vector.element, lanes * lanes)

    def emit(_builder: Any, value: Any) -> Any:
        numbers = [float(i // lanes) for i in range(lanes * lanes)]
        return ir.Constant(ir.VectorType(value.type.element, lanes * lanes), numbers)

    return square(vector), emit


@primitive
def store_columns(square: Any, pointer: Any, step: Any) -> Any:
    """pointer[i * step + j] = the number in row j, column i."""
    lanes = math.isqrt(square.lanes)

    def emit(builder: Any, value: Any, pointer_: Any, step_: Any) -> None:
        rows = [shuffle(builder, value, value, [*range(i, i + lanes)]) for i in range(0, lanes * lanes, lanes)]
        v = Vectors(builder, square.element, lanes * square.element.bitwidth // 8)
        for i, column in enumerate(transposed(builder, rows)):
            v.store(column, v.offset(pointer_, builder.mul(step_, const(i))))

    return types.void(square, pointer, step), emit
