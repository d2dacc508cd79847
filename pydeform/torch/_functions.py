"""The operators as PyTorch's own custom operators, made from the table.

    pydeform::name(Tensor or Tensor? for each array, str options, SymInt[] ints, float[] floats) -> Tensor
    pydeform::name_backward(Tensor grad_output, and these, str[] needs) -> Tensor[]

`_options` says how a call's options become text and numbers. A backward returns the gradients that `needs` names.

A call that nothing but autograd can see does not go through PyTorch's dispatcher, which would take longer than many an
operator: it computes at once, recorded where a gradient is wanted.
"""

from __future__ import annotations

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
from pydeform.torch import _options

LIBRARY = torch.library.Library("pydeform", "FRAGMENT")  # registrations last as long as this object
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Of the tensors that are numbers in memory, on the CPU or a CUDA device: neither mapped nor negated nor sparse.
PLAIN_KEYS = functools.reduce(
    int.__or__,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, kind + device)).raw_repr()
        for kind in ("", "Autograd", "Autocast")
        for device in ("CPU", "CUDA")
    ),
    torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr(),
)
_keys = torch._C._dispatch_keys
DOCUMENTATION = """{summary}

`pydeform.{name}` of tensors, differentiable once: its arguments and its result are described there. An array is a
`torch.Tensor`; `boxes` may also be a list of one tensor for each image, without the column of its number.
"""


def functions() -> dict[str, Callable[..., Any]]:
    """By name: all operators, as users call them."""
    return {name: _function(operator) for name, operator in operators().items()}


def _function(operator: Operator) -> Callable[..., Any]:
    name = operator.name
    call, compute, compute_recorded = _register(operator)
    parameters = signature_of(name).parameters
    positional = [key for key in parameters if key not in operator.keyword_only]
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    known = set(parameters)

    def differentiable(*arguments: Any, **keywords: Any) -> Any:
        given = {**dict(zip(positional, arguments, strict=False)), **keywords}
        if len(given) != len(arguments) + len(keywords) or not required <= given.keys() <= known:
            return operator.forward(*arguments, **keywords)  # which raises what Python says of such a call
        if isinstance(given.get("boxes"), _options.ROWS):
            given["boxes"] = _with_batch_index(name, given["boxes"])
        arrays = [given.pop(key, None) for key in operator.arrays]
        options = {key: _options.plain(name, key, value) for key, value in given.items()}
        for key, array in zip(operator.arrays, arrays, strict=True):
            if not isinstance(array, torch.Tensor) and (array is not None or key not in operator.optional):
                raise TypeError(f"{name}: {key} must be a torch.Tensor, got {type(array).__qualname__}")
        first = arrays[0]
        is_autocast = torch.is_autocast_enabled("cuda" if first.is_cuda else "cpu")
        if is_autocast:
            arrays = [_widened(array) for array in arrays]
        if not _is_alone(arrays):
            found = call(*arrays, *_options.packed(options))
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*arrays):
            found = compute_recorded(options, *arrays)
        else:
            found = compute(arrays, options)
        return found.to(first.dtype) if is_autocast else found

    differentiable.__name__ = differentiable.__qualname__ = name
    differentiable.__module__ = "pydeform.torch"
    differentiable.__signature__ = signature_of(name)  # type: ignore[attr-defined]
    summary = str(operator.forward.__doc__).partition("\n")[0]
    differentiable.__doc__ = DOCUMENTATION.format(name=name, summary=summary)
    return differentiable


def _is_alone(tensors: Sequence[Any]) -> bool:
    """Whether a call with them is seen by autograd at most: by no tracer, mode, transform, profiler or subclass."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_TENSORS or _keys(tensor).raw_repr() & ~PLAIN_KEYS):
            return False
    return not (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _with_batch_index(op: str, boxes: Sequence[Any]) -> Any:
    """One tensor of all images' boxes, from one for each image."""
    if not boxes or not all(isinstance(rows, torch.Tensor) and rows.ndim == 2 for rows in boxes):
        raise TypeError(f"{op}: boxes must be a tensor, or a list of one for each image, got {_checks.shown(boxes)}")
    images = [rows.new_full((rows.shape[0], 1), image) for image, rows in enumerate(boxes)]
    return torch.cat([torch.cat(pair, 1) for pair in zip(images, boxes, strict=True)])


def _widened(array: Any) -> Any:
    """As autocast gives it to what computes in float32."""
    return array if array is None or not array.is_floating_point() or array.dtype is torch.float64 else array.float()


def _register(operator: Operator) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Defines `pydeform::name` and its backward. Returns the former, and what computes without the dispatcher: of
    (arrays, options), and of (options, *arrays) for autograd."""
    name, names, count = operator.name, operator.arrays, len(operator.arrays)
    typed = ", ".join(f"Tensor{'?' if key in operator.optional else ''} {key}" for key in names)
    has_deterministic = "deterministic" in inspect.signature(operator.backward).parameters

    def compute(arrays: Sequence[Any], options: dict[str, Any]) -> Any:
        return operator.forward(**dict(zip(names, arrays, strict=True)), **options)

    def compute_backward(
        grad_output: Any, arrays: Sequence[Any], options: dict[str, Any], needs: list[str]
    ) -> list[Any]:
        forwards = dict(zip(names, arrays, strict=True))
        if has_deterministic:
            options = {**options, "deterministic": torch.are_deterministic_algorithms_enabled()}
        grads = operator.backward(grad_output, **forwards, **options, needs=needs)
        found = [(key, getattr(grads, key)) for key in needs]
        return [torch.zeros_like(forwards[key]) if grad is None else grad for key, grad in found]

    def forward(*arguments: Any) -> Any:
        return compute(arguments[:count], _options.unpacked(*arguments[count:]))

    def forward_fake(*arguments: Any) -> Any:
        options = {**operator.options, **_options.unpacked(*arguments[count:])}
        _check_device(name, names, arguments)
        return arguments[0].new_empty(operator.result_shape(dict(zip(names, arguments, strict=False)), options))

    def backward(grad_output: Any, *arguments: Any) -> list[Any]:
        return compute_backward(grad_output, arguments[:count], _options.unpacked(*arguments[count:-1]), arguments[-1])

    def backward_fake(grad_output: Any, *arguments: Any) -> list[Any]:
        forwards, needs = dict(zip(names, arguments, strict=False)), arguments[-1]
        _check_device(f"{name}_backward", ("grad_output", *names), (grad_output, *arguments))
        return [forwards[key].new_empty(forwards[key].shape) for key in needs]

    def save(ctx: Any, inputs: Sequence[Any]) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def found(ctx: Any, call: Callable[[list[str]], list[Any]]) -> list[Any]:
        """The gradients of all arrays, None where there is none, of a call for those that are needed."""
        asked = zip(names, ctx.needs_input_grad[1:], strict=False)  # [0]: the dispatcher's keys, or the options
        needs = [key for key, is_asked in asked if is_asked and key not in operator.fixed]
        grads = dict(zip(needs, call(needs), strict=True)) if needs else {}
        return [*map(grads.get, names)]

    def differentiate(ctx: Any, grad_output: Any) -> tuple[Any, ...]:
        call = functools.partial(call_backward, grad_output, *ctx.saved_tensors, *ctx.options)
        return *found(ctx, call), None, None, None

    class Alone(_SingleLevelFunction):
        """A call that only autograd sees."""

        @staticmethod
        def forward(ctx: Any, options: dict[str, Any], *arrays: Any) -> Any:
            save(ctx, (*arrays, options))
            return compute(arrays, options)

        @staticmethod
        def backward(ctx: Any, grad_output: Any) -> tuple[Any, ...]:
            saved, (options,) = ctx.saved_tensors, ctx.options
            if torch.is_grad_enabled() or not _is_alone((grad_output, *saved)):
                call = functools.partial(call_backward, grad_output, *saved, *_options.packed(options))
            else:
                call = functools.partial(compute_backward, grad_output, saved, options)
            return None, *found(ctx, call)

    def refuse(_ctx: Any, *_grads: Any) -> tuple[Any, ...]:
        raise NotImplementedError(f"{name}: differentiable once, got a call for a second derivative")

    call = _define(name, f"({typed}, {_options.ARGUMENTS}) -> Tensor", forward, forward_fake)
    schema = f"(Tensor grad_output, {typed}, {_options.ARGUMENTS}, str[] needs) -> Tensor[]"
    call_backward = _define(f"{name}_backward", schema, backward, backward_fake)
    _record(call, save, differentiate)
    _record(call_backward, lambda _ctx, _inputs: None, refuse)
    rule = functools.partial(_over_a_new_axis, operator, call, names)
    torch.library.register_vmap(f"pydeform::{name}", rule, lib=LIBRARY)
    rule = functools.partial(_over_a_new_axis, operator, call_backward, ("grad_output", *names))
    torch.library.register_vmap(f"pydeform::{name}_backward", rule, lib=LIBRARY)
    return call, compute, Alone.apply


def _check_device(op: str, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """One meta tensor is enough for PyTorch to compute nothing, and to take what nobody has written for the result."""
    devices = {key: a.device for key, a in zip(names, arguments, strict=False) if a is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{key} is on {device}" for key, device in devices.items())
        raise TypeError(f"{op}: all arrays must be on one device, got {got}")


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
