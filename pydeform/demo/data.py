"""Real digits of many sizes: scikit-learn's 1,797 handwritten digits, warped into a larger image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SIDE = 8  # of a digit, in its own pixels
SIZE = 28  # of the image it is placed in
TRAIN = 1200  # digits; the other 597 are the test set
SCALES = (1.0, 3.0)
ROTATION = 0.5  # radians, either way
SHEAR = 0.3
NOISE = 0.5  # the background: uniform noise up to half of white, so that where a filter looks matters
SHIFT = 4.0  # pixels, either way, and not more than keeps the digit inside the image


class Digits(NamedTuple):
    train_x: Any  # (1200, 8, 8) float32 in [0, 1]
    train_y: Any  # (1200,) int64
    test_x: Any
    test_y: Any


class Placed(NamedTuple):
    image: Any  # (N, 1, SIZE, SIZE) float32
    scale: Any  # (N,) image pixels per digit pixel
    depth: Any  # (N, SIZE, SIZE) how far inside the digit's warped square: 1 centre, 0 edge, below 0 outside


def load_digits() -> Digits:
    """The digits in a fixed random order, split once: the same split for every seed and network.

    The recipe was chosen on another split, so that the test digits here had no say in it.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    order = np.random.default_rng(1811_11168).permutation(len(bunch.target))
    x = (bunch.images[order] / 16).astype(np.float32)
    y = bunch.target[order].astype(np.int64)
    return Digits(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


def place(
    digits: Any,
    rng: np.random.Generator,
    scales: tuple[float, float] = SCALES,
    rotation: float = ROTATION,
    shear: float = SHEAR,
    shift: float = SHIFT,
) -> Placed:
    """Warp each digit (N, 8, 8) by its own random scale (log-uniform), rotation, shear and shift, onto noise."""
    n = len(digits)
    scale = np.exp(rng.uniform(np.log(scales[0]), np.log(scales[1]), n))
    angle = rng.uniform(-rotation, rotation, n)
    slant = rng.uniform(-shear, shear, n)
    room = np.minimum(shift, (SIZE - SIDE * scale) / 2)
    centre = rng.uniform(-1, 1, (n, 2)) * room[:, None]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    # rows of the inverse map: (y, x) of the image, seen from the digit's centre -> (y, x) of the digit
    matrix = np.stack([cos, sin + slant * cos, -sin, cos - slant * sin], axis=1).reshape(n, 2, 2)
    pixel = np.arange(SIZE) - (SIZE - 1) / 2
    grid = np.stack(np.meshgrid(pixel, pixel, indexing="ij"), axis=-1).reshape(1, SIZE * SIZE, 2)
    source = (grid - centre[:, None]) @ matrix.transpose(0, 2, 1) + (SIDE - 1) / 2
    depth = 1 - abs(source - (SIDE - 1) / 2).max(axis=-1) / (SIDE / 2)
    background = NOISE * rng.random((n, SIZE * SIZE), np.float32)
    image = np.maximum(_bilinear(digits, source), background)
    return Placed(image.reshape(n, 1, SIZE, SIZE), scale, depth.reshape(n, SIZE, SIZE))


def _bilinear(digits: Any, source: Any) -> Any:
    """Values of digits (N, 8, 8) at points (N, P, 2) in (y, x); 0 outside."""
    n = len(digits)
    padded = np.zeros((n, SIDE + 3, SIDE + 3), np.float32)  # one zero before, two after: no corner needs a check
    padded[:, 1 : SIDE + 1, 1 : SIDE + 1] = digits
    point = np.clip(source + 1, 0, SIDE + 1).astype(np.float32)
    corner = point.astype(np.intp)
    y, x = np.moveaxis(point - corner, -1, 0)
    flat = padded.reshape(n, -1)
    at = corner[..., 0] * (SIDE + 3) + corner[..., 1]
    v00, v01, v10, v11 = (np.take_along_axis(flat, at + step, axis=1) for step in (0, 1, SIDE + 3, SIDE + 4))
    top, bottom = v00 + x * (v01 - v00), v10 + x * (v11 - v10)
    return (top + y * (bottom - top)).astype(np.float32)
