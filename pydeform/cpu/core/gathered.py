"""Sums over a list of samples, each a few corners with shares of them: forward, its transpose, and dots.

Only the last vector of channels is masked: what lies beyond belongs to another group, and to another thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from pydeform.cpu.core.blend import blended
from pydeform.cpu.core.lanes import Vectors, for_any_width, in_lanes, in_pieces
from pydeform.cpu.core.primitive import INT, const, loop, primitive
from pydeform.cpu.core.simd import CACHE_LINE, VECTOR_BYTES, ask_for
from pydeform.cpu.core.vector import Vector

AT_ONCE = (4, 2, 1)  # vectors


class Corners(NamedTuple):
    """Samples, one after the other, from an entry of their tables on (`place_in`)."""

    maps: Any
    starts: Any  # where in them a pixel's first channel is
    shares: Any
    entry: int
    channel: int  # the first that is meant
    listed: Any  # by which numbers their weights lie; None: one after the other


def _lanes(number: Any) -> int:
    return 8 * VECTOR_BYTES // int(number.bitwidth)


def _corners(axes: Any) -> int:
    return int(2 ** len(axes))


@primitive
def steps_to(pointer: Any, other: Any) -> Any:
    """How many numbers `other` lies beyond `pointer`, also where the two are of different arrays."""

    def emit(builder: Any, *pointers: Any) -> Any:
        start, end = (builder.ptrtoint(pointer_, INT) for pointer_ in pointers)
        return builder.sdiv(builder.sub(end, start), const(pointer.dtype.bitwidth // 8))

    return types.int64(pointer, other), emit


@primitive
def starts_of(pixels: Any, channels: Any) -> Any:
    """Vector of pixels * channels, all of 32 bits, as integers of 64, for which machines have an instruction."""
    wide = ir.VectorType(INT, pixels.lanes)
    half = ir.Constant(wide, [32] * pixels.lanes)

    def emit(builder: Any, pixels_: Any, channels_: Any) -> Any:
        # Shifted up and down, so that LLVM sees how small they are.
        factor = builder.ashr(builder.shl(in_lanes(builder, channels_, pixels.lanes), half), half)
        return builder.mul(builder.sext(pixels_, wide), factor)

    return Vector(types.int64, pixels.lanes)(pixels, channels), emit


@primitive
def place_in(entry: Any, like: Any, axes: Any) -> Any:
    """Where a table has the first corner of an entry; the others follow `lanes_of(like)` apart, since a vector of
    entries has its corners side by side. `axes`: a tuple with an item for each axis of a cell."""

    def emit(builder: Any, entry_: Any, _like: Any, _axes: Any) -> Any:
        return _place(builder, entry_, _lanes(like.dtype), _corners(axes))

    return types.int64(entry, like, axes), emit


def _number(v: Vectors, samples: Corners, i: Any) -> Any:
    """By which the weight of the i-th sample lies."""
    return i if samples.listed is None else v.builder.load(v.offset(samples.listed, i))


def _opened(corners: Any, values: list[Any]) -> Corners:
    """`values` are those of a Corners of the type `corners`."""
    samples = Corners(*values)
    return samples._replace(listed=None) if corners[Corners._fields.index("listed")] == types.none else samples


def _place(builder: Any, entry: Any, lanes: int, corners: int) -> Any:
    lane = builder.and_(entry, const(lanes - 1))
    return builder.add(builder.mul(builder.sub(entry, lane), const(corners)), lane)


def _starts(v: Vectors, samples: Corners, place: Any, step: int, corners: int) -> list[Any]:
    """Where the pixels of the sample at a place of the tables are."""
    return [v.builder.load(v.offset(samples.starts, _beyond(v, place, k * step))) for k in range(corners)]


def _channels(v: Vectors, samples: Corners, places: list[Any]) -> list[Any]:
    """Pointers to those channels of the first pixel that are at places of a result."""
    return [v.offset(samples.maps, v.builder.add(samples.channel, place)) for place in places]


def _shares(v: Vectors, samples: Corners, place: Any, step: int, corners: int) -> list[Any]:
    return [v.load_splat(samples.shares, _beyond(v, place, k * step)) for k in range(corners)]


def _beyond(v: Vectors, place: Any, number: int) -> Any:
    return v.builder.add(place, const(number))


class Runs(NamedTuple):
    """Runs of samples, one after the other, and how far one has what is its own from the next."""

    number: int
    entries: int  # in the samples' tables
    pixels: int  # of channels in pixels,
    results: int  # and in results or their gradients
    weights: int


def _for_each(v: Vectors, runs: Runs, samples: Corners, body: Callable[[Any, Corners], None]) -> None:
    """body(number of a run, its samples)"""
    builder = v.builder

    def step(i: Any, _: list[Any]) -> list[Any]:
        entry = builder.add(samples.entry, builder.mul(i, runs.entries))
        channel = builder.add(samples.channel, builder.mul(i, runs.pixels))
        body(i, samples._replace(entry=entry, channel=channel))
        return []

    loop(builder, runs.number, [], step)


@for_any_width
def sum_samples(
    vector_bytes: int,
    out: Any,
    corners: Any,
    runs: Any,
    axes: Any,
    weights: Any,
    step: Any,
    count: Any,
    channels: Any,
) -> Any:
    """out[c] = sum_i weights[i * step] * sample_i[c], for each run."""
    shape = _lanes(out.dtype), _corners(axes)

    def emit(builder: Any, out_: Any, corners_: Any, runs_: Any, _axes: Any, weights_: Any, *rest: Any) -> None:
        step_, count_, channels_ = rest
        v, all_samples, apart = Vectors(builder, out.dtype, vector_bytes), _opened(corners, corners_), Runs(*runs_)

        def run(places: list[Any], load: Any, store: Any) -> None:
            def sum_run(number: Any, samples: Corners) -> None:
                target = v.offset(out_, builder.mul(number, apart.results))
                own_weights = v.offset(weights_, builder.mul(number, apart.weights))
                channels = _channels(v, samples, places)

                def add(i: Any, sums: list[Any]) -> list[Any]:
                    at = _place(builder, builder.add(samples.entry, i), *shape)
                    starts, shares = _starts(v, samples, at, *shape), _shares(v, samples, at, *shape)
                    w = v.load_splat(own_weights, builder.mul(_number(v, samples, i), step_))
                    values = (blended(v, shares, [load(v.offset(c, start)) for start in starts]) for c in channels)
                    return [v.fma(w, value, total) for value, total in zip(values, sums, strict=True)]

                for place, total in zip(places, loop(builder, count_, [v.zero] * len(places), add), strict=True):
                    store(total, v.offset(target, place))

            _for_each(v, apart, all_samples, sum_run)

        in_pieces(v, channels_, AT_ONCE, run)

    return types.void(out, corners, runs, axes, weights, step, count, channels), emit


@for_any_width
def scatter_samples(
    vector_bytes: int,
    grad: Any,
    corners: Any,
    runs: Any,
    axes: Any,
    weights: Any,
    step: Any,
    count: Any,
    channels: Any,
) -> Any:
    """The transpose: sample_i[c] += weights[i * step] * grad[c], onto each corner by its share, one after the other."""
    shape = _lanes(grad.dtype), _corners(axes)

    def emit(builder: Any, grad_: Any, corners_: Any, runs_: Any, _axes: Any, weights_: Any, *rest: Any) -> None:
        step_, count_, channels_ = rest
        v, all_samples, apart = Vectors(builder, grad.dtype, vector_bytes), _opened(corners, corners_), Runs(*runs_)

        def prepare(number: Any, places: list[Any], load: Any) -> tuple[Any, list[Any]]:
            source = v.offset(grad_, builder.mul(number, apart.results))
            own_weights = v.offset(weights_, builder.mul(number, apart.weights))
            return own_weights, [load(v.offset(source, place)) for place in places]

        def scatter(i: Any, samples: Corners, given: Any, places: list[Any], load: Any, store: Any) -> None:
            own_weights, grads = given
            w = v.load_splat(own_weights, builder.mul(_number(v, samples, i), step_))
            weighted = [builder.fmul(w, g) for g in grads]
            at = _place(builder, builder.add(samples.entry, i), *shape)
            starts, shares = _starts(v, samples, at, *shape), _shares(v, samples, at, *shape)
            for start, share in zip(starts, shares, strict=True):
                for c, g in zip(_channels(v, samples, places), weighted, strict=True):
                    target = v.offset(c, start)
                    store(v.fma(share, g, load(target)), target)

        _in_order(v, apart, all_samples, shape, count_, channels_, prepare, scatter)

    return types.void(grad, corners, runs, axes, weights, step, count, channels), emit


@for_any_width
def corner_dots(
    vector_bytes: int, dots: Any, apart: Any, grad: Any, corners: Any, runs: Any, axes: Any, count: Any, channels: Any
) -> Any:
    """dots[k] of each sample, side by side, = sum_c grad[c] * corner_k[c]; the next run's lie `apart` further."""
    shape = _lanes(grad.dtype), _corners(axes)

    def emit(builder: Any, dots_: Any, apart_: Any, grad_: Any, corners_: Any, runs_: Any, *rest: Any) -> None:
        _axes, count_, channels_ = rest
        v, all_samples, by = Vectors(builder, grad.dtype, vector_bytes), _opened(corners, corners_), Runs(*runs_)

        def prepare(number: Any, places: list[Any], load: Any) -> tuple[Any, list[Any]]:
            source = v.offset(grad_, builder.mul(number, by.results))
            own_dots = v.offset(dots_, builder.mul(number, apart_))
            return own_dots, [load(v.offset(source, place)) for place in places]

        def dot(i: Any, samples: Corners, given: Any, places: list[Any], load: Any, _store: Any) -> None:
            own_dots, grads = given
            at, channels = _place(builder, builder.add(samples.entry, i), *shape), _channels(v, samples, places)
            sums = []
            for start in _starts(v, samples, at, *shape):
                products = [(g, load(v.offset(c, start))) for g, c in zip(grads, channels, strict=True)]
                sums.append(functools.reduce(lambda total, pair: v.fma(pair[0], pair[1], total), products, v.zero))
            is_first = builder.icmp_signed("==", places[0], const(0))
            _add_to(v, v.offset(own_dots, builder.mul(i, const(shape[1]))), v.sum_each(sums), is_first)

        _in_order(v, by, all_samples, shape, count_, channels_, prepare, dot)

    return types.void(dots, apart, grad, corners, runs, axes, count, channels), emit


def _in_order(
    v: Vectors,
    runs: Runs,
    samples: Corners,
    shape: Any,
    count: Any,
    channels: Any,
    prepare: Callable[..., Any],
    body: Callable[..., None],
) -> None:
    """body(number of a sample, its run's samples, what `prepare` made of that run and some channels, their places,
    load, store). Run by run; or, where all have the same samples, sample by sample: its pixels are read in one go, and
    asked for while another is at work."""
    builder = v.builder

    def of_runs(places: list[Any], load: Any, store: Any) -> None:
        def of_run(number: Any, own: Corners) -> None:
            given = prepare(number, places, load)

            def step(i: Any, _: list[Any]) -> list[Any]:
                body(i, own, given, places, load, store)
                return []

            loop(builder, count, [], step)

        _for_each(v, runs, samples, of_run)

    lines = builder.sdiv(builder.mul(builder.mul(runs.number, channels), const(v.itemsize)), const(CACHE_LINE))

    def of_sample(i: Any, _: list[Any]) -> list[Any]:
        following = builder.add(i, const(1))
        following = builder.select(builder.icmp_signed("<", following, count), following, i)
        at = _place(builder, builder.add(samples.entry, following), *shape)
        for start in _starts(v, samples, at, *shape):
            ask_for(builder, v.offset(samples.maps, builder.add(samples.channel, start)), lines)

        def of_run(number: Any, own: Corners) -> None:
            def some(places: list[Any], load: Any, store: Any) -> None:
                body(i, own, prepare(number, places, load), places, load, store)

            in_pieces(v, channels, AT_ONCE, some)

        _for_each(v, runs, samples, of_run)
        return []

    if samples.listed is None:
        in_pieces(v, channels, AT_ONCE, of_runs)
    else:
        loop(builder, count, [], of_sample)


def _add_to(v: Vectors, pointer: Any, some: Any, is_first: Any) -> None:
    """What is there counts as zero where `is_first`."""
    target = v.builder.bitcast(pointer, some.type.as_pointer())
    before = v.builder.load(target)
    before.align = v.itemsize
    before = v.builder.select(is_first, ir.Constant(some.type, [0.0] * some.type.count), before)
    v.builder.store(v.builder.fadd(before, some), target).align = v.itemsize
