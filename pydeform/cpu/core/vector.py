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
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from pydeform.cpu.core.simd import VECTOR_BYTES, _const, _shuffle, _Vectors


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


def _splat(builder: Any, number: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, one, undefined, [0] * lanes)


@lower_cast(types.Number, Vector)
def _in_every_lane(context: Any, builder: Any, source: Any, target: Any, number: Any) -> Any:
    return _splat(builder, context.cast(builder, number, source, target.element), target.lanes)


def _binary(operation: Any, result: Callable[[Any], Any], emit: Callable[[Any, Any, Any, Any], Any]) -> None:
    @infer_global(operation)
    class Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, arguments: Any, keywords: Any) -> Any:
            vectors = [a for a in arguments if isinstance(a, Vector)]
            others = [a for a in arguments if not isinstance(a, (Vector, types.Number))]
            if not vectors or others or any(v != vectors[0] for v in vectors):
                return None
            if operation is operator.truediv and not _is_real(vectors[0]):
                return None
            return signature(result(vectors[0]), *(vectors[0] for _ in arguments))

    @lower_builtin(operation, Vector, Vector)  # type: ignore[untyped-decorator]
    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
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


def _of_masks(operation: Any, name: str) -> None:
    @infer_global(operation)
    class Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, arguments: Any, keywords: Any) -> Any:
            first = arguments[0]
            is_known = isinstance(first, Mask) and all(a == first for a in arguments)
            return signature(first, *arguments) if is_known else None

    @lower_builtin(operation, *(Mask,) * (1 if name == "not_" else 2))  # type: ignore[untyped-decorator]
    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return getattr(builder, name)(*arguments)


_of_masks(operator.and_, "and_")
_of_masks(operator.or_, "or_")
_of_masks(operator.invert, "not_")


def _load(context: Any, builder: Any, kind: Any, pointer: Any) -> Any:
    value = builder.load(builder.bitcast(pointer, context.get_value_type(kind).as_pointer()))
    value.align = kind.element.bitwidth // 8
    return value


@intrinsic  # type: ignore[misc]
def lanes_of(typing_context: Any, pointer: Any) -> Any:
    """Numbers of a vector of what `pointer` points to."""
    lanes = 8 * VECTOR_BYTES // pointer.dtype.bitwidth
    return types.int64(pointer), lambda context, builder, signature, arguments: _const(lanes)


@intrinsic  # type: ignore[misc]
def load(typing_context: Any, pointer: Any) -> Any:
    kind = Vector(pointer.dtype, 8 * VECTOR_BYTES // pointer.dtype.bitwidth)
    return kind(pointer), lambda context, builder, signature, arguments: _load(context, builder, kind, arguments[0])


@intrinsic  # type: ignore[misc]
def load_beside(typing_context: Any, pointer: Any, vector: Any) -> Any:
    """As many numbers as `vector` has."""
    kind = Vector(pointer.dtype, vector.lanes)
    signature = kind(pointer, vector)
    return signature, lambda context, builder, signature, arguments: _load(context, builder, kind, arguments[0])


@intrinsic  # type: ignore[misc]
def load_first(typing_context: Any, pointer: Any, count: Any) -> Any:
    """A vector of floats, of which there are `count`, or more; behind the last is read nothing, and gives zeros."""
    kind = Vector(pointer.dtype, 8 * VECTOR_BYTES // pointer.dtype.bitwidth)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v, (start, left) = _Vectors(builder, pointer.dtype, VECTOR_BYTES), arguments
        # Where there are no masked loads, each lane is a branch of its own: only for a last vector.
        with builder.if_else(builder.icmp_signed(">=", left, _const(v.lanes))) as (is_whole, is_last):
            with is_whole:
                whole, after_whole = v.load(start), builder.block
            with is_last:
                last = v.masked_load(start, v.first_lanes(left))
                after_last = builder.block
        loaded = builder.phi(v.type)
        loaded.add_incoming(whole, after_whole)
        loaded.add_incoming(last, after_last)
        return loaded

    return kind(pointer, types.int64), codegen


@intrinsic  # type: ignore[misc]
def store(typing_context: Any, vector: Any, pointer: Any) -> Any:
    """pointer[0], ... = the numbers of the vector, whole, which are of the type that it points to."""
    if pointer.dtype != vector.element:
        return None

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, start = arguments
        builder.store(value, builder.bitcast(start, value.type.as_pointer())).align = vector.element.bitwidth // 8
        return context.get_dummy_value()

    return types.void(vector, pointer), codegen


@intrinsic  # type: ignore[misc]
def convert(typing_context: Any, vector: Any, element: Any) -> Any:
    """The numbers as those of another type, a float towards zero where that is one of integers."""
    kind = Vector(element.dtype, vector.lanes)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wanted = context.get_value_type(kind)
        narrower = kind.element.bitwidth < vector.element.bitwidth
        if kind == vector:
            return arguments[0]
        if _is_real(vector) and _is_real(kind):
            return (builder.fptrunc if narrower else builder.fpext)(arguments[0], wanted)
        if _is_real(vector):
            return builder.fptosi(arguments[0], wanted)
        if _is_real(kind):
            return builder.sitofp(arguments[0], wanted)
        return (builder.trunc if narrower else builder.sext)(arguments[0], wanted)

    return kind(vector, element), codegen


@intrinsic  # type: ignore[misc]
def select(typing_context: Any, mask: Any, x: Any, y: Any) -> Any:
    """x where the mask is true, y elsewhere; one of them may be a number."""
    kind = x if isinstance(x, (Vector, Mask)) else y
    signature = kind(mask, kind, kind)
    return signature, lambda context, builder, signature, arguments: builder.select(*arguments)


@intrinsic  # type: ignore[misc]
def floor(typing_context: Any, vector: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = _Vectors(builder, vector.element, vector.lanes * vector.element.bitwidth // 8)
        return builder.call(v._intrinsic("floor", [v.type], v.type), arguments)

    return vector(vector), codegen
