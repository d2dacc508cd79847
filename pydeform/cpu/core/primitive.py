"""Functions of kernels that are written in LLVM's instructions, for what Numba cannot say.

    @primitive
    def next_number(pointer):
        def emit(builder, pointer_):
            return builder.load(builder.gep(pointer_, [const(1)]))

        return pointer.dtype(pointer), emit

A primitive takes the types of its arguments, as Numba knows them, and gives its signature with a function that emits
code for their values: of a tuple it gets the items, of an array `data` and `shape`. All integers come as int64. None
says that it is not for these types. What is emitted gives a value, a list of those of a tuple, or nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

INT = ir.IntType(64)


def primitive(define: Callable[..., Any], *given: Any) -> Any:
    """`given` are arguments of `define` that stand before the types."""

    @functools.wraps(define)
    def definition(_typing_context: Any, *kinds: Any) -> Any:
        found = define(*given, *map(_widened, kinds))
        if found is None:
            return None
        signature, emit = found

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            opened = [_opened(context, builder, *pair) for pair in zip(signature.args, values, strict=True)]
            result = emit(builder, *opened)
            if isinstance(result, list):
                return context.make_tuple(builder, signature.return_type, result)
            return context.get_dummy_value() if result is None else result

        return signature, generate

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY)
    parameters = list(inspect.signature(define).parameters.values())[len(given) :]
    definition.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    made = intrinsic(definition)
    made.define = functools.partial(define, *given)
    return made


def _widened(kind: Any) -> Any:
    if isinstance(kind, types.BaseTuple):
        return types.BaseTuple.from_types([_widened(item) for item in kind], getattr(kind, "instance_class", None))
    return types.int64 if isinstance(kind, types.Integer) else kind


def _opened(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        view = context.make_array(kind)(context, builder, value)
        return SimpleNamespace(data=view.data, shape=cgutils.unpack_tuple(builder, view.shape, kind.ndim))
    if isinstance(kind, types.BaseTuple):
        items = cgutils.unpack_tuple(builder, value, len(kind))
        return [_opened(context, builder, *pair) for pair in zip(kind, items, strict=True)]
    return value


def const(value: int) -> Any:
    return ir.Constant(INT, value)


def function_of(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """A function that LLVM or the system knows by this name."""
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name=name)


def loop(builder: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """for i in range(count): carried = body(i, carried), for any count, without branches around the body."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT)
    index.add_incoming(const(0), before)
    values = []
    for value in carried:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        values.append(phi)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    results = body(index, values)
    following = builder.add(index, const(1))
    index.add_incoming(following, builder.block)
    for phi, result in zip(values, results, strict=True):
        phi.add_incoming(result, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def merged(builder: Any, one: list[Any], after_one: Any, other: list[Any], after_other: Any) -> list[Any]:
    """Values that come from either of two blocks."""
    values = []
    for pair in zip(one, other, strict=True):
        values.append(builder.phi(pair[0].type))
        for value, block in zip(pair, (after_one, after_other), strict=True):
            values[-1].add_incoming(value, block)
    return values
