"""Deformable convolution as its equation says it, one index at a time, in float64.

    output[b, o, oy, ox] = bias[o] + sum over c, ky, kx of
        weight[o, c, ky, kx] * mask[b, og, ky, kx, oy, ox] * image[b, c](y, x)
    y = oy*stride_h - pad_h + ky*dilation_h + offset[b, og, ky, kx, 0, oy, ox]        x likewise

og is the offset group of channel c (consecutive channels share one), and o sees only the channels of its own group.
Padding comes as ((top, bottom), (left, right)). Slow on purpose; nothing here is shared with the library under test.
"""

import math
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """Image value at a point, its derivatives there, and the pixels it was made of as (row, column, weight)."""

    value: float
    dy: float
    dx: float
    pixels: tuple


OUTSIDE = Sample(0.0, 0.0, 0.0, ())
UNDEFINED = Sample(math.nan, math.nan, math.nan, ())  # a NaN coordinate: no pixel was read, so none gets a gradient


def sample(image, y, x, boundary):
    """One channel at (y, x), bilinearly, under one of the three rules for points near the border."""
    if math.isnan(y) or math.isnan(x):
        return UNDEFINED
    if boundary == "dcnv1":
        return _sample_replicated(image, y, x)
    return _sample_zeros(image, y, x, slope_on_edge=boundary == "torchvision")


def _sample_zeros(image, y, x, slope_on_edge):
    """Zeros surround the image. At exactly -1 the value is 0; its right-hand slope counts only if `slope_on_edge`."""
    height, width = image.shape
    if not (-1 <= y < height and -1 <= x < width):
        return OUTSIDE
    on_edge = y == -1 or x == -1
    if on_edge and not slope_on_edge:
        return OUTSIDE
    rows, columns = _right_hand_line(y), _right_hand_line(x)
    existing = [
        (row, column, wy, wx, sy, sx)
        for row, wy, sy in rows
        for column, wx, sx in columns
        if 0 <= row < height and 0 <= column < width
    ]
    dy = sum(sy * wx * image[row, column] for row, column, wy, wx, sy, sx in existing)
    dx = sum(wy * sx * image[row, column] for row, column, wy, wx, sy, sx in existing)
    if on_edge:
        return Sample(0.0, dy, dx, ())
    value = sum(wy * wx * image[row, column] for row, column, wy, wx, sy, sx in existing)
    return Sample(value, dy, dx, tuple((row, column, wy * wx) for row, column, wy, wx, sy, sx in existing))


def _sample_replicated(image, y, x):
    """Nothing before 0 or from the length on; between the last pixel and the length, the last pixel repeated."""
    height, width = image.shape
    if not (0 <= y < height and 0 <= x < width):
        return OUTSIDE
    rows = _right_hand_line(y) if y < height - 1 else [(height - 1, 1.0, 0.0)]
    columns = _right_hand_line(x) if x < width - 1 else [(width - 1, 1.0, 0.0)]
    value = sum(wy * wx * image[row, column] for row, wy, _ in rows for column, wx, _ in columns)
    dy = sum(sy * wx * image[row, column] for row, _, sy in rows for column, wx, _ in columns)
    dx = sum(wy * sx * image[row, column] for row, wy, _ in rows for column, _, sx in columns)
    return Sample(value, dy, dx, tuple((row, column, wy * wx) for row, wy, _ in rows for column, wx, _ in columns))


def _right_hand_line(p):
    """Both pixels of the line through p that holds from p to the right: (index, weight, slope of the weight)."""
    low = math.floor(p)
    return [(low, 1 - (p - low), -1.0), (low + 1, p - low, 1.0)]


class Sizes(NamedTuple):
    batch: int
    in_channels: int
    out_channels: int
    group_channels: int  # input channels that one output channel sees
    group_outputs: int
    offset_groups: int
    kernel_h: int
    kernel_w: int
    out_h: int
    out_w: int


def sizes(input, offset, weight, stride, padding, dilation):
    batch, in_channels, in_h, in_w = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    (top, bottom), (left, right) = padding
    return Sizes(
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        group_channels=group_channels,
        group_outputs=out_channels * group_channels // in_channels,
        offset_groups=offset.shape[1] // (2 * kernel_h * kernel_w),
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        out_h=(in_h + top + bottom - (dilation[0] * (kernel_h - 1) + 1)) // stride[0] + 1,
        out_w=(in_w + left + right - (dilation[1] * (kernel_w - 1) + 1)) // stride[1] + 1,
    )


def _taps(s):
    for b in range(s.batch):
        for c in range(s.in_channels):
            for ky in range(s.kernel_h):
                for kx in range(s.kernel_w):
                    for oy in range(s.out_h):
                        for ox in range(s.out_w):
                            yield b, c, ky, kx, oy, ox


def _float64(*arrays):
    return [None if a is None else np.asarray(a).astype(np.float64) for a in arrays]


def _as_taps(offset, mask, s):
    """The channel axis of offset and mask taken apart; without a mask every sample counts fully."""
    offset = offset.reshape(s.batch, s.offset_groups, s.kernel_h, s.kernel_w, 2, s.out_h, s.out_w)
    shape = (s.batch, s.offset_groups, s.kernel_h, s.kernel_w, s.out_h, s.out_w)
    return offset, np.ones(shape) if mask is None else mask.reshape(shape)


def forward(input, offset, weight, bias, mask, stride, padding, dilation, boundary="torchvision"):
    input, offset, weight, bias, mask = _float64(input, offset, weight, bias, mask)
    s = sizes(input, offset, weight, stride, padding, dilation)
    offset, mask = _as_taps(offset, mask, s)
    output = np.zeros((s.batch, s.out_channels, s.out_h, s.out_w))
    if bias is not None:
        output += bias[:, None, None]
    for b, c, ky, kx, oy, ox in _taps(s):
        og = c * s.offset_groups // s.in_channels
        dy, dx = offset[b, og, ky, kx, :, oy, ox]
        y = oy * stride[0] - padding[0][0] + ky * dilation[0] + dy
        x = ox * stride[1] - padding[1][0] + kx * dilation[1] + dx
        value = mask[b, og, ky, kx, oy, ox] * sample(input[b, c], y, x, boundary).value
        group, c_in_group = divmod(c, s.group_channels)
        for o in range(group * s.group_outputs, (group + 1) * s.group_outputs):
            output[b, o, oy, ox] += weight[o, c_in_group, ky, kx] * value
    return output


def backward(grad_output, input, offset, weight, bias, mask, stride, padding, dilation, boundary="torchvision"):
    """Gradients of sum(grad_output * forward(...)), as a dict under the arguments' names."""
    grad_output, input, offset, weight, bias, mask = _float64(grad_output, input, offset, weight, bias, mask)
    s = sizes(input, offset, weight, stride, padding, dilation)
    has_mask = mask is not None
    shapes = offset.shape, None if mask is None else mask.shape
    offset, mask = _as_taps(offset, mask, s)
    grad_input, grad_offset = np.zeros_like(input), np.zeros_like(offset)
    grad_weight, grad_mask = np.zeros_like(weight), np.zeros_like(mask)
    for b, c, ky, kx, oy, ox in _taps(s):
        og = c * s.offset_groups // s.in_channels
        dy, dx = offset[b, og, ky, kx, :, oy, ox]
        y = oy * stride[0] - padding[0][0] + ky * dilation[0] + dy
        x = ox * stride[1] - padding[1][0] + kx * dilation[1] + dx
        point = sample(input[b, c], y, x, boundary)
        m = mask[b, og, ky, kx, oy, ox]
        group, c_in_group = divmod(c, s.group_channels)
        grad_column = 0.0  # of the product mask * image value, which is what the weight multiplies
        for o in range(group * s.group_outputs, (group + 1) * s.group_outputs):
            grad_column += grad_output[b, o, oy, ox] * weight[o, c_in_group, ky, kx]
            grad_weight[o, c_in_group, ky, kx] += grad_output[b, o, oy, ox] * m * point.value
        grad_mask[b, og, ky, kx, oy, ox] += grad_column * point.value
        grad_offset[b, og, ky, kx, 0, oy, ox] += grad_column * point.dy
        grad_offset[b, og, ky, kx, 1, oy, ox] += grad_column * point.dx
        for row, column, share in point.pixels:
            grad_input[b, c, row, column] += grad_column * m * share
    grad_offset *= mask[:, :, :, :, None]  # the mask times the sum over channels: an infinite one times 0 is NaN
    return {
        "input": grad_input,
        "offset": grad_offset.reshape(shapes[0]),
        "weight": grad_weight,
        "bias": None if bias is None else grad_output.sum(axis=(0, 2, 3)),
        "mask": grad_mask.reshape(shapes[1]) if has_mask else None,
    }
