"""How a convolution is laid out and cut into tiles on a device. Nothing here needs one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pydeform import _checks, _geometry
from pydeform._geometry import ConvGeometry
from pydeform.cuda.core import sizes
from pydeform.cuda.core.numbers import ITEMSIZE, round_up
from pydeform.cuda.core.product import Product

PLAIN, DEFORMED, ADJOINT = 0, 1, 2  # where a tap reads, as in conv/taps.cuh
COPIED_FOR_EACH = 4  # values at most, in a larger copy, for each product that is summed
SLOTS = (8, 4, 2, 1)  # most offset groups along the depth of a tile, as shared memory allows
NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}  # of the axes


class Channels(NamedTuple):
    """`struct Channels` of conv/places.cuh."""

    unit: int
    units: int
    pitch: int
    padded: int
    blocks: int

    def slots(self, depth: int) -> int:
        """Units, each with an offset group of its own, along the depth of a tile."""
        return max(1, depth // self.padded)

    def memory(self, groups: int) -> int:
        """Channels of a pixel of the copy."""
        return groups * self.units * self.pitch


def forward_product(dtype: str, capability: int, group_outputs: int, allow_tf32: bool) -> Product:
    """The widest tile that the outputs of a group fill: each sample is gathered once for all of a tile's outputs."""
    if dtype == "float64" or (capability < 80 and dtype != "float16"):
        return Product("Fma", dtype, 64, 64, 32, 32)
    if capability < 80:
        return Product("Mma", dtype, 64, 64, 32, 32)
    exact = dtype == "float32" and not allow_tf32
    if capability == 90:
        columns = 64 if group_outputs <= 64 else 128 if group_outputs <= 128 or exact else 256
        return Product("Wgmma", dtype, 128, columns, 16, columns, parts=2 if exact else 1, tf32=allow_tf32)
    if group_outputs <= 64:
        return Product("Mma", dtype, 128, 64, 32, 32, tf32=allow_tf32)
    return Product("Mma", dtype, 128, 128, 64, 32, tf32=allow_tf32)


def data_product(dtype: str, capability: int, allow_tf32: bool) -> Product:
    """For the column gradient: pixels by input channels."""
    if dtype == "float64":
        return Product("Fma", dtype, 64, 32, 32, 16)
    if capability < 80 and dtype != "float16":
        return Product("Fma", dtype, 64, 64, 32, 32)
    if capability < 80:
        return Product("Mma", dtype, 64, 64, 32, 32)
    if capability == 90 and (dtype != "float32" or allow_tf32):
        return Product("Wgmma", dtype, 128, 64, 16, 64, tf32=allow_tf32)
    return Product("Mma", dtype, 128, 64, 32, 32, tf32=allow_tf32)


def weight_product(dtype: str, capability: int, group_outputs: int, allow_tf32: bool) -> Product:
    """For the weight's gradient: output channels by input channels."""
    if dtype == "float64":
        return Product("TurnedFma", dtype, 64, 32, 32, 16)
    if capability < 80 and dtype != "float16":
        return Product("TurnedFma", dtype, 64, 64, 32, 32)
    if capability < 80 or group_outputs <= 64:
        return Product("TurnedMma", dtype, 64, 64, 32, 32, tf32=allow_tf32)
    if group_outputs <= 128 or dtype == "float32":
        return Product("TurnedMma", dtype, 128, 64, 32, 32, tf32=allow_tf32)
    return Product("TurnedMma", dtype, 256, 64, 64, 32)


def check_size(op: str, g: ConvGeometry) -> None:
    """Pixels and cells of one image are counted in an int, those of all images in whatever they need."""
    axes = len(g.in_size)
    formula = " * ".join(f"({name} + 1)" for name in NAMES[axes])
    for what, size in (("input", g.in_size), ("output", g.out_size)):
        cells = math.prod(pixels + 1 for pixels in size)
        if cells > sizes.MOST_CELLS:
            got = " * ".join(str(pixels + 1) for pixels in size)
            raise ValueError(
                f"{op}: an image of the {what} must have {formula} <= {sizes.MOST_CELLS} on CUDA, got {got} = {cells}"
            )
    weights = g.in_channels // g.groups * math.prod(g.kernel)
    if weights > _checks.MOST:
        kernel = _geometry.named("kernel", axes).replace(", ", " * ")
        raise ValueError(f"{op}: weight must have C/groups * {kernel} <= {_checks.MOST} on CUDA, got {weights}")
    sizes.check_fields(op, g)


def is_direct(g: ConvGeometry) -> bool:
    """Whether arrays are read as they lie: tiles of few channels are a waste, or a copy of an image for few samples."""
    outputs = g.out_channels // g.groups * math.prod(g.out_size)
    copy = g.in_channels * math.prod(g.in_size)
    samples = math.prod(g.kernel) * g.in_channels * outputs
    few = g.in_channels // g.groups < sizes.DIRECT_CHANNELS
    return few or copy > max(sizes.SMALL_COPY, COPIED_FOR_EACH * samples)


def channels(
    g: ConvGeometry, dtype: str, depth: int, shared: Callable[[int], int], limit: int, *, whole: bool = False
) -> Channels:
    """Layout of the input's channels for tiles of this depth. `shared(slots)`: bytes that a kernel then takes.

    `whole`: an offset group that has several units needs tiles of one unit.
    """
    unit = math.gcd(g.in_channels // g.groups, g.in_channels // g.offset_groups)
    units = g.in_channels // g.groups // unit
    chunk = 16 // ITEMSIZE[dtype]
    for most in SLOTS:
        shortest = max(chunk, depth if whole and unit != g.in_channels // g.offset_groups else depth // most)
        padded = round_up(unit, depth) if unit >= depth else max(1 << (unit - 1).bit_length(), shortest)
        found = Channels(unit, units, round_up(unit, chunk), padded, -(-units * padded // depth))
        if shared(found.slots(depth)) <= limit:
            break
    return found


def slices(tiles: int, steps: int, processors: int, shortest: int) -> int:
    """Into how many parts the sum of a tile is cut, so that a problem of few tiles still fills the device."""
    return max(1, min(processors // max(tiles, 1), steps // shortest))


def swapped(g: ConvGeometry) -> ConvGeometry:
    """The transposed convolution: outputs in the places of inputs."""
    return g._replace(
        in_channels=g.out_channels,
        in_size=g.out_size,
        out_channels=g.in_channels,
        out_size=g.in_size,
        offset_groups=1,
    )


def offsets(g: ConvGeometry) -> int:
    """Numbers that move the samples of one output pixel."""
    return g.offset_groups * taps(g) * len(g.in_size)


def corners_read(g: ConvGeometry, reads: int) -> int:
    """Pixels of a sample."""
    return 1 << len(g.in_size) if reads == DEFORMED else 1


def corner_bytes(dtype: str, index: str, corners: int, values: int) -> int:
    """sizeof a C struct of `corners` indices and `values` numbers."""
    number, value = (4 if index == "int" else 8), max(4, ITEMSIZE[dtype])
    return round_up(round_up(corners * number, value) + values * value, max(number, value))


def pixels(g: Any) -> int:
    return math.prod(g.out_size)


def taps(g: Any) -> int:
    return math.prod(g.kernel)
