"""How a RoI problem is cut up and where its arrays lie, for every way in which it is computed (docs/math/roi.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from pydeform.cpu.core import parallel
from pydeform.cpu.core.bands import BAND
from pydeform.cpu.core.layout import PIXELS
from pydeform.cpu.core.memory import Workspace, contiguous
from pydeform.cpu.core.planes import NO_PLANES, is_as_computed, planes_of, reader_parts
from pydeform.cpu.core.simd import VECTOR_BYTES
from pydeform.cpu.core.sizes import SERIAL_FLOPS, pixel_dtype, round_up, table
from pydeform.cpu.roi.bins import MANY_POINTS
from pydeform.cpu.roi.boxes import by_image
from pydeform.cpu.roi.records import Given, Kind, Plan, Prepared, Scratch, Tables

CHANNELS = 64  # most of a block, whose gradients one thread adds up
# Fewest channels of a slice, and most bytes of an image's: the forward copies one slice of channels to channels-last,
# which the caches keep, pools all boxes, then takes the next; each slice lists the bins again.
SLICE_CHANNELS, SLICE_BYTES = 128, 1 << 23
FEW_CHANNELS = 4  # of a class: with fewer a pixel fills less than one vector, so the channels-last copy does not pay
LISTED = 512  # pixels of a bin that are listed at a time
TILE = 1 << 14  # numbers in a thread's tile of results
LIST_BYTES = 4 << 20  # of a thread's lists, if eight bins fit: where there are more bins, some rows of them at a time
KEPT_BINS = 1 << 12  # of both axes: of more, tables and memory are made for each call
# Planes are divided into so many units for each thread, each of several in a row: neighbouring bins of a box are
# neighbours in memory, and threads that wrote them at the same time would wait for each other's cache lines.
UNITS_OF_THREAD = 16
# For estimates of the work:
TYPICAL_PIXELS = 16  # that a bin reads
LISTING = 300  # operations that it takes to list them


def run(kernel: Any, make: Callable[[Kind, int], Prepared], kind: Kind, threads: int, given: Any, results: Any) -> None:
    """`make` makes the plan, which is kept with its memory for the next call of this kind."""
    g = kind.g
    prepare = _kept if g.pooled_h + g.pooled_w <= KEPT_BINS else _kept.__wrapped__
    how = prepare(make, kind, threads)
    arrays = how.workspace.take()
    scratch = Scratch(*arrays)
    parallel.run(
        kernel,
        kind.dtype.char + pixel_dtype(g.in_h * g.in_w).char + "turned" * bool(g.turn),
        threads,
        parallel.new_counters(how.phases),
        given,
        results,
        scratch if g.turn else scratch._replace(turns=None),  # None: compiled without what turns need
        how.tables,
        g,
        how.plan,
    )
    how.workspace.give_back(arrays)


@functools.lru_cache(maxsize=64)
def _kept(make: Callable[[Kind, int], Prepared], kind: Kind, threads: int) -> Prepared:
    return make(kind, threads)


def threads_for(g: Any, products: int, gathers: bool, units: int) -> int:
    per_bin = products * (2 * TYPICAL_PIXELS * g.out_channels + LISTING * g.classes)
    flops = g.boxes * g.pooled_h * g.pooled_w * per_bin
    if not gathers:
        flops += products * g.batch * g.in_channels * g.in_h * g.in_w
    return 1 if flops < SERIAL_FLOPS else parallel.threads_for(units)


# Which way ------------------------------------------------------------------------------------------------------------


def has_few_channels(g: Any) -> bool:
    """Whether a class has so few, in means over bins, that each channel is read by itself, in its plane."""
    return bool(g.out_channels // g.classes < FEW_CHANNELS and not g.is_max)


def prefers_planes(g: Any, dtype: Any) -> bool:
    """Whether a copy would be most of the work, as for few boxes: it has more numbers than bins read, about."""
    per_class = g.out_channels // g.classes
    width = per_class if has_few_channels(g) else blocks_of_class(per_class, lanes_of(dtype))[1]
    return TYPICAL_PIXELS * g.boxes * g.pooled_h * g.pooled_w * int(g.out_channels) < copy_size(g, width)


def gathers_pixels(input: Any, g: Any, dtype: Any) -> bool:
    """Whether pixels are gathered, not the input copied. Planes that kernels can read as they are need neither."""
    return prefers_planes(g, dtype) and not (has_few_channels(g) and is_as_computed(input, dtype))


def given_arrays(
    input: Any, boxes: Any, offset: Any, mask: Any, g: Any, dtype: Any, gathers: bool, reads: bool = True
) -> Given:
    copied = reads and not gathers
    boxes = contiguous(boxes, dtype, boxes.shape)
    return Given(
        contiguous(input, dtype, (g.batch, g.in_channels, g.in_h * g.in_w)) if copied else np.empty((0, 1, 1), dtype),
        boxes,
        np.empty((0, 1, 2, 1), dtype)
        if offset is None
        else contiguous(offset, dtype, (g.boxes, g.classes, 2, g.part_h * g.part_w)),
        np.empty((0, 1), dtype) if mask is None else contiguous(mask, dtype, (g.boxes, g.pooled_h * g.pooled_w)),
        planes_of(input) if gathers else NO_PLANES,
        *by_image(boxes, g.batch),
    )


# Channels and bins ----------------------------------------------------------------------------------------------------


def lanes_of(dtype: Any) -> int:
    return VECTOR_BYTES // int(dtype.itemsize)


def cells_of(g: Any) -> int:
    """Groups of channels of the input, of which each bin reads one."""
    return int(g.group_h * g.group_w)


def copy_size(g: Any, width: int) -> int:
    return int(g.batch * cells_of(g) * g.classes * width * (g.in_h * g.in_w + 1))


def _blocks(channels: int, largest: int, lanes: int) -> list[tuple[int, int, int]]:
    """(first, channels, width) of blocks as equal as can be; the width is whole vectors."""
    size = -(-channels // -(-channels // largest))
    starts = range(0, channels, size)
    return [(first, n := min(size, channels - first), round_up(n, lanes)) for first in starts]


@functools.lru_cache(maxsize=64)
def blocks_of_class(per_class: int, lanes: int) -> tuple[Any, int]:
    """The blocks of channels of one class, and their width together. `before`: the width of those before a block.

    Two blocks at least where channels allow it, so that threads can share them. Sums over channels go block by block,
    so blocks depend on the class alone, not on threads.
    """
    half = max(2 * lanes, round_up(-(-per_class // 2), lanes))
    rows, before = [], 0
    for row in _blocks(per_class, min(half, CHANNELS), lanes):
        rows.append((*row, before))
        before += row[-1]
    return table("first channels width before", rows), before


def slices_of_class(per_class: int, lanes: int, channel_bytes: int) -> tuple[Any, int]:
    """The slices of a class's channels, which the forward copies one after the other to the same memory, and the
    largest width."""
    blocks = _blocks(per_class, max(SLICE_CHANNELS, SLICE_BYTES // channel_bytes), lanes)
    return table("first channels width before", [(*row, 0) for row in blocks]), blocks[0][-1]


@functools.lru_cache(maxsize=64)
def bins_table(pooled: tuple[int, int], group: tuple[int, int], part: tuple[int, int]) -> Any:
    """For each row of bins, then for each column: what it adds to the number of the cell that a bin reads, and to that
    of the part of `offset` that moves the bin.

    Kernels look these numbers up: divisions would take as long as all else that a bin of one channel needs.
    """
    bins = np.empty(sum(pooled), [("cell", np.int64), ("part", np.int64)])
    for axis, of_axis in enumerate((bins[: pooled[0]], bins[pooled[0] :])):
        numbers = np.arange(pooled[axis])
        for name, cells in ("cell", group), ("part", part):
            of_axis[name] = numbers * cells[axis] // pooled[axis] * (1 if axis else cells[1])
    return bins


def bins_of(g: Any) -> Any:
    make = bins_table if g.pooled_h + g.pooled_w <= KEPT_BINS else bins_table.__wrapped__
    return make((g.pooled_h, g.pooled_w), (g.group_h, g.group_w), (g.part_h, g.part_w))


# A thread's lists -----------------------------------------------------------------------------------------------------


def most_listed(g: Any) -> int:
    """Most entries of a bin on an axis, whichever way they are listed, and some room behind: eight are read at once."""
    longest = max(g.in_h, g.in_w)
    if g.turn:
        return BAND  # a slot has the few numbers of a `rotated.Line`; what points read is never all listed
    if g.points and g.is_max:
        return int(g.samples + 2 if 0 < g.samples <= MANY_POINTS else 2 * longest + 16)
    return int((min(2 * g.samples, longest) if g.samples and g.points else longest) + BAND)


def _longest_bin(boxes: Any, g: Any) -> float:
    """A length in pixels that no bin exceeds: to that of the boxes, rounding, a last pixel and a least size each add
    one at most, and the arithmetic of kernels may round up."""
    corners = boxes[:, 1:].astype(np.float64)
    corners = corners[np.isfinite(corners).all(axis=1)]
    if not len(corners):
        return 0.0
    lengths = (np.abs(corners[:, 2:] - corners[:, :2]).max(axis=0) + 2) * g.spatial_scale + 2
    rounding = np.abs(corners).max() * max(g.spatial_scale, 1) * 2.0**-20
    return float(np.ceil(max(lengths[0] / g.pooled_w, lengths[1] / g.pooled_h) + rounding))


def size_of_lists(g: Any, boxes: Any) -> tuple[int, int]:
    """Slots of each axis, and entries of a slot. `boxes` as kernels get them."""
    listed, slots = most_listed(g), round_up(max(g.pooled_h, g.pooled_w), BAND)  # eight are listed at once
    entry = 2 * (pixel_dtype(g.in_h * g.in_w).itemsize + 2 * boxes.dtype.itemsize)
    if slots * listed * entry > LIST_BYTES:
        if not (g.turn or (g.points and g.is_max and g.samples)):
            # Lists as long as bins, not as the image: every pixel, or point between, is one entry, or two.
            listed = int(min(listed, 2 * _longest_bin(boxes, g) + 16))
        slots = max(BAND, min(slots, LIST_BYTES // (listed * entry) // BAND * BAND))
    return slots, listed


def scratch_of(
    kind: Kind,
    threads: int,
    width: int,
    *,
    tile: int = 0,
    copies: tuple[int, int, int] = (0, 0, 0),
    gathered: int = 0,
    edges: int = 0,
) -> Workspace:
    """`width`: most channels that are read at once; `tile`: bins; `copies`: numbers of each; `gathered`: pixels;
    `edges`: 1 if derivatives come in two parts."""
    g, dtype, slots, listed, *_ = kind
    pixel, number = pixel_dtype(g.in_h * g.in_w), np.dtype(np.int64)
    corners = 4 if g.is_max and g.points else 1
    return Workspace(
        ((g.boxes, 4), dtype),
        ((g.boxes,), number),
        *(((size,), dtype) for size in copies),
        ((g.boxes * bool(g.turn), 4), dtype),
        threads=threads,
        own=(
            ((tile, width), dtype),
            ((width * g.is_max,), np.dtype(f"i{dtype.itemsize}")),
            ((2, 2 * slots), dtype),
            ((2 * slots, listed), pixel),
            ((2 * slots, 2, listed), dtype),
            ((2 * slots,), dtype),
            ((3 * slots,), number),
            ((corners * LISTED,), pixel),
            ((max(corners, 3 + edges) * LISTED,), dtype),
            ((2 * slots * edges, listed), dtype),
            *reader_parts(gathered * corners, width, pixel, dtype),
        ),
    )


# Plans ----------------------------------------------------------------------------------------------------------------


def _plan(kind: Kind, **rest: int) -> Plan:
    g, flags = kind.g, map(int, kind[-4:])
    return Plan(int(kind.gathers), g.out_channels // g.classes, *flags, **rest)


def slices_plan(kind: Kind, threads: int) -> Prepared:
    """Of a forward: slice by slice of the channels."""
    g, dtype, lanes = kind.g, kind.dtype, lanes_of(kind.dtype)
    channel_bytes = g.in_h * g.in_w * cells_of(g) * g.classes * dtype.itemsize
    # Few channels at a time are gathered, so that a thread's pixels stay in its caches.
    most = SLICE_BYTES if kind.gathers else max(channel_bytes, 1)
    slices, width = slices_of_class(g.out_channels // g.classes, lanes, most)
    tile = min(g.pooled_h * g.pooled_w, max(lanes, TILE // width))
    copies = 0 if kind.gathers else copy_size(g, width), 0, 0
    no_shift = np.full(g.out_channels, -0.0, dtype)  # +0.0 would change -0.0
    return Prepared(
        1 + 2 * len(slices),
        scratch_of(kind, threads, width, tile=tile, copies=copies, gathered=LISTED * kind.gathers),
        Tables(bins_of(g), slices, no_shift),
        _plan(kind, width=width, tile_bins=tile),
    )


def blocks_threads(kind: Kind) -> int:
    """Threads of a backward, block by block of the channels."""
    g = kind.g
    blocks, _ = blocks_of_class(g.out_channels // g.classes, lanes_of(kind.dtype))
    groups = g.batch * cells_of(g) * g.classes
    units = groups * len(blocks) * kind.need_input + g.boxes * g.classes * kind.need_dots
    return threads_for(g, 1 + 2 * kind.need_dots, kind.gathers, max(units, g.batch * -(-g.in_h * g.in_w // PIXELS)))


def blocks_plan(kind: Kind, threads: int) -> Prepared:
    """Of a backward: block by block of the channels."""
    g, dtype = kind.g, kind.dtype
    blocks, width = blocks_of_class(g.out_channels // g.classes, lanes_of(dtype))
    groups = g.batch * cells_of(g) * g.classes
    reads, copied = kind.need_dots or bool(g.is_max), not kind.gathers
    copies = (kind.need_input and copied) or (kind.need_dots and not g.is_max)
    sizes = (
        copy_size(g, width) * (copied and reads),
        copy_size(g, width) * (copied and kind.need_input),
        g.boxes * g.classes * width * (g.pooled_h * g.pooled_w + 1) * copies,
    )
    gathered = LISTED * (kind.gathers and reads)
    return Prepared(
        4,
        scratch_of(kind, threads, int(max(blocks["width"])), tile=1, copies=sizes, gathered=gathered),
        Tables(bins_of(g), blocks, np.empty(0, dtype)),
        # What a bin reads is listed once for each unit, so there are no more than keep the threads at work.
        _plan(kind, width=width, copies=int(copies), blocks_of_unit=-(-len(blocks) // max(1, threads // groups))),
    )


def planes_plan(kind: Kind, threads: int) -> Prepared:
    """Of a forward or backward: plane by plane."""
    g, dtype = kind.g, kind.dtype
    number = g.batch * cells_of(g) * g.classes
    reads = kind.need_dots or not kind.need_input
    return Prepared(
        2,
        scratch_of(kind, threads, BAND, gathered=max(LISTED, kind.listed) * (kind.gathers and reads)),
        Tables(bins_of(g), np.empty(0, np.int64), np.empty(0, dtype)),
        _plan(
            kind,
            parts=-(-UNITS_OF_THREAD * threads // (4 * number)) if threads > 1 else 1,
            units=UNITS_OF_THREAD * threads,
        ),
    )


def edges_plan(kind: Kind, threads: int) -> Prepared:
    """Of the boxes' gradient: box by box."""
    g, dtype = kind.g, kind.dtype
    blocks, width = blocks_of_class(g.out_channels, lanes_of(dtype))
    sizes = copy_size(g, width) * (not kind.gathers), 0, g.boxes * width * (g.pooled_h * g.pooled_w + 1)
    gathered = LISTED * kind.gathers
    return Prepared(
        3 if g.is_max else 4,
        scratch_of(kind, threads, int(max(blocks["width"])), tile=1, copies=sizes, gathered=gathered, edges=1),
        Tables(bins_of(g), blocks, np.empty(0, dtype)),
        _plan(kind, width=width),
    )
