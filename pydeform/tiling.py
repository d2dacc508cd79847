"""Convolutions and `warp` of images that fit no memory: tile by tile, each with the pixels around it that it reads.

Every function here is the operator of that name with the same arguments and, by keyword, `tile_size`: how many pixels of
the result a tile has along each axis, one int or one per axis. Where pixels move, `max_offset` is how far at most, in
pixels of the input, along any axis; a tile that has a longer finite offset is a ValueError that names it. Arrays are
anything with `shape` and `dtype` that slices give NumPy arrays of: NumPy's, `numpy.memmap`, of Zarr, or an object that
computes what it is asked for. A tile reads the slices that it needs, `weight`, `bias` and `positions` are read once.
`out` is what to write to, slice by slice: an array of the result's shape and dtype, or for a backward a mapping from names
to such arrays, which need not have all; what is not there is a new NumPy array.

Results are those of the operator up to rounding: coordinates within a tile are smaller numbers, so they are rounded less.

>>> import numpy as np
>>> import pydeform
>>> from pydeform import tiling
>>> rng = np.random.default_rng(0)
>>> image, weight = rng.standard_normal((1, 2, 40, 50)), rng.standard_normal((3, 2, 3, 3))
>>> offset = rng.uniform(-4, 4, (1, 18, 40, 50))
>>> tiled = tiling.deform_conv2d(image, offset, weight, padding=1, tile_size=16, max_offset=4)
>>> np.abs(tiled - pydeform.deform_conv2d(image, offset, weight, padding=1)).max() < 1e-12
True
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pydeform import _checks
from pydeform._arrays import wide_dtype
from pydeform._operators import Operator, operators

MOVES = ("offset", "positions", "displacement")  # names of arrays that say by how many pixels a sample is moved
TILED = {name: op for name, op in operators().items() if "weight" in op.arrays or "displacement" in op.arrays}


class Tile(NamedTuple):
    """A part of a result, and the same operator on a part of the input that gives it."""

    output: tuple[slice, ...]  # along the axes of an image, as all fields
    input: tuple[slice, ...]
    padding: tuple[tuple[int, int], ...]  # of that part of the input
    extra: tuple[tuple[int, int], ...]  # results before and after those of the tile, which are computed and dropped


class Plan(NamedTuple):
    """How the axes of an image go from the result to the input, one number for each."""

    size: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding
    below: int  # pixels that a sample may read before its place, and after it
    above: int

    def tile(self, output: tuple[slice, ...]) -> Tile:
        parts = [self._along(axis, part.start, part.stop) for axis, part in enumerate(output)]
        return Tile(output, *zip(*parts, strict=True))

    def tiles(self, sizes: Sequence[int]) -> Iterator[Tile]:
        edges = [
            [slice(start, min(start + size, n)) for start in range(0, n, size)]
            for n, size in zip(self.out, sizes, strict=True)
        ]
        return map(self.tile, itertools.product(*edges))

    def _along(self, axis: int, start: int, stop: int) -> tuple[slice, tuple[int, int], tuple[int, int]]:
        """Of one axis. The part of the input ends where the image does, so that its borders are the image's, or else
        further out than any sample; there its taps' first place may lie inside it, which no padding can say, so that
        results are computed from further out as well."""
        size, stride = self.size[axis], self.stride[axis]
        first = start * stride - self.before[axis]
        last = (stop - 1) * stride - self.before[axis] + self.dilation[axis] * (self.kernel[axis] - 1)
        low = min(max(first - self.below, 0), size - 1)
        high = min(max(last + self.above + 1, low + 1), size)
        extra = _steps(first - low, stride), _steps(high - 1 - last, stride)
        padding = low - first + extra[0] * stride, last + 1 - high + extra[1] * stride
        return slice(low, high), padding, extra


def _steps(pixels: int, stride: int) -> int:
    return max(-(-pixels // stride), 0)


def moved_by(operator: Operator) -> str | None:
    """The name of the array that moves samples."""
    return next((key for key in MOVES if key in operator.arrays), None)


def plan(operator: Operator, op: str, arrays: Mapping[str, Any], options: Mapping[str, Any], max_offset: Any) -> Plan:
    """Of a call that has passed the operator's checks."""
    size = tuple(arrays["input"].shape[2:])
    axes = len(size)
    kernel = tuple(arrays["weight"].shape[2:]) if "weight" in arrays else (1,) * axes
    stride, dilation = (_checks.per_axis(op, key, options.get(key, 1), axes, 1) for key in ("stride", "dilation"))
    before = _checks.padding_pairs(op, options.get("padding", 0), size, kernel, stride, dilation)
    out = tuple(operator.result_shape(arrays, options)[2:])
    below = above = 0
    if moved_by(operator):
        far = _checks.number(op, "max_offset", max_offset)
        if far < 0:
            raise ValueError(f"{op}: max_offset must be a number >= 0, got {max_offset}")
        more = options.get("mode") == "bicubic"  # which reads one pixel further than those around a place
        below = math.ceil(far) + more
        above = below + 1
    return Plan(size, out, kernel, stride, dilation, tuple(pair[0] for pair in before), below, above)


def forward_of_tile(operator: Operator, arrays: dict[str, Any], options: dict[str, Any], tile: Tile) -> Any:
    """The tile's part of the result; `arrays` are its parts."""
    return _inner(tile, operator.forward(**_surrounded(operator, tile, arrays), **_of_tile(options, tile)))


def backward_of_tile(
    operator: Operator, arrays: dict[str, Any], options: dict[str, Any], tile: Tile
) -> dict[str, Any]:
    """What the tile adds to the gradients of its parts of the arrays. `arrays`: with `grad_output`; `options`: also
    those of the backward alone."""
    grads = operator.backward(**_surrounded(operator, tile, arrays), **_of_tile(options, tile))._asdict()
    return {
        key: _inner(tile, grad) if grad is not None and lies_on_result(operator, key) else grad
        for key, grad in grads.items()
    }


def lies_on_result(operator: Operator, key: str) -> bool:
    """The array has an entry for each pixel of the result."""
    return key not in operator.shared and key != "input"


def _of_tile(options: dict[str, Any], tile: Tile) -> dict[str, Any]:
    return {**options, "padding": tile.padding} if "padding" in options else options


def _surrounded(operator: Operator, tile: Tile, arrays: dict[str, Any]) -> dict[str, Any]:
    """With entries for the results that will be dropped: their samples lie nowhere, their gradients are 0."""
    if not any(map(any, tile.extra)):
        return arrays
    width = ((0, 0), (0, 0), *tile.extra)
    return {
        key: np.pad(array, width, constant_values=math.inf if key in MOVES else 0)
        if array is not None and lies_on_result(operator, key)
        else array
        for key, array in arrays.items()
    }


def _inner(tile: Tile, array: Any) -> Any:
    """Without those results. A copy, where it would hold a larger array in memory."""
    if not any(map(any, tile.extra)):
        return array
    sizes = [part.stop - part.start for part in tile.output]
    inner = [slice(before, before + n) for (before, _), n in zip(tile.extra, sizes, strict=True)]
    return array[(..., *inner)].copy()


def check_offset(op: str, operator: Operator, arrays: Mapping[str, Any], max_offset: float, where: str) -> None:
    """No finite one is longer than was stated. Others read nothing: they are outside, or not a number."""
    key = moved_by(operator)
    if key is None:
        return
    longest = abs(arrays[key]).astype(np.float64)
    longest = float(np.max(longest, where=np.isfinite(longest), initial=0))
    if longest > max_offset:
        raise ValueError(f"{op}: {key} must be at most max_offset = {max_offset} pixels, got {longest:.6g} in {where}")


def place(output: Sequence[slice]) -> str:
    """How errors call a part of the result."""
    return "the result's block [" + ", ".join(f"{part.start}:{part.stop}" for part in output) + "]"


class _Parts(NamedTuple):
    """A call, checked, whose arrays are read by parts."""

    operator: Operator
    op: str
    arrays: dict[str, Any]  # with `grad_output`, if it is a backward
    options: dict[str, Any]
    max_offset: Any
    plan: Plan
    sizes: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[slice, Tile, dict[str, Any]]]:
        """Image, tile and its arrays, which have one image."""
        shared = {key: _read(a, (...,)) for key, a in self.arrays.items() if a is not None and key in self.operator.shared}
        for image in range(self.arrays["input"].shape[0]):
            one = slice(image, image + 1)
            for tile in self.plan.tiles(self.sizes):
                parts = dict.fromkeys(self.arrays) | shared
                for key, array in self.arrays.items():
                    if array is not None and key not in shared:
                        parts[key] = _read(array, (one, slice(None), *(tile.input if key == "input" else tile.output)))
                where = place((one, *tile.output))
                check_offset(self.op, self.operator, parts, self.max_offset, where)
                yield one, tile, parts


def _read(array: Any, part: tuple[Any, ...]) -> Any:
    return np.asarray(array[part])


def _parts(operator: Operator, op: str, given: dict[str, Any]) -> tuple[_Parts, Any]:
    """Of a call's arguments; and what the operator says of no image."""
    tile_size, max_offset = given.pop("tile_size"), given.pop("max_offset", None)
    arrays = {key: given.pop(key) for key in ("grad_output", *operator.arrays) if key in given}
    for key, array in arrays.items():
        if array is not None and not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise TypeError(f"{op}: {key} must be an array with a shape and a dtype, got {type(array).__qualname__}")
    nothing, options = operator.without_batch(op, arrays, given)
    empty = (operator.backward if "grad_output" in arrays else operator.forward)(**nothing, **options)
    of_forward = {key: given[key] for key in operator.options}
    axes = plan(operator, op, {key: arrays[key] for key in operator.arrays}, of_forward, max_offset)
    sizes = _checks.per_axis(op, "tile_size", tile_size, len(axes.size), 1)
    return _Parts(operator, op, arrays, given, max_offset, axes, sizes), empty


def _forward(operator: Operator, op: str, given: dict[str, Any]) -> Any:
    out = given.pop("out")
    parts, empty = _parts(operator, op, given)
    out = _target(op, "out", out, (parts.arrays["input"].shape[0], *empty.shape[1:]), empty.dtype)
    for one, tile, arrays in parts:
        out[(one, slice(None), *tile.output)] = forward_of_tile(operator, arrays, parts.options, tile)
    return out


def _backward(operator: Operator, op: str, given: dict[str, Any]) -> Any:
    out = given.pop("out")
    parts, empty = _parts(operator, op, given)
    targets: dict[str, Any] = dict.fromkeys(operator.arrays)
    sums = {}
    for key, grad in empty._asdict().items():
        if grad is not None:
            shape = tuple(parts.arrays[key].shape)
            targets[key] = _target(op, f"out[{key!r}]", (out or {}).get(key), shape, grad.dtype)
            if key in operator.shared:
                sums[key] = np.zeros(shape, wide_dtype(grad.dtype))
            elif key == "input":
                targets[key][...] = 0
    for one, tile, arrays in parts:
        for key, grad in backward_of_tile(operator, arrays, parts.options, tile).items():
            if grad is None:
                continue
            if key in sums:
                sums[key] += grad
            elif key == "input":
                place_of = (one, slice(None), *tile.input)
                targets[key][place_of] = targets[key][place_of] + grad
            else:
                targets[key][(one, slice(None), *tile.output)] = grad
    for key, total in sums.items():
        targets[key][...] = total.astype(targets[key].dtype)
    return operator.grads(**targets)


def _target(op: str, name: str, out: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if out is None:
        return np.empty(shape, dtype)
    if tuple(out.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{op}: {name} must have dtype {dtype}, got {out.dtype}")
    return out


def keywords(function: Callable[..., Any], **more: Any) -> inspect.Signature:
    """Its signature with more arguments by keyword, and their defaults."""
    signature = inspect.signature(function)
    extra = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value) for key, value in more.items()]
    return signature.replace(parameters=[*signature.parameters.values(), *extra])


def _tiled(operator: Operator, function: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    op = function.__name__
    moved = {"max_offset": inspect.Parameter.empty} if moved_by(operator) else {}
    signature = keywords(function, tile_size=inspect.Parameter.empty, **moved, out=None)

    def call(*arguments: Any, **given: Any) -> Any:
        bound = signature.bind(*arguments, **given)
        bound.apply_defaults()
        return compute(operator, op, bound.arguments)

    call.__name__ = call.__qualname__ = op
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = f"`pydeform.{op}`, tile by tile: see `pydeform.tiling`."
    return call


for _operator in TILED.values():
    globals()[_operator.name] = _tiled(_operator, _operator.forward, _forward)
    globals()[f"{_operator.name}_backward"] = _tiled(_operator, _operator.backward, _backward)

__all__ = [name for key in TILED for name in (key, f"{key}_backward")]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
