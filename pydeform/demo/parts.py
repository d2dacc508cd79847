"""Parts of a box, class by class, on two photographs: offsets that gradient ascent found, without any training.

There is no detector here. The score map of a class says how near each colour is to one colour, picked by hand. The
offsets of a box start at zero and climb what its bins see of the maps, through `deform_psroi_pool_backward`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pydeform import viz
from pydeform.ops.deform_psroi_pool import deform_psroi_pool, deform_psroi_pool_backward

STRIDE = 4  # pixels of the photograph per pixel of the score maps
BLUR = 8  # pixels of the score maps: so far beyond its edge a bin feels a slope
SIGMA = 40  # a colour so far away, of 255, scores exp(-1/2)
PARTS, SAMPLES, TRANS_STD = 3, 4, 0.1
# Without the decay every bin would end on the brightest spot that it can feel its way to.
STEPS, RATE, DECAY = 200, 0.5, 0.1
MARGIN = 0.18  # of the box, shown around it
COLORS = ("#00e5ff", "#ff4fd8")  # one for each class; neither is in the photographs


class Scene(NamedTuple):
    """A box on one of scikit-learn's photographs, and what its classes look like: name -> (R, G, B)."""

    photo: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2
    classes: dict[str, tuple[int, int, int]]


SCENES = (
    Scene("flower.jpg", (110, 40, 440, 350), {"outer petals": (240, 185, 125), "heart": (215, 75, 25)}),
    Scene("china.jpg", (55, 15, 415, 355), {"walls": (110, 35, 35), "sky": (205, 215, 230)}),
)


class Climb(NamedTuple):
    """What gradient ascent on the offsets of one box gave."""

    trans: Any  # (1, 2*classes, PARTS, PARTS)
    before: Any  # (classes,): the mean of all bins without offsets
    after: Any  # and with them


def score_maps(photo: Any, colors: Any) -> Any:
    """(1, classes, H / STRIDE, W / STRIDE), from 0 to 1: how near to the class's colour, blurred."""
    height, width = (length // STRIDE for length in photo.shape[:2])
    small = photo[: height * STRIDE, : width * STRIDE].reshape(height, STRIDE, width, STRIDE, 3).mean(axis=(1, 3))
    distance = ((small - np.array(colors, np.float64)[:, None, None]) ** 2).sum(axis=-1)
    maps = np.exp(-distance / (2 * SIGMA**2))
    window = np.convolve(np.ones(BLUR) / BLUR, np.ones(BLUR) / BLUR)
    for axis in (1, 2):
        maps = np.apply_along_axis(np.convolve, axis, maps, window, mode="same")
    return maps[None]


def climb(maps: Any, box: Any, steps: int = STEPS) -> Climb:
    """Move the bins of each class uphill on its map, from where they are without offsets; nothing is random."""
    classes = maps.shape[1]
    boxes = np.array([[0, *box]], np.float64)
    options: dict[str, Any] = {
        "output_dim": classes,
        "pooled_size": PARTS,
        "sample_per_part": SAMPLES,
        "trans_std": TRANS_STD,
        "spatial_scale": 1 / STRIDE,
    }
    trans = np.zeros((1, 2 * classes, PARTS, PARTS))
    before = deform_psroi_pool(maps, boxes, trans, **options)
    ones = np.ones_like(before)
    for _ in range(steps):
        grads = deform_psroi_pool_backward(ones, maps, boxes, trans, **options, needs=("trans",))
        trans += RATE * (grads.trans - DECAY * trans)
    after = deform_psroi_pool(maps, boxes, trans, **options)
    return Climb(trans, before.mean(axis=(0, 2, 3)), after.mean(axis=(0, 2, 3)))


def draw(path: Path) -> list[str]:
    """Write the picture: above the photographs, below the maps, with the bins of each class. Returns a line a class."""
    from sklearn import datasets

    axes = viz.panels(2, 4, (2.9, 2.75))
    lines = []
    for number, scene in enumerate(SCENES):
        photo = datasets.load_sample_image(scene.photo)
        maps = score_maps(photo, list(scene.classes.values()))
        found = climb(maps, scene.box)
        for at, (name, color) in enumerate(zip(scene.classes, COLORS, strict=True)):
            photo_ax, map_ax = axes[:, 2 * number + at]
            height, width = (STRIDE * length for length in maps.shape[2:])
            map_ax.imshow(maps[0, at], cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            for ax, image in ((photo_ax, photo), (map_ax, None)):
                viz.roi_parts(ax, scene.box, found.trans[0], image=image, class_index=at, scale=TRANS_STD, color=color)
                _crop(ax, scene.box, photo.shape)
            change = f"{found.before[at]:.2f} to {found.after[at]:.2f}"
            photo_ax.set_title(f"class {at}: {name}", fontsize=11)
            map_ax.set_xlabel(f"mean score in the bins: {change}", fontsize=10)
            lines.append(f"{scene.photo}, {name}: mean score in the bins {change}")
    axes[0, 0].figure.savefig(path, dpi=90)
    return lines


def _crop(ax: Any, box: Any, shape: tuple[int, ...]) -> None:
    """Show the box and a margin around it, within the photograph."""
    x1, y1, x2, y2 = box
    margin = MARGIN * max(x2 - x1, y2 - y1)
    left, right = max(x1 - margin, 0) - 0.5, min(x2 + margin, shape[1]) - 0.5
    top, bottom = max(y1 - margin, 0) - 0.5, min(y2 + margin, shape[0]) - 0.5
    ax.set(xlim=(left, right), ylim=(bottom, top))
