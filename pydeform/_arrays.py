"""NumPy and CuPy arrays for layers, losses and optimisers, which compute in place and therefore take no other kind."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pydeform import _backend, _checks

DEVICES = ("cpu", "cuda")


def namespace(op: str, name: str, array: Any) -> ModuleType:
    """The module that computes with `array`: numpy or cupy. An array of any other kind is refused by its name."""
    if isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray | np.matrix):
        return np
    if isinstance(array, _loaded("cupy", "ndarray")):
        return sys.modules["cupy"]
    if isinstance(array, np.ndarray):
        raise TypeError(f"{op}: {name} must be a plain array, got {_kind(array)}")
    advice = f"pass numpy.asarray({name})"
    if hasattr(array, "__dlpack__") and not isinstance(array, np.generic):
        advice = (
            f"pass numpy.asarray({name}), or cupy.from_dlpack({name}) of a CUDA array "
            "(only the operators, such as pydeform.conv2d, take arrays of every kind)"
        )
    raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got {_kind(array)}: {advice}")


def check_floats(op: str, name: str, array: Any) -> ModuleType:
    """`namespace` of an array that has one of our dtypes."""
    xp = namespace(op, name, array)
    _checks.check_dtypes(op, {name: array})
    return xp


class Like(NamedTuple):
    """What another array must be like; holds no memory."""

    xp: ModuleType
    device: int | None  # its number; None: the CPU
    dtype: Any
    shape: tuple[int, ...]


def like(op: str, name: str, array: Any) -> Like:
    xp = namespace(op, name, array)
    return Like(xp, None if xp is np else int(array.device.id), array.dtype, tuple(array.shape))


def place(op: str, name: str, array: Any) -> Like:
    """The same for an array of any dtype."""
    return like(op, name, array)._replace(dtype=None)


def check_like(op: str, name: str, array: Any, model: str, expected: Like) -> ModuleType:
    """`namespace` of an array of the kind, device and (but for None) dtype of `model`, which are `expected`."""
    found = like(op, name, array)
    if found.xp is not expected.xp:
        want, got, device = ("NumPy", "CuPy", "cuda") if expected.xp is np else ("CuPy", "NumPy", "cpu")
        raise TypeError(
            f"{op}: {name} must be a {want} array, as {model}, got a {got} array: "
            f'call to("{device}") of the layer, or move the array'
        )
    if found.device != expected.device:
        raise TypeError(f"{op}: {name} must be on cuda:{expected.device}, as {model}, got cuda:{found.device}")
    if expected.dtype is not None and found.dtype != expected.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {model}, {expected.dtype.name}, got {found.dtype}")
    return found.xp


def wide_dtype(dtype: Any) -> Any:
    """What is computed with: float32 for the half types."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else np.dtype(dtype)


def wide(array: Any) -> Any:
    """A half type's values as float32; any other array as it is, so nothing may be written to the result."""
    return _twin(array).widened(array) if array.dtype.itemsize == 2 else array


def rounded(array: Any, dtype: Any) -> Any:
    """`array` in `dtype`, the same where it has that already."""
    return array if array.dtype == dtype else _twin(array).rounded(array, dtype)


def surely_finite(array: Any) -> bool:
    """Whether no value is infinite or NaN, as far as that is known: a device would have to be waited for."""
    if not isinstance(array, np.ndarray):
        return False
    flat = array.ravel(order="K")
    return bool(np.isfinite(np.dot(flat, flat)))


def masked(array: Any, mask: Any) -> Any:
    """`array` where `mask` is true, else 0. A product, where that is the same: on a CPU it is four times as fast."""
    if surely_finite(array):
        return array * mask
    if isinstance(array, np.ndarray):
        return np.where(mask, array, np.copysign(0, array))  # the zeros of the product
    return namespace("masked", "array", array).where(mask, array, 0)


def zeros_like(array: Any, dtype: Any) -> Any:
    return namespace("zeros_like", "array", array).zeros(array.shape, dtype)


def to_device(op: str, array: Any, device: str) -> Any:
    """`array` as a NumPy array for "cpu", as a CuPy array on the current device for "cuda"; the same if it is one."""
    if isinstance(array, np.ndarray) == (device == "cpu"):
        return array
    if device == "cpu":
        return array.get()
    try:
        cuda = _backend.twin(op, "cuda", "_arrays")
    except ImportError as error:
        raise RuntimeError(f'{op}: to("cuda") needs CuPy, which cannot be imported: {error}') from error
    if not cuda.available():
        raise RuntimeError(f'{op}: to("cuda") needs a CUDA device, and CuPy finds none')
    return cuda.to_device(array)


def device_of(array: Any) -> str:
    return "cpu" if isinstance(array, np.ndarray | np.generic) else "cuda"


def _twin(array: Any) -> ModuleType:
    return _backend.twin("layers", device_of(array), "_arrays")


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, ())


def _kind(array: Any) -> str:
    if isinstance(array, _loaded("jax", "Array")):
        return "jax.Array"
    kind = type(array)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
