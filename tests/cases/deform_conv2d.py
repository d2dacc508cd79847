"""Problems of deformable convolution on which the tests agree, named. No two sizes alike where the case allows it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from tests.reference import deform_conv2d as reference

ARRAYS = ("input", "offset", "weight", "bias", "mask")


class Case(NamedTuple):
    batch: int = 1
    in_channels: int = 3
    in_h: int = 7
    in_w: int = 5
    out_channels: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    bias: bool = True
    mask: bool = True
    reach: int = 2  # offsets go this many whole pixels each way

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def out_size(self) -> tuple[int, int]:
        sizes = []
        for axis, size in enumerate((self.in_h, self.in_w)):
            free = size + sum(self.padding[axis]) - self.dilation[axis] * (self.kernel[axis] - 1) - 1
            sizes.append(free // self.stride[axis] + 1)
        return sizes[0], sizes[1]


CASES = {
    "every_option": Case(2, 12, 11, 7, 4, (3, 2), (2, 1), ((1, 1), (0, 0)), (2, 1), groups=2, offset_groups=3),
    "version_1": Case(3, 4, 6, 5, 7, (2, 3), mask=False, bias=False),
    "version_1_bias": Case(1, 2, 5, 8, 3, padding=((1, 1), (1, 1)), mask=False),
    "depthwise": Case(2, 6, 5, 7, 6, (3, 3), padding=((1, 1), (1, 1)), groups=6, offset_groups=2, bias=False),
    "groups_across_offset_groups": Case(1, 12, 4, 6, 9, (2, 1), groups=3, offset_groups=4),
    "offset_group_per_channel": Case(1, 5, 6, 4, 3, (1, 3), (1, 2), ((0, 0), (2, 2)), offset_groups=5),
    "padding_asymmetric": Case(1, 3, 5, 6, 4, (2, 3), (1, 2), ((0, 3), (4, 1))),
    "one_pixel": Case(4, 1, 1, 1, 3, (1, 1), reach=1),
    "row_image": Case(2, 3, 1, 9, 5, (1, 4), (1, 2), ((0, 0), (1, 2)), (1, 2)),
    "mostly_outside": Case(2, 3, 4, 6, 5, (3, 2), padding=((2, 2), (1, 1)), reach=9),
    # Past any tile, vector width or unrolling: 19 * 23 pixels, 35 outputs, 17 channels.
    "past_tiles": Case(1, 17, 19, 23, 35, (1, 2), padding=((0, 0), (1, 0))),
    # Several blocks of channels, whole vectors and a rest: two blocks in one offset group, sums from block to block.
    "channel_blocks": Case(2, 150, 3, 4, 5, (1, 2), padding=((0, 0), (1, 0)), groups=1, offset_groups=1),
    "depthwise_blocks": Case(2, 146, 3, 5, 146, (2, 1), padding=((1, 0), (0, 0)), groups=146, offset_groups=2),
    # More outputs than are multiplied at once for the column's gradient, with whole vectors of channels.
    "many_outputs": Case(1, 32, 3, 4, 150, (1, 2)),
    # One tap: only the offset group tells one sample from the next.
    "kernel_of_1": Case(2, 6, 5, 4, 7, (1, 1), offset_groups=3),
    "kernel_of_1_groups": Case(1, 36, 4, 5, 6, (1, 1), groups=3, offset_groups=4, mask=False),
    "channel_multiplier": Case(1, 5, 4, 6, 15, (2, 2), groups=5, mask=False),
    "batch_0": Case(0, 3, 5, 6, 4, (2, 3)),
}


def make(case: Case, dtype: str = "float64", seed: int = 0) -> dict[str, Any]:
    """Arrays in the order of ARRAYS, every batch entry different. Offsets keep 1/8 or more from integers, and all
    values are exact in each dtype, so that no rounding can move a sample across a kink."""
    rng = np.random.default_rng([seed, *map(int, np.array(case[:5]))])
    taps = case.kernel[0] * case.kernel[1]
    out_h, out_w = case.out_size
    offset_shape = (case.batch, 2 * case.offset_groups * taps, out_h, out_w)
    whole = rng.integers(-case.reach, case.reach, offset_shape)

    def values(*shape: int) -> np.ndarray:
        return rng.integers(-128, 129, shape) / 64

    arrays = {
        "input": values(case.batch, case.in_channels, case.in_h, case.in_w),
        "offset": whole + rng.integers(1, 8, offset_shape) / 8,
        "weight": values(case.out_channels, case.in_channels // case.groups, *case.kernel),
        "bias": values(case.out_channels) if case.bias else None,
        "mask": values(case.batch, case.offset_groups * taps, out_h, out_w) if case.mask else None,
    }
    return {name: None if array is None else array.astype(dtype_of(dtype)) for name, array in arrays.items()}


def make_grad_output(case: Case, dtype: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(99)
    return (rng.integers(-64, 65, (case.batch, case.out_channels, *case.out_size)) / 32).astype(dtype_of(dtype))


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@functools.cache
def expected(name: str, boundary: str = "torchvision") -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The oracle's output and gradients of a named case (the same for every dtype, whose values are exact)."""
    case = CASES[name]
    arrays = make(case)
    output = reference.forward(*arrays.values(), **case.options, boundary=boundary)
    grads = reference.backward(make_grad_output(case), *arrays.values(), **case.options, boundary=boundary)
    return output, grads
