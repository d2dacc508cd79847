"""Sampling points and effective dilation as their definitions say them, one index at a time, in float64."""

import math

import numpy as np


def sampling_locations(offset, kernel, stride, before, dilation):
    """`before` is the padding (top, left)."""
    offset = offset.astype(np.float64)
    batch, channels, out_h, out_w = offset.shape
    taps = kernel[0] * kernel[1]
    offset_groups = channels // (2 * taps)
    locations = np.zeros((batch, offset_groups, taps, out_h, out_w, 2))
    for b, og, k, oy, ox in np.ndindex(locations.shape[:-1]):
        ky, kx = k // kernel[1], k % kernel[1]
        channel = 2 * (og * taps + k)
        y = oy * stride[0] - before[0] + ky * dilation[0] + offset[b, channel, oy, ox]
        x = ox * stride[1] - before[1] + kx * dilation[1] + offset[b, channel + 1, oy, ox]
        locations[b, og, k, oy, ox] = y, x
    return locations


def effective_dilation(offset, kernel, dilation):
    locations = sampling_locations(offset, kernel, (1, 1), (0, 0), dilation)
    batch, offset_groups, _, out_h, out_w, _ = locations.shape
    result = np.zeros((batch, offset_groups, out_h, out_w))
    for b, og, oy, ox in np.ndindex(result.shape):
        distances = []
        for ky, kx in np.ndindex(*kernel):
            here = locations[b, og, ky * kernel[1] + kx, oy, ox]
            for next_ky, next_kx in ((ky, kx + 1), (ky + 1, kx)):
                if next_ky < kernel[0] and next_kx < kernel[1]:
                    there = locations[b, og, next_ky * kernel[1] + next_kx, oy, ox]
                    distances.append(math.dist(here, there))
        result[b, og, oy, ox] = sum(distances) / len(distances)
    return result


def channel_of(layout, group, taps, kernel, ky, kx, axis):
    """Where a layout has the offset of one tap: axis 0 is y, 1 is x."""
    tap = ky * kernel[1] + kx
    if layout == "chainer":
        return group * 2 * taps + (taps if axis == 0 else 0) + tap
    if layout == "blocked_yx":
        return group * 2 * taps + (taps if axis == 1 else 0) + tap
    if layout == "dcnv3":
        return 2 * (group * taps + kx * kernel[0] + ky) + (1 if axis == 0 else 0)
    return 2 * (group * taps + tap) + axis


def offset_in(layout, canonical):
    """`canonical` (N, offset_groups, kernel_h, kernel_w, 2, out_h, out_w) with (y, x), as `layout` has it."""
    batch, groups, *kernel, _, out_h, out_w = canonical.shape
    taps = kernel[0] * kernel[1]
    last = layout == "dcnv3"
    channels = groups * taps * 2
    result = np.zeros((batch, out_h, out_w, channels) if last else (batch, channels, out_h, out_w), canonical.dtype)
    for b, og, ky, kx, axis, oy, ox in np.ndindex(canonical.shape):
        channel = channel_of(layout, og, taps, kernel, ky, kx, axis)
        place = (b, oy, ox, channel) if last else (b, channel, oy, ox)
        result[place] = canonical[b, og, ky, kx, axis, oy, ox]
    return result
