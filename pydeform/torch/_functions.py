"""The operators as PyTorch's own custom operators, made from the table.

    pydeform::name(Tensor or Tensor? for each array, str options, SymInt[] ints, float[] floats) -> Tensor
    pydeform::name_backward(Tensor grad_output, and these, str[] needs) -> Tensor[]

`options` is the literal of a dict of those that the caller gave, where `...` stands for every int and `0.0` for every
float: these come beside it, in order, since in a traced graph they may be symbols. A backward returns the gradients
that `needs` names.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from pydeform import _checks
from pydeform._operators import Operator, operators, signature_of

LIBRARY = torch.library.Library("pydeform", "FRAGMENT")  # registrations last as long as this object
ROWS, PLAIN = (list, tuple), (bool, str, type(None))
INTS, FLOATS = (int, torch.SymInt), (float, torch.SymFloat)
OPTIONS = "str options, SymInt[] ints, float[] floats"
DOCUMENTATION = """{summary}

`pydeform.{name}` of tensors, differentiable once: its arguments and its result are described there. An array is a
`torch.Tensor`; `boxes` may also be a list of one tensor for each image, without the column of its number.
"""


def functions() -> dict[str, Callable[..., Any]]:
    """By name: all operators, as users call them."""
    return {name: _function(operator) for name, operator in operators().items()}


def _function(operator: Operator) -> Callable[..., Any]:
    call, name = _register(operator), operator.name
    parameters = signature_of(name).parameters
    positional = [key for key in parameters if key not in operator.keyword_only]
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    known = set(parameters)

    def differentiable(*arguments: Any, **keywords: Any) -> Any:
        given = {**dict(zip(positional, arguments, strict=False)), **keywords}
        if len(given) != len(arguments) + len(keywords) or not required <= given.keys() <= known:
            return operator.forward(*arguments, **keywords)  # which raises what Python says of such a call
        if isinstance(given.get("boxes"), ROWS):
            given["boxes"] = _with_batch_index(name, given["boxes"])
        arrays = [given.pop(key, None) for key in operator.arrays]
        for key, array in zip(operator.arrays, arrays, strict=True):
            if not isinstance(array, torch.Tensor) and (array is not None or key not in operator.optional):
                raise TypeError(f"{name}: {key} must be a torch.Tensor, got {type(array).__qualname__}")
        ints: list[Any] = []
        floats: list[Any] = []
        options = "{" + ", ".join([f"{key!r}: {_packed(name, key, given[key], ints, floats)}" for key in given]) + "}"
        first = arrays[0]
        if torch.is_autocast_enabled("cuda" if first.is_cuda else "cpu"):
            return call(*map(_widened, arrays), options, ints, floats).to(first.dtype)
        return call(*arrays, options, ints, floats)

    differentiable.__name__ = differentiable.__qualname__ = name
    differentiable.__module__ = "pydeform.torch"
    differentiable.__signature__ = signature_of(name)  # type: ignore[attr-defined]
    summary = str(operator.forward.__doc__).partition("\n")[0]
    differentiable.__doc__ = DOCUMENTATION.format(name=name, summary=summary)
    return differentiable


def _with_batch_index(op: str, boxes: Sequence[Any]) -> Any:
    """One tensor of all images' boxes, from one for each image."""
    if not boxes or not all(isinstance(rows, torch.Tensor) and rows.ndim == 2 for rows in boxes):
        raise TypeError(f"{op}: boxes must be a tensor, or a list of one for each image, got {_checks.shown(boxes)}")
    images = [rows.new_full((rows.shape[0], 1), image) for image, rows in enumerate(boxes)]
    return torch.cat([torch.cat(pair, 1) for pair in zip(images, boxes, strict=True)])


def _widened(array: Any) -> Any:
    """As autocast gives it to what computes in float32."""
    return array if array is None or not array.is_floating_point() or array.dtype is torch.float64 else array.float()


def _packed(op: str, name: str, value: Any, ints: list[Any], floats: list[Any]) -> str:
    """The literal of an option, whose numbers go into the lists."""
    if isinstance(value, ROWS):
        return "(" + "".join([_packed(op, name, item, ints, floats) + "," for item in value]) + ")"
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, INTS):
        ints.append(value)
        return "..."
    if isinstance(value, FLOATS):
        floats.append(value)
        return "0.0"
    if hasattr(value, "tolist"):  # a tensor, an array or a number of NumPy
        return _packed(op, name, value.tolist(), ints, floats)
    raise TypeError(f"{op}: {name} must be of numbers, texts, None and tuples of them, got {_checks.shown(value)}")


def _unpacked(options: str, ints: Sequence[Any], floats: Sequence[Any]) -> dict[str, Any]:
    next_int, next_float = iter(ints), iter(floats)

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple([filled(item) for item in value])
        if value is ...:
            return next(next_int)
        return next(next_float) if isinstance(value, float) else value

    return {key: filled(value) for key, value in _literal(options).items()}


_literal = functools.lru_cache(maxsize=1024)(ast.literal_eval)


def _register(operator: Operator) -> Callable[..., Any]:
    """Defines `pydeform::name` and its backward. Returns the former."""
    name, names, count = operator.name, operator.arrays, len(operator.arrays)
    arrays = ", ".join(f"Tensor{'?' if key in operator.optional else ''} {key}" for key in names)
    has_deterministic = "deterministic" in inspect.signature(operator.backward).parameters

    def forward(*arguments: Any) -> Any:
        return operator.forward(**dict(zip(names, arguments, strict=False)), **_unpacked(*arguments[count:]))

    def forward_fake(*arguments: Any) -> Any:
        options = {**operator.options, **_unpacked(*arguments[count:])}
        return arguments[0].new_empty(operator.result_shape(dict(zip(names, arguments, strict=False)), options))

    def backward(grad_output: Any, *arguments: Any) -> list[Any]:
        forwards, needs = dict(zip(names, arguments, strict=False)), arguments[-1]
        options = _unpacked(*arguments[count:-1])
        if has_deterministic:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        grads = operator.backward(grad_output, **forwards, **options, needs=needs)
        found = [(key, getattr(grads, key)) for key in needs]
        return [torch.zeros_like(forwards[key]) if grad is None else grad for key, grad in found]

    def backward_fake(_grad_output: Any, *arguments: Any) -> list[Any]:
        forwards, needs = dict(zip(names, arguments, strict=False)), arguments[-1]
        return [forwards[key].new_empty(forwards[key].shape) for key in needs]

    def save(ctx: Any, inputs: Sequence[Any]) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def differentiate(ctx: Any, grad_output: Any) -> tuple[Any, ...]:
        asked = zip(names, ctx.needs_input_grad[1:], strict=False)  # [0]: the dispatcher's keys
        needs = [key for key, is_asked in asked if is_asked and key not in operator.fixed]
        grads = call_backward(grad_output, *ctx.saved_tensors, *ctx.options, needs) if needs else []
        found = dict(zip(needs, grads, strict=True))
        return *map(found.get, names), None, None, None

    def refuse(_ctx: Any, *_grads: Any) -> tuple[Any, ...]:
        raise NotImplementedError(f"{name}: differentiable once, got a call for a second derivative")

    call = _define(name, f"({arrays}, {OPTIONS}) -> Tensor", forward, forward_fake)
    schema = f"(Tensor grad_output, {arrays}, {OPTIONS}, str[] needs) -> Tensor[]"
    call_backward = _define(f"{name}_backward", schema, backward, backward_fake)
    _record(call, save, differentiate)
    _record(call_backward, lambda _ctx, _inputs: None, refuse)
    rule = functools.partial(_over_a_new_axis, operator, call, names)
    torch.library.register_vmap(f"pydeform::{name}", rule, lib=LIBRARY)
    rule = functools.partial(_over_a_new_axis, operator, call_backward, ("grad_output", *names))
    torch.library.register_vmap(f"pydeform::{name}_backward", rule, lib=LIBRARY)
    return call


def _define(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # on every device; _interop says which are none of ours
    torch.library.register_fake(f"pydeform::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.pydeform, name).default


def _record(call: Any, save: Callable[..., None], differentiate: Callable[..., Any]) -> None:
    """What autograd does with `call`: torch.library.register_autograd, in a way that torch.func takes as well."""

    def below(keys: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return call.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Recorded(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            save(ctx, arguments[1:])
            # Below is either another level of torch.func, where derivatives may be wanted too, or the computation.
            is_level = torch._C._are_functorch_transforms_active()
            with torch.set_grad_enabled(is_level), forward_ad._set_fwd_grad_enabled(is_level):
                found = below(*arguments)
            return tuple(found) if isinstance(found, list) else found  # only of a tuple are the tensors results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return None, *differentiate(ctx, *grads)

    def kernel(keys: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(f"{call._opname}: has no forward-mode derivatives")
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*arguments):
            return below(keys, *arguments)
        with enable_single_level_autograd_function():
            found = Recorded.apply(keys, *arguments)
        return list(found) if isinstance(found, tuple) else found

    LIBRARY.impl(call._opname, kernel, "Autograd", with_keyset=True)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _over_a_new_axis(
    operator: Operator, call: Any, names: Sequence[str], info: Any, axes: Sequence[Any], *arguments: Any
) -> tuple[Any, Any]:
    """vmap's rule: as a larger batch or, where that would mix results or an option counts the batch, one by one."""
    options = arguments[len(names) :]
    arrays, mapped = dict(zip(names, arguments, strict=False)), set()
    size = max(info.batch_size, 1)  # one of zeros tells what shapes there are none of
    for name, axis in zip(names, axes, strict=False):
        if axis is not None:
            moved = arrays[name].movedim(axis, 0)
            arrays[name] = moved if info.batch_size else moved.new_zeros((1, *moved.shape[1:]))
            mapped.add(name)
    if operator.shared & mapped.union(*options[3:]) or "size" in operator.options:  # options[3]: needs
        parts = [
            call(*[array[index] if name in mapped else array for name, array in arrays.items()], *options)
            for index in range(size)
        ]
        is_list = isinstance(parts[0], list)
        found = [torch.stack(grads) for grads in zip(*parts, strict=True)] if is_list else [torch.stack(parts)]
    else:
        for name, array in arrays.items():
            if array is not None and name not in operator.shared:
                arrays[name] = (array if name in mapped else array.expand(size, *array.shape)).flatten(0, 1)
        folded = call(*arrays.values(), *options)
        is_list = isinstance(folded, list)
        found = [part.unflatten(0, (size, part.shape[0] // size)) for part in (folded if is_list else [folded])]
    found = [part[: info.batch_size] for part in found]
    return (found, [0] * len(found)) if is_list else (found[0], 0)
