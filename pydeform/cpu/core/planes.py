"""Pixels of an input as it lies in memory, whatever its dtype, strides and alignment, a few at a time.

Where a problem reads few pixels of a large image, a copy of the image, be it to channels last, to float32 or to
contiguous memory, would be most of the work and of the memory. There kernels gather the pixels that they have listed,
channels last, and go on as with a copy: the same bits, since the same numbers come in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.primitive import INT, primitive
from pydeform.cpu.core.simd import at
from pydeform.cpu.core.sizes import volume

_AS_COMPUTED, _FLOAT16, _BFLOAT16 = 0, 1, 2
_KINDS = {"float64": _AS_COMPUTED, "float32": _AS_COMPUTED, "float16": _FLOAT16, "bfloat16": _BFLOAT16}


class Planes(NamedTuple):
    """Where the pixels of an array (N, C, *size) lie. Whoever has a Planes must hold the array, too."""

    address: int
    image: int  # bytes from one image to the next
    channel: int  # bytes from one channel to the next
    steps: tuple[int, ...]  # bytes from one pixel to the next along each axis
    kind: int  # of number: one of _KINDS


NO_PLANES = Planes(0, 0, 0, (0, 0), _AS_COMPUTED)


class Reader(NamedTuple):
    """What a thread needs to gather pixels. The last three are pointers: arrays take time to hand on."""

    planes: Planes
    own: Any  # for each listed pixel, which of `pixels` it is; -1: none
    offsets: Any  # bytes from the start of a plane to each listed pixel
    pixels: Any  # those that were gathered, channels last


def is_as_computed(array: Any, dtype: Any) -> bool:
    """Kernels can read it as it is, without gathering."""
    return bool(array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned)


def planes_of(array: Any) -> Planes:
    image, channel, *steps = array.strides
    return Planes(array.__array_interface__["data"][0], image, channel, tuple(steps), _KINDS[array.dtype.name])


def reader_parts(count: int, width: int, index_dtype: Any, dtype: Any) -> tuple[Any, ...]:
    """Shapes and dtypes of a thread's arrays of `Reader`: `count` pixels of `width` channels, 0 if none."""
    return ((count,), index_dtype), ((count,), np.dtype(np.int64)), ((count * width,), dtype)


@inline_always
def reader_of(thread: int, planes: Any, own: Any, offsets: Any, pixels: Any) -> Reader:
    return Reader(planes, at(own, (thread, 0)), at(offsets, (thread, 0)), at(pixels, (thread, 0)))


@primitive
def _load_float(address: Any, like: Any) -> Any:
    """The number at an address, of the dtype that `like` points to; it need not be aligned."""

    def emit(builder: Any, address_: Any, like_: Any) -> Any:
        number = builder.load(builder.inttoptr(address_, like_.type))
        number.align = 1
        return number

    return like.dtype(address, like), emit


@primitive
def _load_bits(address: Any) -> Any:
    """The two bytes at an address, as a number from 0 to 65535."""

    def emit(builder: Any, address_: Any) -> Any:
        bits = builder.load(builder.inttoptr(address_, ir.IntType(16).as_pointer()))
        bits.align = 1
        return builder.zext(bits, INT)

    return types.int64(address), emit


@primitive
def _float_of(bits: Any, like: Any) -> Any:
    """The float32 of the lower 32 bits, in the dtype that `like` points to."""

    def emit(builder: Any, bits_: Any, like_: Any) -> Any:
        number = builder.bitcast(builder.trunc(bits_, ir.IntType(32)), ir.FloatType())
        return number if like_.type.pointee == number.type else builder.fpext(number, like_.type.pointee)

    return like.dtype(bits, like), emit


@primitive
def _times_2_to_minus_24(number: Any, like: Any) -> Any:
    """Exact, in the dtype that `like` points to."""

    def emit(builder: Any, number_: Any, like_: Any) -> Any:
        wanted = like_.type.pointee
        return builder.fmul(builder.sitofp(number_, wanted), ir.Constant(wanted, 2.0**-24))

    return like.dtype(number, like), emit


@inline_always
def _widened(bits: int, like: Any) -> Any:
    """The bits of a float16 as a wider float, exactly. LLVM would call a library's function, which may be missing."""
    sign, rest = (bits & 0x8000) << 16, bits & 0x7FFF
    if rest < 0x0400:  # smaller than every normal number
        number = _times_2_to_minus_24(rest, like)
        return -number if sign else number
    exponent = 0x7F800000 if rest >= 0x7C00 else 112 << 23  # infinity and NaN, or the difference of the biases
    return _float_of(sign | ((rest << 13) | exponent if rest >= 0x7C00 else (rest << 13) + exponent), like)


@inline_always
def read_pixel(planes: Any, address: int, like: Any) -> Any:
    """The pixel at an address, in the dtype that `like` points to."""
    if planes.kind == _AS_COMPUTED:
        return _load_float(address, like)
    if planes.kind == _BFLOAT16:
        return _float_of(_load_bits(address) << 16, like)
    return _widened(_load_bits(address), like)


@inline_always
def pixel_offset(planes: Any, place: int, size: Any) -> int:
    """Bytes from the first pixel of a plane of `size` to pixel `place`."""
    offset = np.int64(0)
    for axis in range(len(size) - 1, 0, -1):
        before = place // size[axis]
        offset += (place - before * size[axis]) * planes.steps[axis]
        place = before
    return offset + place * planes.steps[0]


@inline
def gather_corners(planes: Any, b: int, first: int, channels: int, corners: Any, g: Any, target: Any) -> None:
    """target[k * channels + c] = channel first + c of pixel corners[k]; zeros for the pixel behind the last one."""
    start = planes.address + b * planes.image + first * planes.channel
    for k in range(len(corners)):
        place = np.int64(corners[k])
        if place == volume(g.in_size):
            for c in range(channels):
                target[k * channels + c] = 0
        else:
            pixel = start + pixel_offset(planes, place, g.in_size)
            for c in range(channels):
                target[k * channels + c] = read_pixel(planes, pixel + c * planes.channel, target)


@inline
def gather_band(reader: Any, b: int, channel: int, rows: Any, count: int, column: int, columns: int, band: int) -> None:
    """pixels[i * band + k] = column + k of row rows[i] of a channel, zeros from `columns` to `band`; own[i] = i."""
    planes, own, _, target = reader
    start = planes.address + b * planes.image + channel * planes.channel + column * planes.steps[1]
    for i in range(count):
        own[i] = i
        row = start + rows[i] * planes.steps[0]
        for k in range(columns):
            target[i * band + k] = read_pixel(planes, row + k * planes.steps[1], target)
        for k in range(columns, band):
            target[i * band + k] = 0


@inline
def gather(
    reader: Any,
    b: int,
    first: int,
    apart: int,
    channels: int,
    width: int,
    places: Any,
    count: int,
    in_w: int,
) -> None:
    """pixels[i * width + c] = channel first + c * apart of pixel places[i], zeros from `channels` to `width`.

    own[i] = i says that pixel i is number i of those. places[i] may be -1, for no pixel; own[i] is -1 then.
    """
    planes, own, offsets, target = reader
    for i in range(count):
        place = np.int64(places[i])
        own[i] = i if place >= 0 else place
        offsets[i] = pixel_offset(planes, max(place, 0), (0, in_w))
    start = planes.address + b * planes.image + first * planes.channel
    for c in range(channels):
        plane = start + c * apart * planes.channel
        for i in range(count):
            target[i * width + c] = read_pixel(planes, plane + offsets[i], target)
    for i in range(count):
        for c in range(channels, width):
            target[i * width + c] = 0
