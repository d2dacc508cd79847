"""Convolutions over one, two or three axes, as geometry and arrays: plain, deformable or active, and their oracle.

What the twins of a backend are given, whichever operator calls them.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from pydeform._geometry import BOUNDARIES, ConvGeometry
from tests.cases.deform_conv2d import dtype_of

GRADS = ("input", "offset", "weight", "bias", "mask")


class Case(NamedTuple):
    batch: int
    in_channels: int
    in_size: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    offset_groups: int = 1
    kind: str = "deform"  # or "active", "plain"
    mask: bool = True
    boundary: str = "torchvision"
    reach: int = 2  # offsets go this many whole pixels each way

    @property
    def geometry(self) -> ConvGeometry:
        spans = [
            (size + before + after - d * (k - 1) - 1) // s + 1
            for size, (before, after), d, k, s in zip(
                self.in_size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]
        return ConvGeometry(
            *(self.batch, self.in_channels, self.out_channels, self.groups, self.offset_groups),
            *(BOUNDARIES.index(self.boundary), self.in_size, tuple(spans), self.kernel, self.stride),
            tuple(before for before, _ in self.padding),
            self.dilation,
        )


def make(case: Case, dtype: str = "float64", seed: int = 0) -> dict[str, Any]:
    """Arrays under the names of GRADS and grad_output. Offsets keep off the integers; each dtype has all values."""
    rng, g = np.random.default_rng(seed), case.geometry
    taps, axes = math.prod(g.kernel), len(g.kernel)

    def values(*shape: int) -> np.ndarray:
        return rng.integers(-128, 129, shape) / 64

    shape = (g.offset_groups * taps * axes,)
    if case.kind == "deform":
        shape = (g.batch, *shape, *g.out_size)
    arrays: dict[str, Any] = {
        "input": values(g.batch, g.in_channels, *g.in_size),
        "offset": rng.integers(-case.reach, case.reach, shape) + rng.integers(1, 8, shape) / 8,
        "weight": values(g.out_channels, g.in_channels // g.groups, *g.kernel),
        "bias": values(g.out_channels),
        "mask": values(g.batch, g.offset_groups * taps, *g.out_size),
        "grad_output": values(g.batch, g.out_channels, *g.out_size) / 2,
    }
    if case.kind == "plain":
        arrays["offset"] = None
    if case.kind != "deform" or not case.mask:
        arrays["mask"] = None
    return {name: None if a is None else a.astype(dtype_of(dtype)) for name, a in arrays.items()}


@functools.cache
def expected(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    return oracle(case, make(case, seed=seed))


def oracle(case: Case, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """The output and every gradient in float64, one sample at a time, as docs/math/deform_conv2d.md has them."""
    a = {name: None if array is None else np.asarray(array).astype(np.float64) for name, array in arrays.items()}
    g, taps = case.geometry, math.prod(case.kernel)
    axes = len(g.kernel)
    offset = np.zeros(axes * g.offset_groups * taps) if a["offset"] is None else a["offset"]
    if offset.ndim == 1:
        offset = np.broadcast_to(offset.reshape(-1, *[1] * axes), (g.batch, len(offset), *g.out_size))
    offset = offset.reshape(g.batch, g.offset_groups, *g.kernel, axes, *g.out_size)
    shape = (g.batch, g.offset_groups, *g.kernel, *g.out_size)
    mask = np.ones(shape) if a["mask"] is None else a["mask"].reshape(shape)
    output = np.zeros((g.batch, g.out_channels, *g.out_size)) + a["bias"].reshape(-1, *[1] * axes)
    grads = {"input": np.zeros_like(a["input"]), "weight": np.zeros_like(a["weight"])}
    grad_offset, grad_mask = np.zeros_like(offset), np.zeros(shape)
    per_group, per_offset, outputs = (
        g.in_channels // g.groups,
        g.in_channels // g.offset_groups,
        g.out_channels // g.groups,
    )
    for b, og, *rest in np.ndindex(*shape):
        tap, p = tuple(rest[:axes]), tuple(rest[axes:])
        place = [
            p[i] * g.stride[i] - g.pad[i] + tap[i] * g.dilation[i] + offset[(b, og, *tap, i, *p)] for i in range(axes)
        ]
        m = mask[(b, og, *tap, *p)]
        for c in range(og * per_offset, (og + 1) * per_offset):
            value, slopes, pixels = sample(a["input"][b, c], place, case.boundary)
            group, own = divmod(c, per_group)
            for o in range(group * outputs, (group + 1) * outputs):
                output[(b, o, *p)] += a["weight"][(o, own, *tap)] * (m * value)
                grads["weight"][(o, own, *tap)] += a["grad_output"][(b, o, *p)] * (m * value)
            of_group = slice(group * outputs, (group + 1) * outputs)
            column = a["grad_output"][(b, of_group, *p)] @ a["weight"][(of_group, own, *tap)]
            grad_mask[(b, og, *tap, *p)] += column * value
            grad_offset[(b, og, *tap, slice(None), *p)] += column * np.array(slopes)
            for index, weight in pixels:
                grads["input"][(b, c, *index)] += column * (m * weight)
    grad_offset *= np.expand_dims(mask, 2 + axes)
    grads["bias"] = a["grad_output"].sum(axis=(0, *range(2, 2 + axes)))
    if a["mask"] is not None:
        grads["mask"] = grad_mask.reshape(a["mask"].shape)
    if a["offset"] is not None:
        total = grad_offset.reshape(g.batch, -1, *g.out_size)
        grads["offset"] = total if case.kind == "deform" else total.sum(axis=(0, *range(2, 2 + axes)))
    return {"output": output, **grads}


def sample(image: np.ndarray, place: list[float], boundary: str) -> tuple[float, list[float], list[Any]]:
    """Value, slope along each axis, and the pixels with their weights."""
    axes = image.ndim
    if any(math.isnan(x) for x in place):
        return math.nan, [math.nan] * axes, []
    lowest, is_open = {"torchvision": (-1, False), "dcnv2": (-1, True), "dcnv1": (0, False)}[boundary]
    for x, size in zip(place, image.shape, strict=True):
        if x < lowest or (is_open and x == lowest) or x >= size:
            return 0.0, [0.0] * axes, []
    lines = []
    for x, size in zip(place, image.shape, strict=True):
        low = math.floor(x)
        if boundary == "dcnv1" and low == size - 1:
            lines.append([(low, 1.0, 0.0)])  # repeated
        else:
            lines.append([(low, 1 - (x - low), -1.0), (low + 1, x - low, 1.0)])
    value, slopes, pixels = 0.0, [0.0] * axes, []
    for corner in itertools.product(*lines):
        index = tuple(i for i, _, _ in corner)
        if any(i < 0 or i >= size for i, size in zip(index, image.shape, strict=True)):
            continue
        weight = math.prod(w for _, w, _ in corner)
        value += weight * image[index]
        pixels.append((index, weight))
        for i in range(axes):
            slopes[i] += math.prod(corner[j][2 if j == i else 1] for j in range(axes)) * image[index]
    return value, slopes, pixels
