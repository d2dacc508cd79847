"""How a grid of coordinates samples an image: the sizes of one call, and the rules.

A query reads each channel of its image at one place, between pixels whose centres lie at integers:

    pixel = start + ((number + shift) * half - back)          along each axis

where `start` is the query's own place where it is moved from there, else 0. Both backends compute it in this order,
which puts a sample on the same side of every pixel as PyTorch does.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from pydeform import _checks
from pydeform._geometry import FARTHEST, SIZES

BILINEAR, NEAREST, BICUBIC = range(3)
MODES = {"bilinear": BILINEAR, "nearest": NEAREST, "bicubic": BICUBIC}
ZEROS, BORDER, REFLECTION = range(3)
PADDINGS = {"zeros": ZEROS, "border": BORDER, "reflection": REFLECTION}
# What errors call the shapes of a grid and of a result, by the number of axes.
GRIDS = {2: "(N, out_h, out_w, 2)", 3: "(N, out_d, out_h, out_w, 3)"}
OUTPUTS = {2: "(N, C, out_h, out_w)", 3: "(N, C, out_d, out_h, out_w)"}


class GridGeometry(NamedTuple):
    """Every number that a kernel needs. Tuples have one for each axis, in the order of the array's."""

    batch: int
    channels: int
    queries: int  # of each image
    in_size: tuple[int, ...]
    mode: int
    padding: int
    number_step: int  # numbers from one query's to the next one's in the grid,
    number_first: tuple[int, ...]  # and where those of the first are
    moves: int  # 1: queries are the pixels, and numbers say how far they move
    shift: float
    half: tuple[float, ...]
    back: float  # reflection turns first at -back,
    span: tuple[float, ...]  # and so far beyond it again


class GridArrays(NamedTuple):
    """What is sampled, and where."""

    input: Any
    grid: Any


def grid_geometry(op: str, input: Any, grid: Any, mode: str, padding_mode: str, align_corners: Any) -> GridGeometry:
    """Of normalised coordinates: -1 and 1 are the outer edges of the image, or, with `align_corners`, the centres of
    its first and last pixel."""
    _check_choices(op, mode, padding_mode)
    shapes = (tuple(map(int, array.shape)) for array in (input, grid))
    corners = _checks.flag(op, "align_corners", align_corners)
    return _normalised(op, input.dtype.itemsize, *shapes, MODES[mode], PADDINGS[padding_mode], corners)


def displaced_geometry(op: str, input: Any, displacement: Any, mode: str, padding_mode: str) -> GridGeometry:
    """Of the pixels themselves, moved."""
    _check_choices(op, mode, padding_mode)
    shapes = (tuple(map(int, array.shape)) for array in (input, displacement))
    return _displaced(op, input.dtype.itemsize, *shapes, MODES[mode], PADDINGS[padding_mode])


def _check_choices(op: str, mode: str, padding_mode: str) -> None:
    _checks.check_choice(op, "mode", mode, tuple(MODES))
    _checks.check_choice(op, "padding_mode", padding_mode, tuple(PADDINGS))


@functools.lru_cache(maxsize=256)
def _normalised(
    op: str, itemsize: int, input: Any, grid: Any, mode: int, padding: int, align_corners: bool
) -> GridGeometry:
    """Of shapes."""
    axes, size = _check_input(op, itemsize, input, mode)
    _checks.check_ndim(op, "grid", grid, GRIDS[axes], axes + 2)
    _checks.check_shape(op, "grid", grid, GRIDS[axes], (input[0], *grid[1:-1], axes))
    _checks.check_result(op, OUTPUTS[axes], (*input[:2], *grid[1:-1]), itemsize)
    span = tuple(float(n - align_corners) for n in size)
    return GridGeometry(
        batch=input[0],
        channels=input[1],
        queries=math.prod(grid[1:-1]),
        in_size=size,
        mode=mode,
        padding=padding,
        number_step=axes,
        number_first=tuple(reversed(range(axes))),
        moves=0,
        shift=1.0,
        half=tuple(n / 2 for n in span),
        back=0.0 if align_corners else 0.5,
        span=span,
    )


@functools.lru_cache(maxsize=256)
def _displaced(op: str, itemsize: int, input: Any, displacement: Any, mode: int, padding: int) -> GridGeometry:
    """Of shapes."""
    axes, size = _check_input(op, itemsize, input, mode)
    formula = f"(N, {axes}, {SIZES[axes]})"
    _checks.check_shape(op, "displacement", displacement, formula, (input[0], axes, *size))
    pixels = math.prod(size)
    return GridGeometry(
        batch=input[0],
        channels=input[1],
        queries=pixels,
        in_size=size,
        mode=mode,
        padding=padding,
        number_step=1,
        number_first=tuple(pixels * axis for axis in range(axes)),
        moves=1,
        shift=0.0,
        half=(1.0,) * axes,
        back=0.0,
        span=tuple(float(n - 1) for n in size),
    )


def _check_input(op: str, itemsize: int, input: tuple[int, ...], mode: int) -> tuple[int, tuple[int, ...]]:
    """Its axes, and their sizes."""
    axes, size = len(input) - 2, input[2:]
    if axes not in GRIDS:
        raise ValueError(f"{op}: input must have shape (N, C, H, W) or (N, C, D, H, W), got {input}")
    if mode == BICUBIC and axes != 2:
        raise ValueError(f"{op}: mode 'bicubic' needs an input of shape (N, C, H, W), got {input}")
    if min(input[1:]) < 1:
        raise ValueError(f"{op}: input must have at least one channel and one pixel, got shape {input}")
    if math.prod(size) > _checks.MOST:
        raise ValueError(f"{op}: input must have at most {_checks.MOST} pixels in an image, got {math.prod(size)}")
    farthest = FARTHEST["float64" if itemsize == 8 else "float32"]
    if max(size) > farthest:
        raise ValueError(f"{op}: input must have at most {farthest} pixels along each axis, got {SIZES[axes]} = {size}")
    return axes, size
