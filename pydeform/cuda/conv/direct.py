"""Convolutions by single threads, on the arrays as they are: launches of conv/direct.cuh.

Arrays arrive C-contiguous and checked, with at least one image; None stands for an array that is absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform.cuda.conv import gather
from pydeform.cuda.conv.plan import pixels, taps
from pydeform.cuda.conv.plan import slices as slices_of
from pydeform.cuda.core.copies import to_channels_first
from pydeform.cuda.core.launch import device, geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, integer, own_types
from pydeform.cuda.core.sizes import WORKSPACE
from pydeform.cuda.core.source import Code
from pydeform.cuda.core.sums import convert

THREADS = 256
TILE = 128  # output pixels at least, where an image is taken in parts
BLOCKS = 4  # of a sum over pixels for each multiprocessor
SHORTEST_SLICE = 8  # steps, each of a pixel a thread


def forward(code: Code, arrays: Any, g: Any, output: Any) -> None:
    """Into `output` (N, O, *out_size)."""
    input, offset, *_ = arrays
    index = index_type(input.size, output.size, *_size(offset))
    _launch(
        code,
        f"forward_direct<{C_TYPES[input.dtype.name]}, {index}, {_deformed(input, offset)}>",
        output.size,
        (*arrays, output, geometry(g)),
    )


def backward(code: Code, grad_output: Any, arrays: Any, g: Any, grads: dict[str, Any], *, deterministic: bool) -> None:
    """Into the arrays of `grads`, None where a gradient is not needed."""
    input, offset, weight, _, mask = arrays
    if grads["weight"] is not None:
        weight_gradient(code, grad_output, input, offset, mask, g, grads["weight"])
    if grads["bias"] is not None:
        bias_gradient(code, grad_output, g, grads["bias"])
    if offset is None:
        if grads["input"] is not None:
            _input_gradient(code, grad_output, weight, g, grads["input"])
    elif any(grads[name] is not None for name in ("input", "offset", "mask")):
        sums = OffsetSums(code, grads["offset"], g)
        data = _Data(code, grad_output, input, offset, weight, mask, sums, grads["mask"], g)
        if deterministic:
            data.in_chunks(grads["input"])
        else:
            data.at_once(grads["input"])
        sums.finish()


def weight_gradient(code: Code, grad_output: Any, input: Any, offset: Any, mask: Any, g: Any, grad_weight: Any) -> None:
    """Eq. 6."""
    index = index_type(input.size, grad_output.size, *_size(offset))
    expression = f"weight_direct<{C_TYPES[input.dtype.name]}, {index}, {_deformed(input, offset)}>"
    _sum_over_pixels(code, expression, (grad_output, input, offset, mask), grad_weight, index, g)


def bias_gradient(code: Code, grad_output: Any, g: Any, grad_bias: Any) -> None:
    """Eq. 7."""
    index = index_type(grad_output.size)
    expression = f"bias_gradient<{C_TYPES[grad_output.dtype.name]}, {index}>"
    _sum_over_pixels(code, expression, (grad_output,), grad_bias, index, g)


def _sum_over_pixels(code: Code, expression: str, arrays: Any, result: Any, index: str, g: Any) -> None:
    """A block sums an element of `result`; where these are few for the device, some blocks sum a slice each."""
    everything = g.batch * pixels(g)
    steps = ceil_div(everything, THREADS)
    slices = slices_of(result.size, steps, BLOCKS * device().processors, SHORTEST_SLICE)
    length = ceil_div(steps, slices) * THREADS
    slices = ceil_div(everything, length)  # none is empty
    parts = None if slices == 1 else cupy.empty((result.size, slices), compute_dtype(result.dtype))
    arguments = (*arrays, result, parts, geometry(g), integer(index, length))
    launch(kernel(code, expression), (result.size, slices), THREADS, arguments)
    if parts is not None:
        added = f"add_parts<{C_TYPES[result.dtype.name]}>"
        _launch(code, added, result.size * THREADS, (parts, result, np.int32(slices)))


def _input_gradient(code: Code, grad_output: Any, weight: Any, g: Any, grad_input: Any) -> None:
    """Eq. 5 without offsets."""
    index = index_type(grad_input.size, grad_output.size)
    _launch(
        code,
        f"input_gradient_direct<{C_TYPES[weight.dtype.name]}, {index}>",
        grad_input.size,
        (grad_output, weight, grad_input, geometry(g)),
    )


class OffsetSums:
    """The gradient of the offset, which kernels write sample by sample; or, active, add up, always in the same order.

    Then each block of a launch writes the sum over its pixels, and these are added to those of launches before.
    `grad_offset` may be None.
    """

    def __init__(self, code: Code, grad_offset: Any, g: Any) -> None:
        self._code, self._grad_offset, self._g = code, grad_offset, g
        self._active = code.active and grad_offset is not None
        if self._active:
            self._sums = cupy.zeros(grad_offset.shape, compute_dtype(grad_offset.dtype))

    def target(self, images: slice, some: int, blocks: int) -> Any:
        """What a launch over these images and `some` taps, each with so many blocks, writes to."""
        if not self._active:
            return None if self._grad_offset is None else self._grad_offset[images]
        return cupy.empty((self._g.offset_groups * some * len(self._g.in_size), blocks), self._sums.dtype)

    def add(self, parts: Any, tap0: int) -> None:
        """Once `parts`, which `target` made, are written; `tap0` is the first of their taps."""
        if self._active:
            count, blocks = parts.shape
            some = count // (self._g.offset_groups * len(self._g.in_size))
            numbers = (geometry(self._g), np.int32(blocks), np.int32(tap0), np.int32(some))
            expression = f"add_offset_parts<{C_TYPES[self._sums.dtype.name]}>"
            _launch(self._code, expression, count * THREADS, (parts, self._sums, *numbers))

    def finish(self) -> None:
        if self._active:
            convert(self._code, self._sums, self._grad_offset)


class _Data(NamedTuple):
    """Eq. 3, 4 and 5, which share the column gradients. grad_mask may be None."""

    code: Code
    grad_output: Any
    input: Any
    offset: Any
    weight: Any
    mask: Any
    offset_sums: OffsetSums
    grad_mask: Any
    g: Any

    def at_once(self, grad_input: Any) -> None:
        """Atomic additions to the input's gradient: fast, and rounded differently on each run."""
        accumulator = None
        if grad_input is not None:
            dtype = compute_dtype(grad_input.dtype)
            accumulator = grad_input if grad_input.dtype == dtype else cupy.empty(grad_input.shape, dtype)
            accumulator.fill(0)
        self._run(accumulator, None, 0, self.g.batch * pixels(self.g), 0, taps(self.g), store=False)
        if accumulator is not grad_input:
            convert(self.code, accumulator, grad_input)

    def in_chunks(self, grad_input: Any) -> None:
        """The same bits on each run: column gradients of one chunk at a time, gathered by the pixels."""
        g, dtype, sums = self.g, compute_dtype(self.input.dtype), None
        ranges: Iterable[tuple[int, int, int, int]] = [(0, g.batch * pixels(g), 0, taps(g))]
        # What adds up over pixels keeps to the same chunks whatever else is needed, so that `needs` changes no bit.
        if grad_input is not None or self.code.active:
            ranges = chunks(g, dtype.itemsize, WORKSPACE)
        if grad_input is not None:
            sums = cupy.zeros((g.batch, math.prod(g.in_size), g.in_channels), dtype)
        for chunk in ranges:
            _, count, _, some = chunk
            columns = None if sums is None else cupy.empty((some, count, g.in_channels), dtype)
            self._run(None, columns, *chunk, store=True)  # also without columns, for the same reason
            if sums is not None:
                gather.accumulate(self.code, columns, self.offset, self.mask, sums, g, g.in_channels, *chunk)
        if sums is not None:
            to_channels_first(self.code, sums, grad_input, g.in_channels, g.in_channels)

    def _run(
        self, accumulator: Any, columns: Any, first: int, count: int, tap0: int, some: int, *, store: bool
    ) -> None:
        g = self.g
        index = index_type(self.input.size, self.grad_output.size, self.offset.size, *_size(columns))
        types = f"{C_TYPES[self.input.dtype.name]}, {index}"
        # Of an active convolution, a block sums over pixels of one tap.
        blocks = ceil_div(count, THREADS)
        span = blocks * THREADS if self.code.active else count
        grad_offset = self.offset_sums.target(slice(None), some, blocks)
        _launch(
            self.code,
            f"backward_data_direct<{types}, {'true' if store else 'false'}{own_types(self.input, self.offset)}>",
            g.offset_groups * some * span,
            (
                *(self.grad_output, self.input, self.offset, self.weight, self.mask),
                *(grad_offset, self.grad_mask, accumulator, columns, geometry(g)),
                *(integer(index, first), integer(index, count), np.int32(tap0), np.int32(some)),
            ),
        )
        self.offset_sums.add(grad_offset, tap0)


def chunks(g: Any, itemsize: int, workspace: int) -> Iterator[tuple[int, int, int, int]]:
    """(first output pixel, how many, first tap, how many), so that columns and bins of each fit into `workspace` bytes.

    Whole images with all taps where one fits, else parts of one image: an image's sums do not depend on the others.
    """
    everything, whole = g.batch * pixels(g), pixels(g)
    sample = g.in_channels * itemsize + g.offset_groups * 4  # bytes, with its place in a bin
    image = taps(g) * whole * sample + gather.bin_bytes(g)
    if image <= workspace:
        span, length, step = everything, workspace // image * whole, taps(g)
    else:
        step = max(1, min(taps(g), workspace // (TILE * sample)))
        span, length = whole, max(1, workspace // (step * sample * TILE)) * TILE
    for origin in range(0, everything, span):
        for first in range(origin, origin + span, length):
            for tap0 in range(0, taps(g), step):
                yield first, min(length, origin + span - first), tap0, min(step, taps(g) - tap0)


def _launch(code: Code, expression: str, threads: int, arguments: tuple[Any, ...]) -> None:
    launch(kernel(code, expression), (ceil_div(threads, THREADS),), THREADS, arguments)


def _deformed(input: Any, offset: Any) -> str:
    return "false" if offset is None else "true" + own_types(input, offset)


def _size(array: Any) -> tuple[int, ...]:
    return () if array is None else (array.size,)
