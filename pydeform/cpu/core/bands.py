"""Explicit SIMD for RoI pooling where each channel is read for itself: what bins read, and sums over their rows.

A band is up to eight neighbouring pixels of a row, or eight bins, in eight lanes on every machine, so that sums have
one order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydeform.cpu.core.simd import _const, _loop, _shuffle, _Vectors
from pydeform.cpu.core.weighted import place_of

BAND = 8


def _band(builder: Any, element: Any) -> _Vectors:
    return _Vectors(builder, element, BAND * element.bitwidth // 8)


def _unary(builder: Any, v: _Vectors, name: str, value: Any) -> Any:
    return builder.call(v._intrinsic(name, [v.type], v.type), [value])


def _smaller(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """As many vectors as each has lanes: lane j of row i becomes lane i of row j, one bit of i and j at a time."""
    n = len(rows)
    distance = 1
    while distance < n:
        keep = [lane if not lane & distance else n + lane - distance for lane in range(n)]
        swap = [lane + distance if not lane & distance else n + lane for lane in range(n)]
        after = list(rows)
        for i in range(n):
            if not i & distance:
                pair = rows[i], rows[i + distance]
                after[i], after[i + distance] = (_shuffle(builder, *pair, lanes) for lanes in (keep, swap))
        rows, distance = after, 2 * distance
    return rows


@intrinsic  # type: ignore[misc]
def band_lists(
    typing_context: Any,
    starts: Any,
    sizes: Any,
    index: Any,
    weights: Any,
    entries: Any,
    counts: Any,
    row: Any,
    bins: Any,
    samples: Any,
    first_point: Any,
    reach: Any,
    highest: Any,
    count_inside: Any,
    flat: Any,
    sloped: Any,
) -> Any:
    """What up to eight bins of an axis read by linear interpolation, a lane for each (docs/math/roi.md, eq. 3).

    Points of bin s are y_i = starts[s] + (i + first_point) * sizes[s] / points, where points is `samples` or, if that
    is 0, ceil(sizes[s]). Those from -reach to highest + reach count, clamped to [0, highest]. The bin reads entries[s]
    pixels: index[s * row], its neighbours after it, weighted by weights[2 * s * row + k]; (2 * s + 1) * row + k is the
    derivative of that, if `sloped`. counts[s] is how many points count, or all of them without `count_inside`. With
    `flat` a point at a pixel moves nothing, and the pixel above it is not read. Eight entries are written for each of
    eight bins, also of fewer.

    entries[s] = -1 says that none of this is so: more than eight points or pixels, points that are further than a pixel
    apart, or in descending order. Gives whether none of the bins is like that.
    """
    real, number, boolean = starts.dtype, types.int64, types.boolean
    signature = boolean(
        *(starts, sizes, index, weights, entries, counts, number, number),
        *(real, real, real, real, boolean, boolean, boolean),
    )

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        starts_, sizes_, index_, weights_, entries_, counts_, row_, bins_, *numbers = arguments
        *numbers, count_inside_, flat_, sloped_ = numbers
        v = _band(builder, starts.dtype)
        samples_, first_point_, reach_, highest_ = (v.splat(number) for number in numbers)
        start, size = v.load(starts_), v.load(sizes_)
        constants = [ir.Constant(v.type, [float(j)] * BAND) for j in range(BAND + 1)]
        one, eight = constants[1], constants[BAND]
        nowhere = ir.Constant(v.type, [-1e30] * BAND)  # far from every pixel
        ordered = builder.fcmp_ordered
        masks = ir.VectorType(ir.IntType(1), BAND)

        def everywhere(flag: Any) -> Any:
            return builder.select(flag, ir.Constant(masks, [1] * BAND), ir.Constant(masks, [0] * BAND))

        flat_, count_inside_ = everywhere(flat_), everywhere(count_inside_)
        points = builder.select(ordered(">", samples_, v.zero), samples_, _unary(builder, v, "ceil", size))
        sound = builder.and_(
            builder.and_(ordered(">=", size, v.zero), ordered("<=", size, points)), ordered("<=", points, eight)
        )
        most_points = v._intrinsic("vector.reduce.fmax", [v.type], v.element)
        most = builder.call(most_points, [builder.select(sound, points, v.zero)])
        most = builder.fptosi(most, ir.IntType(64))
        places, steep = (cgutils.alloca_once(builder, v.type, size=_const(BAND)) for _ in range(2))
        lowest_counted, highest_counted = builder.fneg(reach_), builder.fadd(highest_, reach_)

        def add_point(i: Any, carried: list[Any]) -> list[Any]:
            low, high, inside = carried
            i_real = v.splat(builder.sitofp(i, v.element))
            y = builder.fadd(i_real, first_point_)
            y = builder.fadd(start, builder.fdiv(builder.fmul(y, size), points))
            counted = builder.and_(ordered(">=", y, lowest_counted), ordered("<=", y, highest_counted))
            counted = builder.and_(counted, ordered("<", i_real, points))
            at_start, at_end = ordered("<=", y, v.zero), ordered(">=", y, highest_)
            place = builder.select(at_end, highest_, builder.select(at_start, v.zero, y))
            place_or_nowhere = builder.select(counted, place, nowhere)
            builder.store(place_or_nowhere, builder.gep(places, [i]))
            with builder.if_then(sloped_):
                at_pixel = builder.and_(flat_, ordered("==", place, _unary(builder, v, "floor", place)))
                still = builder.or_(builder.or_(at_start, at_end), at_pixel)
                builder.store(builder.select(still, v.zero, one), builder.gep(steep, [i]))
            low = _smaller(builder, low, builder.select(counted, place, builder.fneg(nowhere)))
            high = _larger(builder, high, place_or_nowhere)
            return [low, high, builder.fadd(inside, builder.select(counted, one, v.zero))]

        low, high, inside = _loop(builder, most, [builder.fneg(nowhere), nowhere, v.zero], add_point)
        some = ordered(">", inside, v.zero)
        low, high = builder.select(some, low, v.zero), builder.select(some, high, v.zero)
        base, latest = _unary(builder, v, "floor", low), _unary(builder, v, "floor", high)
        at_last = builder.or_(ordered(">=", latest, highest_), builder.and_(flat_, ordered("==", high, latest)))
        pixels = builder.fadd(builder.fsub(latest, base), builder.select(at_last, one, constants[2]))
        pixels = builder.select(some, pixels, v.zero)
        sound = builder.and_(sound, ordered("<=", pixels, eight))
        base = builder.select(sound, base, v.zero)
        found = builder.fptosi(builder.select(sound, pixels, builder.fneg(one)), ir.VectorType(ir.IntType(64), BAND))
        builder.store(found, builder.bitcast(entries_, found.type.as_pointer())).align = 8
        v.store(builder.select(count_inside_, inside, points), counts_)

        index_type = ir.VectorType(ir.IntType(index.dtype.bitwidth), BAND)
        first_pixels = builder.fptosi(base, index_type)
        for s in range(BAND):
            run = _shuffle(builder, first_pixels, first_pixels, [s] * BAND)
            run = builder.add(run, ir.Constant(index_type, list(range(BAND))))
            target = builder.gep(index_, [builder.mul(row_, _const(s))])
            store = builder.store(run, builder.bitcast(target, index_type.as_pointer()))
            store.align = index.dtype.bitwidth // 8

        def store_rows(first: int, lanes: list[Any]) -> None:
            for s, values in enumerate(_transposed(builder, lanes)):
                v.store(values, v.offset(weights_, builder.mul(row_, _const(2 * s + first))))

        def add_weight(i: Any, carried: list[Any]) -> list[Any]:
            # Exact, also where `base` is so large that the numbers after it are rounded.
            place = builder.fsub(builder.load(builder.gep(places, [i])), base)
            distances = [_unary(builder, v, "fabs", builder.fsub(place, pixel)) for pixel in constants[:BAND]]
            near = [builder.fsub(one, distance) for distance in distances]
            return [builder.fadd(w, _larger(builder, n, v.zero)) for w, n in zip(carried, near, strict=True)]

        def add_slope(i: Any, carried: list[Any]) -> list[Any]:
            # What the lower pixel loses the upper one gains. Which they are is not to be seen from a distance: that of
            # a point close to a pixel is rounded to a whole one.
            gain = builder.load(builder.gep(steep, [i]))
            lower = builder.fsub(_unary(builder, v, "floor", builder.load(builder.gep(places, [i]))), base)
            at = [builder.select(ordered("==", lower, pixel), gain, v.zero) for pixel in constants[:BAND]]
            losses = [builder.fsub(v.zero, gain_here) for gain_here in at]
            before = [v.zero, *at[:-1]]
            changes = [builder.fadd(loss, gained) for loss, gained in zip(losses, before, strict=True)]
            return [builder.fadd(slope, change) for slope, change in zip(carried, changes, strict=True)]

        store_rows(0, _loop(builder, most, [v.zero] * BAND, add_weight))
        with builder.if_then(sloped_):
            store_rows(1, _loop(builder, most, [v.zero] * BAND, add_slope))
        fails = builder.and_(v.first_lanes(bins_), builder.not_(sound))
        return builder.icmp_unsigned("==", builder.bitcast(fails, ir.IntType(BAND)), ir.Constant(ir.IntType(BAND), 0))

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
        return builder.mul(place_of(builder, rows, i), width)

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
