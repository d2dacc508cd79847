"""The operators as PyTorch's own custom operators, made from the table.

    pydeform::name(Tensor or Tensor? for each array, str options, SymInt[] numbers) -> Tensor
    pydeform::name_backward(Tensor grad_output, and these, str[] needs) -> Tensor[]

`options` is the literal of a dict of those that the caller gave, in which `...` stands for every int. The ints are
`numbers`, in this order, since in a traced graph they may be symbols. A backward returns the gradients that `needs`
names.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pydeform import _checks
from pydeform._operators import Operator, operators, signature_of

LIBRARY = torch.library.Library("pydeform", "FRAGMENT")  # registrations last as long as this object


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
        if isinstance(given.get("boxes"), list | tuple):
            given["boxes"] = _with_batch_index(name, given["boxes"])
        arrays = [given.pop(key, None) for key in operator.arrays]
        for key, array in zip(operator.arrays, arrays, strict=True):
            if not isinstance(array, torch.Tensor) and (array is not None or key not in operator.optional):
                raise TypeError(f"{name}: {key} must be a torch.Tensor, got {type(array).__qualname__}")
        numbers: list[Any] = []
        options = "{" + "".join(f"{key!r}: {_packed(name, key, given[key], numbers)}, " for key in given) + "}"
        dtype, device = arrays[0].dtype, arrays[0].device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            return call(*map(_widened, arrays), options, numbers).to(dtype)
        return call(*arrays, options, numbers)

    differentiable.__name__ = differentiable.__qualname__ = name
    differentiable.__module__ = "pydeform.torch"
    differentiable.__signature__ = signature_of(name)  # type: ignore[attr-defined]
    differentiable.__doc__ = DOCUMENTATION.format(name=name, first=inspect.getdoc(operator.forward).splitlines()[0])
    return differentiable


DOCUMENTATION = """{first}

`pydeform.{name}` of tensors, differentiable; arguments and result are described there.
"""


def _with_batch_index(op: str, boxes: Sequence[Any]) -> Any:
    """One tensor of all images' boxes, from one for each image."""
    if not boxes or not all(isinstance(rows, torch.Tensor) and rows.ndim == 2 for rows in boxes):
        raise TypeError(
            f"{op}: boxes must be a tensor, or one tensor (n, 4) for each image, got {_checks.shown(boxes)}"
        )
    indices = [rows.new_full((rows.shape[0], 1), image) for image, rows in enumerate(boxes)]
    return torch.cat([torch.cat(pair, 1) for pair in zip(indices, boxes, strict=True)])


def _widened(array: Any) -> Any:
    """As autocast does where an operator computes in float32."""
    return array.float() if array is not None and array.is_floating_point() and array.dtype != torch.float64 else array


def _packed(op: str, name: str, value: Any, numbers: list[Any]) -> str:
    """The literal of an option, but its ints."""
    if isinstance(value, list | tuple):
        return "(" + "".join([_packed(op, name, item, numbers) + ", " for item in value]) + ")"
    if value is None or isinstance(value, bool | str):
        return repr(value)
    if isinstance(value, int | torch.SymInt):
        numbers.append(value)
        return "..."
    if isinstance(value, float):
        return repr(_checks.number(op, name, value))
    if hasattr(value, "tolist"):  # a tensor, NumPy's array or number
        return _packed(op, name, value.tolist(), numbers)
    raise TypeError(f"{op}: {name} must be of numbers, texts, None and tuples of them, got {_checks.shown(value)}")


def _unpacked(options: str, numbers: Sequence[Any]) -> dict[str, Any]:
    rest = iter(numbers)
    return {key: _filled(value, rest) for key, value in _literal(options).items()}


_literal = functools.lru_cache(maxsize=1024)(ast.literal_eval)


def _filled(value: Any, numbers: Iterator[Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_filled(item, numbers) for item in value)
    return next(numbers) if value is ... else value


def _register(operator: Operator) -> Callable[..., Any]:
    """Defines `pydeform::name` and its backward. Returns the former."""
    name, names = operator.name, operator.arrays
    count = len(names)
    arrays = ", ".join(f"Tensor{'?' if key in operator.optional else ''} {key}" for key in names)
    differentiable = [key for key in names if key not in operator.fixed]
    is_deterministic_on_request = "deterministic" in inspect.signature(operator.backward).parameters

    def forward(*arguments: Any) -> Any:
        *given, options, numbers = arguments
        return operator.forward(**dict(zip(names, given, strict=True)), **_unpacked(options, numbers))

    def forward_fake(*arguments: Any) -> Any:
        *given, options, numbers = arguments
        every = {**operator.options, **_unpacked(options, numbers)}
        return given[0].new_empty(operator.result_shape(dict(zip(names, given, strict=True)), every))

    def backward(grad_output: Any, *arguments: Any) -> list[Any]:
        *given, options, numbers, needs = arguments
        forwards, keywords = dict(zip(names, given, strict=True)), _unpacked(options, numbers)
        if is_deterministic_on_request:
            keywords["deterministic"] = torch.are_deterministic_algorithms_enabled()
        grads = operator.backward(grad_output, **forwards, **keywords, needs=tuple(needs))
        found = [(key, getattr(grads, key)) for key in needs]
        return [torch.zeros_like(forwards[key]) if grad is None else grad for key, grad in found]

    def backward_fake(_grad_output: Any, *arguments: Any) -> list[Any]:
        forwards, needs = dict(zip(names, arguments, strict=False)), arguments[-1]
        return [forwards[key].new_empty(forwards[key].shape) for key in needs]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def differentiate(ctx: Any, grad_output: Any) -> tuple[Any, ...]:
        asked = dict(zip(names, ctx.needs_input_grad, strict=False))
        needs = [key for key in differentiable if asked[key]]
        grads = call_backward(grad_output, *ctx.saved_tensors, *ctx.options, needs) if needs else []
        found = dict(zip(needs, grads, strict=True))
        return *map(found.get, names), None, None

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise NotImplementedError(f"{name}: differentiable once, got a request for second derivatives")

    call = _define(name, f"({arrays}, str options, SymInt[] numbers) -> Tensor", forward, forward_fake)
    schema = f"(Tensor grad_output, {arrays}, str options, SymInt[] numbers, str[] needs) -> Tensor[]"
    call_backward = _define(f"{name}_backward", schema, backward, backward_fake)
    torch.library.register_autograd(f"pydeform::{name}", differentiate, setup_context=save, lib=LIBRARY)
    torch.library.register_autograd(f"pydeform::{name}_backward", refuse, lib=LIBRARY)
    for function, arguments in ((call, names), (call_backward, ("grad_output", *names))):
        rule = functools.partial(_over_a_new_axis, operator, function, arguments)
        torch.library.register_vmap(f"pydeform::{function._opname}", rule, lib=LIBRARY)
    return call


def _define(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # every device: what is refused, _interop says
    torch.library.register_fake(f"pydeform::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.pydeform, name).default


def _over_a_new_axis(
    operator: Operator, call: Any, names: Sequence[str], info: Any, axes: Sequence[Any], *arguments: Any
) -> tuple[Any, Any]:
    """A rule of vmap: as a larger batch, or, where results would mix or an option counts the batch, one by one."""
    size, count = info.batch_size, len(names)
    mapped = {name for name, axis in zip(names, axes, strict=False) if axis is not None}
    arrays = {
        name: array.movedim(axis, 0) if name in mapped else array
        for name, array, axis in zip(names, arguments, axes, strict=False)
    }
    options = arguments[count:]
    whole = mapped if len(options) == 2 else mapped.union(options[2])  # of which results or gradients stay apart
    if whole & operator.shared or "size" in operator.options:
        results = [
            call(*[array[index] if name in mapped else array for name, array in arrays.items()], *options)
            for index in range(size)
        ]
        if isinstance(results[0], list):
            return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])
        return torch.stack(results), 0
    for name, array in arrays.items():
        if array is not None and name not in operator.shared:
            arrays[name] = (array if name in mapped else array.expand(size, *array.shape)).flatten(0, 1)
    found = call(*arrays.values(), *options)
    if isinstance(found, list):
        return [grad.unflatten(0, (size, grad.shape[0] // size)) for grad in found], [0] * len(found)
    return found.unflatten(0, (size, found.shape[0] // size)), 0
