"""What every layer has: two plain dicts, and the same few checks."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from pydeform import _arrays, _checks

Backprop = Callable[[Any], Any]
Seed = np.random.Generator | int | None


class Layer:
    """Parameters, their gradients, and what is saved with them but not learned. No registry, no hooks.

    The arrays are updated in place and never replaced, but by `to`: `Sequential` and the optimisers hold the same
    objects. `settings` are the arguments that made the layer, for its repr.
    """

    def __init__(
        self,
        params: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.params: dict[str, Any] = params or {}
        self.grads: dict[str, Any] = {name: np.zeros_like(array) for name, array in self.params.items()}
        self.state: dict[str, Any] = state or {}
        self.settings: dict[str, Any] = settings or {}

    @property
    def name(self) -> str:
        return type(self).__name__

    def zero_grads(self) -> None:
        """Before each step of training: every `backprop` adds to `grads`."""
        for grad in self.grads.values():
            grad[...] = 0

    def to(self, device: str) -> Layer:
        """Move all arrays to "cuda", CuPy's current device, or back to "cpu", and return the layer.

        They are replaced in the dicts of the layer and of the layers in it. Optimisers follow; a backprop from before
        the move does not.

        Examples
        --------
        >>> from pydeform.layers import Linear
        >>> Linear(3, 2, rng=0).to("cpu")
        Linear(in_features=3, out_features=2): 8 parameters
        """
        _checks.check_choice(self.name, "device", device, _arrays.DEVICES)
        held = [dicts for part in parts(self) for dicts in (part.params, part.grads, part.state)]
        # One array may have several names. All are moved before any is replaced: a full device changes nothing.
        before = {id(array): array for arrays in held for array in arrays.values()}
        moved = {key: _arrays.to_device(self.name, array, device) for key, array in before.items()}
        for arrays in held:
            for name, array in arrays.items():
                arrays[name] = moved[id(array)]
        return self

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, Backprop]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{self.name}({self._described()}){counted(self)}"

    def _described(self) -> str:
        """The settings that are not the defaults."""
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        return ", ".join(
            f"{name}={np.dtype(value).name if name == 'dtype' else value}"
            for name, value in self.settings.items()
            if defaults.get(name, inspect.Parameter.empty) != value
        )


def counted(layer: Layer) -> str:
    """ ": 1,234 parameters", and nothing where there are none."""
    count = sum(math.prod(param.shape) for param in layer.params.values())
    return f": {count:,} parameters" if count else ""


def parts(layer: Layer, seen: set[int] | None = None) -> Iterator[Layer]:
    """The layer and all layers that its attributes, or lists, tuples and dicts among them, hold: each once."""
    seen = set() if seen is None else seen
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for value in vars(layer).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for part in values:
            if isinstance(part, Layer):
                yield from parts(part, seen)


def hold(layer: Layer, name: str, part: Layer) -> None:
    """The arrays of a part, the very objects, are those of the layer too, under `name`. An array is listed once."""
    for own, theirs in ((layer.params, part.params), (layer.grads, part.grads), (layer.state, part.state)):
        listed = {id(array) for array in own.values()}
        for key, array in theirs.items():
            if id(array) not in listed:
                listed.add(id(array))
                own[f"{name}.{key}"] = array


def add_grads(layer: Layer, **grads: Any) -> None:
    """Add to the gradients of parameters; sums in half types are rounded once."""
    for name, value in grads.items():
        held = layer.grads[name]
        if held.dtype == value.dtype and held.dtype.itemsize > 2:
            held += value
        else:
            held[...] = _arrays.rounded(_arrays.wide(held) + _arrays.wide(value), held.dtype)


def fitting(op: str, source: str, owner: str, targets: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays in `found` as they go into those in `targets`: all the names, the same shapes, values that fit."""
    missing, unknown = sorted(targets.keys() - found.keys()), sorted(found.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(
            f"{op}: {source} must hold the arrays of {owner}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    fitted = {}
    for name, target in targets.items():
        array, where = found[name], f"{name} in {source}"
        _arrays.namespace(op, where, array)
        if tuple(array.shape) != tuple(target.shape):
            raise ValueError(f"{op}: {where} must have shape {tuple(target.shape)}, got {tuple(array.shape)}")
        if array.dtype != target.dtype:
            array = _converted(op, where, _arrays.to_device(op, array, "cpu"), target.dtype)
        fitted[name] = _arrays.to_device(op, array, _arrays.device_of(target))
    return fitted


def _converted(op: str, where: str, array: Any, dtype: Any) -> Any:
    """A NumPy array in another dtype, floats as floats and integers as integers."""
    if dtype.name in _checks.FLOAT_DTYPES:
        if array.dtype.name not in _checks.FLOAT_DTYPES:
            raise TypeError(f"{op}: {where} must have dtype {', '.join(_checks.FLOAT_DTYPES)}, got {array.dtype}")
    elif array.dtype.kind not in "iu":
        raise TypeError(f"{op}: {where} must have an integer dtype, got {array.dtype}")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype.name in _checks.FLOAT_DTYPES and bool((np.isfinite(array) & ~np.isfinite(converted)).any()):
        raise ValueError(f"{op}: {where} must hold values that fit in {dtype.name}, got {np.abs(array).max()}")
    return converted


def nothing_kept(layer: Layer) -> Backprop:
    """The backprop of a call with train=False: holds no array, and says what to do instead."""
    name = layer.name

    def backprop(_grad_y: Any) -> NoReturn:
        raise RuntimeError(f"{name}: nothing was kept for backprop, because the layer was called with train=False")

    return backprop


def check_input(
    layer: Layer, x: Any, axes: Sequence[str] | None, sizes: dict[str, int] | None = None, param: Any = None
) -> ModuleType:
    """x has one axis for each name in `axes`, of the sizes that are known, and the kind and dtype of the parameters.

    `param` is one of those; None: any float array will do. Returns the module that computes with x.
    """
    xp = _arrays.namespace(layer.name, "x", x)
    if axes is not None:
        expected = tuple((sizes or {}).get(axis) for axis in axes)
        fits = x.ndim == len(axes) and all(e is None or e == n for e, n in zip(expected, x.shape, strict=True))
        if not fits:
            numbers = ", ".join(axis if e is None else str(e) for axis, e in zip(axes, expected, strict=True))
            known = f" = ({numbers})" if sizes else ""
            raise ValueError(f"{layer.name}: x must have shape ({', '.join(axes)}){known}, got {tuple(x.shape)}")
    if param is None:
        return _arrays.check_floats(layer.name, "x", x)
    _arrays.check_like(layer.name, "x", x, "the parameters", _arrays.like(layer.name, "the parameters", param))
    return xp


def like(layer: Layer, y: Any) -> _arrays.Like:
    """What a gradient of y must be like."""
    return _arrays.like(layer.name, "y", y)


def check_grad(layer: Layer, grad_y: Any, y: _arrays.Like) -> None:
    _arrays.check_like(layer.name, "grad_y", grad_y, "y", y)
    if tuple(grad_y.shape) != y.shape:
        raise ValueError(f"{layer.name}: grad_y must have the shape of y, {y.shape}, got {tuple(grad_y.shape)}")


def pair(layer: Layer, argument: str, value: Any, minimum: int = 1) -> tuple[int, int]:
    first, second = _checks.per_axis(layer.name, argument, value, 2, minimum)
    return first, second


def positive(layer: Layer, **arguments: Any) -> tuple[int, ...]:
    return tuple(_checks.per_axis(layer.name, argument, value, 1, 1)[0] for argument, value in arguments.items())


def number(op: str, argument: str, value: Any, low: float, high: float = math.inf) -> float:
    """A finite number from `low` to `high`."""
    found = _checks.number(op, argument, value)
    if not low <= found <= high:
        expected = f"a finite number >= {low}" if high == math.inf else f"a number from {low} to {high}"
        raise ValueError(f"{op}: {argument} must be {expected}, got {value!r}")
    return found


def integer(layer: Layer, argument: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{layer.name}: {argument} must be an int, got {value!r}") from None


def flag(layer: Layer, argument: str, value: Any) -> bool:
    return _checks.flag(layer.name, argument, value)


def float_dtype(layer: Layer, dtype: Any) -> Any:
    expected = f"{layer.name}: dtype must be {', '.join(_checks.FLOAT_DTYPES)}"
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{expected}, got {dtype!r}") from None
    if dtype is None or found.name not in _checks.FLOAT_DTYPES or not found.isnative:
        raise TypeError(f"{expected}, got {dtype if dtype is None else found}")
    return found


def generator(layer: Layer, rng: Seed) -> np.random.Generator:
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        text = f"{layer.name}: rng must be a numpy.random.Generator or what seeds one, got {rng!r}"
        raise type(error)(text) from None


def he_normal(layer: Layer, rng: Seed, shape: Sequence[int], fan_in: int, dtype: Any) -> Any:
    """Normal with variance 2 / fan_in: keeps the size of activations through layers followed by ReLU."""
    return (generator(layer, rng).standard_normal(shape) * np.sqrt(2 / fan_in)).astype(dtype)
