"""Explicit SIMD for RoI pooling: sums, dots, scattered additions and maxima over a list of pixels.

Each is taken for `vectors` vectors of channels. "plane" primitives are the same with vectors of one lane, for channels
whose planes are read as they lie (stride 1): the same bits, since the order of every sum and every rounding is the
same.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from pydeform.cpu.core.lanes import Vectors, for_any_width, in_lanes, in_runs, place_of
from pydeform.cpu.core.primitive import const, loop, merged

AT_ONCE = (8, 4, 2, 1)  # vectors


class Pixels(NamedTuple):
    """A list of pixels: number i has its channels from image[index[i] * stride] on."""

    image: Any
    index: Any
    weights: Any  # of the pixels; for `weighted_dots` some lists of weights
    number: int
    stride: int


def _channels_of(v: Vectors, pixels: Pixels, i: Any) -> Any:
    """Pointer to pixel i of the list."""
    return v.offset(pixels.image, v.builder.mul(place_of(v.builder, pixels.index, i), pixels.stride))


@for_any_width
def weighted_sum(vector_bytes: int, out: Any, pixels: Any, vectors: Any, scale: Any, accumulate: Any) -> Any:
    """out[c] = (out[c], if accumulate, + sum_i weights[i] * pixel_i[c]) * scale."""

    def emit(builder: Any, out_: Any, pixels_: Any, vectors_: Any, scale_: Any, accumulate_: Any) -> None:
        v, listed = Vectors(builder, out.dtype, vector_bytes), Pixels(*pixels_)
        factor = v.splat(scale_)

        def run(places: list[Any]) -> None:
            def add(i: Any, sums: list[Any]) -> list[Any]:
                start, w = _channels_of(v, listed, i), v.load_splat(listed.weights, i)
                return [v.fma(w, v.load(v.offset(start, p)), s) for p, s in zip(places, sums, strict=True)]

            before = builder.block
            with builder.if_then(accumulate_):
                earlier = [v.load(v.offset(out_, p)) for p in places]
                inside = builder.block
            sums = merged(builder, [v.zero] * len(places), before, earlier, inside)
            for p, total in zip(places, loop(builder, listed.number, sums, add), strict=True):
                v.store(builder.fmul(total, factor), v.offset(out_, p))

        in_runs(v, vectors_, AT_ONCE, run)

    return types.void(out, pixels, vectors, scale, accumulate), emit


@for_any_width
def weighted_dots(vector_bytes: int, grad: Any, pixels: Any, vectors: Any) -> Any:
    """For each list of weights: sum_c grad[c] * sum_i weight[i] * pixel_i[c]."""

    def emit(builder: Any, grad_: Any, pixels_: Any, vectors_: Any) -> list[Any]:
        v, listed = Vectors(builder, grad.dtype, vector_bytes), Pixels(*pixels_)
        # The weights come last: what a pixel's channels add up to, lane by lane, serves all lists of them.
        totals = [cgutils.alloca_once_value(builder, v.zero) for _ in listed.weights]

        def run(places: list[Any]) -> None:
            grads = [v.load(v.offset(grad_, p)) for p in places]

            def add(i: Any, dots: list[Any]) -> list[Any]:
                start = _channels_of(v, listed, i)
                sums = [v.zero] * min(len(places), 2)  # so that one addition does not wait for the other
                for j, (p, g) in enumerate(zip(places, grads, strict=True)):
                    k = j % len(sums)
                    sums[k] = v.fma(g, v.load(v.offset(start, p)), sums[k])
                lanes = functools.reduce(builder.fadd, sums)
                ws = [v.load_splat(weights, i) for weights in listed.weights]
                return [v.fma(w, lanes, dot) for w, dot in zip(ws, dots, strict=True)]

            dots = loop(builder, listed.number, [builder.load(total) for total in totals], add)
            for dot, total in zip(dots, totals, strict=True):
                builder.store(dot, total)

        in_runs(v, vectors_, AT_ONCE, run)
        return [v.sum(builder.load(total)) for total in totals]

    lists = pixels[Pixels._fields.index("weights")]
    return types.UniTuple(grad.dtype, len(lists))(grad, pixels, vectors), emit


@for_any_width
def scatter(
    vector_bytes: int,
    grad: Any,
    image: Any,
    index: Any,
    weights: Any,
    count: Any,
    stride: Any,
    vectors: Any,
    scale: Any,
) -> Any:
    """pixel_i[c] += weights[i] * (grad[c] * scale), one pixel after the other."""

    def emit(builder: Any, grad_: Any, *values: Any) -> None:
        *pixels_, vectors_, scale_ = values
        v, listed = Vectors(builder, grad.dtype, vector_bytes), Pixels(*pixels_)
        factor = v.splat(scale_)

        def run(places: list[Any]) -> None:
            grads = [builder.fmul(v.load(v.offset(grad_, p)), factor) for p in places]

            def add(i: Any, _: list[Any]) -> list[Any]:
                start, w = _channels_of(v, listed, i), v.load_splat(listed.weights, i)
                for p, g in zip(places, grads, strict=True):
                    target = v.offset(start, p)
                    v.store(v.fma(w, g, v.load(target)), target)
                return []

            loop(builder, listed.number, [], add)

        in_runs(v, vectors_, AT_ONCE, run)

    return types.void(grad, image, index, weights, count, stride, vectors, scale), emit


def _define_largest(
    vector_bytes: int, of_points: bool, out: Any, winner: Any, pixels: Any, vectors: Any, first: Any, accumulate: Any
) -> Any:
    """out[c] = the largest of value_i[c], and of out[c] if accumulate; winner[c] = first + i, an int.

    Of pixels value_i is pixel_i; of points it is sum_k weights[4*i + k] * pixel_(4*i + k), k < 4, or 0 where
    index[4*i] is negative. The first of equal values wins, NaN over all.
    """

    def emit(builder: Any, out_: Any, winner_: Any, pixels_: Any, *rest: Any) -> None:
        vectors_, first_, accumulate_ = rest
        v, listed = Vectors(builder, out.dtype, vector_bytes), Pixels(*pixels_)
        integer = ir.IntType(8 * v.itemsize)
        numbers = ir.VectorType(integer, v.lanes)
        none = ir.Constant(numbers, [-1] * v.lanes)

        def run(places: list[Any]) -> None:
            (place,) = places
            out_place = v.offset(out_, place)
            winner_place = builder.bitcast(builder.gep(winner_, [place]), numbers.as_pointer())
            # At first nothing has been seen, which any value replaces: the first, whatever it is.
            before = builder.block
            with builder.if_then(accumulate_):
                earlier = [v.load(out_place), builder.load(winner_place)]
                earlier[1].align = v.itemsize
                inside = builder.block

            def compare(i: Any, carried: list[Any]) -> list[Any]:
                best, chosen = carried
                value = (_value_of_point if of_points else _value_of_pixel)(v, listed, i, place)
                # Larger or NaN, unless NaN is what has won already.
                larger = builder.fcmp_unordered(">", value, best)
                wins = builder.and_(larger, builder.fcmp_ordered("==", best, best))
                wins = builder.or_(wins, builder.icmp_signed("<", chosen, ir.Constant(numbers, [0] * v.lanes)))
                number = builder.add(first_, i)
                number = in_lanes(builder, builder.trunc(number, integer) if integer.width < 64 else number, v.lanes)
                return [builder.select(wins, value, best), builder.select(wins, number, chosen)]

            carried = merged(builder, [v.zero, none], before, earlier, inside)
            best, chosen = loop(builder, listed.number, carried, compare)
            v.store(best, out_place)
            builder.store(chosen, winner_place).align = v.itemsize

        in_runs(v, vectors_, (1,), run)

    return types.void(out, winner, pixels, vectors, first, accumulate), emit


def _value_of_pixel(v: Vectors, pixels: Pixels, i: Any, place: Any) -> Any:
    return v.load(v.offset(_channels_of(v, pixels, i), place))


def _value_of_point(v: Vectors, pixels: Pixels, i: Any, place: Any) -> Any:
    builder, base, total = v.builder, v.builder.mul(i, const(4)), v.zero
    low = builder.load(builder.gep(pixels.index, [base]))
    absent = builder.icmp_signed("<", low, ir.Constant(low.type, 0))
    for k in range(4):
        j = builder.add(base, const(k))
        read = builder.select(absent, const(0), place_of(builder, pixels.index, j))
        source = v.offset(v.offset(pixels.image, builder.mul(read, pixels.stride)), place)
        total = v.fma(v.load_splat(pixels.weights, j), v.load(source), total)
    return builder.select(absent, v.zero, total)


largest_pixel, largest_point = (for_any_width(_define_largest, of_points) for of_points in (False, True))
plane_weighted_sum, plane_weighted_dots = weighted_sum.of_width(0), weighted_dots.of_width(0)
plane_scatter = scatter.of_width(0)
