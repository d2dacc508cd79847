"""Weighted sums of a few rows of numbers, the transpose of that, and sums of one row."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from pydeform.cpu.core.lanes import Vectors, for_any_width, in_pieces, place_of
from pydeform.cpu.core.primitive import const, loop

AT_ONCE = (4, 2, 1)  # vectors


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


class Cell(NamedTuple):
    """The corners of one sample. Number k has its channels from image[index[k * step] * channels] on where `index` is a
    pointer, from image[k * channels] on where it is an int, and its weight in weights[k * step]."""

    image: Any
    index: Any
    weights: Any
    step: Any
    channels: Any

    def corner(self, v: Vectors, k: Any) -> tuple[Any, Any]:
        """Where it begins in its image, and its weight in all lanes."""
        place = v.builder.mul(k, self.step)
        number = place_of(v.builder, self.index, place) if isinstance(self.index.type, ir.PointerType) else k
        return v.builder.mul(number, self.channels), v.load_splat(self.weights, place)


def blended(v: Vectors, weights: list[Any], values: list[Any]) -> Any:
    total = v.builder.fmul(weights[0], values[0])
    for w, value in zip(weights[1:], values[1:], strict=True):
        total = v.fma(w, value, total)
    return total


@for_any_width
def blend(vector_bytes: int, out: Any, cell: Any, axes: Any, vectors: Any) -> Any:
    """out[c] = sum_k weights[k] * corner_k[c], of a `Cell` that has an axis for each item of `axes`, a tuple."""

    def emit(builder: Any, out_: Any, cell_: Any, _axes: Any, vectors_: Any) -> None:
        v, sample = Vectors(builder, cell[0].dtype, vector_bytes), Cell(*cell_)
        corners = [sample.corner(v, const(k)) for k in range(2 ** len(axes))]
        starts, weights = [v.offset(sample.image, start) for start, _ in corners], [w for _, w in corners]

        def body(i: Any, _: list[Any]) -> list[Any]:
            c = builder.mul(i, const(v.lanes))
            v.store(blended(v, weights, [v.load(v.offset(start, c)) for start in starts]), v.offset(out_, c))
            return []

        loop(builder, vectors_, [], body)

    return types.void(out, cell, axes, vectors), emit


def _define_blend_dots(
    vector_bytes: int, scatters: bool, out: Any, grad: Any, grad_image: Any, cell: Any, axes: Any, count: Any
) -> Any:
    """`blend` of `count` channels into out, and the dots sum_c grad[c] * corner_k[c]. If it `scatters`, the transpose
    of `blend` is added to grad_image.

    Corner by corner, a few vectors of channels at a time: these, their sums and their gradients stay in registers. The
    weights, dots and places of eight corners would not: that took 1.3 to 1.4 times as long.
    """
    corners = 2 ** len(axes)

    def emit(builder: Any, out_: Any, grad_: Any, grad_image_: Any, cell_: Any, _axes: Any, count_: Any) -> list[Any]:
        v, sample = Vectors(builder, out.dtype, vector_bytes), Cell(*cell_)
        dots = cgutils.alloca_once(builder, v.type, size=const(corners))
        for k in range(corners):
            builder.store(v.zero, builder.gep(dots, [const(k)]))

        def run(places: list[Any], load: Any, store: Any) -> None:
            grads = [load(v.offset(grad_, p)) for p in places]  # infinite ones may be beyond: 0 times that is NaN

            def add(k: Any, sums: list[Any]) -> list[Any]:
                start, w = sample.corner(v, k)
                starts, dot = [builder.add(start, p) for p in places], builder.gep(dots, [k])
                total, following = builder.load(dot), []
                for place, g, earlier in zip(starts, grads, sums, strict=True):
                    value = load(v.offset(sample.image, place))
                    total = v.fma(g, value, total)
                    following.append(v.fma(w, value, earlier))
                    # Before the next is read, or LLVM reads all first, and keeps them on the stack. Corners in their
                    # order: several may be the same pixel.
                    if scatters:
                        target = v.offset(grad_image_, place)
                        store(v.fma(w, g, load(target)), target)
                builder.store(total, dot)
                return following

            for p, total in zip(places, loop(builder, const(corners), [v.minus_zero] * len(places), add), strict=True):
                v.store(total, v.offset(out_, p))

        in_pieces(v, count_, AT_ONCE, run)
        total = v.sum_each([builder.load(builder.gep(dots, [const(k)])) for k in range(corners)])
        return [builder.extract_element(total, const(k)) for k in range(corners)]

    return types.UniTuple(out.dtype, corners)(out, grad, grad_image, cell, axes, count), emit


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
