"""Copies between an image (channels, pixels) and its channels-last form, block by block through registers."""

from __future__ import annotations

from typing import Any

from pydeform.cpu._jit import inline
from pydeform.cpu._simd import VECTOR_BYTES, at, transpose_block, transpose_block_shifted

PIXELS = 128  # a unit of work: its channels-last form stays in the first-level cache while channels are filled in


@inline
def pixel_blocks(pixels: int) -> int:
    return -(-pixels // PIXELS)


@inline
def to_channels_last(input: Any, image: Any, b: int, block: int, channels: int, pixels: int) -> None:
    """image[b, pixel, c] = input[b, c, pixel] for one block of pixels; the first block also writes the zero pixel.

    image is flat, (batch, pixels + 1, channels): one more pixel of zeros stands behind each image.
    """
    lanes = VECTOR_BYTES // input.itemsize
    first = block * PIXELS
    last = min(first + PIXELS, pixels)
    origin = b * (pixels + 1) * channels
    whole = first + (last - first) // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for pixel in range(first, whole, lanes):
            target = at(image, (origin + pixel * channels + c,))
            transpose_block(at(input, (b, c, pixel)), pixels, target, channels, target)
    for c in range(channels):
        for pixel in range(whole if c < whole_channels else first, last):
            image[origin + pixel * channels + c] = input[b, c, pixel]
    if block == 0:
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
    image: Any, first: int, grad_input: Any, b: int, channels: int, start: int, count: int
) -> None:
    """grad_input[b, c, start + i] = image[first + i*channels + c]: the way back of `to_channels_last`."""
    lanes = VECTOR_BYTES // image.itemsize
    whole = count // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for i in range(0, whole, lanes):
            target = at(grad_input, (b, c, start + i))
            transpose_block(at(image, (first + i * channels + c,)), channels, target, grad_input.shape[2], target)
    for c in range(channels):
        for i in range(whole if c < whole_channels else 0, count):
            grad_input[b, c, start + i] = image[first + i * channels + c]
