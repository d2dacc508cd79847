"""Copies between an image (channels, pixels) and its channels-last form, block by block through registers."""

from __future__ import annotations

from typing import Any

from numba import types

from pydeform.cpu.core.jit import inline
from pydeform.cpu.core.lanes import Vectors, for_any_width, transposed
from pydeform.cpu.core.primitive import const
from pydeform.cpu.core.simd import VECTOR_BYTES, at

PIXELS = 128  # a unit of work: its channels-last form stays in the first-level cache while channels are filled in


def _define_transpose(
    vector_bytes: int, shifts: bool, source: Any, source_row: Any, target: Any, target_row: Any, shift: Any
) -> Any:
    """target[j*target_row + i] = source[i*source_row + j] (+ shift[j]), a square block one vector wide."""

    def emit(builder: Any, source_: Any, source_row_: Any, target_: Any, target_row_: Any, shift_: Any) -> None:
        v = Vectors(builder, source.dtype, vector_bytes)
        block = [v.load(v.offset(source_, builder.mul(source_row_, const(i)))) for i in range(v.lanes)]
        for j, row in enumerate(transposed(builder, block)):
            value = builder.fadd(row, v.load_splat(shift_, const(j))) if shifts else row
            v.store(value, v.offset(target_, builder.mul(target_row_, const(j))))

    return types.void(source, source_row, target, target_row, shift), emit


transpose_block, transpose_block_shifted = (for_any_width(_define_transpose, shifts) for shifts in (False, True))


@inline
def pixel_parts(pixels: int) -> int:
    return -(-pixels // PIXELS)


@inline
def to_channels_last(
    input: Any,
    b: int,
    first: int,
    apart: int,
    image: Any,
    origin: int,
    channels: int,
    width: int,
    part: int,
    pixels: int,
) -> None:
    """One block of channels and one part of the pixels of image b; the first part also writes the zero pixel.

    The block has channels first, first + apart, ... of the input. Its place in image, which is flat, starts at origin:
    (pixels + 1, width), zeros from `channels` on; one more pixel of zeros stands behind the last. Blocks lie apart: two
    threads at work on two of them share no cache line, and corners of one fill a cache evenly.
    """
    lanes = VECTOR_BYTES // input.itemsize
    start = part * PIXELS
    last = min(start + PIXELS, pixels)
    whole = start + (last - start) // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for pixel in range(start, whole, lanes):
            target = at(image, (origin + pixel * width + c,))
            transpose_block(at(input, (b, first + c * apart, pixel)), apart * pixels, target, width, target)
    for c in range(channels):
        for pixel in range(whole if c < whole_channels else start, last):
            image[origin + pixel * width + c] = input[b, first + c * apart, pixel]
    for c in range(channels, width):
        for pixel in range(start, last):
            image[origin + pixel * width + c] = 0
    if part == 0:
        for c in range(width):
            image[origin + pixels * width + c] = 0


@inline
def to_channels_first(
    tile: Any, output: Any, b: int, channel: int, channels: int, start: int, count: int, shift: Any
) -> None:
    """output[b, channel + c, start + i] = tile[i, c] + shift[channel + c]."""
    lanes = VECTOR_BYTES // output.itemsize
    length = output.shape[2]
    whole = count // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for i in range(0, whole, lanes):
            transpose_block_shifted(
                at(tile, (i, c)),
                tile.shape[1],
                at(output, (b, channel + c, start + i)),
                length,
                at(shift, (channel + c,)),
            )
    for c in range(channels):
        for i in range(whole if c < whole_channels else 0, count):
            output[b, channel + c, start + i] = tile[i, c] + shift[channel + c]


@inline
def block_to_channels_first(
    image: Any,
    origin: int,
    channels: int,
    width: int,
    grad_input: Any,
    b: int,
    first: int,
    apart: int,
    part: int,
    pixels: int,
) -> None:
    """`to_channels_last` the other way round: a part of the pixels of one block, from `image` into grad_input."""
    lanes = VECTOR_BYTES // image.itemsize
    start = part * PIXELS
    last = min(start + PIXELS, pixels)
    whole = start + (last - start) // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for pixel in range(start, whole, lanes):
            target = at(grad_input, (b, first + c * apart, pixel))
            transpose_block(at(image, (origin + pixel * width + c,)), width, target, apart * pixels, target)
    for c in range(channels):
        for pixel in range(whole if c < whole_channels else start, last):
            grad_input[b, first + c * apart, pixel] = image[origin + pixel * width + c]
