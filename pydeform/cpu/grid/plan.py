"""How the queries of a call are cut up, and the memory that its kernels work with."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from pydeform._grid_geometry import BICUBIC, NEAREST, GridGeometry
from pydeform.cpu.core import parallel
from pydeform.cpu.core.memory import Workspace, contiguous
from pydeform.cpu.core.simd import VECTOR_BYTES
from pydeform.cpu.core.sizes import SERIAL_FLOPS, round_up

TILE = 512  # queries that are located together: their tables stay in a cache
UNITS_OF_THREAD = 8  # so that none waits long for the last
LOCATING = 32  # what locating a sample costs, in multiply-adds


class Given(NamedTuple):
    """What a caller gave, in the kernels' shapes."""

    input: Any  # (image, channel, pixel)
    grid: Any  # (image, number)


class Scratch(NamedTuple):
    """A call's own memory, each thread's: rows of the queries of a tile."""

    numbers: Any  # for each axis
    parts: Any  # along each axis, if somebody asks: each pixel's part of the sample,
    slopes: Any  # and how this grows with the number
    corners: Any  # for each corner: which pixel, or `NOTHING`
    shares: Any  # its part of the sample,
    dots: Any  # and dot with the output's gradient


class Plan(NamedTuple):
    nearest: Any  # None, or that a sample is one pixel,
    cubic: Any  # or four along each axis, instead of two;
    volume: Any  # None, or that there is a third axis
    pairs: Any  # None, or that neighbours along the last axis are read at once
    bits: int  # that is 2**bits pixels along an axis
    corners: int
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
def prepared(g: GridGeometry, dtype: Any, needs_dots: bool, threads: int) -> Prepared:
    lanes, axes = VECTOR_BYTES // dtype.itemsize, len(g.in_size)
    is_nearest, is_cubic = g.mode == NEAREST, g.mode == BICUBIC
    bits = 0 if is_nearest else 2 if is_cubic else 1
    has_pairs = bits > 0 and g.in_size[-1] > 1
    taps, corners, integer = axes << bits, 1 << bits * axes, np.dtype(np.int32)
    fair = -(-g.batch * g.queries // (UNITS_OF_THREAD * threads))
    queries = round_up(max(1, min(TILE, g.queries, fair)), lanes)
    blocks = min(-(-threads // g.batch), g.channels)  # of an image
    block = -(-g.channels // blocks)
    own = (
        ((axes, queries), dtype),
        ((taps * needs_dots, queries), dtype),
        ((taps * needs_dots, queries), dtype),
        ((corners, queries), integer),
        ((corners, queries), dtype),
        ((corners * needs_dots, queries), dtype),
    )
    plan = Plan(
        nearest=1 if is_nearest else None,
        cubic=1 if is_cubic else None,
        volume=1 if axes > 2 else None,
        pairs=1 if has_pairs else None,
        bits=bits,
        corners=corners,
        queries=queries,
        blocks=-(-g.channels // block),
        block=block,
    )
    key = dtype.char + str(axes) + str(bits) + "p" * has_pairs
    return Prepared(key, threads, Workspace(threads=threads, own=own), plan)


def given_arrays(arrays: Any, g: GridGeometry, dtype: Any) -> Given:
    return Given(
        contiguous(arrays.input, dtype, (g.batch, g.channels, math.prod(g.in_size))),
        contiguous(arrays.grid, dtype, (g.batch, g.queries * len(g.in_size))),
    )
