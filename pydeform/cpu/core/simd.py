"""Explicit SIMD for Numba: the few inner loops that LLVM does not vectorise well by itself.

Each primitive is a function that emits LLVM vector code of a given width. `primitives(vector_bytes)` builds the set
for any width (16: SSE and NEON, 32: AVX2, 64: AVX-512); the module exports the set for this machine. They take
pointers, made by `at(array, (i, j, ...))`, and check nothing: the kernels above them own all bounds.

Sums run in one fixed order at a given width, so a result depends on neither threads nor tiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

CACHE_LINE = 64
_INT = ir.IntType(64)
_LANE = ir.IntType(32)
_BITS = ir.IntType(16)


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def host_features() -> set[str]:
    """Of the processor, as far as Numba's code generator may use them."""
    if config.CPU_FEATURES is not None:
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    if config.CPU_NAME == "generic":
        return set()
    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


def host_vector_bytes() -> int:
    """Width of the vectors that Numba's code generator may use here."""
    features = host_features()
    if {"avx512f", "avx512vl"} <= features:
        return 64
    return 32 if {"avx2", "fma"} <= features else 16


def second_level_cache() -> int:
    """Its bytes, of one core; 1 MB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (AttributeError, OSError, ValueError):
        return 1 << 20


def rows_for(vector_bytes: int) -> tuple[int, int, int]:
    """Rows of a register block that is as wide as a panel, two vectors, and one vector wide. Its sums have room in the
    registers, of which there are 32 or 16, with a row of the panel and a broadcast. Not in all of the 32: schedulers
    that load many factors first would spill."""
    return (6, 8, 16) if vector_bytes == 64 else (6, 6, 8)


def panel_vectors(vector_bytes: int) -> int:
    """Vectors of a panel of a product's second factor: the wider, the fewer numbers of the first are loaded."""
    return 4 if vector_bytes == 64 else 2


def _const(value: int) -> Any:
    return ir.Constant(_INT, value)


def _shuffle(builder: Any, low: Any, high: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_LANE, len(lanes)), lanes))


class _Vectors:
    """Emits loads, stores and arithmetic on vectors of one element type."""

    def __init__(self, builder: Any, element: Any, vector_bytes: int) -> None:
        self.builder = builder
        self.element = ir.FloatType() if element == types.float32 else ir.DoubleType()
        self.itemsize = element.bitwidth // 8
        self.lanes = vector_bytes // self.itemsize
        self.type = ir.VectorType(self.element, self.lanes)
        self.zero = ir.Constant(self.type, [0.0] * self.lanes)

    def offset(self, pointer: Any, elements: Any) -> Any:
        return self.builder.gep(pointer, [elements])

    def _as_vector(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.type.as_pointer())

    def load(self, pointer: Any) -> Any:
        value = self.builder.load(self._as_vector(pointer))
        value.align = self.itemsize
        return value

    def store(self, value: Any, pointer: Any) -> None:
        """The numbers, or what is left of them in bfloat16 where the pointer is one to 16 bits."""
        if pointer.type.pointee == _BITS:
            narrow = self.rounded(value)
            self.builder.store(narrow, self.builder.bitcast(pointer, narrow.type.as_pointer())).align = 2
            return
        self.builder.store(value, self._as_vector(pointer)).align = self.itemsize

    def rounded(self, value: Any) -> Any:
        """float32 as the bits of bfloat16."""
        narrow = self.builder.fptrunc(value, ir.VectorType(BFloat(), self.lanes))
        return self.builder.bitcast(narrow, ir.VectorType(_BITS, self.lanes))

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(_LANE, 0))
        return _shuffle(self.builder, one, undefined, [0] * self.lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, fused where the machine can."""
        return self.builder.call(self._intrinsic("fmuladd", [self.type] * 3, self.type), [x, y, z])

    def sum(self, vector: Any) -> Any:
        """Sum of the lanes, halves first."""
        width = self.lanes
        while width > 1:
            half = width // 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low = _shuffle(self.builder, vector, undefined, list(range(half)))
            high = _shuffle(self.builder, vector, undefined, list(range(half, width)))
            vector, width = self.builder.fadd(low, high), half
        return self.builder.extract_element(vector, ir.Constant(_LANE, 0))

    def first_lanes(self, count: Any) -> Any:
        """Mask that is true in the first `count` lanes, which is compared in integers of the lanes' own width."""
        integer = ir.IntType(8 * self.itemsize)
        lanes = ir.Constant(ir.VectorType(integer, self.lanes), list(range(self.lanes)))
        undefined = ir.Constant(lanes.type, ir.Undefined)
        most = self.builder.select(self.builder.icmp_signed("<", count, _const(self.lanes)), count, _const(self.lanes))
        narrow = most if integer.width == 64 else self.builder.trunc(most, integer)
        one = self.builder.insert_element(undefined, narrow, ir.Constant(_LANE, 0))
        return self.builder.icmp_signed("<", lanes, _shuffle(self.builder, one, undefined, [0] * self.lanes))

    def masked_load(self, pointer: Any, mask: Any) -> Any:
        load = self._intrinsic(
            "masked.load", [self.type.as_pointer(), _LANE, mask.type, self.type], self.type, f".p0{self._suffix()}"
        )
        align = ir.Constant(_LANE, self.itemsize)
        return self.builder.call(load, [self._as_vector(pointer), align, mask, self.zero])

    def masked_store(self, value: Any, pointer: Any, mask: Any) -> None:
        store = self._intrinsic(
            "masked.store", [self.type, self.type.as_pointer(), _LANE, mask.type], ir.VoidType(), f".p0{self._suffix()}"
        )
        align = ir.Constant(_LANE, self.itemsize)
        self.builder.call(store, [value, self._as_vector(pointer), align, mask])

    def _suffix(self) -> str:
        return f"v{self.lanes}f{8 * self.itemsize}"

    def _intrinsic(self, name: str, arguments: list[Any], result: Any, more: str = "") -> Any:
        module = self.builder.module
        full = f"llvm.{name}.{self._suffix()}{more}"
        if full in module.globals:
            return module.globals[full]
        return ir.Function(module, ir.FunctionType(result, arguments), name=full)


def _loop(builder: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """for i in range(count): carried = body(i, carried), for any count, without branches around the body."""
    before = builder.block
    head = builder.append_basic_block("head")
    inside = builder.append_basic_block("body")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_INT)
    index.add_incoming(_const(0), before)
    values = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        values.append(phi)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    results = body(index, values)
    following = builder.add(index, _const(1))
    index.add_incoming(following, builder.block)
    for phi, result in zip(values, results, strict=True):
        phi.add_incoming(result, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _put_sums(v: _Vectors, sums: list[Any], c: Any, c_row: Any, places: list[Any], accumulate: Any) -> None:
    """The sums of a block, row by row, each at `places` of its row of c, in place of or added to what is there."""
    builder, targets = v.builder, []
    for r in range(len(sums) // len(places)):
        c_r = v.offset(c, builder.mul(c_row, _const(r)))
        targets += [v.offset(c_r, place) for place in places]
    with builder.if_else(accumulate) as (add, replace):
        with add:
            for target, total in zip(targets, sums, strict=True):
                v.store(builder.fadd(v.load(target), total), target)
        with replace:
            for target, total in zip(targets, sums, strict=True):
                v.store(total, target)


@intrinsic  # type: ignore[misc]
def at(typing_context: Any, array: Any, index: Any) -> Any:
    """Pointer to array[index] of a C-contiguous array; `index` is a tuple with one int per axis."""
    if not (isinstance(array, types.Array) and array.layout == "C" and len(index) == array.ndim):
        return None
    signature = types.CPointer(array.dtype)(array, types.UniTuple(types.int64, array.ndim))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(array)(context, builder, arguments[0])
        shape = cgutils.unpack_tuple(builder, view.shape, array.ndim)
        flat = _const(0)
        for axis, i in enumerate(cgutils.unpack_tuple(builder, arguments[1], array.ndim)):
            flat = builder.add(builder.mul(flat, shape[axis]), i) if axis else i
        return builder.gep(view.data, [flat])

    return signature, codegen


@intrinsic  # type: ignore[misc]
def vectors_of(typing_context: Any, pointer: Any, count: Any) -> Any:
    """Vectors that hold `count` of the numbers that `pointer` points to."""
    lanes = 8 * VECTOR_BYTES // pointer.dtype.bitwidth

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sdiv(builder.add(arguments[1], _const(lanes - 1)), _const(lanes))

    return types.int64(pointer, types.int64), codegen


@intrinsic  # type: ignore[misc]
def advance(typing_context: Any, pointer: Any, elements: Any) -> Any:
    """pointer + elements."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic  # type: ignore[misc]
def column(typing_context: Any, pointer: Any, step: Any, axes: Any) -> Any:
    """(pointer[0], pointer[step], ...), one for each corner of a cell with an axis for each item of `axes`, a tuple."""
    signature = types.UniTuple(pointer.dtype, 2 ** len(axes))(pointer, types.int64, axes)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, step, _ = arguments
        places = [builder.gep(pointer, [builder.mul(step, _const(k))]) for k in range(2 ** len(axes))]
        return cgutils.pack_array(builder, [builder.load(place) for place in places])

    return signature, codegen


@intrinsic  # type: ignore[misc]
def put_column(typing_context: Any, pointer: Any, step: Any, values: Any) -> Any:
    """pointer[k * step] = values[k]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for k, value in enumerate(cgutils.unpack_tuple(builder, arguments[2])):
            builder.store(value, builder.gep(arguments[0], [builder.mul(arguments[1], _const(k))]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, values), codegen


@intrinsic  # type: ignore[misc]
def times(typing_context: Any, numbers: Any, factor: Any) -> Any:
    """A tuple of integers, each times `factor`, as they index."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = [builder.sext(n, _INT) if n.type != _INT else n for n in cgutils.unpack_tuple(builder, arguments[0])]
        return cgutils.pack_array(builder, [builder.mul(n, arguments[1]) for n in wide])

    return types.UniTuple(types.int64, len(numbers))(numbers, types.int64), codegen


@intrinsic  # type: ignore[misc]
def corner_numbers(typing_context: Any, axes: Any) -> Any:
    """(0, 1, ...), one for each corner of a cell with an axis for each item of `axes`."""
    count = 2 ** len(axes)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return cgutils.pack_array(builder, [_const(k) for k in range(count)])

    return types.UniTuple(types.int64, count)(axes), codegen


def _corner_types(corners: Any, number: Any) -> tuple[Any, Any]:
    """Of a tuple with the place of each corner and one with its weight."""
    return types.UniTuple(types.int64, len(corners)), types.UniTuple(number, len(corners))


@intrinsic  # type: ignore[misc]
def use_widest_vectors(typing_context: Any) -> Any:
    """In a kernel: LLVM vectorises its plain loops, too, to vectors of `VECTOR_BYTES`, where it would take half of
    them on processors that once ran slower with the widest."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite lets no attribute pass that has a value.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * VECTOR_BYTES}"')
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[misc]
def fetch_ahead(typing_context: Any, pointer: Any, lines: Any) -> Any:
    """Ask for so many cache lines from `pointer` on, which will be read soon, to come into the second-level cache.
    They may lie behind the end of an array: nothing is read."""
    signature = types.void(pointer, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag, name = ir.IntType(8).as_pointer(), ir.IntType(32), "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), name=name
        )
        start = builder.bitcast(arguments[0], byte)
        to_read, second_level, data = flag(0), flag(2), flag(1)

        def body(i: Any, _: list[Any]) -> list[Any]:
            line = builder.gep(start, [builder.mul(i, _const(CACHE_LINE))])
            builder.call(function, [line, to_read, second_level, data])
            return []

        _loop(builder, arguments[1], [], body)
        return context.get_dummy_value()

    return signature, codegen


def primitives(vector_bytes: int, rows: int | None = None) -> SimpleNamespace:
    """The primitives for vectors of `vector_bytes`, as Numba intrinsics for float32 and float64 pointers."""
    wide_rows, two_rows, narrow_rows = rows_for(vector_bytes)
    rows = rows or two_rows

    def make_multiply(rows: int, vectors: int) -> Any:
        @intrinsic  # type: ignore[misc]
        def multiply_tile(
            typing_context: Any,
            a: Any,
            a_row: Any,
            a_step: Any,
            b: Any,
            b_step: Any,
            depth: Any,
            c: Any,
            c_row: Any,
            accumulate: Any,
        ) -> Any:
            """c[r*c_row + j] (+)= sum_k a[r*a_row + k*a_step] * b[k*b_step + j], r < rows, j < vectors * lanes."""
            count = types.int64
            signature = types.void(a, count, count, b, count, count, c, count, types.boolean)

            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                a_, a_row_, a_step_, b_, b_step_, depth_, c_, c_row_, accumulate_ = arguments
                v = _Vectors(builder, a.dtype, vector_bytes)
                places = [_const(j * v.lanes) for j in range(vectors)]
                a_rows = [v.offset(a_, builder.mul(a_row_, _const(r))) for r in range(rows)]

                def body(k: Any, sums: list[Any]) -> list[Any]:
                    b_k = v.offset(b_, builder.mul(k, b_step_))
                    columns = [v.load(v.offset(b_k, place)) for place in places]
                    a_k = builder.mul(k, a_step_)
                    out = []
                    for r in range(rows):
                        scalar = v.splat(builder.load(v.offset(a_rows[r], a_k)))
                        out += [v.fma(scalar, columns[j], sums[vectors * r + j]) for j in range(vectors)]
                    return out

                sums = _loop(builder, depth_, [v.zero] * (vectors * rows), body)
                _put_sums(v, sums, c_, c_row_, places, accumulate_)
                return context.get_dummy_value()

            return signature, codegen

        return multiply_tile

    @intrinsic  # type: ignore[misc]
    def copy_vectors(typing_context: Any, out: Any, source: Any, vectors: Any) -> Any:
        """out[c] = source[c]."""
        signature = types.void(out, source, types.int64)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v = _Vectors(builder, source.dtype, vector_bytes)

            def body(i: Any, _: list[Any]) -> list[Any]:
                c = builder.mul(i, _const(v.lanes))
                v.store(v.load(v.offset(arguments[1], c)), v.offset(arguments[0], c))
                return []

            _loop(builder, arguments[2], [], body)
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic  # type: ignore[misc]
    def blend(
        typing_context: Any,
        out: Any,
        image: Any,
        corners: Any,
        weights: Any,
        vectors: Any,
    ) -> Any:
        """out[c] = sum_k weights[k] * image[corners[k] + c], of two tuples of any length."""
        signature = types.void(out, image, *_corner_types(corners, image.dtype), types.int64)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v = _Vectors(builder, image.dtype, vector_bytes)
            corners = [v.offset(arguments[1], i) for i in cgutils.unpack_tuple(builder, arguments[2])]
            weights = [v.splat(w) for w in cgutils.unpack_tuple(builder, arguments[3])]

            def body(i: Any, _: list[Any]) -> list[Any]:
                c = builder.mul(i, _const(v.lanes))
                total = builder.fmul(weights[0], v.load(v.offset(corners[0], c)))
                for w, corner in zip(weights[1:], corners[1:], strict=True):
                    total = v.fma(w, v.load(v.offset(corner, c)), total)
                v.store(total, v.offset(arguments[0], c))
                return []

            _loop(builder, arguments[4], [], body)
            return context.get_dummy_value()

        return signature, codegen

    def make_blend_backward(scatter: bool) -> Any:
        @intrinsic  # type: ignore[misc]
        def blend_backward(
            typing_context: Any,
            out: Any,
            grad: Any,
            image: Any,
            grad_image: Any,
            corners: Any,
            weights: Any,
            channels: Any,
        ) -> Any:
            """`blend` into out, its transpose added to grad_image, and dots sum_c grad[c] * image[corners[k] + c]."""
            kinds = _corner_types(corners, out.dtype)
            signature = kinds[1](out, grad, image, grad_image, *kinds, types.int64)

            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                v = _Vectors(builder, out.dtype, vector_bytes)
                out_, grad_, image_, grad_image_ = arguments[:4]
                places = cgutils.unpack_tuple(builder, arguments[4])
                corners = [v.offset(image_, i) for i in places]
                targets = [v.offset(grad_image_, i) for i in places]
                weights = [v.splat(w) for w in cgutils.unpack_tuple(builder, arguments[5])]
                count = arguments[6]

                def step(c: Any, dots: list[Any], load: Any, store: Any) -> list[Any]:
                    g = v.load(v.offset(grad_, c))
                    values = [load(v.offset(corner, c)) for corner in corners]
                    total = builder.fmul(weights[0], values[0])
                    for w, value in zip(weights[1:], values[1:], strict=True):
                        total = v.fma(w, value, total)
                    v.store(total, v.offset(out_, c))
                    if scatter:  # one corner after the other: several may be the same pixel
                        for w, target in zip(weights, targets, strict=True):
                            pointer = v.offset(target, c)
                            store(v.fma(w, g, load(pointer)), pointer)
                    return [v.fma(g, value, dot) for value, dot in zip(values, dots, strict=True)]

                lanes = _const(v.lanes)
                full = builder.sdiv(count, lanes)
                dots = _loop(
                    builder,
                    full,
                    [v.zero] * len(corners),
                    lambda i, dots: step(builder.mul(i, lanes), dots, v.load, v.store),
                )
                # The last channels of a block: the lanes beyond belong to another block and another thread. There, grad
                # may be infinite: 0 times that is NaN, and stays out of the dots.
                done = builder.mul(full, lanes)
                left = builder.sub(count, done)
                before = builder.block
                with builder.if_then(builder.icmp_signed(">", left, _const(0))):
                    mask = v.first_lanes(left)
                    more = step(
                        done,
                        dots,
                        lambda pointer: v.masked_load(pointer, mask),
                        lambda value, pointer: v.masked_store(value, pointer, mask),
                    )
                    more = [builder.select(mask, with_tail, dot) for with_tail, dot in zip(more, dots, strict=True)]
                    inside = builder.block
                sums = []
                for dot, with_tail in zip(dots, more, strict=True):
                    phi = builder.phi(v.type)
                    phi.add_incoming(dot, before)
                    phi.add_incoming(with_tail, inside)
                    sums.append(phi)
                return cgutils.pack_array(builder, [v.sum(total) for total in sums])

            return signature, codegen

        return blend_backward

    def make_transpose(with_shift: bool) -> Any:
        @intrinsic  # type: ignore[misc]
        def transpose_block(
            typing_context: Any, source: Any, source_row: Any, target: Any, target_row: Any, shift: Any
        ) -> Any:
            """target[j*target_row + i] = source[i*source_row + j] (+ shift[j]), a square block one vector wide."""
            signature = types.void(source, types.int64, target, types.int64, shift)

            def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                v = _Vectors(builder, source.dtype, vector_bytes)
                source_, source_row_, target_, target_row_, shift_ = arguments
                n = v.lanes
                block = [v.load(v.offset(source_, builder.mul(source_row_, _const(i)))) for i in range(n)]
                half = n // 2
                while half:  # swap the off-diagonal quarters of ever smaller squares
                    for i in range(n):
                        if i & half:
                            continue
                        top, bottom = block[i], block[i + half]
                        low = [j if not j & half else n + j - half for j in range(n)]
                        high = [j + half if not j & half else n + j for j in range(n)]
                        block[i] = _shuffle(builder, top, bottom, low)
                        block[i + half] = _shuffle(builder, top, bottom, high)
                    half //= 2
                for j in range(n):
                    row = block[j]
                    if with_shift:
                        row = builder.fadd(row, v.splat(builder.load(v.offset(shift_, _const(j)))))
                    v.store(row, v.offset(target_, builder.mul(target_row_, _const(j))))
                return context.get_dummy_value()

            return signature, codegen

        return transpose_block

    @intrinsic  # type: ignore[misc]
    def sum_values(typing_context: Any, source: Any, count: Any) -> Any:
        """source[0] + ... + source[count - 1], in four vectors of partial sums."""
        signature = source.dtype(source, types.int64)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v = _Vectors(builder, source.dtype, vector_bytes)
            source_, count_ = arguments
            group = _const(4 * v.lanes)

            def body(i: Any, sums: list[Any]) -> list[Any]:
                start = v.offset(source_, builder.mul(i, group))
                return [builder.fadd(s, v.load(v.offset(start, _const(j * v.lanes)))) for j, s in enumerate(sums)]

            full = builder.sdiv(count_, group)
            a, b, c, d = _loop(builder, full, [v.zero] * 4, body)
            total = v.sum(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
            done = builder.mul(full, group)
            (total,) = _loop(
                builder,
                builder.sub(count_, done),
                [total],
                lambda i, carried: [builder.fadd(carried[0], builder.load(v.offset(source_, builder.add(done, i))))],
            )
            return total

        return signature, codegen

    return SimpleNamespace(
        vector_bytes=vector_bytes,
        multiply_wide=make_multiply(wide_rows, panel_vectors(vector_bytes)),
        multiply_tile=make_multiply(rows, 2),
        multiply_narrow=make_multiply(narrow_rows, 1),
        copy_vectors=copy_vectors,
        blend=blend,
        blend_dots=make_blend_backward(scatter=False),
        blend_dots_scatter=make_blend_backward(scatter=True),
        transpose_block=make_transpose(with_shift=False),
        transpose_block_shifted=make_transpose(with_shift=True),
        sum_values=sum_values,
    )


VECTOR_BYTES = host_vector_bytes()
_HOST = primitives(VECTOR_BYTES)
PANEL = panel_vectors(VECTOR_BYTES)
WIDE_ROWS, ROWS, NARROW_ROWS = rows_for(VECTOR_BYTES)
multiply_wide, multiply_tile, multiply_narrow = _HOST.multiply_wide, _HOST.multiply_tile, _HOST.multiply_narrow
copy_vectors = _HOST.copy_vectors
blend = _HOST.blend
blend_dots = _HOST.blend_dots
blend_dots_scatter = _HOST.blend_dots_scatter
transpose_block = _HOST.transpose_block
transpose_block_shifted = _HOST.transpose_block_shifted
sum_values = _HOST.sum_values
