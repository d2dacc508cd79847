"""Channels-last copies and back, against NumPy: sizes, layouts of channels, alignments, limits of a grid, traffic."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from pydeform.cuda.core.source import Code
from tests.conftest import assert_same_bits, needs_emulation
from tests.test_cuda_convolution import on

pytestmark = needs_emulation
DTYPES = ("float16", "bfloat16", "float32", "float64")
CODE = Code("conv", 1)


class Layout(NamedTuple):
    channels: int
    unit: int
    pitch: int
    cells: int = 1

    @property
    def memory(self) -> int:
        return self.channels // self.unit * self.pitch


def layouts(itemsize: int) -> dict[str, Layout]:
    """Chunks are of 16 bytes, a tile has eight of them."""
    chunk = 16 // itemsize
    return {
        "one channel": Layout(1, 1, 1),
        "as they come": Layout(chunk + 1, chunk + 1, chunk + 1),
        "as they come, two tiles": Layout(9 * chunk + 1, 9 * chunk + 1, 9 * chunk + 1),
        "units of what is one chunk together": Layout(chunk, 1, 1),
        "a tile": Layout(8 * chunk, 8 * chunk, 8 * chunk),
        "units of whole chunks": Layout(18 * chunk, 2 * chunk, 2 * chunk),
        "one unit, padded": Layout(chunk + 1, chunk + 1, 2 * chunk),
        "one unit, padded by more than a tile": Layout(2, 2, 9 * chunk),
        "units, padded": Layout(5 * (chunk + 1), chunk + 1, 2 * chunk),
        "units of half a chunk": Layout(3 * (chunk // 2), chunk // 2, chunk),
        "cells": Layout(6 * chunk, chunk, chunk, 3),
        "cells of units, padded": Layout(2 * 3 * 2 * (chunk + 1), chunk + 1, 3 * chunk, 3),
    }


NAMES = tuple(layouts(2))


def channels_last(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Channel (a*unit + i)*cells + cell is channel i of unit (cell, a)."""
    batch, channels, pixels = array.shape
    copy = np.zeros((batch * pixels + 1, layout.memory), array.dtype)
    units = channels // layout.unit
    for u in range(units):
        cell, a = divmod(u, units // layout.cells)
        for i in range(layout.unit):
            copy[:-1, u * layout.pitch + i] = array[:, (a * layout.unit + i) * layout.cells + cell].ravel()
    return copy


def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """No two alike among neighbours."""
    import ml_dtypes

    of = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    return np.random.default_rng(sum(shape)).normal(0, 1, shape).astype(of)


def at(a: np.ndarray, start: int) -> Any:
    """On the device, so many elements behind a multiple of 16 bytes."""
    import cupy

    whole = cupy.empty((a.size + start,), a.dtype)
    place = whole[start:].reshape(a.shape)
    place[...] = cupy.asarray(a)
    return place


def last(array: Any, layout: Layout) -> Any:
    from pydeform.cuda.core import copies

    return copies.to_channels_last(CODE, array, layout.unit, layout.pitch, layout.cells)


def first(sums: Any, output: Any, layout: Layout) -> None:
    from pydeform.cuda.core import copies

    copies.to_channels_first(CODE, sums, output, layout.unit, layout.pitch)


def check(layout: Layout, batch: int, pixels: int, dtype: str, start: int) -> None:
    array = values((batch, layout.channels, pixels), dtype)
    copy = channels_last(array, layout)
    assert_same_bits(last(at(array, start), layout).get(), copy)
    if layout.cells == 1:
        sums = copy[:-1].astype("float64" if dtype == "float64" else "float32")
        sums[:, [q for q in range(layout.memory) if q % layout.pitch >= layout.unit]] = np.nan
        output = at(np.zeros_like(array), start)
        first(at(sums, 0), output, layout)
        assert_same_bits(output.get(), array)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(emulated, dtype, name):
    layout = layouts(np.dtype(values((1,), dtype).dtype).itemsize)[name]
    for schedule, pixels in enumerate((1, 2, 63, 64, 65, 66, 130)):
        with on(check=True, schedule=schedule):
            check(layout, 2, pixels, dtype, 0)


@pytest.mark.parametrize("start", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_that_begin_anywhere(emulated, dtype, start):
    """Two pixels in one access need an address for it, or fault."""
    for name in ("a tile", "units, padded"):
        layout = layouts(values((1,), dtype).itemsize)[name]
        for pixels in (7, 70):
            with on(check=True):
                check(layout, 3, pixels, dtype, start)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_more_tiles_than_a_grid_has_blocks(emulated, monkeypatch, dtype):
    from pydeform.cuda.core import copies

    monkeypatch.setattr(copies, "MOST_BLOCKS", 2)
    copies._turn.cache_clear()
    chunk = 16 // np.dtype(dtype).itemsize
    for schedule in (0, 1, 5):
        with on(check=True, schedule=schedule):
            check(Layout(41 * chunk, 41 * chunk, 41 * chunk), 5, 3, dtype, 0)
            check(Layout(40 * chunk + 1, 40 * chunk + 1, 40 * chunk + 1), 5, 3, dtype, 0)
    copies._turn.cache_clear()


def test_grids_are_within_their_limits(emulated, monkeypatch):
    from pydeform.cuda.core import copies

    grids: list[Any] = []
    monkeypatch.setattr(copies, "Launch", lambda operator, expression, grid, *rest: grids.append(grid))
    copies._turn.cache_clear()
    for batch, channels, pixels in ((70_000, 8, 1), (1, 5_000_000, 1), (1, 1, 2**31 - 2**17), (65_535, 4_194_240, 1)):
        for name, itemsize in (("to_channels_last", 2), ("to_channels_first", 4)):
            copies._turn(name, CODE, "float16", itemsize, batch, channels, pixels, channels, channels, None)
    copies._turn.cache_clear()
    assert all(0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535 for x, y, z in grids), grids


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_images(emulated, dtype):
    with on():
        assert last(at(np.zeros((0, 8, 5), values((1,), dtype).dtype), 0), Layout(8, 8, 8)).shape == (1, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accesses_are_as_wide_as_they_can_be(emulated, dtype):
    """Two pixels of a channel, or 16 bytes of a pixel, for each thread; whole sectors, and no bank twice."""
    array = values((2, 64, 128), dtype)
    layout = Layout(64, 64, 64)
    sums = channels_last(array, layout)[:-1].astype("float64" if dtype == "float64" else "float32")
    itemsize = array.itemsize
    with on(check=True, profile=True) as run:
        last(at(array, 0), layout)
        counters = run.counters()
    traffic(counters, "read", array.nbytes, 2 * itemsize)
    traffic(counters, "write", array.nbytes, 16, more=4)
    with on(check=True, profile=True) as run:
        first(at(sums, 0), at(array, 0), layout)
        counters = run.counters()
    traffic(counters, "read", sums.nbytes, 16)
    traffic(counters, "write", array.nbytes, 2 * itemsize)


def traffic(counters: Any, access: str, nbytes: int, width: int, more: int = 0) -> None:
    """`more`: requests for the pixel of zeros."""
    ours = {key: count for key, count in counters.items() if key[0].startswith("core/copies.cuh")}
    requests = sum(count.requests for key, count in ours.items() if key[1:] == (access, "global"))
    assert requests <= nbytes // (32 * width) + more, (requests, nbytes, width)
    for key, count in ours.items():
        assert count.sectors <= 1.01 * count.least_sectors, f"{key}: {count}"
        assert count.wavefronts <= 1.01 * count.least_wavefronts, f"{key}: {count}"
