"""Convolutions, `dcnv3`, `dcnv4` and `warp` of images that fit no memory: tile by tile, each with the pixels around it
that it reads.

Every function here is the operator of that name with the same arguments and more, by keyword. `tile_size`: how many
pixels of the result a tile has along each axis, one int or one per axis. `max_offset`, where samples are moved: by how
many pixels of the input at most, along any axis; a tile with a longer finite offset raises a ValueError that names it.
Of `dcnv3` and `dcnv4` that is an offset times `offset_scale`, from a sample's place in the scaled kernel.

Arrays are anything with `shape` and `dtype` that slices give NumPy arrays of: NumPy's, `numpy.memmap`, of Zarr, or an
object that computes what it is asked for. A tile reads the slices that it needs, and `weight`, `bias` and `positions`
are read once. `out` is what to write to, slice by slice: an array of the result's shape and dtype, or for a backward a
mapping from names to such arrays, which need not have all. What is not there is a new NumPy array.

Results are those of the operator up to rounding. Coordinates within a tile are smaller numbers and rounded less; what
tiles add to a gradient is rounded to its dtype and then added, for `input` in that dtype, else in float32 at least.

>>> import numpy as np
>>> import pydeform
>>> from pydeform import tiling
>>> rng = np.random.default_rng(0)
>>> image, weight = rng.standard_normal((1, 2, 40, 50)), rng.standard_normal((3, 2, 3, 3))
>>> offset = rng.uniform(-4, 4, (1, 18, 40, 50))
>>> tiled = tiling.deform_conv2d(image, offset, weight, padding=1, tile_size=16, max_offset=4)
>>> np.allclose(tiled, pydeform.deform_conv2d(image, offset, weight, padding=1), rtol=0, atol=1e-12)
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
from pydeform._gather_geometry import packed_row
from pydeform._operators import Operator, operators

MOVES = ("offset", "positions", "displacement", "offset_mask")  # arrays that say by how many pixels a sample is moved
TILED = {name: op for name, op in operators().items() if "padding" in op.options or "displacement" in op.arrays}


class Tile(NamedTuple):
    """A part of a result, and the same operator on a part of the input that gives it."""

    output: tuple[slice, ...]  # along the axes of an image, as all fields
    input: tuple[slice, ...]
    padding: tuple[tuple[int, int], ...]  # of that part of the input
    extra: tuple[tuple[int, int], ...]  # results before and after those of the tile, which are computed and dropped

    def part_of(self, key: str) -> tuple[slice, ...]:
        """Of the array of this name."""
        return self.input if key == "input" else self.output


class Plan(NamedTuple):
    """How the axes of an image go from the result to the input, one number for each."""

    size: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding
    below: tuple[int, ...]  # pixels that may be read before the first tap's place, and after the last one's
    above: tuple[int, ...]
    even: bool  # of two equally near pixels the even one is read, so that a part begins with an even one

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
        low = min(max(first - self.below[axis], 0), size - 1)
        low -= low % 2 * self.even
        high = min(max(last + self.above[axis] + 1, 1), size)
        extra = _steps(first - low, stride), _steps(high - 1 - last, stride)
        padding = low - first + extra[0] * stride, last + 1 - high + extra[1] * stride
        return slice(low, high), padding, extra


def _near(place: float) -> float:
    """Of places beyond all images one that is, too, and not infinite."""
    return min(max(place, -_checks.MOST), _checks.MOST)


def _steps(pixels: int, stride: int) -> int:
    return max(-(-pixels // stride), 0)


def index(operator: Operator, places: Sequence[slice], images: slice = slice(None)) -> tuple[slice, ...]:
    """Of a part of an array that has an image."""
    return operator.with_image((images, *(slice(None),) * (len(places) + 1)), places)


def moved_by(operator: Operator) -> str | None:
    """The name of the array that moves samples."""
    return next((key for key in MOVES if key in operator.arrays), None)


def plan(operator: Operator, op: str, arrays: Mapping[str, Any], options: Mapping[str, Any], max_offset: Any) -> Plan:
    """Of a call that has passed the operator's checks."""
    size = operator.of_image(arrays["input"].shape)
    axes = len(size)
    kernel, stride, dilation = (
        _checks.per_axis(op, key, options.get(key, 1), axes, 1) for key in ("kernel_size", "stride", "dilation")
    )
    if "weight" in arrays:
        kernel = tuple(arrays["weight"].shape[2:])
    before = _checks.padding_pairs(op, options.get("padding", 0), size, kernel, stride, dilation)
    out = operator.of_image(operator.result_shape(arrays, options))
    below = above = (0,) * axes
    if moved_by(operator):
        far = _checks.number(op, "max_offset", max_offset)
        if far < 0:
            raise ValueError(f"{op}: max_offset must be a number >= 0, got {max_offset}")
        scale = float(options.get("offset_scale", 1))
        # `warp` may read one pixel further than those around a place, and where it stops at a border has other slopes;
        # a scale rounds a place.
        more = "displacement" in arrays or scale != 1
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        # Of the first and last tap, before they are moved.
        ends = [sorted(_near(r // 2 + (tap - r // 2) * scale) for tap in (0, r)) for r in reach]
        below = tuple(math.ceil(far - first) + more for first, _ in ends)
        above = tuple(math.ceil(far + last) - r + 1 + more for (_, last), r in zip(ends, reach, strict=True))
    even = options.get("mode") == "nearest"
    return Plan(size, out, kernel, stride, dilation, tuple(pair[0] for pair in before), below, above, even)


def forward_of_tile(operator: Operator, arrays: dict[str, Any], options: dict[str, Any], tile: Tile) -> Any:
    """The tile's part of the result; `arrays` are its parts."""
    return _inner(operator, tile, operator.forward(**_surrounded(operator, tile, arrays), **_of_tile(options, tile)))


def backward_of_tile(operator: Operator, arrays: dict[str, Any], options: dict[str, Any], tile: Tile) -> dict[str, Any]:
    """What the tile adds to the gradients of its parts of the arrays. `arrays`: with `grad_output`; `options`: also
    those of the backward alone."""
    grads = operator.backward(**_surrounded(operator, tile, arrays), **_of_tile(options, tile))._asdict()
    return {
        key: _inner(operator, tile, grad) if grad is not None and lies_on_result(operator, key) else grad
        for key, grad in grads.items()
    }


def lies_on_result(operator: Operator, key: str) -> bool:
    """The array has an entry for each pixel of the result."""
    return key not in operator.shared and key != "input"


def _of_tile(options: dict[str, Any], tile: Tile) -> dict[str, Any]:
    return {**options, "padding": tile.padding} if "padding" in options else options


def _surrounded(operator: Operator, tile: Tile, arrays: dict[str, Any]) -> dict[str, Any]:
    """With entries for the results that will be dropped: their gradients are 0 and, where that of a shared array is a
    sum over samples, whatever these are, their samples lie nowhere."""
    if not any(map(any, tile.extra)):
        return arrays
    width = operator.with_image(((0, 0),) * (len(tile.extra) + 2), tile.extra)
    return {
        key: np.pad(array, width, constant_values=math.inf if key in MOVES and operator.shared else 0)
        if array is not None and lies_on_result(operator, key)
        else array
        for key, array in arrays.items()
    }


def _inner(operator: Operator, tile: Tile, array: Any) -> Any:
    """Without those results. A copy, where it would hold a larger array in memory."""
    if not any(map(any, tile.extra)):
        return array
    sizes = [part.stop - part.start for part in tile.output]
    inner = [slice(before, before + n) for (before, _), n in zip(tile.extra, sizes, strict=True)]
    return array[index(operator, inner)].copy()


def check_offset(
    op: str,
    operator: Operator,
    arrays: Mapping[str, Any],
    options: Mapping[str, Any],
    max_offset: float,
    tile: Tile,
) -> None:
    """No finite one is longer than was stated. Others read nothing: they are outside, or not a number."""
    key = moved_by(operator)
    if key is None:
        return
    offset, scale = arrays[key], abs(float(options.get("offset_scale", 1)))
    if key == "offset_mask":
        offset = offset[..., _packed_offsets(op, options)]
    limits = {"where": np.isfinite(offset), "initial": 0}
    longest = scale * max(float(offset.max(**limits)), -float(offset.min(**limits)))
    # What is stated may have been rounded, and divided by the scale, to clip offsets.
    rounding = float(np.finfo(wide_dtype(offset.dtype)).eps) / (2 if scale == 1 else 1)
    if longest > max_offset * (1 + rounding):
        block = ", ".join(f"{part.start}:{part.stop}" for part in tile.output)
        raise ValueError(
            f"{op}: {key} must be at most max_offset = {max_offset} pixels, got {longest:.6g} in the block [{block}] "
            "of the result"
        )


def _packed_offsets(op: str, options: Mapping[str, Any]) -> Any:
    """Which numbers of a row of DCNv4's packed array are offsets: others are masks, or fill it."""
    (groups,) = _checks.per_axis(op, "groups", options["groups"], 1, 1)
    kernel = _checks.per_axis(op, "kernel_size", options["kernel_size"], 2, 1)
    points = math.prod(kernel) - bool(options["remove_center"])
    number = np.arange(packed_row(groups, points))
    return (number < groups * points * 3) & (number % (points * 3) < points * 2)


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
        shared = {
            key: _read(a, (...,)) for key, a in self.arrays.items() if a is not None and key in self.operator.shared
        }
        for image in range(self.arrays["input"].shape[0]):
            one = slice(image, image + 1)
            for tile in self.plan.tiles(self.sizes):
                parts = dict.fromkeys(self.arrays) | shared
                for key, array in self.arrays.items():
                    if array is not None and key not in shared:
                        parts[key] = _read(array, index(self.operator, tile.part_of(key), one))
                check_offset(self.op, self.operator, parts, self.options, self.max_offset, tile)
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
        out[index(operator, tile.output, one)] = forward_of_tile(operator, arrays, parts.options, tile)
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
                place = index(operator, tile.input, one)
                targets[key][place] = targets[key][place] + grad
            else:
                targets[key][index(operator, tile.output, one)] = grad
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


def adapted(
    operator: Operator, backward: bool, compute: Callable[..., Any], doc: str, **more: Any
) -> Callable[..., Any]:
    """A function with the signature of an operator or its backward, and `more` arguments by keyword with defaults. It
    calls `compute` with the operator, the function's name and all arguments."""
    function = operator.backward if backward else operator.forward
    op, signature = function.__name__, inspect.signature(function)
    extra = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default) for key, default in more.items()]
    signature = signature.replace(parameters=[*signature.parameters.values(), *extra])

    def call(*arguments: Any, **given: Any) -> Any:
        bound = signature.bind(*arguments, **given)
        bound.apply_defaults()
        return compute(operator, op, bound.arguments)

    call.__name__ = call.__qualname__ = op
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = doc.format(op)
    return call


_DOC = "`pydeform.{}`, tile by tile: see `pydeform.tiling`."
for _operator in TILED.values():
    _more = dict.fromkeys(("tile_size", *(["max_offset"] if moved_by(_operator) else [])), inspect.Parameter.empty)
    globals()[_operator.name] = adapted(_operator, False, _forward, _DOC, **_more, out=None)
    globals()[f"{_operator.name}_backward"] = adapted(_operator, True, _backward, _DOC, **_more, out=None)

__all__ = [name for key in TILED for name in (key, f"{key}_backward")]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
