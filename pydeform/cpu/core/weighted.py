"""Explicit SIMD for RoI pooling: sums, dots, scattered additions and maxima over a list of pixels.

A list has `count` pixels: their places in `index` and their weights. Pixel i starts at image[index[i] * stride], and
what is wanted is wanted for `vectors` vectors of channels from there on. "plane" primitives are the same with vectors
of one lane, for channels whose planes are read as they lie (stride 1): the same bits, since the order of every sum and
every rounding is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydeform.cpu.core.simd import VECTOR_BYTES, _const, _loop, _Vectors

AT_ONCE = (8, 4, 2, 1)  # vectors of sums in registers: each weight is loaded once for as many


def _in_runs(
    builder: Any, vectors: Any, most: int, body: Callable[[Any, int], None], sizes: tuple[int, ...] = AT_ONCE
) -> None:
    """body(first vector, how many): all `vectors`, as many at a time as there may be."""
    done = _const(0)
    for size in sizes:
        if size > most:
            continue
        runs = builder.sdiv(builder.sub(vectors, done), _const(size))

        def step(i: Any, _: list[Any], start: Any = done, size: int = size) -> list[Any]:
            body(builder.add(start, builder.mul(i, _const(size))), size)
            return []

        _loop(builder, runs, [], step)
        done = builder.add(done, builder.mul(runs, _const(size)))


def primitives(vector_bytes: int) -> SimpleNamespace:
    """The primitives for vectors of `vector_bytes`, 0: of one lane, for float32 and float64 pointers."""

    def vectors_of(builder: Any, element: Any) -> _Vectors:
        return _Vectors(builder, element, vector_bytes or element.bitwidth // 8)

    def pixel(builder: Any, v: _Vectors, image: Any, index: Any, i: Any, stride: Any) -> Any:
        """Pointer to pixel i of the list."""
        return v.offset(image, builder.mul(place_of(builder, index, i), stride))

    @intrinsic  # type: ignore[misc]
    def weighted_sum(
        typing_context: Any,
        out: Any,
        image: Any,
        index: Any,
        weight: Any,
        count: Any,
        stride: Any,
        vectors: Any,
        scale: Any,
        accumulate: Any,
    ) -> Any:
        """out[c] = (out[c], if accumulate, + sum_i weight[i] * pixel_i[c]) * scale."""
        number = types.int64
        signature = types.void(out, image, index, weight, number, number, number, out.dtype, types.boolean)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            out_, image_, index_, weight_, count_, stride_, vectors_, scale_, accumulate_ = arguments
            v = vectors_of(builder, out.dtype)
            factor = v.splat(scale_)

            def run(first: Any, size: int) -> None:
                places = [builder.mul(builder.add(first, _const(j)), _const(v.lanes)) for j in range(size)]

                def add(i: Any, sums: list[Any]) -> list[Any]:
                    start = pixel(builder, v, image_, index_, i, stride_)
                    w = v.splat(builder.load(builder.gep(weight_, [i])))
                    return [v.fma(w, v.load(v.offset(start, p)), s) for p, s in zip(places, sums, strict=True)]

                before = builder.block
                with builder.if_then(accumulate_):
                    earlier = [v.load(v.offset(out_, p)) for p in places]
                    inside = builder.block
                sums = []
                for value in earlier:
                    phi = builder.phi(v.type)
                    phi.add_incoming(v.zero, before)
                    phi.add_incoming(value, inside)
                    sums.append(phi)
                for p, total in zip(places, _loop(builder, count_, sums, add), strict=True):
                    v.store(builder.fmul(total, factor), v.offset(out_, p))

            _in_runs(builder, vectors_, 8, run)
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic  # type: ignore[misc]
    def weighted_dots(
        typing_context: Any,
        grad: Any,
        image: Any,
        index: Any,
        weight: Any,
        along_y: Any,
        along_x: Any,
        count: Any,
        stride: Any,
        vectors: Any,
    ) -> Any:
        """For each of the three lists of weights: sum_c grad[c] * sum_i weight[i] * pixel_i[c]."""
        number = types.int64
        result = types.UniTuple(grad.dtype, 3)
        signature = result(grad, image, index, weight, along_y, along_x, number, number, number)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            grad_, image_, index_, *weights, count_, stride_, vectors_ = arguments
            v = vectors_of(builder, grad.dtype)

            # The weights come last: what a pixel's channels add up to, lane by lane, serves all three.
            totals = [cgutils.alloca_once_value(builder, v.zero) for _ in weights]

            def run(first: Any, size: int) -> None:
                places = [builder.mul(builder.add(first, _const(j)), _const(v.lanes)) for j in range(size)]
                grads = [v.load(v.offset(grad_, p)) for p in places]

                def add(i: Any, dots: list[Any]) -> list[Any]:
                    start = pixel(builder, v, image_, index_, i, stride_)
                    sums = [v.zero] * min(size, 2)  # two at once, so that one addition does not wait for the other
                    for j, (p, g) in enumerate(zip(places, grads, strict=True)):
                        k = j % len(sums)
                        sums[k] = v.fma(g, v.load(v.offset(start, p)), sums[k])
                    lanes = functools.reduce(builder.fadd, sums)
                    ws = [v.splat(builder.load(builder.gep(weight, [i]))) for weight in weights]
                    return [v.fma(w, lanes, dot) for w, dot in zip(ws, dots, strict=True)]

                dots = _loop(builder, count_, [builder.load(total) for total in totals], add)
                for dot, total in zip(dots, totals, strict=True):
                    builder.store(dot, total)

            _in_runs(builder, vectors_, 8, run)
            return context.make_tuple(builder, result, [v.sum(builder.load(total)) for total in totals])

        return signature, codegen

    @intrinsic  # type: ignore[misc]
    def scatter(
        typing_context: Any,
        grad: Any,
        image: Any,
        index: Any,
        weight: Any,
        count: Any,
        stride: Any,
        vectors: Any,
        scale: Any,
    ) -> Any:
        """pixel_i[c] += weight[i] * (grad[c] * scale), one pixel after the other."""
        number = types.int64
        signature = types.void(grad, image, index, weight, number, number, number, grad.dtype)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            grad_, image_, index_, weight_, count_, stride_, vectors_, scale_ = arguments
            v = vectors_of(builder, grad.dtype)
            factor = v.splat(scale_)

            def run(first: Any, size: int) -> None:
                places = [builder.mul(builder.add(first, _const(j)), _const(v.lanes)) for j in range(size)]
                grads = [builder.fmul(v.load(v.offset(grad_, p)), factor) for p in places]

                def add(i: Any, _: list[Any]) -> list[Any]:
                    start = pixel(builder, v, image_, index_, i, stride_)
                    w = v.splat(builder.load(builder.gep(weight_, [i])))
                    for p, g in zip(places, grads, strict=True):
                        target = v.offset(start, p)
                        v.store(v.fma(w, g, v.load(target)), target)
                    return []

                _loop(builder, count_, [], add)

            _in_runs(builder, vectors_, 8, run)
            return context.get_dummy_value()

        return signature, codegen

    def make_largest(corners: int) -> Any:
        @intrinsic  # type: ignore[misc]
        def largest(
            typing_context: Any,
            out: Any,
            winner: Any,
            image: Any,
            index: Any,
            weight: Any,
            count: Any,
            stride: Any,
            vectors: Any,
            first: Any,
            accumulate: Any,
        ) -> Any:
            """out[c] = the largest of value_i[c], and of out[c] if accumulate; winner[c] = first + i, an int.

            With 4 corners, value_i = sum_k weight[4*i + k] * pixel_(4*i + k), or 0 where index[4*i] is negative; with 1
            it is pixel_i itself. The first of equal values wins, NaN over all.
            """
            number = types.int64
            signature = types.void(out, winner, image, index, weight, number, number, number, number, types.boolean)

            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                out_, winner_, image_, index_, weight_, count_, stride_, vectors_, first_, accumulate_ = arguments
                v = vectors_of(builder, out.dtype)
                integer = ir.IntType(8 * v.itemsize)
                numbers = ir.VectorType(integer, v.lanes)

                def number_vector(value: Any) -> Any:
                    narrow = builder.trunc(value, integer) if integer.width < 64 else value
                    undefined = ir.Constant(numbers, ir.Undefined)
                    one = builder.insert_element(undefined, narrow, ir.Constant(ir.IntType(32), 0))
                    lanes = ir.Constant(ir.VectorType(ir.IntType(32), v.lanes), [0] * v.lanes)
                    return builder.shuffle_vector(one, undefined, lanes)

                def value_of(i: Any, place: Any) -> Any:
                    if corners == 1:
                        return v.load(v.offset(pixel(builder, v, image_, index_, i, stride_), place))
                    base = builder.mul(i, _const(4))
                    absent = builder.icmp_signed(
                        "<", builder.load(builder.gep(index_, [base])), ir.Constant(_int_of(index), 0)
                    )
                    total = v.zero
                    for k in range(4):
                        j = builder.add(base, _const(k))
                        read = builder.select(absent, _const(0), place_of(builder, index_, j))
                        source = v.offset(v.offset(image_, builder.mul(read, stride_)), place)
                        w = v.splat(builder.load(builder.gep(weight_, [j])))
                        total = v.fma(w, v.load(source), total)
                    return builder.select(absent, v.zero, total)

                def run(vector: Any, _size: int) -> None:
                    place = builder.mul(vector, _const(v.lanes))
                    out_place = v.offset(out_, place)
                    winner_place = builder.bitcast(builder.gep(winner_, [place]), numbers.as_pointer())
                    # At first nothing has been seen, which any value replaces: the first, whatever it is.
                    before = builder.block
                    with builder.if_then(accumulate_):
                        earlier = v.load(out_place)
                        loaded = builder.load(winner_place)
                        loaded.align = v.itemsize
                        inside = builder.block
                    best, chosen = builder.phi(v.type), builder.phi(numbers)
                    best.add_incoming(v.zero, before)
                    best.add_incoming(earlier, inside)
                    chosen.add_incoming(ir.Constant(numbers, [-1] * v.lanes), before)
                    chosen.add_incoming(loaded, inside)

                    def compare(i: Any, carried: list[Any]) -> list[Any]:
                        best, chosen = carried
                        value = value_of(i, place)
                        # Larger or NaN, unless NaN is what has won already.
                        larger = builder.fcmp_unordered(">", value, best)
                        wins = builder.and_(larger, builder.fcmp_ordered("==", best, best))
                        none = builder.icmp_signed("<", chosen, ir.Constant(numbers, [0] * v.lanes))
                        wins = builder.or_(wins, none)
                        number_i = number_vector(builder.add(first_, i))
                        return [builder.select(wins, value, best), builder.select(wins, number_i, chosen)]

                    best, chosen = _loop(builder, count_, [best, chosen], compare)
                    v.store(best, out_place)
                    builder.store(chosen, winner_place).align = v.itemsize

                _in_runs(builder, vectors_, 1, run)
                return context.get_dummy_value()

            return signature, codegen

        return largest

    return SimpleNamespace(
        weighted_sum=weighted_sum,
        weighted_dots=weighted_dots,
        scatter=scatter,
        largest_pixel=make_largest(corners=1),
        largest_point=make_largest(corners=4),
    )


def _int_of(pointer: Any) -> Any:
    return ir.IntType(pointer.dtype.bitwidth)


def place_of(builder: Any, index: Any, i: Any) -> Any:
    place = builder.load(builder.gep(index, [i]))
    return builder.sext(place, ir.IntType(64)) if place.type.width < 64 else place


_HOST, _PLANE = primitives(VECTOR_BYTES), primitives(0)
weighted_sum, plane_weighted_sum = _HOST.weighted_sum, _PLANE.weighted_sum
weighted_dots, plane_weighted_dots = _HOST.weighted_dots, _PLANE.weighted_dots
scatter, plane_scatter = _HOST.scatter, _PLANE.scatter
largest_pixel, largest_point = _HOST.largest_pixel, _HOST.largest_point
