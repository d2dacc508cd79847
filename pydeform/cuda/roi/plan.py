"""Which way an RoI operator goes on a device, and how its channels and results lie. Nothing here needs one."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform._roi_geometry import RoiGeometry
from pydeform.cuda.core import sizes
from pydeform.cuda.core.numbers import round_up

COPIED_FOR_EACH = 32  # values at most, in a copy of the input that is not small, for each of the output


class Images(NamedTuple):
    """`struct RoiImages` of roi/forward.cuh: those that a launch has a copy of."""

    first: int
    number: int


def check_size(g: RoiGeometry) -> None:
    """Pixels of one image are counted in an int, those of all images in whatever they need."""
    if (g.in_h + 1) * (g.in_w + 1) > sizes.MOST_CELLS:
        raise ValueError(
            f"RoI operators: an image of the input must have (height + 1) * (width + 1) <= {sizes.MOST_CELLS} on CUDA, "
            f"got {g.in_h + 1} * {g.in_w + 1} = {(g.in_h + 1) * (g.in_w + 1)}"
        )
    sizes.check_fields("RoI operators", g)


def is_direct(g: RoiGeometry) -> bool:
    """Whether 16-byte chunks of a class's channels would be mostly empty, or a copy of the input most of the work."""
    copy = g.batch * g.in_channels * g.in_h * g.in_w
    large = copy > max(sizes.SMALL_COPY, COPIED_FOR_EACH * outputs(g))
    return large or g.out_channels // g.classes < sizes.DIRECT_CHANNELS


def pitch_of(g: RoiGeometry, array: Any) -> int:
    """Channels of a class in memory: whole chunks of 16 bytes."""
    return round_up(g.out_channels // g.classes, 16 // array.dtype.itemsize)


def lanes_of(pitch: int, array: Any) -> int:
    """Of a warp on the chunks of one pixel: a power of two, as all that are left read other pixels."""
    chunks = pitch * array.dtype.itemsize // 16
    return min(32, 1 << (chunks - 1).bit_length())


def outputs(g: RoiGeometry) -> int:
    return g.boxes * g.out_channels * g.pooled_h * g.pooled_w


def size_of(array: Any) -> int:
    return 0 if array is None else int(array.size)
