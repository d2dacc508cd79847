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
            transpose_block(
                at(input, (b, c, pixel)), pixels, at(image, (origin + pixel * channels + c,)), channels, at(image, (0,))
            )
        for pixel in range(whole, last):
            for k in range(c, c + lanes):
                image[origin + pixel * channels + k] = input[b, k, pixel]
    for c in range(whole_channels, channels):
        for pixel in range(first, last):
            image[origin + pixel * channels + c] = input[b, c, pixel]
    if block == 0:
        for c in range(channels):
            image[origin + pixels * channels + c] = 0


@inline
def to_channels_first(
    tile: Any, tile_row: int, tile_first: int, output: Any, b: int, channel: int, channels: int, start: int, count: int, shift: Any
) -> None:
    """output[b, channel + c, start + i] = tile[tile_first + i*tile_row + c] + shift[channel + c]; tile is flat."""
    lanes = VECTOR_BYTES // output.itemsize
    length = output.shape[2]
    whole = count // lanes * lanes
    whole_channels = channels // lanes * lanes
    for c in range(0, whole_channels, lanes):
        for i in range(0, whole, lanes):
            transpose_block_shifted(
                at(tile, (tile_first + i * tile_row + c,)),
                tile_row,
                at(output, (b, channel + c, start + i)),
                length,
                at(shift, (channel + c,)),
            )
        for i in range(whole, count):
            for k in range(c, c + lanes):
                output[b, channel + k, start + i] = tile[tile_first + i * tile_row + k] + shift[channel + k]
    for c in range(whole_channels, channels):
        for i in range(count):
            output[b, channel + c, start + i] = tile[tile_first + i * tile_row + c] + shift[channel + c]
