"""Backward of a convolution by tiles: each gradient by its own kernel, over the same copies."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform._geometry import ConvArrays
from pydeform.cuda.conv import direct, gather, plan
from pydeform.cuda.conv.forward_tiles import PLANS, THREADS, forward, images_at_a_time, part_of
from pydeform.cuda.conv.plan import ADJOINT, DEFORMED, PLAIN, corner_bytes, pixels, taps
from pydeform.cuda.core.copies import to_channels_first, to_channels_last
from pydeform.cuda.core.launch import Device, Launch, device
from pydeform.cuda.core.numbers import (
    C_TYPES,
    DTYPES,
    ITEMSIZE,
    ceil_div,
    compute_dtype,
    index_type,
    integer,
    own_types,
    round_up,
)
from pydeform.cuda.core.sizes import WORKSPACE
from pydeform.cuda.core.source import Code

SHORTEST_SLICE = 8  # steps of the weight's gradient
BLOCKS = 2  # of the weight's gradient for each multiprocessor


def backward(
    code: Code,
    grad_output: Any,
    given: Any,
    g: Any,
    grads: dict[str, Any],
    *,
    deterministic: bool,
    allow_tf32: bool,
) -> None:
    """Into the arrays of `grads`, None where a gradient is not needed."""
    input, offset, weight, _, mask = given
    if grads["bias"] is not None:
        direct.bias_gradient(code, grad_output, g, grads["bias"])
    if offset is None and grads["input"] is not None:
        # Without offsets every input pixel knows the output pixels that read it: a forward of grad_output.
        back = plan.swapped(g)
        adjoint = ConvArrays(grad_output, None, weight, None, None)
        forward(code, ADJOINT, adjoint, back, grads["input"], allow_tf32=allow_tf32)
    allow_tf32 = allow_tf32 and weight.dtype == np.float32
    need_samples = offset is not None and any(grads[name] is not None for name in ("input", "offset", "mask"))
    if not need_samples and grads["weight"] is None:
        return
    reads = PLAIN if offset is None else DEFORMED
    key = (code, reads, input.dtype.name, device(), allow_tf32, own_types(input, offset))
    packed = partial = None
    offset_sums = direct.OffsetSums(code, grads["offset"], g)
    whole = plan_of(g, *key)
    for part in images_at_a_time(g, plan_of(g._replace(batch=1), *key).image_bytes):
        own = plan_of(g._replace(batch=part.stop - part.start), *key)
        image, gradient = own.copies(input[part], grad_output[part])
        arrays = Parts(gradient, image, part_of(offset, part), part_of(mask, part))
        if need_samples:
            packed = own.pack_weight(weight) if packed is None else packed
            targets = part_of(grads["input"], part), offset_sums, part, part_of(grads["mask"], part)
            own.samples(arrays, packed, *targets, deterministic=deterministic)
        if grads["weight"] is not None:
            started = partial is not None
            partial = whole.partial_weight() if partial is None else partial
            own.add_weight(arrays, partial, started=started)
    offset_sums.finish()
    if grads["weight"] is not None:
        whole.sum_weight(partial, grads["weight"])


class Parts(NamedTuple):
    """What is read for some of the images: channels-last copies of grad_output and input, offset and mask."""

    gradient: Any
    image: Any
    offset: Any
    mask: Any


@functools.lru_cache(maxsize=PLANS)
def plan_of(g: Any, code: Code, reads: int, dtype: str, on: Device, allow_tf32: bool, offset_type: str) -> Plan:
    return Plan(g, code, reads, dtype, on, allow_tf32, offset_type)


class Plan:
    """The backward of one geometry, with everything decided but the arrays; launches are made when first needed.

    `offset_type` is of `own_types`.
    """

    KEPT = 64  # launches of a kind, one for each chunk of a deterministic backward

    def __init__(
        self, g: Any, code: Code, reads: int, dtype: str, on: Device, allow_tf32: bool, offset_type: str = ""
    ) -> None:
        group_outputs = g.out_channels // g.groups
        self.g, self.code, self.reads, self.dtype, self.on, self.offset_type = g, code, reads, dtype, on, offset_type
        self.data_product = plan.data_product(dtype, on.capability, allow_tf32)
        self.weight_product = plan.weight_product(dtype, on.capability, group_outputs, allow_tf32)
        # One layout for both: their tiles have equally many input channels.
        self.channels = c = plan.channels(g, dtype, self.data_product.columns, self._shared, on.shared, whole=True)
        self.slots = c.slots(self.data_product.columns)
        self.width = c.blocks * self.data_product.columns
        self.memory = c.memory(g.groups)
        self.padded_outputs = round_up(group_outputs, self.data_product.depth)
        self.everything = g.batch * pixels(g)
        itemsize, sums = ITEMSIZE[dtype], compute_dtype(np.dtype(DTYPES[dtype]))
        self.sums = sums
        self._samples = functools.lru_cache(self.KEPT)(self._make_samples)
        self._weight = functools.lru_cache(self.KEPT)(self._make_weight)
        self._sum = functools.lru_cache(self.KEPT)(self._make_sum)
        image, gradient = self.memory * math.prod(g.in_size), g.groups * self.padded_outputs * pixels(g)
        self.image_bytes = (image + gradient) * itemsize + image * sums.itemsize
        self.index = index_type(
            *(g.batch * image + self.memory, g.batch * gradient, plan.offsets(g) * self.everything),
            *(taps(g) * g.groups * self.width * self.padded_outputs, WORKSPACE // sums.itemsize),
        )

    def _shared_data(self, slots: int, index: str) -> int:
        """Bytes: two stages of tiles, then the product in their place, and the sampling points."""
        p, corners = self.data_product, 1 << len(self.g.in_size)
        staged = p.rows * (p.columns + 8) * compute_dtype(np.dtype(DTYPES[p.dtype])).itemsize
        point = corner_bytes(p.dtype, index, corners, 1 + len(self.g.in_size))
        return max(2 * p.stage_bytes, staged) + slots * p.rows * point

    def _shared_weight(self, slots: int, index: str) -> int:
        """Bytes: two stages of tiles, and the taps of three steps."""
        corners = plan.corners_read(self.g, self.reads)
        tap = corner_bytes(self.dtype, index, corners, corners)
        return 2 * self.weight_product.turned_stage_bytes + 3 * slots * self.weight_product.turned_depth * tap

    def _shared(self, slots: int) -> int:
        return max(self._shared_data(slots, "long long"), self._shared_weight(slots, "long long"))

    def copies(self, input: Any, grad_output: Any) -> tuple[Any, Any]:
        """Channels-last."""
        group_outputs = self.g.out_channels // self.g.groups
        return (
            to_channels_last(self.code, input, self.channels.unit, self.channels.pitch),
            to_channels_last(self.code, grad_output, group_outputs, self.padded_outputs),
        )

    def pack_weight(self, weight: Any) -> Any:
        packed = cupy.empty((taps(self.g), self.g.groups, self.width, self.padded_outputs), weight.dtype)
        self._pack(weight, packed)
        return packed

    @functools.cached_property
    def _pack(self) -> Launch:
        p, c = self.data_product, self.channels
        steps = self.padded_outputs // p.depth
        size = taps(self.g) * self.g.groups * self.width * self.padded_outputs
        expression = f"pack_weight_columns<{p.expression}, {index_type(size)}>"
        grid = (self.g.groups * c.blocks * steps, p.columns * p.depth // THREADS)
        return Launch(self.code, expression, grid, THREADS, self.g, c, np.int32(steps))

    def samples(
        self,
        parts: Parts,
        packed: Any,
        grad_input: Any,
        offset_sums: direct.OffsetSums,
        images: slice,
        grad_mask: Any,
        *,
        deterministic: bool,
    ) -> None:
        """Gradients of input, offset and mask, into those that are not None; of the offset, into that of the images."""
        g = self.g
        ranges = [(0, self.everything, 0, taps(g))]
        # What adds up over pixels keeps to the same ranges whatever else is needed, so that `needs` changes no bit.
        if deterministic and (grad_input is not None or self.code.active):
            ranges = list(direct.chunks(g._replace(in_channels=self.memory), self.sums.itemsize, WORKSPACE))
        sums = None
        if grad_input is not None:
            sums = cupy.zeros((g.batch * math.prod(g.in_size), self.memory), self.sums)
        gathers = deterministic and sums is not None
        for chunk in ranges:
            _, count, tap0, some = chunk
            grad_offset = offset_sums.target(images, some, ceil_div(count, self.data_product.rows))
            target = cupy.empty((some, count, self.memory), self.sums) if gathers else sums
            # `deterministic` chooses the kernel also where no gradient of the input is needed, for the same reason.
            self._samples(deterministic, *chunk)(*parts, packed, grad_offset, grad_mask, target)
            offset_sums.add(grad_offset, tap0)
            if gathers:
                gather.accumulate(self.code, target, parts.offset, parts.mask, sums, g, self.memory, *chunk)
        if sums is not None:
            to_channels_first(self.code, sums, grad_input, self.channels.unit, self.channels.pitch)

    def _make_samples(self, store: bool, first: int, count: int, tap0: int, some: int) -> Launch:
        p = self.data_product
        shared = self._shared_data(self.slots, self.index)
        return Launch(
            self.code,
            f"backward_data<{p.expression}, {self.index}, {'true' if store else 'false'}{self.offset_type}>",
            (ceil_div(count, p.rows) * some,),
            p.threads,
            *(self.g, self.channels, np.int32(self.padded_outputs), np.int32(self.slots)),
            *(integer(self.index, first), integer(self.index, count), np.int32(tap0), np.int32(some)),
            shared=shared,
        )

    def partial_weight(self) -> Any:
        """Place for the sums of the weight's gradient over ranges of pixels."""
        return cupy.empty((self.slices, taps(self.g) * self.g.out_channels * self.width), self.sums)

    def add_weight(self, parts: Parts, partial: Any, *, started: bool) -> None:
        """Adds to the partial sums what these images give; makes them where nothing was added yet."""
        self._weight(started, partial.shape[0])(*parts, partial)

    @functools.cached_property
    def slices(self) -> int:
        """Ranges of pixels with a sum each."""
        steps = ceil_div(self.everything, self.weight_product.turned_depth)
        most = WORKSPACE // (taps(self.g) * self.g.out_channels * self.width * self.sums.itemsize)
        wanted = plan.slices(self._weight_tiles, steps, BLOCKS * self.on.processors, SHORTEST_SLICE)
        return max(1, min(wanted, most))

    @property
    def _tiles_o(self) -> int:
        return ceil_div(self.g.out_channels // self.g.groups, self.weight_product.rows)

    @property
    def _weight_tiles(self) -> int:
        return self._tiles_o * self.g.groups * self.channels.blocks * taps(self.g)

    def _make_weight(self, started: bool, slices: int) -> Launch:
        p = self.weight_product
        size = slices * taps(self.g) * self.g.out_channels * self.width
        index = index_type(size) if self.index == "int" else self.index
        return Launch(
            self.code,
            f"backward_weight<{p.expression}, {index}, {self.reads}{self.offset_type}>",
            (self._weight_tiles, slices),
            p.threads,
            *(self.g, self.channels, np.int32(self.padded_outputs)),
            *(np.int32(self._tiles_o), np.int32(self.slots), np.int32(started)),
            shared=self._shared_weight(self.slots, index),
        )

    def sum_weight(self, partial: Any, grad_weight: Any) -> None:
        self._sum(partial.shape[0])(partial, grad_weight)

    def _make_sum(self, slices: int) -> Launch:
        g, size = self.g, taps(self.g) * self.g.out_channels * self.width * slices
        grid = (ceil_div(g.out_channels * (g.in_channels // g.groups), THREADS),)
        expression = f"sum_weight<{C_TYPES[self.dtype]}, {index_type(size)}>"
        return Launch(self.code, expression, grid, THREADS, g, self.channels, np.int32(self.width), np.int32(slices))
