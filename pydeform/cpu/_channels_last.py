"""Copies between an image (channels, pixels) and its channels-last form, block by block through registers."""

from __future__ import annotations

from typing import Any

from pydeform.cpu._jit import inline
from pydeform.cpu._simd import VECTOR_BYTES, at, transpose_block, transpose_block_shifted

PIXELS = 128  # a unit of work: its channels-last form stays in the first-level cache while channels are filled in


@inline
def pixel_parts(pixels: int) -> int:
    return -(-pixels // PIXELS)


@inline
def to_channels_last(input: Any, image: Any, b: int, channel: int, channels: int, part: int, pixels: int) -> None:
    """One block of channels and one part of the pixels of image b; the first part also writes the zero pixel.

    image is flat, (batch, blocks, pixels + 1, channels of the block): one more pixel of zeros stands behind the last.
    Blocks lie apart: two threads at work on two of them share no cache line, and corners of one fill a cache evenly.
    """
    lanes = VECTOR_BYTES // input.itemsize
    first = part * PIXELS
    last = min(first + PIXELS, pixels)
    origin = (b * input.shape[1] + channel) * (pixels + 1)
    whole = first + (last - first) // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for pixel in range(first, whole, lanes):
            target = at(image, (origin + pixel * channels + c,))
            transpose_block(at(input, (b, channel + c, pixel)), pixels, target, channels, target)
    for c in range(channels):
        for pixel in range(whole if c < whole_channels else first, last):
            image[origin + pixel * channels + c] = input[b, channel + c, pixel]
    if part == 0:
        for c in range(channels):
            image[origin + pixels * channels + c] = 0


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
    image: Any, grad_input: Any, b: int, channel: int, channels: int, part: int, pixels: int
) -> None:
    """The way back of `to_channels_last`."""
    lanes = VECTOR_BYTES // image.itemsize
    first = part * PIXELS
    last = min(first + PIXELS, pixels)
    origin = (b * grad_input.shape[1] + channel) * (pixels + 1)
    whole = first + (last - first) // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for pixel in range(first, whole, lanes):
            target = at(grad_input, (b, channel + c, pixel))
            transpose_block(at(image, (origin + pixel * channels + c,)), channels, target, pixels, target)
    for c in range(channels):
        for pixel in range(whole if c < whole_channels else first, last):
            grad_input[b, channel + c, pixel] = image[origin + pixel * channels + c]
