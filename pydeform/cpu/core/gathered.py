"""Sums over a list of samples, each a few corners with shares of them: forward, its transpose, and dots.

A corner whose pixel's number is negative is outside the image: it is read from, or written to, `nothing` instead, a row
of zeros or of numbers that nobody reads. Only the last vector of channels is masked: what lies beyond belongs to another
group, and to another thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from pydeform.cpu.core.blend import all_channels, blended
from pydeform.cpu.core.lanes import Vectors, for_any_width
from pydeform.cpu.core.primitive import INT, const, loop, primitive

AT_ONCE = (4, 2, 1)  # vectors of sums in registers


class Corners(NamedTuple):
    """Samples, one after the other. Sample i has corner k at pixel pixels[k][i], with the share shares[k][i]."""

    image: Any  # channel 0 of pixel 0
    nothing: Any
    pixels: Any  # a tuple of pointers, one for each corner
    shares: Any
    stride: int  # numbers from one pixel to the next


@primitive
def rows_of(pointer: Any, row: Any, axes: Any) -> Any:
    """Pointers to the rows of a table, one for each corner of a cell with an axis for each item of `axes`, a tuple."""
    count = 2 ** len(axes)

    def emit(builder: Any, pointer_: Any, row_: Any, _axes: Any) -> Any:
        return [builder.gep(pointer_, [builder.mul(row_, const(k))]) for k in range(count)]

    return types.UniTuple(pointer, count)(pointer, row, axes), emit


def _places(v: Vectors, corners: Corners, i: Any) -> list[Any]:
    """Pointers to channel 0 of the corners of sample i."""
    builder, places = v.builder, []
    for pixels in corners.pixels:
        pixel = builder.sext(builder.load(v.offset(pixels, i)), INT)
        inside = v.offset(corners.image, builder.mul(pixel, corners.stride))
        is_outside = builder.icmp_signed("<", pixel, const(0))
        places.append(builder.select(is_outside, corners.nothing, inside))
    return places


def _shares(v: Vectors, corners: Corners, i: Any) -> list[Any]:
    return [v.load_splat(shares, i) for shares in corners.shares]


def _in_runs(v: Vectors, channels: Any, body: Callable[[list[Any], Any, Any], None]) -> None:
    """body(places of some vectors, load, store): as many at a time as there may be, the last of them masked."""
    builder, done = v.builder, const(0)
    whole = builder.sdiv(channels, const(v.lanes))
    for size in AT_ONCE:
        runs = builder.sdiv(builder.sub(whole, done), const(size))

        def step(i: Any, _: list[Any], start: Any = done, size: int = size) -> list[Any]:
            first = builder.add(start, builder.mul(i, const(size)))
            body([builder.mul(builder.add(first, const(j)), const(v.lanes)) for j in range(size)], v.load, v.store)
            return []

        loop(builder, runs, [], step)
        done = builder.add(done, builder.mul(runs, const(size)))
    place = builder.mul(done, const(v.lanes))
    left = builder.sub(channels, place)
    with builder.if_then(builder.icmp_signed(">", left, const(0))):
        mask = v.first_lanes(left)
        body(
            [place],
            lambda pointer: v.masked_load(pointer, mask),
            lambda value, pointer: v.masked_store(value, pointer, mask),
        )


@for_any_width
def sum_samples(
    vector_bytes: int, out: Any, corners: Any, weights: Any, step: Any, count: Any, channels: Any
) -> Any:
    """out[c] = sum_i weights[i * step] * sample_i[c]."""

    def emit(builder: Any, out_: Any, corners_: Any, weights_: Any, step_: Any, count_: Any, channels_: Any) -> None:
        v, samples = Vectors(builder, out.dtype, vector_bytes), Corners(*corners_)

        def run(places: list[Any], load: Any, store: Any) -> None:
            def add(i: Any, sums: list[Any]) -> list[Any]:
                starts, shares = _places(v, samples, i), _shares(v, samples, i)
                w = v.load_splat(weights_, builder.mul(i, step_))
                values = (
                    blended(v, shares, [load(v.offset(start, place)) for start in starts]) for place in places
                )
                return [v.fma(w, value, total) for value, total in zip(values, sums, strict=True)]

            for place, total in zip(places, loop(builder, count_, [v.zero] * len(places), add), strict=True):
                store(total, v.offset(out_, place))

        _in_runs(v, channels_, run)

    return types.void(out, corners, weights, step, count, channels), emit


@for_any_width
def scatter_samples(
    vector_bytes: int, grad: Any, corners: Any, weights: Any, step: Any, count: Any, channels: Any
) -> Any:
    """The transpose: sample_i[c] += weights[i * step] * grad[c], onto each corner by its share, one after the other."""

    def emit(builder: Any, grad_: Any, corners_: Any, weights_: Any, step_: Any, count_: Any, channels_: Any) -> None:
        v, samples = Vectors(builder, grad.dtype, vector_bytes), Corners(*corners_)

        def run(places: list[Any], load: Any, store: Any) -> None:
            grads = [load(v.offset(grad_, place)) for place in places]

            def add(i: Any, _: list[Any]) -> list[Any]:
                w = v.load_splat(weights_, builder.mul(i, step_))
                weighted = [builder.fmul(w, g) for g in grads]
                for start, share in zip(_places(v, samples, i), _shares(v, samples, i), strict=True):
                    for place, g in zip(places, weighted, strict=True):
                        target = v.offset(start, place)
                        store(v.fma(share, g, load(target)), target)
                return []

            loop(builder, count_, [], add)

        _in_runs(v, channels_, run)

    return types.void(grad, corners, weights, step, count, channels), emit


@for_any_width
def corner_dots(vector_bytes: int, dots: Any, grad: Any, corners: Any, count: Any, channels: Any) -> Any:
    """dots[k][i] = sum_c grad[c] * corner k of sample i [c]."""

    def emit(builder: Any, dots_: Any, grad_: Any, corners_: Any, count_: Any, channels_: Any) -> None:
        v, samples = Vectors(builder, grad.dtype, vector_bytes), Corners(*corners_)

        def dot(i: Any, _: list[Any]) -> list[Any]:
            starts = _places(v, samples, i)

            def add(c: Any, sums: list[Any], load: Any, _store: Any) -> list[Any]:
                g = load(v.offset(grad_, c))
                values = [load(v.offset(start, c)) for start in starts]
                return [v.fma(g, value, total) for value, total in zip(values, sums, strict=True)]

            for total, pointer in zip(all_channels(v, channels_, [v.zero] * len(starts), add), dots_, strict=True):
                builder.store(v.sum(total), v.offset(pointer, i))
            return []

        loop(builder, count_, [], dot)

    return types.void(dots, grad, corners, count, channels), emit
