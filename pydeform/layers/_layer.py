"""What every layer has: two plain dicts, and the same few checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from pydeform import _checks

Backprop = Callable[[Any], Any]
Seed = np.random.Generator | int | None


class Layer:
    """Parameters, their gradients, and what is saved with them but not learned. No registry, no hooks.

    The arrays are updated in place and never replaced: `Sequential` and the optimisers hold the same objects.
    """

    def __init__(self, params: dict[str, Any] | None = None, state: dict[str, Any] | None = None) -> None:
        self.params: dict[str, Any] = params or {}
        self.grads: dict[str, Any] = {name: np.zeros_like(array) for name, array in self.params.items()}
        self.state: dict[str, Any] = state or {}

    @property
    def name(self) -> str:
        return type(self).__name__

    def zero_grads(self) -> None:
        for grad in self.grads.values():
            grad[...] = 0

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, Backprop]:
        raise NotImplementedError


def nothing_kept(layer: Layer) -> Backprop:
    """The backprop of a call with train=False: holds no array, and says what to do instead."""
    name = layer.name

    def backprop(grad_y: Any) -> NoReturn:
        raise RuntimeError(f"{name}: nothing was kept for backprop, because the layer was called with train=False")

    return backprop


def check_input(layer: Layer, x: Any, axes: Sequence[str], sizes: dict[str, int], dtype: Any = None) -> None:
    """x has one axis for each name in `axes`, of the sizes that are known, and the dtype of the parameters."""
    expected = tuple(sizes.get(axis) for axis in axes)
    fits = x.ndim == len(axes) and all(e is None or e == n for e, n in zip(expected, x.shape, strict=True))
    if not fits:
        numbers = ", ".join(axis if e is None else str(e) for axis, e in zip(axes, expected, strict=True))
        formula = ", ".join(axes)
        known = f" = ({numbers})" if sizes else ""
        raise ValueError(f"{layer.name}: x must have shape ({formula}){known}, got {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{layer.name}: x must have the dtype of the parameters, {dtype.name}, got {x.dtype.name}")


def check_grad(layer: Layer, grad_y: Any, shape: Sequence[int]) -> None:
    if tuple(grad_y.shape) != tuple(shape):
        raise ValueError(f"{layer.name}: grad_y must have the shape of y, {tuple(shape)}, got {tuple(grad_y.shape)}")


def pair(layer: Layer, argument: str, value: Any, minimum: int = 1) -> tuple[int, int]:
    first, second = _checks.per_axis(layer.name, argument, value, 2, minimum)
    return first, second


def positive(layer: Layer, **arguments: int) -> None:
    for argument, value in arguments.items():
        _checks.per_axis(layer.name, argument, value, 1, 1)


def he_normal(rng: Seed, shape: Sequence[int], fan_in: int, dtype: Any) -> Any:
    """Normal with variance 2 / fan_in: keeps the size of activations through layers followed by ReLU."""
    return (np.random.default_rng(rng).standard_normal(shape) * np.sqrt(2 / fan_in)).astype(dtype)
