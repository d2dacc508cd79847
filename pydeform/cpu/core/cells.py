"""One sample for each of many queries, the blend of the corners of a cell: forward, its transpose, and dots.

Pixels and the queries' rows have `width` channels, whole vectors of them; where they have few, those of `NARROW` lanes.
"""

from __future__ import annotations

from typing import Any

from numba import types

from pydeform.cpu.core.blend import blended
from pydeform.cpu.core.gathered import Corners, corner_count, corner_shares, corner_starts, machine_lanes, table_place
from pydeform.cpu.core.lanes import Vectors, for_any_width
from pydeform.cpu.core.primitive import const, loop

NARROW = 4


def _vectors(builder: Any, element: Any, vector_bytes: int, narrow: Any, width: Any) -> tuple[Vectors, Any]:
    """What emits vectors, and how many a row has. `narrow`: not None, if rows have NARROW channels."""
    if narrow == types.none:
        v = Vectors(builder, element, vector_bytes)
        return v, builder.sdiv(width, const(v.lanes))
    v = Vectors(builder, element, min(vector_bytes, NARROW * element.bitwidth // 8))
    return v, const(NARROW // v.lanes)


class _Cell:
    """The corners of the i-th sample."""

    def __init__(self, v: Vectors, corners: list[Any], shape: tuple[int, int], i: Any) -> None:
        self._v, self._shape, self._samples = v, shape, Corners(*corners)
        self.place = table_place(v.builder, v.builder.add(self._samples.entry, i), *shape)

    def starts(self) -> list[Any]:
        return corner_starts(self._v, self._samples, self.place, *self._shape)

    def shares(self) -> list[Any]:
        return corner_shares(self._v, self._samples, self.place, *self._shape)


def _shape(element: Any, axes: Any) -> tuple[int, int]:
    return machine_lanes(element), corner_count(axes)


@for_any_width
def sum_cells(vector_bytes: int, out: Any, corners: Any, axes: Any, count: Any, width: Any, narrow: Any) -> Any:
    """out[i * width + c] = sample_i[c]."""
    shape = _shape(out.dtype, axes)

    def emit(builder: Any, out_: Any, corners_: Any, _axes: Any, count_: Any, width_: Any, _narrow: Any) -> None:
        v, vectors = _vectors(builder, out.dtype, vector_bytes, narrow, width_)

        def sample(i: Any, _: list[Any]) -> list[Any]:
            cell = _Cell(v, corners_, shape, i)
            starts, shares, row = cell.starts(), cell.shares(), v.offset(out_, builder.mul(i, width_))

            def blend(j: Any, _: list[Any]) -> list[Any]:
                c = builder.mul(j, const(v.lanes))
                v.store(blended(v, shares, [v.load(v.offset(start, c)) for start in starts]), v.offset(row, c))
                return []

            return loop(builder, vectors, [], blend)

        loop(builder, count_, [], sample)

    return types.void(out, corners, axes, count, width, narrow), emit


@for_any_width
def scatter_cells(vector_bytes: int, grad: Any, corners: Any, axes: Any, count: Any, width: Any, narrow: Any) -> Any:
    """The transpose: corner_k[c] += share_k * grad[i * width + c] of one sample after the other."""
    shape = _shape(grad.dtype, axes)

    def emit(builder: Any, grad_: Any, corners_: Any, _axes: Any, count_: Any, width_: Any, _narrow: Any) -> None:
        v, vectors = _vectors(builder, grad.dtype, vector_bytes, narrow, width_)

        def sample(i: Any, _: list[Any]) -> list[Any]:
            cell = _Cell(v, corners_, shape, i)
            starts, shares, row = cell.starts(), cell.shares(), v.offset(grad_, builder.mul(i, width_))

            def add(j: Any, _: list[Any]) -> list[Any]:
                c = builder.mul(j, const(v.lanes))
                g = v.load(v.offset(row, c))
                for start, share in zip(starts, shares, strict=True):  # several may be the same pixel
                    target = v.offset(start, c)
                    v.store(v.fma(share, g, v.load(target)), target)
                return []

            return loop(builder, vectors, [], add)

        loop(builder, count_, [], sample)

    return types.void(grad, corners, axes, count, width, narrow), emit


@for_any_width
def dot_cells(
    vector_bytes: int, dots: Any, grad: Any, corners: Any, axes: Any, count: Any, width: Any, narrow: Any
) -> Any:
    """dots, in a table like that of the corners: sum_c grad[i * width + c] * corner_k[c]."""
    shape = _shape(grad.dtype, axes)

    def emit(builder: Any, dots_: Any, grad_: Any, corners_: Any, _axes: Any, *rest: Any) -> None:
        count_, width_, _ = rest
        v, vectors = _vectors(builder, grad.dtype, vector_bytes, narrow, width_)

        def sample(i: Any, _: list[Any]) -> list[Any]:
            cell = _Cell(v, corners_, shape, i)
            starts, row = cell.starts(), v.offset(grad_, builder.mul(i, width_))

            def add(j: Any, sums: list[Any]) -> list[Any]:
                c = builder.mul(j, const(v.lanes))
                g = v.load(v.offset(row, c))
                return [v.fma(g, v.load(v.offset(s, c)), total) for s, total in zip(starts, sums, strict=True)]

            total = v.sum_each(loop(builder, vectors, [v.zero] * len(starts), add))
            for k in range(shape[1]):
                target = v.offset(dots_, builder.add(cell.place, const(k * shape[0])))
                builder.store(builder.extract_element(total, const(k)), target)
            return []

        loop(builder, count_, [], sample)

    return types.void(dots, grad, corners, axes, count, width, narrow), emit
