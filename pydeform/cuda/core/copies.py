"""Channels-last copies and back: launches of core/copies.cuh."""

from __future__ import annotations

import functools
import math
from typing import Any

import cupy
import numpy as np

from pydeform.cuda.core.launch import Device, Launch, device
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, integer
from pydeform.cuda.core.source import Code

THREADS = 256
PLANS = 1024  # kept, the most recent ones
TILE_PIXELS, TILE_BYTES = 64, 128  # of a block: pixels, and channels of each in the copy or the sums
MOST_BLOCKS = 65535  # along the second and the third axis of a grid


def contiguous(*arrays: Any) -> list[Any]:
    """One copy of each array that is not, on the current device."""
    return [None if array is None else cupy.ascontiguousarray(array) for array in arrays]


def to_channels_last(code: Code, array: Any, unit: int, pitch: int, cells: int = 1) -> Any:
    """(N*P + 1, channels) of (N, C, P...): each `unit` of channels in a space of `pitch`; the last pixel is zeros.

    A unit's channels come `cells` apart in the array. `pitch` is whole chunks of 16 bytes, or `unit`.
    """
    batch, count, *size = array.shape
    copy = cupy.empty((batch * math.prod(size) + 1, count // unit * pitch), array.dtype)
    sizes = (batch, count, math.prod(size), unit, pitch)
    _turn("to_channels_last", code, array.dtype.name, array.dtype.itemsize, *sizes, device(), cells)(array, copy)
    return copy


def to_channels_first(code: Code, sums: Any, output: Any, unit: int, pitch: int) -> None:
    """The sums of `to_channels_last`'s layout, rounded into `output` (N, C, P...)."""
    batch, count, *size = output.shape
    itemsize, sizes = compute_dtype(output.dtype).itemsize, (batch, count, math.prod(size), unit, pitch)
    _turn("to_channels_first", code, output.dtype.name, itemsize, *sizes, device())(sums, output)


@functools.lru_cache(maxsize=PLANS)
def _turn(
    name: str,
    code: Code,
    dtype: str,
    itemsize: int,
    batch: int,
    count: int,
    image: int,
    unit: int,
    pitch: int,
    _on: Device,  # for whose context the kernel is loaded
    *more: int,
) -> Launch:
    """`itemsize` is that of the channels-last array."""
    memory = count // unit * pitch
    index = index_type((batch * image + 1) * memory)
    columns = ceil_div(memory * itemsize, TILE_BYTES)
    return Launch(
        code,
        f"{name}<{C_TYPES[dtype]}, {index}>",
        (ceil_div(image, TILE_PIXELS), min(columns, MOST_BLOCKS), min(batch, MOST_BLOCKS)),
        THREADS,
        *(np.int32(batch), np.int32(count), integer(index, image), np.int32(memory), np.int32(unit), np.int32(pitch)),
        *map(np.int32, more),
    )
