"""Weighted sums of a few rows of numbers, the transpose of that, and sums of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from pydeform.cpu.core.lanes import Vectors, for_any_width
from pydeform.cpu.core.primitive import const, loop, merged


@for_any_width
def copy_vectors(vector_bytes: int, out: Any, source: Any, vectors: Any) -> Any:
    """out[c] = source[c]."""

    def emit(builder: Any, out_: Any, source_: Any, vectors_: Any) -> None:
        v = Vectors(builder, source.dtype, vector_bytes)

        def body(i: Any, _: list[Any]) -> list[Any]:
            c = builder.mul(i, const(v.lanes))
            v.store(v.load(v.offset(source_, c)), v.offset(out_, c))
            return []

        loop(builder, vectors_, [], body)

    return types.void(out, source, vectors), emit


def blended(v: Vectors, weights: list[Any], values: list[Any]) -> Any:
    total = v.builder.fmul(weights[0], values[0])
    for w, value in zip(weights[1:], values[1:], strict=True):
        total = v.fma(w, value, total)
    return total


@for_any_width
def blend(vector_bytes: int, out: Any, image: Any, corners: Any, weights: Any, vectors: Any) -> Any:
    """out[c] = sum_k weights[k] * image[corners[k] + c], of two tuples of any length."""

    def emit(builder: Any, out_: Any, image_: Any, corners_: Any, weights_: Any, vectors_: Any) -> None:
        v = Vectors(builder, image.dtype, vector_bytes)
        starts, factors = [v.offset(image_, i) for i in corners_], [v.splat(w) for w in weights_]

        def body(i: Any, _: list[Any]) -> list[Any]:
            c = builder.mul(i, const(v.lanes))
            v.store(blended(v, factors, [v.load(v.offset(start, c)) for start in starts]), v.offset(out_, c))
            return []

        loop(builder, vectors_, [], body)

    return types.void(out, image, corners, weights, vectors), emit


def _define_blend_dots(
    vector_bytes: int,
    scatters: bool,
    out: Any,
    grad: Any,
    image: Any,
    grad_image: Any,
    corners: Any,
    weights: Any,
    channels: Any,
) -> Any:
    """`blend` into out, and the dots sum_c grad[c] * image[corners[k] + c]. If it `scatters`, the transpose of `blend`
    is added to grad_image."""

    def emit(builder: Any, *values: Any) -> list[Any]:
        out_, grad_, image_, grad_image_, corners_, weights_, channels_ = values
        v = Vectors(builder, out.dtype, vector_bytes)
        sources, targets = ([v.offset(start, i) for i in corners_] for start in (image_, grad_image_))
        factors = [v.splat(w) for w in weights_]

        def step(c: Any, dots: list[Any], load: Any, store: Any) -> list[Any]:
            g = v.load(v.offset(grad_, c))
            values = [load(v.offset(source, c)) for source in sources]
            v.store(blended(v, factors, values), v.offset(out_, c))
            if scatters:  # one corner after the other: several may be the same pixel
                for w, target in zip(factors, targets, strict=True):
                    pointer = v.offset(target, c)
                    store(v.fma(w, g, load(pointer)), pointer)
            return [v.fma(g, value, dot) for value, dot in zip(values, dots, strict=True)]

        total = v.sum_each(_all_channels(v, channels_, [v.zero] * len(sources), step))
        return [builder.extract_element(total, const(k)) for k in range(len(sources))]

    return weights(out, grad, image, grad_image, corners, weights, channels), emit


def _all_channels(v: Vectors, count: Any, sums: list[Any], step: Callable[..., list[Any]]) -> list[Any]:
    """sums = step(c, sums, load, store) for each vector of channels from c on, the last of which is masked: the lanes
    beyond belong to another block and another thread. There, gradients may be infinite: 0 times that is NaN, and stays
    out of the sums."""
    builder, lanes = v.builder, const(v.lanes)
    whole = builder.sdiv(count, lanes)
    sums = loop(builder, whole, sums, lambda i, sums: step(builder.mul(i, lanes), sums, v.load, v.store))
    done = builder.mul(whole, lanes)
    left = builder.sub(count, done)
    before = builder.block
    with builder.if_then(builder.icmp_signed(">", left, const(0))):
        mask = v.first_lanes(left)
        more = step(
            done,
            sums,
            lambda pointer: v.masked_load(pointer, mask),
            lambda value, pointer: v.masked_store(value, pointer, mask),
        )
        more = [builder.select(mask, *pair) for pair in zip(more, sums, strict=True)]
        inside = builder.block
    return merged(builder, sums, before, more, inside)


blend_dots, blend_dots_scatter = (for_any_width(_define_blend_dots, scatters) for scatters in (False, True))


@for_any_width
def sum_values(vector_bytes: int, source: Any, count: Any) -> Any:
    """source[0] + ... + source[count - 1], in four vectors of partial sums."""

    def emit(builder: Any, source_: Any, count_: Any) -> Any:
        v = Vectors(builder, source.dtype, vector_bytes)
        group = const(4 * v.lanes)

        def add_group(i: Any, sums: list[Any]) -> list[Any]:
            start = v.offset(source_, builder.mul(i, group))
            return [builder.fadd(s, v.load(v.offset(start, const(j * v.lanes)))) for j, s in enumerate(sums)]

        def add_one(i: Any, sums: list[Any]) -> list[Any]:
            return [builder.fadd(sums[0], builder.load(v.offset(source_, builder.add(done, i))))]

        full = builder.sdiv(count_, group)
        a, b, c, d = loop(builder, full, [v.zero] * 4, add_group)
        total = v.sum(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
        done = builder.mul(full, group)
        return loop(builder, builder.sub(count_, done), [total], add_one)[0]

    return source.dtype(source, count), emit
