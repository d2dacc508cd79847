"""Backward of a convolution with or without offsets: each gradient by its own kernel, over the same copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform.cuda import _conv_common, _conv_direct, _conv_gather
from pydeform.cuda._conv_common import (
    ADJOINT,
    C_TYPES,
    DEFORMED,
    PLAIN,
    WORKSPACE,
    Channels,
    Product,
    ceil_div,
    index_type,
    pixels,
    round_up,
    taps,
)
from pydeform.cuda._conv_forward import (
    THREADS,
    Tiles,
    compute_dtype,
    contiguous,
    images_at_a_time,
    integer,
    part_of,
    to_channels_first,
    to_channels_last,
)
from pydeform.cuda._launch import capability, geometry, kernel, launch, multiprocessors, shared_limit

Grads = tuple[Any, Any, Any, Any, Any]
SHORTEST_SLICE = 16  # steps of the weight's gradient
BLOCKS = 2  # of the weight's gradient that a multiprocessor has at a time


class Kernels(NamedTuple):
    """What the parts of one backward call share."""

    operator: str
    data: Product
    weight: Product
    channels: Channels  # for both: their tiles are equally wide
    padded_outputs: int  # channels of a group in the copy of grad_output
    g: Any

    def shared_data(self, slots: int, index: str) -> int:
        """Bytes: two stages of tiles, then the product in their place, and the sampling points."""
        p = self.data
        staged = p.rows * (p.columns + 8) * compute_dtype(np.dtype("f8" if p.dtype == "float64" else "f4")).itemsize
        points = slots * p.rows * _conv_common.corner_bytes(p.dtype, index, 4, 3)
        return max(2 * p.stage_bytes, staged) + points

    def shared_weight(self, slots: int, index: str) -> int:
        """Bytes: two stages of tiles, and the taps of three steps."""
        corners = 4 if self.operator == "deform_conv2d" else 1
        tap = _conv_common.corner_bytes(self.weight.dtype, index, corners, corners)
        return 2 * self.weight.turned_stage_bytes + 3 * slots * _conv_common.TURNED_DEPTH * tap

    def shared(self, slots: int) -> int:
        """The most that either takes."""
        return max(self.shared_data(slots, "long long"), self.shared_weight(slots, "long long"))


def backward(
    operator: str,
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    g: Any,
    needs: Any,
    *,
    deterministic: bool,
    allow_tf32: bool,
) -> Grads:
    grad_output, input, offset, weight, bias, mask = contiguous(grad_output, input, offset, weight, bias, mask)
    with input.device:
        if g.batch == 0:
            arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
            return _grads(*(cupy.zeros_like(a) if name in needs else None for name, a in arrays.items()))
        if _conv_common.is_direct(g):
            arrays = (grad_output, input, offset, weight, bias, mask)
            return _conv_direct.backward(operator, *arrays, g, needs, deterministic)
        return _by_tiles(operator, grad_output, input, offset, weight, bias, mask, g, needs, deterministic, allow_tf32)


def _grads(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Grads:
    return input, offset, weight, bias, mask


def _by_tiles(
    operator: str,
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    g: Any,
    needs: Any,
    deterministic: bool,
    allow_tf32: bool,
) -> Grads:
    k = _kernels(operator, input.dtype.name, g, allow_tf32 and input.dtype == np.float32)
    grad_input = cupy.empty_like(input) if "input" in needs else None
    grad_offset = cupy.empty_like(offset) if "offset" in needs else None
    grad_mask = cupy.empty_like(mask) if "mask" in needs else None
    grad_bias = cupy.empty_like(bias) if "bias" in needs else None
    if grad_bias is not None:
        _conv_direct.bias_gradient(operator, grad_output, g, grad_bias)
    need_data = offset is not None and any(grad is not None for grad in (grad_input, grad_offset, grad_mask))
    sums = WeightSums(k, input.dtype) if "weight" in needs else None
    if offset is None and grad_input is not None:
        _input_of_plain(operator, grad_output, weight, grad_input, g, allow_tf32)
    if not (need_data or sums):
        return grad_input, grad_offset, None, grad_bias, grad_mask
    packed = _pack_weight_columns(k, weight) if need_data else None
    for part in _parts(k, input):
        copy = to_channels_last(operator, input[part], k.channels.unit, k.channels.pitch)
        gradient = to_channels_last(operator, grad_output[part], g.out_channels // g.groups, k.padded_outputs)
        arrays = (gradient, copy, part_of(offset, part), part_of(mask, part))
        if need_data:
            wanted = [part_of(grad, part) for grad in (grad_input, grad_offset, grad_mask)]
            _data(k, arrays, packed, *wanted, deterministic)
        if sums is not None:
            sums.add(*arrays, input[part].shape[0])
    return grad_input, grad_offset, sums.result(weight) if sums else None, grad_bias, grad_mask


def _kernels(operator: str, dtype: str, g: Any, allow_tf32: bool) -> Kernels:
    data = _conv_common.data_product(dtype, capability(), allow_tf32)
    weight = _conv_common.weight_product(dtype, capability(), g.out_channels // g.groups, allow_tf32)
    padded_outputs = round_up(g.out_channels // g.groups, data.depth)
    draft = Kernels(operator, data, weight, Channels(1, 1, 1, 1, 1), padded_outputs, g)
    channels = _conv_common.channels(g, dtype, data.columns, draft.shared, shared_limit(), whole=True)
    return draft._replace(channels=channels)


def _parts(k: Kernels, input: Any) -> list[slice]:
    """Ranges of images whose copies are within bounds."""
    g, dtype = k.g, input.dtype
    memory = k.channels.memory(g.groups)
    image = (memory * g.in_h * g.in_w + g.groups * k.padded_outputs * pixels(g)) * dtype.itemsize
    image += memory * g.in_h * g.in_w * compute_dtype(dtype).itemsize  # the sums of its gradient
    images = images_at_a_time(g, image)
    return [slice(start, start + images) for start in range(0, g.batch, images)]


def _input_of_plain(operator: str, grad_output: Any, weight: Any, grad_input: Any, g: Any, allow_tf32: bool) -> None:
    """Without offsets every input pixel knows the output pixels that read it: a forward of grad_output."""
    back = _conv_common.swapped(g)
    dtype = weight.dtype.name
    exact = allow_tf32 and weight.dtype == np.float32
    product = _conv_common.forward_product(dtype, capability(), back.out_channels // g.groups, exact)
    tiles = Tiles(operator, ADJOINT, product, back)
    packed = tiles.pack_weight(weight)
    memory = tiles.channels.memory(g.groups)
    images = images_at_a_time(g, memory * pixels(g) * weight.dtype.itemsize)
    for start in range(0, g.batch, images):
        part = slice(start, start + images)
        copy = to_channels_last(operator, grad_output[part], tiles.channels.unit, tiles.channels.pitch)
        tiles.run(copy, None, None, packed, None, grad_input[part])


def _pack_weight_columns(k: Kernels, weight: Any) -> Any:
    g, width = k.g, k.channels.blocks * k.data.columns
    packed = cupy.empty((taps(g), g.groups, width, k.padded_outputs), weight.dtype)
    launch(
        kernel(k.operator, f"pack_weight_columns<{C_TYPES[k.data.dtype]}, {index_type(packed.size)}>"),
        (ceil_div(packed.size, THREADS),),
        THREADS,
        (weight, packed, geometry(g), geometry(k.channels), np.int32(width), np.int32(k.padded_outputs)),
    )
    return packed


def _data(
    k: Kernels,
    arrays: tuple[Any, ...],
    packed: Any,
    grad_input: Any,
    grad_offset: Any,
    grad_mask: Any,
    deterministic: bool,
) -> None:
    """Gradients of input, offset and mask for the images of `arrays`: copies of grad_output and input, offset, mask."""
    _, copy, offset, mask = arrays
    g = k.g._replace(batch=offset.shape[0])
    everything = g.batch * pixels(g)
    memory = copy.shape[1]
    sums = None
    if grad_input is not None:
        sums = cupy.zeros((g.batch * g.in_h * g.in_w, memory), compute_dtype(copy.dtype))
    if sums is None or not deterministic:
        # `store` where deterministic, so that `needs` changes no bit of what it asks for.
        _launch_data(k, g, arrays, packed, grad_offset, grad_mask, sums, 0, everything, 0, taps(g), store=deterministic)
    else:
        for chunk in _conv_direct.chunks(g._replace(in_channels=memory), sums.itemsize, WORKSPACE):
            columns = cupy.empty((chunk[3], chunk[1], memory), sums.dtype)
            _launch_data(k, g, arrays, packed, grad_offset, grad_mask, columns, *chunk, store=True)
            _conv_gather.accumulate(columns, offset, mask, sums, g, memory, *chunk)
    if grad_input is not None:
        to_channels_first(k.operator, sums, grad_input, k.channels.unit, k.channels.pitch)


def _launch_data(
    k: Kernels,
    g: Any,
    arrays: tuple[Any, ...],
    packed: Any,
    grad_offset: Any,
    grad_mask: Any,
    sums: Any,
    first: int,
    count: int,
    tap0: int,
    some: int,
    *,
    store: bool,
) -> None:
    p = k.data
    index = index_type(*(a.size for a in (*arrays, packed, sums) if a is not None))
    slots = k.channels.slots(p.columns)
    shared = k.shared_data(slots, index)
    launch(
        kernel(k.operator, f"backward_data<{p.expression}, {index}, {'true' if store else 'false'}>", shared),
        (ceil_div(count, p.rows) * some,),
        p.threads,
        (
            *(*arrays, packed, grad_offset, grad_mask, sums),
            *(geometry(g), geometry(k.channels), np.int32(k.padded_outputs), np.int32(slots)),
            *(integer(index, first), integer(index, count), np.int32(tap0), np.int32(some)),
        ),
        shared,
    )


class WeightSums:
    """The weight's gradient: partial sums over ranges of pixels, added up in their order at the end."""

    def __init__(self, k: Kernels, dtype: Any) -> None:
        p, g = k.weight, k.g
        self.k, self.started = k, False
        self.width = k.channels.blocks * p.columns
        self.tiles_o = ceil_div(g.out_channels // g.groups, p.rows)
        self.tiles = self.tiles_o * g.groups * k.channels.blocks * taps(g)
        size = taps(g) * g.out_channels * self.width
        steps = ceil_div(g.batch * pixels(g), _conv_common.TURNED_DEPTH)
        slices = _conv_common.slices(self.tiles, steps, BLOCKS * multiprocessors(), SHORTEST_SLICE)
        self.slices = max(1, min(slices, WORKSPACE // (size * compute_dtype(dtype).itemsize)))
        self.partial = cupy.empty((self.slices, size), compute_dtype(dtype))

    def add(self, gradient: Any, copy: Any, offset: Any, mask: Any, images: int) -> None:
        k, p = self.k, self.k.weight
        g = k.g._replace(batch=images)
        reads = PLAIN if offset is None else DEFORMED
        index = index_type(*(a.size for a in (gradient, copy, offset, self.partial) if a is not None))
        slots = k.channels.slots(p.columns)
        shared = k.shared_weight(slots, index)
        launch(
            kernel(k.operator, f"backward_weight<{p.expression}, {index}, {reads}>", shared),
            (self.tiles, self.slices),
            p.threads,
            (
                *(gradient, copy, offset, mask, self.partial, geometry(g), geometry(k.channels)),
                *(np.int32(k.padded_outputs), np.int32(self.tiles_o), np.int32(slots), np.int32(self.started)),
            ),
            shared,
        )
        self.started = True

    def result(self, weight: Any) -> Any:
        k = self.k
        grad = cupy.empty_like(weight)
        index = index_type(grad.size, self.partial.size)
        launch(
            kernel(k.operator, f"sum_weight<{C_TYPES[weight.dtype.name]}, {index}>"),
            (ceil_div(grad.size, THREADS),),
            THREADS,
            (
                *(self.partial, grad, geometry(k.g), geometry(k.channels)),
                *(np.int32(self.width), np.int32(self.slices)),
            ),
        )
        return grad
