"""Forward of a convolution with or without offsets: copies, packed weight, tiles, and the sum of slices."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform.cuda import _conv_common, _conv_direct
from pydeform.cuda._conv_common import (
    C_TYPES,
    COPIES,
    DEFORMED,
    PLAIN,
    Channels,
    Product,
    ceil_div,
    index_type,
    pixels,
    taps,
)
from pydeform.cuda._launch import capability, geometry, kernel, launch, multiprocessors, shared_limit

THREADS = 256
SHORTEST_SLICE = 8  # steps: below, filling and emptying the pipeline costs more than a slice saves


def compute_dtype(dtype: Any) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def forward(
    operator: str, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, *, allow_tf32: bool
) -> Any:
    input, offset, weight, bias, mask = contiguous(input, offset, weight, bias, mask)
    with input.device:
        output = cupy.empty((g.batch, g.out_channels, g.out_h, g.out_w), input.dtype)
        if g.batch == 0:
            return output
        if _conv_common.is_direct(g):
            _conv_direct.forward(operator, input, offset, weight, bias, mask, g, output)
            return output
        reads = PLAIN if offset is None else DEFORMED
        product = _conv_common.forward_product(
            input.dtype.name, capability(), g.out_channels // g.groups, allow_tf32 and input.dtype == np.float32
        )
        tiles = Tiles(operator, reads, product, g)
        packed = tiles.pack_weight(weight)
        images = images_at_a_time(g, tiles.channels.memory(g.groups) * g.in_h * g.in_w * input.dtype.itemsize)
        for start in range(0, g.batch, images):
            part = slice(start, start + images)
            copy = to_channels_last(operator, input[part], tiles.channels.unit, tiles.channels.pitch)
            tiles.run(copy, part_of(offset, part), part_of(mask, part), packed, bias, output[part])
        return output


def contiguous(*arrays: Any) -> list[Any]:
    """One copy of each array that is not."""
    return [None if array is None else cupy.ascontiguousarray(array) for array in arrays]


def images_at_a_time(g: Any, image_bytes: int) -> int:
    return int(max(1, min(g.batch, COPIES // image_bytes)))


def part_of(array: Any, part: slice) -> Any:
    return None if array is None else array[part]


class Tiles(NamedTuple):
    """One convolution by tiles: `reads` PLAIN or DEFORMED, or ADJOINT with a geometry from `swapped`."""

    operator: str
    reads: int
    product: Product
    g: Any

    @property
    def channels(self) -> Channels:
        def largest(slots: int) -> int:
            return self.shared(slots, "long long")

        return _conv_common.channels(self.g, self.product.dtype, self.product.depth, largest, shared_limit())

    @property
    def tiles_n(self) -> int:
        """Tiles that the outputs of a group fill."""
        return ceil_div(self.g.out_channels // self.g.groups, self.product.columns)

    def shared(self, slots: int, index: str) -> int:
        """Bytes: two stages of tiles, and the taps of three steps."""
        corners = 4 if self.reads == DEFORMED else 1
        tap = _conv_common.corner_bytes(self.product.dtype, index, corners, corners)
        return 2 * self.product.stage_bytes + 3 * self.product.rows * slots * tap

    def pack_weight(self, weight: Any) -> Any:
        p, c, g = self.product, self.channels, self.g
        size = g.groups * self.tiles_n * c.blocks * taps(g) * p.columns * p.depth
        packed = cupy.empty((p.parts * size,), weight.dtype)
        launch(
            kernel(self.operator, f"pack_weight<{p.expression}, {index_type(packed.size)}, {self.reads}>"),
            (ceil_div(size, THREADS),),
            THREADS,
            (weight, packed, geometry(g), geometry(c), np.int32(self.tiles_n)),
        )
        return packed

    def run(self, copy: Any, offset: Any, mask: Any, packed: Any, bias: Any, output: Any) -> None:
        """`copy`: the channels-last image; the number of images is that of `output`."""
        p, c = self.product, self.channels
        g = self.g._replace(batch=output.shape[0])
        everything = g.batch * pixels(g)
        tiles = ceil_div(everything, p.rows) * g.groups * self.tiles_n
        slices = _conv_common.slices(tiles, c.blocks * taps(g), multiprocessors(), SHORTEST_SLICE)
        partial = None
        if slices > 1:
            partial = cupy.empty((slices, g.out_channels, everything), compute_dtype(output.dtype))
        sizes = [a.size for a in (copy, offset, mask, packed, output, partial) if a is not None]
        index = index_type(*sizes)
        slots = c.slots(p.depth)
        shared = self.shared(slots, index)
        launch(
            kernel(self.operator, f"forward<{p.expression}, {index}, {self.reads}>", shared),
            (tiles, slices),
            p.threads,
            (
                *(copy, offset, mask, packed, bias, output, partial),
                *(geometry(g), geometry(c), np.int32(self.tiles_n), np.int32(slots)),
            ),
            shared,
        )
        if partial is not None:
            launch(
                kernel(self.operator, f"sum_slices<{C_TYPES[p.dtype]}, {index}>"),
                (ceil_div(output.size, THREADS),),
                THREADS,
                (partial, bias, output, geometry(g), np.int32(slices)),
            )


def to_channels_last(operator: str, array: Any, unit: int, pitch: int) -> Any:
    """(N*H*W + 1, channels): each `unit` of channels in a space of `pitch`, and behind the last pixel one of zeros."""
    batch, count, height, width = array.shape
    copy = cupy.empty((batch * height * width + 1, count // unit * pitch), array.dtype)
    index = index_type(array.size, copy.size)
    launch(
        kernel(operator, f"to_channels_last<{C_TYPES[array.dtype.name]}, {index}>"),
        (batch * ceil_div(height * width, 32) * ceil_div(copy.shape[1], 32),),
        THREADS,
        (
            array,
            copy,
            np.int32(batch),
            np.int32(count),
            integer(index, height * width),
            np.int32(unit),
            np.int32(pitch),
        ),
    )
    return copy


def to_channels_first(operator: str, sums: Any, output: Any, unit: int, pitch: int) -> None:
    """The sums of `to_channels_last`'s layout, rounded into `output` (N, C, H, W)."""
    batch, count, height, width = output.shape
    index = index_type(output.size, sums.size)
    launch(
        kernel(operator, f"to_channels_first<{C_TYPES[output.dtype.name]}, {index}>"),
        (batch * ceil_div(height * width, 32) * ceil_div(count // unit * pitch, 32),),
        THREADS,
        (
            sums,
            output,
            np.int32(batch),
            np.int32(count),
            integer(index, height * width),
            np.int32(unit),
            np.int32(pitch),
        ),
    )


def integer(index: str, value: int) -> Any:
    return np.int32(value) if index == "int" else np.int64(value)
