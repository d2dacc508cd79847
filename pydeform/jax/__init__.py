"""Every operator as a JAX function with its gradients, under jit, vmap, checkpoint, scan and shard_map on the CPU.

`pydeform.jax.NAME` has the arguments of `pydeform.NAME`; arrays may be traced, options are static. A gradient is
computed for the arrays that are differentiated, and for no other. docs/bridges/jax.md says more.

>>> import jax
>>> from pydeform.jax import deform_conv2d
>>> image, weight = jax.numpy.ones((1, 4, 8, 8)), jax.numpy.ones((6, 4, 3, 3))
>>> def loss(offset):
...     return deform_conv2d(image, offset, weight, padding=1).sum()
>>> jax.jit(jax.grad(loss))(jax.numpy.full((1, 18, 8, 8), 0.25)).shape
(1, 18, 8, 8)
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pydeform._operators import Operator, operators, signature_of
from pydeform.jax import _ffi

# The arrays of one call by name, and options, which are plain Python values.
Arrays = dict[str, Any]
Options = dict[str, Any]


def __getattr__(name: str) -> Any:
    if name in operators():
        return _function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = list(operators())


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    operator = operators()[name]

    def function(*arguments: Any, **keywords: Any) -> Any:
        given, options = operator.bind(arguments, keywords)
        arrays = {key: _array(name, key, array) for key, array in given.items() if array is not None}
        options = {key: _static(name, key, value) for key, value in options.items()}
        _check(operator, arrays, options)
        differentiable = _differentiable(_Call(name, tuple(arrays), options).text())
        return differentiable(*_varying(arrays.values(), _axes_of(arrays.values())))

    function.__name__ = function.__qualname__ = name
    function.__module__ = __name__
    function.__signature__ = signature_of(name)  # type: ignore[attr-defined]
    function.__doc__ = f"`pydeform.{name}` of JAX arrays: differentiable once, in reverse; options are static."
    return function


# Arguments ------------------------------------------------------------------------------------------------------------
def _array(op: str, name: str, array: Any) -> Any:
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{op}: {name} must be a JAX or NumPy array, got {type(array).__name__}")
    return array if isinstance(array, jax.Array) else jax.numpy.asarray(array)


def _static(op: str, name: str, value: Any) -> Any:
    """An option as numbers, texts and tuples of Python, so that its repr says it all."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{op}: {name} must be known when JAX traces the call, got a tracer: pass a number or tuple that is no "
            f"argument of the traced function, or name it in jit's static_argnames"
        )
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_static(op, name, part) for part in value)
    return value


def _check(operator: Operator, arrays: Arrays, options: Options) -> None:
    """The operator's own checks, with its own errors, while JAX traces: on zeros that take no memory."""
    batches = {array.shape[:1] for name, array in arrays.items() if name not in operator.shared}
    if len(batches) == 1 and () not in batches and "size" not in options:  # affine_grid's says how many there are
        try:  # an empty batch has all checks and no work
            return _call_on_zeros(operator, arrays, options, empty=True)
        except (TypeError, ValueError):
            pass  # the true sizes belong into the message
    _call_on_zeros(operator, arrays, options, empty=False)


def _call_on_zeros(operator: Operator, arrays: Arrays, options: Options, empty: bool) -> None:
    zeros = dict.fromkeys(operator.arrays)
    for name, array in arrays.items():
        shape = (0, *array.shape[1:]) if empty and name not in operator.shared else array.shape
        zeros[name] = np.broadcast_to(np.zeros((), array.dtype), shape)
    operator.forward(**zeros, **options)


def _varying(arrays: Iterable[Any], axes: frozenset[Any]) -> list[Any]:
    """Inside of shard_map: arrays, marked as if they differed from device to device along these axes of the mesh. The
    transpose of that adds the devices' gradients up."""
    mark = functools.partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary
    return [mark(a, tuple(axes - own)) if axes != (own := _axes_of([a])) else a for a in arrays]


def _axes_of(arrays: Iterable[Any]) -> frozenset[Any]:
    """The axes of shard_map's mesh along which one of the arrays differs."""
    types = [jax.typeof(array) for array in arrays]
    return frozenset().union(*(t.vma if hasattr(t, "vma") else t.manual_axis_type.varying for t in types))


# Calls ----------------------------------------------------------------------------------------------------------------
class _Call(NamedTuple):
    """What XLA's program holds of a call but its arrays. As a text, it means the same in every process."""

    name: str
    arrays: tuple[str, ...]  # those that are there, in order; before them grad_output for a backward
    options: Options
    needs: tuple[str, ...] | None = None  # the gradients to compute, in order; None: the forward
    rank: int = 0  # of the first result, without the axes of vmap

    def text(self) -> str:
        return repr(tuple(self))

    @property
    def operator(self) -> Operator:
        return operators()[self.name]


@functools.lru_cache(maxsize=1024)
def _call_of(text: str) -> _Call:
    return _Call(*ast.literal_eval(text))


@functools.lru_cache(maxsize=1024)
def _differentiable(text: str) -> Any:
    """A function of the call's arrays. JAX knows functions by identity: the same call gives the same function."""
    call = _call_of(text)
    operator = call.operator

    def forward(*arrays: Any) -> Any:
        given = dict(zip(call.arrays, arrays, strict=True))
        if _are_on_another_device(arrays):
            return operator.forward(**_all_of(operator, given), **call.options)
        shape = operator.result_shape(given, call.options)
        return _through_xla(call, arrays, [(shape, arrays[0].dtype)])[0]

    def save(*primals: Any) -> Any:
        arrays = tuple(jax.numpy.asarray(primal.value) for primal in primals)  # older JAX has NumPy's here
        asked = {name for name, primal in zip(call.arrays, primals, strict=True) if primal.perturbed}
        return output_of(*arrays), (arrays, dict.fromkeys(asked - operator.fixed))  # names only: no leaves for JAX

    def pull(saved: Any, grad_output: Any) -> tuple[Any, ...]:
        arrays, asked = saved
        needs = tuple(name for name in call.arrays if name in asked)
        if not needs or isinstance(grad_output, jax.custom_derivatives.SymbolicZero):
            return (None,) * len(arrays)
        backward = _backward(call._replace(arrays=("grad_output", *call.arrays), needs=needs).text())
        grads = backward(*map(jax.numpy.asarray, (grad_output, *arrays)))
        return tuple(grads.get(name) for name in call.arrays)

    output_of = _not_differentiable(call.name, forward)
    function = jax.custom_vjp(forward)
    function.defvjp(save, pull, symbolic_zeros=True)
    return function


@functools.lru_cache(maxsize=1024)
def _backward(text: str) -> Any:
    call = _call_of(text)
    assert call.needs is not None
    needs, operator = call.needs, call.operator

    def backward(*arrays: Any) -> dict[str, Any]:
        given = dict(zip(call.arrays, arrays, strict=True))
        if _are_on_another_device(arrays):
            named = {"grad_output": given.pop("grad_output"), **_all_of(operator, given)}
            grads = operator.backward(**named, **call.options, needs=needs)._asdict()
            return {name: jax.numpy.zeros_like(given[name]) if grads[name] is None else grads[name] for name in needs}
        results = [(given[name].shape, given[name].dtype) for name in needs]
        return dict(zip(needs, _through_xla(call, arrays, results), strict=True))

    return _not_differentiable(call.name, backward)


def _not_differentiable(name: str, function: Callable[..., Any]) -> Any:
    """What a gradient is computed with."""
    guarded = jax.custom_jvp(function)

    @guarded.defjvp
    def refuse(_primals: Any, _tangents: Any) -> Any:
        raise NotImplementedError(f"{name}: its gradient cannot be differentiated again")

    return guarded


def _all_of(operator: Operator, given: Arrays) -> Arrays:
    return {name: given.get(name) for name in operator.arrays}


def _are_on_another_device(arrays: tuple[Any, ...]) -> bool:
    """Arrays that are there, not traced, and not on the CPU: XLA has no part of ours for them, but they are ours to
    read, through DLPack."""
    there = [array for array in arrays if not isinstance(array, jax.core.Tracer)]
    return len(there) == len(arrays) and any(device.platform != "cpu" for array in there for device in array.devices())


# XLA ------------------------------------------------------------------------------------------------------------------
def _through_xla(call: _Call, arrays: tuple[Any, ...], results: list[tuple[Any, Any]]) -> list[Any]:
    _ffi.end_in_order()
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    text = call._replace(rank=len(structs[0].shape)).text()
    # Arrays that vmap does not map come with axes of 1; `_fill` knows what to do with them.
    found = jax.ffi.ffi_call(_target(call.name), structs, vmap_method="expand_dims")(*arrays, text=text)
    return _varying(found, _axes_of(arrays))


def _fill(text: str, arrays: list[Any], results: list[Any]) -> None:
    """XLA's call: `results` become those of the call, for every index of vmap's axes, which come first."""
    call = _call_of(text)
    given = dict(zip(call.arrays, arrays, strict=True))
    axes = results[0].ndim - call.rank
    if not axes:
        return _compute(call, given, results)
    batch = results[0].shape[:axes]
    if folded := _folded(call, given, axes, batch):
        flat = [result.reshape(-1, *result.shape[axes + 1 :]) for result in results]
        return _compute(call, folded, flat)
    for index in np.ndindex(batch):
        one = {name: a[tuple(np.minimum(index, np.array(a.shape[:axes]) - 1))] for name, a in given.items()}
        _compute(call, one, [result[index] for result in results])


def _folded(call: _Call, given: Arrays, axes: int, batch: tuple[int, ...]) -> Arrays | None:
    """The arrays with vmap's axes as a part of their first one; None where results then are others: where a shared
    array is mapped, or its gradient is a sum over too many, or an option says how many there are."""
    whole = call.operator.shared & set(given)
    if whole & set(call.needs or ()) or any(set(given[name].shape[:axes]) - {1} for name in whole):
        return None
    folded = {}
    for name, array in given.items():
        shape = array.shape[axes:]
        if name in whole:
            folded[name] = array.reshape(shape)
        else:
            folded[name] = np.broadcast_to(array, (*batch, *shape)).reshape(-1, *shape[1:])
    named = {name: array for name, array in folded.items() if name != "grad_output"}
    count = next(array.shape[0] for name, array in folded.items() if name not in whole)
    return folded if call.operator.result_shape(named, call.options)[0] == count else None


def _compute(call: _Call, arrays: Mapping[str, Any], results: list[Any]) -> None:
    operator = call.operator
    if call.needs is None:
        results[0][...] = operator.forward(**arrays, **call.options)
        return
    grads = operator.backward(**arrays, **call.options, needs=call.needs)
    for name, result in zip(call.needs, results, strict=True):
        grad = getattr(grads, name)
        result[...] = 0 if grad is None else grad  # None: places of samples that are pixels


def _refuse(text: str, _arrays: list[Any], _results: list[Any]) -> None:
    raise NotImplementedError(
        f"{_call_of(text).name}: compiled programs call it on the CPU only; on a GPU call it outside of jit, vmap and "
        "scan, or jit that part for the CPU"
    )


# Kept for as long as the process lives: XLA holds their addresses.
_HANDLERS = {"cpu": _ffi.handler(_fill), "CUDA": _ffi.handler(_refuse), "ROCM": _ffi.handler(_refuse)}


def _target(name: str) -> str:
    return f"pydeform.{name}"


# All of them, now: a program from JAX's cache or an exported one calls by name.
for _name in __all__:
    for _platform, _handler in _HANDLERS.items():
        jax.ffi.register_ffi_target(_target(_name), jax.ffi.pycapsule(_handler), platform=_platform)
