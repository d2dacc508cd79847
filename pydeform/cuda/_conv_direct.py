"""Convolutions with few channels in a group: launches of conv_direct.cuh, on the arrays as they are.

Arrays arrive C-contiguous and checked, with at least one image; None stands for an array that is absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform.cuda import _conv_gather
from pydeform.cuda._channels import to_channels_first
from pydeform.cuda._conv_common import (
    C_TYPES,
    WORKSPACE,
    ceil_div,
    compute_dtype,
    index_type,
    integer,
    own_types,
    pixels,
    taps,
)
from pydeform.cuda._launch import geometry, kernel, launch

THREADS = 256
TILE = 128  # output pixels at least, where an image is taken in parts

Gradients = tuple[Any, Any, Any, Any, Any]


def forward(operator: str, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, output: Any) -> None:
    """Into `output` (N, O, out_h, out_w)."""
    index = index_type(input.size, output.size, *_size(offset))
    _launch(
        operator,
        f"forward_direct<{C_TYPES[input.dtype.name]}, {index}, {_deformed(input, offset)}>",
        output.size,
        (input, offset, weight, bias, mask, output, geometry(g)),
    )


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
    deterministic: bool,
) -> Gradients:
    """By input, offset, weight, bias and mask; None for each that is not needed or whose array is absent."""
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    grads = {
        name: cupy.empty(array.shape, array.dtype) if name in needs and array is not None else None
        for name, array in arrays.items()
    }
    if grads["weight"] is not None:
        weight_gradient(operator, grad_output, input, offset, mask, g, grads["weight"])
    if grads["bias"] is not None:
        bias_gradient(operator, grad_output, g, grads["bias"])
    if offset is None:
        if grads["input"] is not None:
            _input_gradient(operator, grad_output, weight, g, grads["input"])
    elif any(grads[name] is not None for name in ("input", "offset", "mask")):
        data = _Data(operator, grad_output, input, offset, weight, mask, grads["offset"], grads["mask"], g)
        if deterministic:
            data.in_chunks(grads["input"])
        else:
            data.at_once(grads["input"])
    return grads["input"], grads["offset"], grads["weight"], grads["bias"], grads["mask"]


def weight_gradient(
    operator: str, grad_output: Any, input: Any, offset: Any, mask: Any, g: Any, grad_weight: Any
) -> None:
    """Eq. 6."""
    index = index_type(input.size, grad_output.size, *_size(offset))
    _launch(
        operator,
        f"weight_direct<{C_TYPES[input.dtype.name]}, {index}, {_deformed(input, offset)}>",
        grad_weight.size * THREADS,
        (grad_output, input, offset, mask, grad_weight, geometry(g)),
    )


def bias_gradient(operator: str, grad_output: Any, g: Any, grad_bias: Any) -> None:
    """Eq. 7."""
    expression = f"bias_gradient<{C_TYPES[grad_output.dtype.name]}, {index_type(grad_output.size)}>"
    _launch(operator, expression, g.out_channels * THREADS, (grad_output, grad_bias, geometry(g)))


def _input_gradient(operator: str, grad_output: Any, weight: Any, g: Any, grad_input: Any) -> None:
    """Eq. 5 without offsets."""
    index = index_type(grad_input.size, grad_output.size)
    _launch(
        operator,
        f"input_gradient_direct<{C_TYPES[weight.dtype.name]}, {index}>",
        grad_input.size,
        (grad_output, weight, grad_input, geometry(g)),
    )


class _Data(NamedTuple):
    """Eq. 3, 4 and 5, which share the column gradients. grad_offset and grad_mask may be None."""

    operator: str
    grad_output: Any
    input: Any
    offset: Any
    weight: Any
    mask: Any
    grad_offset: Any
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
            index = index_type(grad_input.size)
            _launch(
                self.operator,
                f"convert<{C_TYPES[grad_input.dtype.name]}, {index}>",
                grad_input.size,
                (accumulator, grad_input, integer(index, grad_input.size)),
            )

    def in_chunks(self, grad_input: Any) -> None:
        """The same bits on each run: column gradients of one chunk at a time, gathered by the pixels."""
        g = self.g
        if grad_input is None:  # by the same kernel, so that `needs` changes no bit
            self._run(None, None, 0, g.batch * pixels(g), 0, taps(g), store=True)
            return
        dtype = compute_dtype(grad_input.dtype)
        sums = cupy.zeros((g.batch, math.prod(g.in_size), g.in_channels), dtype)
        for first, count, tap0, some in chunks(g, dtype.itemsize, WORKSPACE):
            columns = cupy.empty((some, count, g.in_channels), dtype)
            self._run(None, columns, first, count, tap0, some, store=True)
            _conv_gather.accumulate(columns, self.offset, self.mask, sums, g, g.in_channels, first, count, tap0, some)
        to_channels_first(self.operator, sums, grad_input, g.in_channels, g.in_channels)

    def _run(
        self, accumulator: Any, columns: Any, first: int, count: int, tap0: int, some: int, *, store: bool
    ) -> None:
        g = self.g
        index = index_type(self.input.size, self.grad_output.size, self.offset.size, *_size(columns))
        types = f"{C_TYPES[self.input.dtype.name]}, {index}"
        _launch(
            self.operator,
            f"backward_data_direct<{types}, {'true' if store else 'false'}{own_types(self.input, self.offset)}>",
            g.offset_groups * some * count,
            (
                *(self.grad_output, self.input, self.offset, self.weight, self.mask),
                *(self.grad_offset, self.grad_mask, accumulator, columns, geometry(g)),
                *(integer(index, first), integer(index, count), np.int32(tap0), np.int32(some)),
            ),
        )


def chunks(g: Any, itemsize: int, workspace: int) -> Iterator[tuple[int, int, int, int]]:
    """(first output pixel, how many, first tap, how many), so that columns and bins of each fit into `workspace` bytes.

    Whole images with all taps where one fits, else parts of one image: an image's sums do not depend on the others.
    """
    everything, whole = g.batch * pixels(g), pixels(g)
    sample = g.in_channels * itemsize + g.offset_groups * 4  # bytes, with its place in a bin
    image = taps(g) * whole * sample + _conv_gather.bin_bytes(g)
    if image <= workspace:
        span, length, step = everything, workspace // image * whole, taps(g)
    else:
        step = max(1, min(taps(g), workspace // (TILE * sample)))
        span, length = whole, max(1, workspace // (step * sample * TILE)) * TILE
    for origin in range(0, everything, span):
        for first in range(origin, origin + span, length):
            for tap0 in range(0, taps(g), step):
                yield first, min(length, origin + span - first), tap0, min(step, taps(g) - tap0)


def _launch(operator: str, expression: str, threads: int, arguments: tuple[Any, ...]) -> None:
    launch(kernel(operator, expression), (ceil_div(threads, THREADS),), THREADS, arguments)


def _deformed(input: Any, offset: Any) -> str:
    return "false" if offset is None else "true" + own_types(input, offset)


def _size(array: Any) -> tuple[int, ...]:
    return () if array is None else (array.size,)
