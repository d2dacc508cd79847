"""Deformable convolution over any number of axes as its equation says it, one index at a time, in float64.

    output[b, o, p] = bias[o] + sum over c, k of weight[o, c, k] * mask[b, og, k, p] * image[b, c](position)
    position[a] = p[a]*stride[a] - before[a] + k[a]*dilation[a] + offset[b, og, k, a, p]        a: 0 .. axes - 1

p is an output pixel and k a tap, both with one index an axis; og is the offset group of channel c (consecutive channels
share one), and o sees only the channels of its own group. Padding comes as one (before, after) an axis, stride and
dilation as one number an axis. Slow on purpose; nothing here is shared with the library under test, nor with the oracle
of two axes beside it, which is written out and with which this one has to agree.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """Image value at a point, its derivative along each axis, and the pixels it was made of as (index, weight)."""

    value: float
    slopes: tuple
    pixels: tuple


def sample(image, position, boundary):
    """One channel at a point, linearly along every axis, under one of the three rules for points near the border."""
    axes = image.ndim
    outside = Sample(0.0, (0.0,) * axes, ())
    if any(math.isnan(p) for p in position):
        return Sample(math.nan, (math.nan,) * axes, ())  # no pixel was read, so none gets a gradient
    if not all(_counts(p, length, boundary) for p, length in zip(position, image.shape, strict=True)):
        return outside
    lines = [_line(p, length, boundary) for p, length in zip(position, image.shape, strict=True)]
    value, slopes, pixels = 0.0, [0.0] * axes, []
    for corner in itertools.product(*lines):
        index = tuple(i for i, _, _ in corner)
        if not all(0 <= i < length for i, length in zip(index, image.shape, strict=True)):
            continue  # a corner that does not exist is never read: it counts as zero whatever it is multiplied by
        weights = [weight for _, weight, _ in corner]
        value += math.prod(weights) * image[index]
        pixels.append((index, math.prod(weights)))
        for axis in range(axes):
            slope = math.prod(corner[a][2 if a == axis else 1] for a in range(axes))
            slopes[axis] += slope * image[index]
    if -1 in position:  # the value is 0 by rule, not by a product: no pixel has a part in it
        return Sample(0.0, tuple(slopes), ())
    return Sample(value, tuple(slopes), tuple(pixels))


def _counts(p, length, boundary):
    """Whether a sample has a value or a slope so far along one axis."""
    if boundary == "dcnv1":
        return 0 <= p < length
    if boundary == "dcnv2":
        return -1 < p < length
    assert boundary == "torchvision"
    return -1 <= p < length  # at exactly -1 the right-hand slope alone


def _line(p, length, boundary):
    """Both pixels of the line through p that holds from p to the right: (index, weight, slope of the weight)."""
    if boundary == "dcnv1" and p >= length - 1:
        return [(length - 1, 1.0, 0.0)]  # the last pixel repeated
    low = math.floor(p)
    return [(low, 1 - (p - low), -1.0), (low + 1, p - low, 1.0)]


class Sizes(NamedTuple):
    batch: int
    in_channels: int
    out_channels: int
    group_channels: int  # input channels that one output channel sees
    group_outputs: int
    offset_groups: int
    kernel: tuple
    out: tuple


def sizes(input, offset, weight, stride, padding, dilation):
    batch, in_channels, *in_size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    return Sizes(
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        group_channels=group_channels,
        group_outputs=out_channels * group_channels // in_channels,
        offset_groups=offset.shape[1] // (len(kernel) * math.prod(kernel)),
        kernel=tuple(kernel),
        out=output_size(in_size, kernel, stride, padding, dilation),
    )


def output_size(in_size, kernel, stride, padding, dilation):
    sizes = zip(in_size, kernel, stride, padding, dilation, strict=True)
    return tuple((size + sum(pair) - (d * (k - 1) + 1)) // s + 1 for size, k, s, pair, d in sizes)


def _float64(*arrays):
    return [None if a is None else np.asarray(a).astype(np.float64) for a in arrays]


def _as_taps(offset, mask, s):
    """The channel axis of offset and mask taken apart; without a mask every sample counts fully."""
    offset = offset.reshape(s.batch, s.offset_groups, *s.kernel, len(s.kernel), *s.out)
    shape = (s.batch, s.offset_groups, *s.kernel, *s.out)
    return offset, np.ones(shape) if mask is None else mask.reshape(shape)


def _points(s, input, offset, stride, padding, dilation, boundary):
    """(b, c, og, tap, p, sample) of every sample there is."""
    axes = len(s.kernel)
    for b, c, *rest in np.ndindex(s.batch, s.in_channels, *s.kernel, *s.out):
        og, tap, p = c * s.offset_groups // s.in_channels, tuple(rest[:axes]), tuple(rest[axes:])
        position = [
            p[a] * stride[a] - padding[a][0] + tap[a] * dilation[a] + offset[(b, og, *tap, a, *p)] for a in range(axes)
        ]
        yield b, c, og, tap, p, sample(input[b, c], position, boundary)


def forward(input, offset, weight, bias, mask, stride, padding, dilation, boundary="torchvision"):
    input, offset, weight, bias, mask = _float64(input, offset, weight, bias, mask)
    s = sizes(input, offset, weight, stride, padding, dilation)
    offset, mask = _as_taps(offset, mask, s)
    output = np.zeros((s.batch, s.out_channels, *s.out))
    if bias is not None:
        output += bias.reshape(-1, *[1] * len(s.out))
    for b, c, og, tap, p, point in _points(s, input, offset, stride, padding, dilation, boundary):
        column = mask[(b, og, *tap, *p)] * point.value
        group, c_in_group = divmod(c, s.group_channels)
        for o in range(group * s.group_outputs, (group + 1) * s.group_outputs):
            output[(b, o, *p)] += weight[(o, c_in_group, *tap)] * column
    return output


def backward(grad_output, input, offset, weight, bias, mask, stride, padding, dilation, boundary="torchvision"):
    """Gradients of sum(grad_output * forward(...)), as a dict under the arguments' names."""
    grad_output, input, offset, weight, bias, mask = _float64(grad_output, input, offset, weight, bias, mask)
    s = sizes(input, offset, weight, stride, padding, dilation)
    has_mask, axes = mask is not None, len(s.kernel)
    shapes = offset.shape, None if mask is None else mask.shape
    offset, mask = _as_taps(offset, mask, s)
    grad_input, grad_offset = np.zeros_like(input), np.zeros_like(offset)
    grad_weight, grad_mask = np.zeros_like(weight), np.zeros_like(mask)
    for b, c, og, tap, p, point in _points(s, input, offset, stride, padding, dilation, boundary):
        m = mask[(b, og, *tap, *p)]
        group, c_in_group = divmod(c, s.group_channels)
        grad_column = 0.0  # of the product mask * image value, which is what the weight multiplies
        for o in range(group * s.group_outputs, (group + 1) * s.group_outputs):
            grad_column += grad_output[(b, o, *p)] * weight[(o, c_in_group, *tap)]
            grad_weight[(o, c_in_group, *tap)] += grad_output[(b, o, *p)] * m * point.value
        grad_mask[(b, og, *tap, *p)] += grad_column * point.value
        for a in range(axes):
            grad_offset[(b, og, *tap, a, *p)] += grad_column * point.slopes[a]
        for index, share in point.pixels:
            grad_input[(b, c, *index)] += grad_column * m * share
    # The mask times the sum over channels: an infinite one times 0 is NaN.
    grad_offset *= np.expand_dims(mask, 2 + axes)
    return {
        "input": grad_input,
        "offset": grad_offset.reshape(shapes[0]),
        "weight": grad_weight,
        "bias": None if bias is None else grad_output.sum(axis=(0, *range(2, 2 + axes))),
        "mask": grad_mask.reshape(shapes[1]) if has_mask else None,
    }


# Active convolution: one place of each tap for all images and pixels -------------------------------------------------


def offset_of_positions(positions, batch, out, kernel):
    """The offset of a deformable convolution, without dilation, that samples where active convolution does.

    The convention stands here alone: a position is added to the place that its tap has in a plain convolution, so zeros
    are a plain convolution. (The first paper counts from the middle tap, kernel//2; ours is its position minus the
    tap's own place there: its p + kernel//2 - k along each axis.)
    """
    assert len(positions) % (len(kernel) * math.prod(kernel)) == 0
    return np.broadcast_to(positions.reshape(1, -1, *[1] * len(out)), (batch, len(positions), *out))


def active_forward(input, positions, weight, bias, stride, padding):
    input, positions, weight, bias = _float64(input, positions, weight, bias)
    offset, dilation = _active_offset(input, positions, weight, stride, padding)
    return forward(input, offset, weight, bias, None, stride, padding, dilation)


def active_backward(grad_output, input, positions, weight, bias, stride, padding):
    """As `backward`; what comes to one position from all images and pixels adds up."""
    grad_output, input, positions, weight, bias = _float64(grad_output, input, positions, weight, bias)
    offset, dilation = _active_offset(input, positions, weight, stride, padding)
    grads = backward(grad_output, input, offset, weight, bias, None, stride, padding, dilation)
    summed = grads["offset"].sum(axis=(0, *range(2, offset.ndim)))
    return {"input": grads["input"], "positions": summed, "weight": grads["weight"], "bias": grads["bias"]}


def _active_offset(input, positions, weight, stride, padding):
    kernel = weight.shape[2:]
    dilation = (1,) * len(kernel)
    out = output_size(input.shape[2:], kernel, stride, padding, dilation)
    return offset_of_positions(positions, len(input), out, kernel), dilation
