"""How the queries of a call are cut up, and the memory that its kernels work with."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from pydeform._grid_geometry import BICUBIC, NEAREST, GridGeometry
from pydeform.cpu.core import parallel
from pydeform.cpu.core.cells import NARROW
from pydeform.cpu.core.memory import Workspace, contiguous
from pydeform.cpu.core.simd import VECTOR_BYTES
from pydeform.cpu.core.sizes import SERIAL_FLOPS, round_up

TABLES = 32 << 10  # bytes of a tile's tables, about: they stay in the first-level cache,
ROWS = 64 << 10  # and its rows of channels in the second
MOST_QUERIES = 512
UNITS_OF_THREAD = 8  # so that none waits long for the last
LOCATING = 32  # what locating a sample costs, in multiply-adds


class Given(NamedTuple):
    """What a caller gave, in the kernels' shapes."""

    input: Any  # (image, channel, pixel)
    grid: Any  # (image, number)


class Scratch(NamedTuple):
    """A call's own memory: a copy of the images, channels last, then each thread's. Of a tile's queries there are rows
    for each axis, or for each pixel that they name along each axis; and tables for each corner (`place_in`)."""

    image: Any  # of each image its pixels, and one of zeros for all that is outside
    grad_image: Any  # likewise, of the channels that a thread has
    numbers: Any
    pixels: Any  # along an axis: times the pixels that a step takes; -1: there is none
    parts: Any  # and its part of the sample,
    slopes: Any  # and how this grows with the number
    starts: Any  # of corners: addresses of their first channel,
    shares: Any  # parts of the sample,
    dots: Any  # and dots with the output's gradient
    rows: Any  # channels of the queries


class Plan(NamedTuple):
    axes: tuple[int, ...]  # an item for each axis of a cell of 2, 4, 8 or 16 corners; none where it is one pixel
    nearest: Any  # None, or that sample is one pixel,
    cubic: Any  # or four along each axis, instead of two;
    bits: int  # that is 2**bits pixels along an axis
    narrow: Any  # None, or pixels have NARROW channels,
    width: int  # or so many
    queries: int  # of a tile
    blocks: int  # into how many blocks the channels are cut for the input's gradient,
    block: int  # and their size


class Prepared(NamedTuple):
    key: str  # of the types of a kernel's arguments
    threads: int
    workspace: Workspace
    plan: Plan


def threads_for(g: GridGeometry, products: int, units: int) -> int:
    flops = products * g.batch * g.queries * (8 * g.channels + LOCATING)
    return 1 if flops < SERIAL_FLOPS else parallel.threads_for(units)


@functools.lru_cache(maxsize=64)
def prepared(g: GridGeometry, dtype: Any, copies: bool, scatters: bool, needs_dots: bool, threads: int) -> Prepared:
    lanes, itemsize, axes = VECTOR_BYTES // dtype.itemsize, dtype.itemsize, len(g.in_size)
    is_nearest, is_cubic, is_narrow = g.mode == NEAREST, g.mode == BICUBIC, g.channels <= NARROW
    bits = 0 if is_nearest else 2 if is_cubic else 1
    taps, corners = axes << bits, 1 << bits * axes
    unit = NARROW if is_narrow else lanes
    width = round_up(g.channels, unit)
    of_query = taps * (4 + 2 * itemsize) + corners * (8 + 2 * itemsize)
    fair = -(-g.batch * g.queries // (UNITS_OF_THREAD * threads))
    queries = min(MOST_QUERIES, max(TABLES // of_query, 1), max(ROWS // (width * itemsize), 1), g.queries, fair)
    queries = round_up(queries, lanes)
    parts = -(-threads // g.batch)  # of an image, for the gradient of the input
    block = round_up(-(-width // min(parts, width // unit)), unit)
    pixels, real, integer = math.prod(g.in_size) + 1, dtype, np.dtype(np.int64)
    workspace = Workspace(
        ((g.batch * pixels * width * copies,), real),
        ((threads, pixels * block * scatters), real),
        ((threads, axes, queries), real),
        ((threads, taps, queries), np.dtype(np.int32)),
        ((threads, taps, queries), real),
        ((threads, taps, queries), real),
        ((threads, corners * queries), integer),
        ((threads, corners * queries), real),
        ((threads, corners * queries * needs_dots), real),
        ((threads, queries * width), real),
    )
    plan = Plan(
        axes=(0,) * (bits * axes),
        nearest=1 if is_nearest else None,
        cubic=1 if is_cubic else None,
        bits=bits,
        narrow=1 if is_narrow else None,
        width=width,
        queries=queries,
        blocks=-(-width // block),
        block=block,
    )
    key = dtype.char + str(axes) + str(bits) + "n" * is_narrow
    return Prepared(key, threads, workspace, plan)


def given_arrays(arrays: Any, g: GridGeometry, dtype: Any) -> Given:
    return Given(
        contiguous(arrays.input, dtype, (g.batch, g.channels, math.prod(g.in_size))),
        contiguous(arrays.grid, dtype, (g.batch, g.queries * len(g.in_size))),
    )
