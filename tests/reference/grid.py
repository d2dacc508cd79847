"""Sampling at free positions, along any number of axes, in float64: grid_sample, warp, affine_grid.

    output[b, :, p] = sum over one tap of each axis of (product of their shares) * input[b, :, their indices]

An axis turns a position into its taps: which pixel, its share, and the share's derivative by the position; that of one
axis is all that the gradient of a grid needs beside the shares of the others. Slow on purpose; nothing here is shared
with the library under test.

PyTorch's rules, at kinks too. Only a position is computed as the operators do, in float32 unless the data is float64:
far away that decides which pixel it falls on. NaN along one axis makes the whole point NaN; infinity, or a position
that becomes infinite, is outside: under border the pixel on that side, else nothing.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np


class Tap(NamedTuple):
    """A pixel along one axis."""

    index: int
    share: float
    slope: float  # of the share, by the position


def taps_of(position, length, mode, padding_mode, align_corners):
    """Of one axis; a missing pixel is no tap."""
    if math.isinf(position):
        return [Tap(0 if position < 0 else length - 1, 1.0, 0.0)] if padding_mode == "border" else []
    if mode == "bicubic":
        taps, first = [], np.floor(position)
        for k, (share, slope) in zip((-1, 0, 1, 2), _cubic(float(position - first)), strict=True):
            index = _padded(first + k, length, padding_mode, align_corners)[0]
            taps.append(Tap(int(index), share, slope))
        return _inside(taps, length)
    position, moves = _padded(position, length, padding_mode, align_corners)
    if mode == "nearest":
        return _inside([Tap(int(np.rint(position)), 1.0, 0.0)], length)
    first = math.floor(position)
    part = float(position) - first
    return _inside([Tap(first, 1 - part, -moves), Tap(first + 1, part, moves)], length)


def _inside(taps, length):
    return [tap for tap in taps if 0 <= tap.index < length]


def _cubic(t):
    """(share, slope) of the pixels at -1, 0, 1 and 2 from a position t; the kernel with a = -3/4."""
    a = -0.75
    for distance, way in ((t + 1, 1), (t, 1), (1 - t, -1), (2 - t, -1)):  # and how it changes with t
        if distance <= 1:
            share = ((a + 2) * distance - (a + 3)) * distance**2 + 1
            slope = (3 * (a + 2) * distance - 2 * (a + 3)) * distance
        else:
            share = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
            slope = (3 * a * distance - 10 * a) * distance + 8 * a
        yield share, way * slope


def _padded(position, length, padding_mode, align_corners):
    """The position that stands for one outside, and its derivative: 0 where it does not move."""
    moves = 1.0
    if padding_mode == "reflection":
        position, moves = _mirrored(position, length, align_corners)
    if padding_mode != "zeros":
        if position <= 0:
            return type(position)(0), 0.0
        if position >= length - 1:
            return type(position)(length - 1), 0.0
    return position, moves


def _mirrored(position, length, align_corners):
    """At the middle of the first and last pixel, or at their outer edges."""
    low, span = (0.0, length - 1) if align_corners else (-0.5, length)
    if span == 0:
        return type(position)(0), 0.0
    low, span = type(position)(low), type(position)(span)
    sign = -1.0 if position < low else 1.0
    rest = np.fmod(abs(position - low), 2 * span)
    return (rest + low, sign) if rest <= span else (2 * span - rest + low, -sign)


def _sampled(image, axes):
    """Channels of an image (channels, *lengths), their slopes by each position, and (pixel, share) read."""
    value, slopes, pixels = np.zeros(len(image)), np.zeros((len(axes), len(image))), []
    for taps in itertools.product(*axes):
        pixel = tuple(tap.index for tap in taps)
        share = math.prod(tap.share for tap in taps)
        value += share * image[(slice(None), *pixel)]
        pixels.append((pixel, share))
        for axis, tap in enumerate(taps):
            others = math.prod(other.share for place, other in enumerate(taps) if place != axis)
            slopes[axis] += tap.slope * others * image[(slice(None), *pixel)]
    return value, slopes, pixels


def _points(input, positions, mode, padding_mode, align_corners):
    """(image, place in the output, value, slopes, pixels) of every position, an array (N, *out, axes)."""
    lengths = input.shape[2:]
    for place in np.ndindex(positions.shape[:-1]):
        at, channels = positions[place], input.shape[1]
        if np.isnan(at).any():  # no pixel is read, so none gets a gradient
            yield place, np.full(channels, math.nan), np.full((len(at), channels), math.nan), []
        else:
            axes = [taps_of(*axis, mode, padding_mode, align_corners) for axis in zip(at, lengths, strict=True)]
            yield place, *_sampled(input[place[0]], axes)


def _forward(input, positions, *options):
    output = np.zeros((len(input), input.shape[1], *positions.shape[1:-1]))
    for (b, *place), value, _, _ in _points(_float64(input), positions, *options):
        output[(b, slice(None), *place)] = value
    return output


def _backward(grad_output, input, positions, *options):
    """Gradients of the input and of the positions."""
    grad_output, input = _float64(grad_output), _float64(input)
    grad_input, grad_positions = np.zeros_like(input), np.zeros(positions.shape)
    for (b, *place), _, slopes, pixels in _points(input, positions, *options):
        grad = grad_output[(b, slice(None), *place)]
        for pixel, share in pixels:
            grad_input[(b, slice(None), *pixel)] += share * grad
        if options[0] != "nearest" or np.isnan(positions[(b, *place)]).any():  # else 0, whatever it would multiply
            grad_positions[(b, *place)] = (slopes * grad).sum(1)
    return grad_input, grad_positions


def _float64(array):
    return np.ascontiguousarray(array).astype(np.float64)


def _computed_in(input):
    return np.float64 if input.dtype == np.float64 else np.float32


# Grids ----------------------------------------------------------------------------------------------------------------


def _unnormalised(input, grid, align_corners):
    """Positions in pixels, axes in array order, from a grid (N, *out, axes) in (x, y) or (x, y, z) of [-1, 1]."""
    grid = np.ascontiguousarray(grid).astype(_computed_in(input))[..., ::-1]
    kind = grid.dtype.type
    half, back = (np.array(input.shape[2:], kind) - kind(align_corners)) / kind(2), kind(0 if align_corners else 0.5)
    with np.errstate(over="ignore", invalid="ignore"):
        positions = (grid + kind(1)) * half - back
    return np.where(np.isinf(grid), grid, positions)  # also on an axis of one pixel


def grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False):
    return _forward(input, _unnormalised(input, grid, align_corners), mode, padding_mode, align_corners)


def grid_sample_backward(grad_output, input, grid, mode="bilinear", padding_mode="zeros", align_corners=False):
    """Gradients of sum(grad_output * grid_sample(...)), as a dict under the arguments' names."""
    positions = _unnormalised(input, grid, align_corners)
    options = mode, padding_mode, align_corners
    grad_input, grad_positions = _backward(grad_output, input, positions, *options)
    lengths = np.array(input.shape[2:])
    scale = (lengths - 1 if align_corners else lengths) / 2
    return {"input": grad_input, "grid": (grad_positions * scale)[..., ::-1]}


def _displaced(input, displacement):
    """Positions from a displacement (N, axes, *lengths) in pixels."""
    displacement = np.ascontiguousarray(displacement).astype(_computed_in(input))
    own = np.indices(input.shape[2:]).astype(displacement.dtype)
    return np.moveaxis(own + displacement, 1, -1)


def warp(input, displacement, mode="bilinear", padding_mode="zeros"):
    return _forward(input, _displaced(input, displacement), mode, padding_mode, True)


def warp_backward(grad_output, input, displacement, mode="bilinear", padding_mode="zeros"):
    positions = _displaced(input, displacement)
    grad_input, grad_positions = _backward(grad_output, input, positions, mode, padding_mode, True)
    return {"input": grad_input, "displacement": np.moveaxis(grad_positions, -1, 1)}


# Affine grids ---------------------------------------------------------------------------------------------------------


def _base(length, align_corners):
    """Coordinates of the pixels of an axis: its ends, or the outer edges of its ends, are -1 and 1."""
    if align_corners:
        return [2 * i / (length - 1) - 1 for i in range(length)] if length > 1 else [0.0]
    return [(2 * i + 1) / length - 1 for i in range(length)]


def _homogeneous(size, align_corners):
    """(place in the output, (x, y, 1) or (x, y, z, 1)) of every pixel."""
    bases = [_base(length, align_corners) for length in size[2:]]
    for place in np.ndindex(*size[2:]):
        yield place, np.array([*[base[i] for base, i in zip(bases, place, strict=True)][::-1], 1.0])


def affine_grid(theta, size, align_corners=False):
    theta = _float64(theta)
    grid = np.zeros((len(theta), *size[2:], len(size) - 2))
    for place, point in _homogeneous(size, align_corners):
        grid[(slice(None), *place)] = theta @ point
    return grid


def affine_grid_backward(grad_output, theta, size, align_corners=False):
    grad_output, grad_theta = _float64(grad_output), np.zeros(theta.shape)
    for place, point in _homogeneous(size, align_corners):
        grad_theta += grad_output[(slice(None), *place)][:, :, None] * point
    return {"theta": grad_theta}
