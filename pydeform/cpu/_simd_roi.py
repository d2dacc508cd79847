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

from pydeform.cpu._simd import VECTOR_BYTES, _const, _loop, _Vectors

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
        return v.offset(image, builder.mul(_place(builder, index, i), stride))

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
                        read = builder.select(absent, _const(0), _place(builder, index_, j))
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


# Bands: up to eight neighbouring pixels of a row, in eight lanes on every machine, so that sums have one order.
BAND = 8


def _band(builder: Any, element: Any) -> _Vectors:
    return _Vectors(builder, element, BAND * element.bitwidth // 8)


def _unary(builder: Any, v: _Vectors, name: str, value: Any) -> Any:
    return builder.call(v._intrinsic(name, [v.type], v.type), [value])


@intrinsic  # type: ignore[misc]
def band_points(
    typing_context: Any,
    places: Any,
    steep: Any,
    start: Any,
    first: Any,
    first_point: Any,
    bin_size: Any,
    points: Any,
    count: Any,
    reach: Any,
    highest: Any,
    flat: Any,
    sloped: Any,
) -> Any:
    """Points y_i = start + (first + i + first_point) * bin_size / points of a bin, in ascending order.

    places[i] is y_i clamped to [0, highest], steep[i] (if sloped) whether it moves with y_i: 1 or 0; both are written
    up to the next multiple of eight. Gives how many points are below -reach, and how many neither that nor above
    highest + reach. With `flat` a point at a pixel is not steep.
    """
    real, boolean = places.dtype, types.boolean
    result = types.UniTuple(types.int64, 2)
    signature = result(places, steep, real, real, real, real, real, types.int64, real, real, boolean, boolean)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places_, steep_, *numbers, count_, reach_, highest_, flat_, sloped_ = arguments
        v = _band(builder, places.dtype)
        start_, first_, first_point_, bin_size_, points_ = (v.splat(number) for number in numbers)
        one = ir.Constant(v.type, [1.0] * BAND)
        lanes = ir.Constant(v.type, [float(lane) for lane in range(BAND)])
        lowest_counted = v.splat(builder.fneg(reach_))
        highest_counted, highest_ = v.splat(builder.fadd(highest_, reach_)), v.splat(highest_)
        mask = ir.VectorType(ir.IntType(1), BAND)
        nowhere_flat = builder.select(flat_, ir.Constant(mask, [0] * BAND), ir.Constant(mask, [1] * BAND))

        def number_of(lanes: Any) -> Any:
            bits = builder.bitcast(lanes, ir.IntType(BAND))
            return builder.zext(builder.ctpop(bits), ir.IntType(64))

        def add(k: Any, carried: list[Any]) -> list[Any]:
            below, inside = carried
            i = builder.mul(k, _const(BAND))
            number = builder.fadd(v.splat(builder.sitofp(i, v.element)), lanes)
            number = builder.fadd(builder.fadd(first_, number), first_point_)
            y = builder.fadd(start_, builder.fdiv(builder.fmul(number, bin_size_), points_))
            exists = v.first_lanes(builder.sub(count_, i))
            is_below = builder.fcmp_ordered("<", y, lowest_counted)
            counted = builder.and_(
                builder.fcmp_ordered(">=", y, lowest_counted), builder.fcmp_ordered("<=", y, highest_counted)
            )
            low, high = builder.fcmp_ordered("<=", y, v.zero), builder.fcmp_ordered(">=", y, highest_)
            place = builder.select(high, highest_, builder.select(low, v.zero, y))
            v.store(place, v.offset(places_, i))
            with builder.if_then(sloped_):
                between = builder.fcmp_ordered("!=", place, _unary(builder, v, "floor", place))
                moves = builder.and_(builder.not_(builder.or_(low, high)), builder.or_(between, nowhere_flat))
                v.store(builder.select(moves, one, v.zero), v.offset(steep_, i))
            below = builder.add(below, number_of(builder.and_(is_below, exists)))
            return [below, builder.add(inside, number_of(builder.and_(counted, exists)))]

        blocks = builder.sdiv(builder.add(count_, _const(BAND - 1)), _const(BAND))
        return context.make_tuple(builder, result, _loop(builder, blocks, [_const(0), _const(0)], add))

    return signature, codegen


@intrinsic  # type: ignore[misc]
def band_weights(
    typing_context: Any,
    weights: Any,
    slopes: Any,
    points: Any,
    steep: Any,
    first: Any,
    count: Any,
    base: Any,
    sloped: Any,
) -> Any:
    """What linear interpolation at `count` points from points[first] on gives to pixels base ... base + 7, summed.

    weights[j] = sum_i max(0, 1 - |points[i] - (base + j)|); its derivative slopes[j], if sloped, is sum_i steep[i],
    minus it for the pixel below.
    """
    signature = types.void(weights, slopes, points, steep, types.int64, types.int64, points.dtype, types.boolean)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights_, slopes_, points_, steep_, first_, count_, base_, sloped_ = arguments
        points_, steep_ = builder.gep(points_, [first_]), builder.gep(steep_, [first_])
        v = _band(builder, weights.dtype)
        lanes = ir.Constant(v.type, [float(lane) for lane in range(BAND)])
        pixels = builder.fadd(v.splat(base_), lanes)
        one = ir.Constant(v.type, [1.0] * BAND)

        def distance_of(i: Any) -> Any:
            return builder.fsub(v.splat(builder.load(builder.gep(points_, [i]))), pixels)

        def add_weight(i: Any, carried: list[Any]) -> list[Any]:
            near = builder.fsub(one, _unary(builder, v, "fabs", distance_of(i)))
            inside = builder.fcmp_ordered(">", near, v.zero)
            return [builder.fadd(carried[0], builder.select(inside, near, v.zero))]

        def add_slope(i: Any, carried: list[Any]) -> list[Any]:
            distance = distance_of(i)
            s = v.splat(builder.load(builder.gep(steep_, [i])))
            # The lower pixel, at a distance from 0 up to 1, loses what the upper one gains.
            lower = builder.fcmp_ordered(">=", distance, v.zero)
            signed = builder.select(lower, builder.fsub(v.zero, s), s)
            # At a pixel the upper one has no weight, but a slope.
            at_either = builder.and_(
                builder.fcmp_ordered(">=", distance, builder.fsub(v.zero, one)),
                builder.fcmp_ordered("<", distance, one),
            )
            return [builder.fadd(carried[0], builder.select(at_either, signed, v.zero))]

        # The slopes first: they may lie where `steep` does, as the weights may where `points` do.
        with builder.if_then(sloped_):
            v.store(_loop(builder, count_, [v.zero], add_slope)[0], slopes_)
        v.store(_loop(builder, count_, [v.zero], add_weight)[0], weights_)
        return context.get_dummy_value()

    return signature, codegen


def _band_rows(
    builder: Any,
    v: _Vectors,
    geometry: tuple[Any, Any, Any, Any, Any],
    mask: Any,
    carried: list[Any],
    body: Callable[[Any, Any, list[Any]], tuple[Any, list[Any]]],
) -> list[Any]:
    """carried = body(i, eight pixels of row i, carried) for each row; body may give the pixels new values as well.

    Masked loads are slow and masked stores slower, so whole vectors are read, whose lanes outside of the mask are to be
    left aside and are written back as they were, unless they reach past the end of the plane.
    """
    plane, rows, count, width, room = geometry

    def start_of(i: Any) -> Any:
        return builder.mul(_place(builder, rows, i), width)

    def all_rows(load: Callable[[Any], Any], store: Callable[[Any, Any, Any], None]) -> list[Any]:
        def step(i: Any, carried: list[Any]) -> list[Any]:
            row = v.offset(plane, start_of(i))
            before = load(row)
            after, carried = body(i, before, carried)
            if after is not None:
                store(after, before, row)
            return carried

        return _loop(builder, count, carried, step)

    last = builder.add(start_of(builder.sub(count, _const(1))), _const(BAND))
    with builder.if_else(builder.icmp_signed("<=", last, room)) as (inside, at_end):
        with inside:
            results = all_rows(v.load, lambda after, before, row: v.store(builder.select(mask, after, before), row))
            end_inside = builder.block
        with at_end:
            masked = all_rows(
                lambda row: v.masked_load(row, mask), lambda after, before, row: v.masked_store(after, row, mask)
            )
            end_masked = builder.block
    merged = []
    for result, other in zip(results, masked, strict=True):
        phi = builder.phi(result.type)
        phi.add_incoming(result, end_inside)
        phi.add_incoming(other, end_masked)
        merged.append(phi)
    return merged


@intrinsic  # type: ignore[misc]
def band_dots(
    typing_context: Any,
    plane: Any,
    rows: Any,
    y_weights: Any,
    y_slopes: Any,
    count: Any,
    width: Any,
    room: Any,
    x_weights: Any,
    x_slopes: Any,
    columns: Any,
) -> Any:
    """Sums over rows and columns of the plane: with both weights, with y's slopes, and with x's.

    There is one row at least, in ascending order; the plane has `room` pixels. Eight weights can be read for x.
    """
    number = types.int64
    result = types.UniTuple(plane.dtype, 3)
    signature = result(plane, rows, y_weights, y_slopes, number, number, number, x_weights, x_slopes, number)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        plane_, rows_, y_weights_, y_slopes_, count_, width_, room_, x_weights_, x_slopes_, columns_ = arguments
        v = _band(builder, plane.dtype)
        mask = v.first_lanes(columns_)

        def add(i: Any, values: Any, carried: list[Any]) -> tuple[Any, list[Any]]:
            return None, [
                v.fma(v.splat(builder.load(builder.gep(factors, [i]))), values, total)
                for factors, total in zip((y_weights_, y_slopes_), carried, strict=True)
            ]

        geometry = plane_, rows_, count_, width_, room_
        summed, sloped = _band_rows(builder, v, geometry, mask, [v.zero, v.zero], add)
        weights, slopes = v.load(x_weights_), v.load(x_slopes_)
        products = [builder.fmul(*pair) for pair in ((summed, weights), (sloped, weights), (summed, slopes))]
        return context.make_tuple(
            builder, result, [v.sum(builder.select(mask, product, v.zero)) for product in products]
        )

    return signature, codegen


@intrinsic  # type: ignore[misc]
def band_sum(
    typing_context: Any,
    plane: Any,
    rows: Any,
    y_weights: Any,
    count: Any,
    width: Any,
    room: Any,
    x_weights: Any,
    columns: Any,
) -> Any:
    """The first of `band_dots`."""
    number = types.int64
    signature = plane.dtype(plane, rows, y_weights, number, number, number, x_weights, number)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        plane_, rows_, y_weights_, count_, width_, room_, x_weights_, columns_ = arguments
        v = _band(builder, plane.dtype)
        mask = v.first_lanes(columns_)

        def add(i: Any, values: Any, carried: list[Any]) -> tuple[Any, list[Any]]:
            return None, [v.fma(v.splat(builder.load(builder.gep(y_weights_, [i]))), values, carried[0])]

        (summed,) = _band_rows(builder, v, (plane_, rows_, count_, width_, room_), mask, [v.zero], add)
        return v.sum(builder.select(mask, builder.fmul(summed, v.load(x_weights_)), v.zero))

    return signature, codegen


@intrinsic  # type: ignore[misc]
def band_scatter(
    typing_context: Any,
    plane: Any,
    rows: Any,
    y_weights: Any,
    count: Any,
    width: Any,
    room: Any,
    x_weights: Any,
    columns: Any,
    grad: Any,
) -> Any:
    """plane[row, column] += y_weights[row] * (x_weights[column] * grad), in a plane that nobody else writes to."""
    number = types.int64
    signature = types.void(plane, rows, y_weights, number, number, number, x_weights, number, plane.dtype)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        plane_, rows_, y_weights_, count_, width_, room_, x_weights_, columns_, grad_ = arguments
        v = _band(builder, plane.dtype)
        along = builder.fmul(v.load(x_weights_), v.splat(grad_))

        def add(i: Any, values: Any, _: list[Any]) -> tuple[Any, list[Any]]:
            return v.fma(v.splat(builder.load(builder.gep(y_weights_, [i]))), along, values), []

        _band_rows(builder, v, (plane_, rows_, count_, width_, room_), v.first_lanes(columns_), [], add)
        return context.get_dummy_value()

    return signature, codegen


def _int_of(pointer: Any) -> Any:
    return ir.IntType(pointer.dtype.bitwidth)


def _place(builder: Any, index: Any, i: Any) -> Any:
    place = builder.load(builder.gep(index, [i]))
    return builder.sext(place, ir.IntType(64)) if place.type.width < 64 else place


_HOST, _PLANE = primitives(VECTOR_BYTES), primitives(0)
weighted_sum, plane_weighted_sum = _HOST.weighted_sum, _PLANE.weighted_sum
weighted_dots, plane_weighted_dots = _HOST.weighted_dots, _PLANE.weighted_dots
scatter, plane_scatter = _HOST.scatter, _PLANE.scatter
largest_pixel, largest_point = _HOST.largest_pixel, _HOST.largest_point
