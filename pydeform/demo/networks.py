"""The three networks: one shape, two of them with deformable layers, all with the same number of parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.layers import BatchNorm2d, Conv2d, DeformConv2d, GlobalAvgPool2d, Layer, Linear, ReLU, Sequential

CLASSES = 10
PLAIN = "plain"
# Channels of the four convolutions. The offset branches cost parameters, so the others are wider in the third.
WIDTHS = {
    PLAIN: (16, 32, 47, 56),
    "deformable v1": (16, 32, 36, 49),
    "modulated v2": (16, 32, 32, 44),
}


class Site(NamedTuple):
    """Where a deformable layer stands in the network."""

    place: int  # in network.layers
    conv_stride: int  # of the layer itself
    input_stride: int  # image pixels per pixel of its input


SITES = (Site(6, 1, 2), Site(9, 2, 2))


def build(kind: str, rng: np.random.Generator) -> Sequential:
    """The network `kind`, one of WIDTHS, for images (N, 1, H, W). Only the two convolutions at SITES differ."""
    a, b, c, d = WIDTHS[kind]

    def conv(inputs: int, outputs: int, stride: int) -> Layer:
        if kind == PLAIN:
            return Conv2d(inputs, outputs, 3, stride, 1, rng=rng)
        # mask_scale 2 starts the mask at 1: before training, all three are plain networks
        return DeformConv2d(inputs, outputs, 3, stride, 1, modulated=kind == "modulated v2", mask_scale=2, rng=rng)

    convolutions = (
        Conv2d(1, a, 3, 2, 1, rng=rng),
        Conv2d(a, b, 3, 1, 1, rng=rng),
        *(conv(inputs, outputs, site.conv_stride) for inputs, outputs, site in zip((b, c), (c, d), SITES, strict=True)),
    )
    blocks = (
        layer for conv, n in zip(convolutions, (a, b, c, d), strict=True) for layer in (conv, BatchNorm2d(n), ReLU())
    )
    return Sequential(*blocks, GlobalAvgPool2d(), Linear(d, CLASSES, rng=rng))


def parameters(network: Layer) -> int:
    return sum(param.size for param in network.params.values())


def offsets(network: Sequential, image: Any) -> list[Any]:
    """Offsets (N, 18, H, W) that each deformable layer computes for images (N, 1, H, W)."""
    found = []
    x = image
    for place, layer in enumerate(network.layers[: SITES[-1].place + 1]):
        if place in (site.place for site in SITES):
            assert isinstance(layer, DeformConv2d)
            found.append(layer.offset_and_mask(x)[0])
        x = layer(x, train=False)[0]
    return found
