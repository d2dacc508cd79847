"""The sampling points of a trained, or seeded, network on a photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pydeform import viz
from pydeform.demo import networks, pictures
from pydeform.layers import DeformConv2d, Sequential, load

LONG_SIDE = 224  # pixels the photograph is reduced to: about ten times a digit
POSITIONS = ((0.3, 0.3), (0.3, 0.7), (0.55, 0.5), (0.75, 0.25), (0.75, 0.75))  # fractions of height and width
COLORS = ("#e4572e", "#2a9d8f", "#ffd23f", "#4c9be8", "#d16ba5")
KIND = pictures.DEFORMABLE


def read(path: str | None) -> Any:
    """(H, W, 3) uint8, reduced to LONG_SIDE; scikit-learn's flower.jpg when there is no path."""
    from PIL import Image

    if path is None:
        from sklearn import datasets

        picture = Image.fromarray(datasets.load_sample_image("flower.jpg"))
    else:
        picture = Image.open(path).convert("RGB")
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    return np.asarray(picture)


def network_for(folder: Path, seed: int) -> tuple[Sequential, str]:
    """The network that a demo run left in `folder`, or a seeded one with random offsets; and words for which."""
    network = networks.build(KIND, np.random.default_rng([seed, 0]))
    saved = folder / f"{KIND.replace(' ', '_')}.npz"
    if saved.exists():
        load(network, saved)
        return network, f"trained on digits ({saved})"
    rng = np.random.default_rng([seed, 2])
    for site in networks.SITES:
        layer = network.layers[site.place]
        assert isinstance(layer, DeformConv2d)
        branch = layer.params["offset.weight"]
        branch[...] = rng.standard_normal(branch.shape) * 0.15
    return network, f"seeded with {seed}, not trained: run `pydeform demo` first for one that is"


def draw(photo: Any, network: Sequential, path: Path) -> Path:
    """Write the picture: points of five positions beside those of the same network without offsets."""
    grey = photo.mean(axis=2, dtype=np.float32) / 255
    chain = pictures.levels(network, grey)
    height, width = photo.shape[:2]
    axes = viz.panels(1, 2, (5.6, 5.6 * height / width + 0.4))
    for ax, title, drawn in (
        (axes[0, 0], "regular grid (plain)", pictures.regular(chain)),
        (axes[0, 1], "deformable", chain),
    ):
        out_h, out_w = chain[-1].offset.shape[1:]
        for (y, x), color in zip(POSITIONS, COLORS, strict=True):
            at = (int(y * out_h), int(x * out_w))
            stride = networks.SITES[0].input_stride
            viz.sampling_points(ax, photo, drawn, at, pixel_stride=stride, color=color, size=9)
        ax.set(title=title, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes[0, 0].figure.savefig(path, dpi=110)
    return path
