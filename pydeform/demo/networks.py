"""The three networks: one shape, two of them with deformable layers, all with the same number of parameters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pydeform.layers import Conv2d, DeformConv2d, GlobalAvgPool2d, Layer, Linear, ReLU, Sequential

CLASSES = 10
# The branches of the deformable layers have parameters of their own; the others get wider layers for them.
WIDTHS = {
    "plain": (16, 32, 46, 56),
    "deformable v1": (16, 32, 36, 48),
    "modulated v2": (16, 32, 32, 44),
}


class Site(NamedTuple):
    """A deformable layer of a network."""

    place: int  # in network.layers
    stride: int  # image pixels per pixel of its output


SITES = (Site(4, 2), Site(6, 4))


def build(kind: str, rng: np.random.Generator) -> Sequential:
    """One of WIDTHS for images (N, 1, SIZE, SIZE)."""
    a, b, c, d = WIDTHS[kind]

    def conv(inputs: int, outputs: int, stride: int) -> Layer:
        if kind == "plain":
            return Conv2d(inputs, outputs, 3, stride, 1, rng=rng)
        # mask_scale 2 starts the mask at 1: all three networks start as the same kind of plain network
        return DeformConv2d(inputs, outputs, 3, stride, 1, modulated=kind == "modulated v2", mask_scale=2, rng=rng)

    return Sequential(
        Conv2d(1, a, 3, 2, 1, rng=rng),
        ReLU(),
        Conv2d(a, b, 3, 1, 1, rng=rng),
        ReLU(),
        conv(b, c, 1),
        ReLU(),
        conv(c, d, 2),
        ReLU(),
        GlobalAvgPool2d(),
        Linear(d, CLASSES, rng=rng),
    )


def parameters(network: Layer) -> int:
    return sum(param.size for param in network.params.values())
