"""What the forward and the backward of a convolution share: how a problem is cut up, and its arrays."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core import parallel
from pydeform.cpu.core.memory import compute_dtype, contiguous
from pydeform.cpu.core.pair_products import pair_dtype
from pydeform.cpu.core.planes import planes_of
from pydeform.cpu.core.simd import VECTOR_BYTES
from pydeform.cpu.core.sizes import SERIAL_FLOPS

CHANNELS = 64  # of a block, sampled together
FEW_SAMPLES = 16  # pixels of an image for each sample, or more: then a copy of it would be most of the work
KEPT_ROWS = 1 << 16  # of a problem's tables: longer ones are made for each call


def channels_last_size(g: Any) -> int:
    return int(g.batch * (math.prod(g.in_size) + 1) * g.in_channels)


def threads_for(g: Any, products: int, units: int) -> int:
    taps = math.prod(g.kernel)
    per_output = 2 * products * (g.out_channels // g.groups) + 16
    flops = per_output * g.batch * math.prod(g.out_size) * g.in_channels * taps
    return 1 if flops < SERIAL_FLOPS else parallel.threads_for(units)


def prefers_planes(g: Any) -> bool:
    """For few samples of a large image the copy would be most of the work, and of the memory. No sample differs by a
    bit; a weight's gradient may, where such an image would have been two pieces."""
    samples = math.prod(g.kernel) * math.prod(g.out_size)
    return bool(FEW_SAMPLES * samples <= math.prod(g.in_size))


def is_shared(offset: Any) -> bool:
    """All images and positions have the same: one axis."""
    return offset is not None and offset.ndim == 1


def corners_size(blocks: Any, axes: tuple[int, ...]) -> int:
    """Numbers of the corners of one sample, and behind them what the last vector reads too."""
    return 2 ** len(axes) * int(max(blocks["channels"])) + VECTOR_BYTES // 4


def numbers_of(dtype: Any, g: Any) -> Any:
    """The dtype of what is multiplied, columns and weights: the one that is computed with, or pairs of bfloat16."""
    is_pairs = dtype.itemsize == 2 and dtype.name == "bfloat16" and not is_depthwise(g)
    return (pair_dtype() if is_pairs else None) or compute_dtype(dtype)


def kernel_key(g: Any, dtype: Any, numbers: Any, pixel_dtype: Any, planes: bool, has_offset: bool) -> str:
    """Of the types of a kernel's arguments."""
    options = planes * "p" + has_offset * "o" + is_depthwise(g) * "d"
    return dtype.char + numbers.char + pixel_dtype.char + str(len(g.in_size)) + options


class Given(NamedTuple):
    """What a caller gave, in the kernels' shapes. What is absent is None, so that kernels are compiled without what it
    would take: input or planes, and the offset of a plain convolution. No mask is ones for one tile, no bias zeros."""

    input: Any
    offset: Any
    mask: Any
    weight: Any
    bias: Any
    planes: Any  # the input as it lies


def given_arrays(arrays: Any, g: Any, dtype: Any, planes: bool, tile: int) -> Given:
    input, offset, weight, bias, mask = arrays
    taps, axes, positions = math.prod(g.kernel), len(g.out_size), math.prod(g.out_size)
    shape = (g.batch, g.offset_groups, taps)
    if is_shared(offset):
        offset = contiguous(offset, dtype, (1, g.offset_groups, taps, axes, 1)).repeat(tile, axis=-1)
    elif offset is not None:
        offset = contiguous(offset, dtype, (*shape, axes, positions))
    return Given(
        None if planes else contiguous(input, dtype, (g.batch, g.in_channels, math.prod(g.in_size))),
        offset,
        np.ones((1, 1, 1, tile), dtype) if mask is None else contiguous(mask, dtype, (*shape, positions)),
        contiguous(weight, dtype, (g.out_channels, g.in_channels // g.groups, taps)),
        np.zeros(g.out_channels, dtype) if bias is None else contiguous(bias, dtype, (g.out_channels,)),
        planes_of(input) if planes else None,
    )


def repeated(rows: Any, times: int, **steps: int) -> Any:
    """The table `times` times over; each time the columns named in `steps` are so much greater."""
    after = np.tile(rows, times)
    number = np.repeat(np.arange(times), len(rows))
    for name, step in steps.items():
        after[name] += number * step
    return after


def period_of(g: Any) -> tuple[Any, int]:
    """A convolution that this one repeats with other channels, and how often. Tables are made for that one."""
    per_group, per_offset = g.in_channels // g.groups, g.in_channels // g.offset_groups
    if is_depthwise(g):
        channels = per_offset  # blocks have many groups
    else:
        channels = per_group if per_offset % per_group == 0 else math.lcm(per_group, per_offset)
    times = g.in_channels // channels
    one = g._replace(
        in_channels=channels,
        out_channels=g.out_channels // times,
        groups=g.groups // times,
        offset_groups=max(channels // per_offset, 1),
    )
    return one, times


def is_small(g: Any) -> bool:
    """Its tables may be kept."""
    return bool(g.in_channels * math.prod(g.kernel) <= KEPT_ROWS)


def is_depthwise(g: Any) -> bool:
    """One input and one output channel in each group: nothing to sum over channels, so groups need not be apart."""
    return bool(g.groups == g.in_channels == g.out_channels and g.groups > 1)


def channel_blocks(g: Any, largest: int, depthwise: bool) -> list[tuple[int, int, int, int]]:
    """(group, offset group, first channel, channels): no block crosses a border of either kind of group.

    A depthwise convolution has blocks of many groups; `group` is then the first of them.
    """
    per_group = 1 if depthwise else g.in_channels // g.groups
    per_offset = g.in_channels // g.offset_groups
    borders = {0, g.in_channels, *range(0, g.in_channels, per_offset)}
    if not depthwise:
        borders.update(range(0, g.in_channels, per_group))
    blocks = []
    for first, last in itertools.pairwise(sorted(borders)):
        parts = -(-(last - first) // largest)
        size = -(-(last - first) // parts)
        for channel in range(first, last, size):
            blocks.append((channel // per_group, channel // per_offset, channel, min(size, last - channel)))
    return blocks
