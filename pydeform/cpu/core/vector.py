"""A SIMD vector as a value in a kernel: loaded, computed with as numbers are, and stored.

Where pointers may be aliases LLVM leaves plain loops scalar. With vectors a loop says itself what is done side by side:

    for i in range(0, count, lanes_of(x)):
        a = load(advance(x, i))
        store(select(a > 0, a * b, a), advance(y, i))

`load` gives as many numbers as this machine's vectors hold, `load_beside` and `convert` as many numbers of another type
as a given vector has, say the integers that belong to floats. A number beside a vector stands in every lane. Floats are
added and multiplied one by one, as numbers are: nothing is fused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

from pydeform.cpu.core.lanes import Vectors, in_lanes, shuffle
from pydeform.cpu.core.primitive import const, merged, primitive
from pydeform.cpu.core.simd import VECTOR_BYTES


class Vector(types.Type):  # type: ignore[misc]
    def __init__(self, element: Any, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(f"Vector({element}, {lanes})")


class Mask(types.Type):  # type: ignore[misc]
    """A truth value in each lane."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"Mask({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.element).get_value_type(), kind.lanes))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


def _is_real(vector: Any) -> bool:
    return isinstance(vector.element, types.Float)


@lower_cast(types.Number, Vector)
def _in_every_lane(context: Any, builder: Any, source: Any, target: Any, number: Any) -> Any:
    return in_lanes(builder, context.cast(builder, number, source, target.element), target.lanes)


def _binary(operation: Any, result: Callable[[Any], Any], emit: Callable[[Any, Any, Any, Any], Any]) -> None:
    @infer_global(operation)
    class Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, arguments: Any, _keywords: Any) -> Any:
            vectors = [a for a in arguments if isinstance(a, Vector)]
            others = [a for a in arguments if not isinstance(a, (Vector, types.Number))]
            if not vectors or others or any(v != vectors[0] for v in vectors):
                return None
            if operation is operator.truediv and not _is_real(vectors[0]):
                return None
            return signature(result(vectors[0]), *(vectors[0] for _ in arguments))

    @lower_builtin(operation, Vector, Vector)  # type: ignore[untyped-decorator]
    def lower(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, signature.args[0], *arguments)


def _arithmetic(operation: Any, real: str, integer: str = "") -> None:
    def emit(builder: Any, kind: Any, x: Any, y: Any) -> Any:
        return getattr(builder, real if _is_real(kind) else integer)(x, y)

    _binary(operation, lambda kind: kind, emit)


def _comparison(operation: Any, sign: str) -> None:
    def emit(builder: Any, kind: Any, x: Any, y: Any) -> Any:
        if not _is_real(kind):
            return builder.icmp_signed(sign, x, y)
        return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, x, y)

    _binary(operation, lambda kind: Mask(kind.lanes), emit)


_arithmetic(operator.add, "fadd", "add")
_arithmetic(operator.sub, "fsub", "sub")
_arithmetic(operator.mul, "fmul", "mul")
_arithmetic(operator.truediv, "fdiv")
for _operation, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _comparison(_operation, _sign)


@lower_cast(types.Boolean, Mask)
def _everywhere(_context: Any, builder: Any, _source: Any, target: Any, flag: Any) -> Any:
    return in_lanes(builder, flag, target.lanes)


def _of_masks(operation: Any, name: str) -> None:
    @infer_global(operation)
    class Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, arguments: Any, _keywords: Any) -> Any:
            masks = [a for a in arguments if isinstance(a, Mask)]
            is_known = masks and all(a in (masks[0], types.boolean) for a in arguments)
            return signature(masks[0], *(masks[0] for _ in arguments)) if is_known else None

    @lower_builtin(operation, *(Mask,) * (1 if name == "not_" else 2))  # type: ignore[untyped-decorator]
    def lower(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return getattr(builder, name)(*arguments)


_of_masks(operator.and_, "and_")
_of_masks(operator.or_, "or_")
_of_masks(operator.invert, "not_")


def _lanes(pointer: Any) -> int:
    return 8 * VECTOR_BYTES // int(pointer.dtype.bitwidth)


def _number(kind: Any) -> Any:
    """LLVM's name of a type of numbers."""
    if isinstance(kind, types.Float):
        return ir.FloatType() if kind.bitwidth == 32 else ir.DoubleType()
    return ir.IntType(kind.bitwidth)


def _emitter(builder: Any, vector: Any) -> Vectors:
    return Vectors(builder, vector.element, vector.lanes * vector.element.bitwidth // 8)


def _loads(pointer: Any, lanes: int) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The type of a vector, and what loads it."""
    wanted = ir.VectorType(_number(pointer.dtype), lanes).as_pointer()

    def emit(builder: Any, pointer_: Any) -> Any:
        value = builder.load(builder.bitcast(pointer_, wanted))
        value.align = pointer.dtype.bitwidth // 8
        return value

    return Vector(pointer.dtype, lanes), emit


@primitive
def lanes_of(pointer: Any) -> Any:
    """Numbers of a vector of what `pointer` points to."""
    return types.int64(pointer), lambda _builder, _pointer: const(_lanes(pointer))


@primitive
def load(pointer: Any) -> Any:
    kind, emit = _loads(pointer, _lanes(pointer))
    return kind(pointer), emit


def load_lanes(lanes: int) -> Any:
    """`load` of vectors of so many lanes, on every machine."""

    @primitive
    def load(pointer: Any) -> Any:
        kind, emit = _loads(pointer, lanes)
        return kind(pointer), emit

    return load


@primitive
def load_beside(pointer: Any, vector: Any) -> Any:
    """As many numbers as `vector` has."""
    kind, emit = _loads(pointer, vector.lanes)
    return kind(pointer, vector), lambda builder, pointer_, _vector: emit(builder, pointer_)


@primitive
def load_first(pointer: Any, count: Any) -> Any:
    """A vector of floats, of which there are `count`, or more; behind the last is read nothing, and gives zeros."""

    def emit(builder: Any, pointer_: Any, count_: Any) -> Any:
        v = Vectors(builder, pointer.dtype, VECTOR_BYTES)
        # Where there are no masked loads, each lane is a branch of its own: only for a last vector.
        with builder.if_else(builder.icmp_signed(">=", count_, const(v.lanes))) as (is_whole, is_last):
            with is_whole:
                whole, after_whole = v.load(pointer_), builder.block
            with is_last:
                last = v.masked_load(pointer_, v.first_lanes(count_))
                after_last = builder.block
        return merged(builder, [whole], after_whole, [last], after_last)[0]

    return Vector(pointer.dtype, _lanes(pointer))(pointer, count), emit


@primitive
def store(vector: Any, pointer: Any) -> Any:
    """pointer[0], ... = the numbers of the vector, whole, which are of the type that it points to."""
    if pointer.dtype != vector.element:
        return None

    def emit(builder: Any, value: Any, pointer_: Any) -> None:
        builder.store(value, builder.bitcast(pointer_, value.type.as_pointer())).align = vector.element.bitwidth // 8

    return types.void(vector, pointer), emit


@primitive
def load_where(mask: Any, pointer: Any) -> Any:
    """Floats, where the mask is true; elsewhere nothing is read, and gives zeros."""
    kind = Vector(pointer.dtype, mask.lanes)
    return kind(mask, pointer), lambda builder, mask_, pointer_: _emitter(builder, kind).masked_load(pointer_, mask_)


@primitive
def gather_numbered(pointer: Any, numbers: Any, like: Any) -> Any:
    """pointer[n] for as many of the ints at `numbers` as `like` has lanes; zeros for those with a sign, without which
    they are places that may be read."""
    kind = Vector(pointer.dtype, like.lanes)

    def emit(builder: Any, pointer_: Any, numbers_: Any, _like: Any) -> Any:
        return _emitter(builder, kind).gather_numbered(pointer_, numbers_)

    return kind(pointer, numbers, like), emit


@primitive
def gather_pairs(mask: Any, pointer: Any, places: Any) -> Any:
    """pointer[places] and pointer[places + 1] where the mask is true; elsewhere anything; the first two may be read."""
    kind = Vector(pointer.dtype, mask.lanes)

    def emit(builder: Any, mask_: Any, pointer_: Any, places_: Any) -> Any:
        return _emitter(builder, kind).gather_pairs(pointer_, places_, mask_)

    return types.UniTuple(kind, 2)(mask, pointer, places), emit


@primitive
def store_where(mask: Any, vector: Any, pointer: Any) -> Any:
    """Floats, where the mask is true; nothing is touched elsewhere."""

    def emit(builder: Any, mask_: Any, value: Any, pointer_: Any) -> None:
        _emitter(builder, vector).masked_store(value, pointer_, mask_)

    return types.void(mask, vector, pointer), emit


@primitive
def room_for(vector: Any) -> Any:
    """Pointer to room on the stack for as many such vectors as one has lanes."""

    def emit(builder: Any, value: Any) -> Any:
        room = cgutils.alloca_once(builder, value.type, size=const(vector.lanes))
        return builder.bitcast(room, value.type.element.as_pointer())

    return types.CPointer(vector.element)(vector), emit


@primitive
def convert(vector: Any, element: Any) -> Any:
    """The numbers as those of another type, that which `element` points to; a float goes towards zero where that is one
    of integers."""
    kind = Vector(element.dtype, vector.lanes)
    wanted = ir.VectorType(_number(element.dtype), vector.lanes)
    narrower = kind.element.bitwidth < vector.element.bitwidth

    def emit(builder: Any, value: Any, _element: Any) -> Any:
        if kind == vector:
            return value
        if _is_real(vector) and _is_real(kind):
            return (builder.fptrunc if narrower else builder.fpext)(value, wanted)
        if _is_real(vector):
            return builder.fptosi(value, wanted)
        if _is_real(kind):
            return builder.sitofp(value, wanted)
        return (builder.trunc if narrower else builder.sext)(value, wanted)

    return kind(vector, element), emit


@primitive
def select(mask: Any, x: Any, y: Any) -> Any:
    """x where the mask is true, y elsewhere; one of them may be a number, and the mask a truth value for all lanes."""
    kind = x if isinstance(x, (Vector, Mask)) else y
    return kind(mask, kind, kind), lambda builder, mask_, x_, y_: builder.select(mask_, x_, y_)


@primitive
def splat(number: Any, vector: Any) -> Any:
    """The number in as many lanes as the vector has, as one of its type."""
    if not isinstance(number, types.Number):
        return None
    return vector(vector, vector), lambda _builder, number_, _vector: number_


@primitive
def fma(x: Any, y: Any, z: Any) -> Any:
    """x * y + z, fused where the machine can; x may be a number."""
    signature = z(z if isinstance(x, types.Number) else x, y, z)
    return signature, lambda builder, *values: _emitter(builder, z).fma(*values)


def _lane_by_lane(name: str) -> Any:
    """LLVM's function of a vector of floats."""

    @primitive
    def function(vector: Any) -> Any:
        return vector(vector), lambda builder, value: _emitter(builder, vector).call(name, [value])

    return function


floor, ceil, fabs = _lane_by_lane("floor"), _lane_by_lane("ceil"), _lane_by_lane("fabs")
rint = _lane_by_lane("rint")  # halves to even


@primitive
def sum_of(vector: Any) -> Any:
    """Sum of the lanes, halves first."""
    return vector.element(vector), lambda builder, value: _emitter(builder, vector).sum(value)


@primitive
def largest_of(vector: Any) -> Any:
    """The largest of floats, none of which is NaN."""

    def emit(builder: Any, value: Any) -> Any:
        return _emitter(builder, vector).call("vector.reduce.fmax", [value], value.type.element)

    return vector.element(vector), emit


@primitive
def first_lanes(count: Any, vector: Any) -> Any:
    """True in the first `count` lanes of such a vector."""
    signature = Mask(vector.lanes)(count, vector)
    return signature, lambda builder, count_, _vector: _emitter(builder, vector).first_lanes(count_)


@primitive
def is_any(mask: Any) -> Any:
    def emit(builder: Any, mask_: Any) -> Any:
        bits = ir.IntType(mask.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(mask_, bits), ir.Constant(bits, 0))

    return types.boolean(mask), emit


@primitive
def lane_numbers(vector: Any) -> Any:
    """(0, 1, ...) in the lanes of such a vector."""

    def emit(_builder: Any, value: Any) -> Any:
        return ir.Constant(value.type, [float(i) if _is_real(vector) else i for i in range(vector.lanes)])

    return vector(vector), emit


@primitive
def from_lane(vector: Any, lane: Any) -> Any:
    """One lane's number in all of them."""

    def emit(builder: Any, value: Any, lane_: Any) -> Any:
        return in_lanes(builder, builder.extract_element(value, lane_), vector.lanes)

    return vector(vector, lane), emit


def _lanes_of_pair(numbers: Callable[[int], list[int]]) -> Any:
    """Some lanes of two vectors of n lanes, where 0 is the first lane of one and n the first of the other."""

    @primitive
    def function(x: Any, y: Any) -> Any:
        def emit(builder: Any, x_: Any, y_: Any) -> Any:
            return shuffle(builder, x_, y_, numbers(x.lanes))

        return x(x, y), emit

    return function


evens = _lanes_of_pair(lambda n: list(range(0, 2 * n, 2)))
odds = _lanes_of_pair(lambda n: list(range(1, 2 * n, 2)))
