"""Forward of a convolution by tiles: copies, packed weight, tiles, and the sum of slices."""

from __future__ import annotations

import functools
import math
from typing import Any

import cupy
import numpy as np

from pydeform.cuda.conv import plan
from pydeform.cuda.conv.plan import corner_bytes, pixels, taps
from pydeform.cuda.core.copies import to_channels_last
from pydeform.cuda.core.launch import Device, Launch, device
from pydeform.cuda.core.numbers import C_TYPES, DTYPES, ceil_div, compute_dtype, index_type, own_types
from pydeform.cuda.core.sizes import COPIES
from pydeform.cuda.core.source import Code

THREADS = 256
PLANS = 512  # kept, the most recent ones: a network has some for each of its layers
SHORTEST_SLICE = 8  # steps: below, filling and emptying the pipeline costs more than a slice saves


def forward(code: Code, reads: int, arrays: Any, g: Any, output: Any, *, allow_tf32: bool) -> None:
    """Into `output`. `reads` is PLAIN, DEFORMED, or ADJOINT with a geometry from `swapped`."""
    input, offset, weight, bias, mask = arrays
    key = (input.dtype.name, device(), allow_tf32 and input.dtype == np.float32, own_types(input, offset))
    packed = None
    for part in images_at_a_time(g, tiles_of(code, reads, g._replace(batch=1), *key).image_bytes):
        tiles = tiles_of(code, reads, g._replace(batch=part.stop - part.start), *key)
        packed = tiles.pack_weight(weight) if packed is None else packed
        tiles.run(input[part], part_of(offset, part), part_of(mask, part), packed, bias, output[part])


def images_at_a_time(g: Any, image_bytes: int) -> list[slice]:
    """Ranges of images whose copies are within bounds."""
    images = max(1, min(g.batch, COPIES // image_bytes))
    return [slice(start, min(start + images, g.batch)) for start in range(0, g.batch, images)]


def part_of(array: Any, part: slice) -> Any:
    """Of those images. What has no images is an active convolution's offset, of all."""
    return array if array is None or array.ndim == 1 else array[part]


@functools.lru_cache(maxsize=PLANS)
def tiles_of(code: Code, reads: int, g: Any, dtype: str, on: Device, allow_tf32: bool, offset_type: str) -> Tiles:
    return Tiles(code, reads, g, dtype, on, allow_tf32, offset_type)


class Tiles:
    """One convolution by tiles, with everything decided but the arrays. `offset_type` is of `own_types`."""

    def __init__(
        self, code: Code, reads: int, g: Any, dtype: str, on: Device, allow_tf32: bool, offset_type: str = ""
    ) -> None:
        group_outputs = g.out_channels // g.groups
        self.code, self.reads, self.g, self.dtype = code, reads, g, np.dtype(DTYPES[dtype])
        self.product = p = plan.forward_product(dtype, on.capability, group_outputs, allow_tf32)
        self.channels = c = plan.channels(g, dtype, p.depth, lambda slots: self._shared(slots, "long long"), on.shared)
        self.memory = c.memory(g.groups)
        self.image_bytes = self.memory * math.prod(g.in_size) * self.dtype.itemsize
        self._tiles_n = ceil_div(group_outputs, p.columns)
        self._packed = g.groups * self._tiles_n * c.blocks * taps(g) * p.parts * p.columns * p.depth
        self._everything = g.batch * pixels(g)
        tiles = ceil_div(self._everything, p.rows) * g.groups * self._tiles_n
        self._slices = plan.slices(tiles, c.blocks * taps(g), on.processors, SHORTEST_SLICE)
        outputs = self._everything * g.out_channels
        index = index_type(
            *((g.batch * math.prod(g.in_size) + 1) * self.memory, self._packed, outputs * self._slices),
            plan.offsets(g) * self._everything,
        )
        slots = c.slots(p.depth)
        shared = self._shared(slots, index)
        self._forward = Launch(
            code,
            f"forward<{p.expression}, {index}, {reads}{offset_type}>",
            (tiles, self._slices),
            p.threads,
            *(g, c, np.int32(self._tiles_n), np.int32(slots)),
            shared=shared,
        )
        if self._slices > 1:
            expression = f"sum_slices<{C_TYPES[dtype]}, {index}>"
            grid = (ceil_div(outputs, THREADS),)
            self._sum = Launch(code, expression, grid, THREADS, g, np.int32(self._slices))

    def _shared(self, slots: int, index: str) -> int:
        """Bytes: two stages of tiles, and the taps of three steps."""
        corners = plan.corners_read(self.g, self.reads)
        tap = corner_bytes(self.product.dtype, index, corners, corners)
        return 2 * self.product.stage_bytes + 3 * self.product.rows * slots * tap

    @functools.cached_property
    def _pack(self) -> Launch:
        expression = f"pack_weight<{self.product.expression}, {index_type(self._packed)}, {self.reads}>"
        p = self.product
        grid = (self.g.groups * self._tiles_n * self.channels.blocks, p.columns * p.depth // THREADS)
        return Launch(self.code, expression, grid, THREADS, self.g, self.channels, np.int32(self._tiles_n))

    def pack_weight(self, weight: Any) -> Any:
        packed = cupy.empty((self._packed,), weight.dtype)
        self._pack(weight, packed)
        return packed

    def run(self, input: Any, offset: Any, mask: Any, packed: Any, bias: Any, output: Any) -> None:
        copy = to_channels_last(self.code, input, self.channels.unit, self.channels.pitch)
        if self._slices == 1:
            self._forward(copy, offset, mask, packed, bias, output, None)
            return
        partial = cupy.empty((self._slices, output.size), compute_dtype(self.dtype))
        self._forward(copy, offset, mask, packed, None, output, partial)
        self._sum(partial, bias, output)
