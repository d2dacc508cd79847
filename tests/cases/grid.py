"""Problems of the operators that sample at positions of their own, grid_sample and warp, named.

They are made into problems, and run, by tests/cases/gather.py. Every number is exact in each dtype, but positions on
images whose sizes are no powers of two, or with align_corners one more than one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MODES = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")


class Grid(NamedTuple):
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    channels: int = 3
    mode: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    batch: int = 2

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("mode", "padding_mode", "align_corners")}


class Warp(NamedTuple):
    in_size: tuple[int, ...]
    channels: int = 3
    mode: str = "bilinear"
    padding_mode: str = "zeros"
    batch: int = 2

    @property
    def options(self) -> dict[str, Any]:
        return {"mode": self.mode, "padding_mode": self.padding_mode}


GRID_SAMPLE = {
    "zeros": Grid((4, 8), (5, 6)),
    "border_corners": Grid((5, 3), (4, 7), 8, padding_mode="border", align_corners=True),
    "reflection": Grid((8, 2), (6, 5), 5, padding_mode="reflection"),
    "zeros_corners": Grid((3, 9), (4, 6), 1, align_corners=True),
    "border": Grid((4, 2), (7, 4), 16, padding_mode="border"),
    "reflection_corners": Grid((5, 9), (5, 6), 17, padding_mode="reflection", align_corners=True),
    "nearest": Grid((4, 4), (7, 6), 3, "nearest"),
    "nearest_border": Grid((5, 9), (6, 4), 5, "nearest", "border", True),
    "nearest_reflection": Grid((2, 4), (6, 7), 19, "nearest", "reflection"),
    "bicubic": Grid((4, 8), (5, 6), 3, "bicubic"),
    "bicubic_border": Grid((5, 3), (6, 4), 5, "bicubic", "border", True),
    "bicubic_reflection": Grid((2, 4), (4, 7), 9, "bicubic", "reflection"),
    "volume": Grid((2, 4, 8), (3, 4, 5)),
    "volume_border": Grid((3, 2, 5), (4, 3, 2), 8, padding_mode="border", align_corners=True),
    "volume_reflection": Grid((4, 2, 2), (3, 2, 5), 5, padding_mode="reflection"),
    "volume_nearest": Grid((4, 2, 8), (2, 5, 3), 3, "nearest", "reflection"),
    "odd_sizes": Grid((7, 6), (3, 5), 20, padding_mode="reflection"),
    "one_pixel": Grid((1, 1), (4, 5), 3, padding_mode="border"),
    "one_pixel_bicubic": Grid((1, 1), (4, 5), 3, "bicubic", "reflection", True),
    "one_voxel": Grid((1, 1, 1), (2, 3, 4), 2, padding_mode="reflection", align_corners=True),
    "row": Grid((1, 9), (6, 5), 2, padding_mode="reflection", align_corners=True),
    "column": Grid((8, 1), (4, 7), 3),
    "one_point": Grid((4, 4), (1, 1), 33, batch=3),
    "channels_32": Grid((4, 4), (3, 2), 32, "nearest"),
    "channels_40": Grid((2, 4), (3, 5), 40, "bicubic", "border", batch=1),
    "channels_70": Grid((4, 4), (3, 4), 70, batch=1),
    "many_points": Grid((4, 2), (11, 17), 4, padding_mode="border", batch=3),
    "batch_0": Grid((4, 8), (5, 6), mode="bicubic", batch=0),
    "no_points": Grid((4, 8), (0, 6), mode="nearest"),
    "no_points_of_a_volume": Grid((4, 8, 2), (3, 4, 0)),
}
WARP = {  # on the kernels of grid_sample
    "zeros": Warp((4, 8)),
    "border": Warp((5, 3), 8, padding_mode="border"),
    "reflection": Warp((5, 9), 5, padding_mode="reflection"),
    "nearest": Warp((7, 4), 3, "nearest", "reflection"),
    "bicubic": Warp((6, 5), 4, "bicubic", "border"),
    "volume": Warp((3, 4, 5), 3),
    "one_pixel": Warp((1, 1), 3, batch=5),
    "channels_40": Warp((4, 3), 40, batch=1),
    "batch_0": Warp((4, 8), mode="nearest", batch=0),
}
CASES: dict[str, dict[str, Any]] = {"grid_sample": GRID_SAMPLE, "warp": WARP}
# As FEW of tests/cases/gather.py.
FEW = {
    "grid_sample": ("zeros", "border_corners", "reflection", "nearest", "bicubic_border", "volume_reflection"),
    "warp": ("zeros", "reflection", "bicubic", "volume"),
}


def every_mode(axes: int) -> list[dict[str, Any]]:
    """All that the options of grid_sample can be."""
    names = "mode", "padding_mode", "align_corners"
    modes = [mode for mode in MODES if axes == 2 or mode != "bicubic"]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(modes, PADDINGS, (False, True))]


def normalised(positions: Any, lengths: Any, align_corners: bool) -> Any:
    """The grid of positions in pixels, whose last axis is in array order. On an axis of one pixel all corners are one:
    there a position is taken as it is."""
    lengths = np.asarray(lengths)
    if align_corners:
        return np.where(lengths > 1, 2 * positions / np.maximum(lengths - 1, 1) - 1, positions)[..., ::-1]
    return ((2 * positions + 1) / lengths - 1)[..., ::-1]


def _values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 129, shape) / 64


def _grid_sample(case: Grid, rng: np.random.Generator, draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    positions = draw(rng, case.in_size, (case.batch, *case.out_size, len(case.in_size)))
    arrays = {
        "input": _values(rng, case.batch, case.channels, *case.in_size),
        "grid": normalised(positions, case.in_size, case.align_corners),
    }
    return arrays, case.options


def _warp(case: Warp, rng: np.random.Generator, draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    positions = draw(rng, case.in_size, (case.batch, *case.in_size, len(case.in_size)))
    arrays = {
        "input": _values(rng, case.batch, case.channels, *case.in_size),
        "displacement": np.moveaxis(positions, -1, 1) - np.indices(case.in_size),
    }
    return arrays, case.options


MAKERS: dict[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = {"grid_sample": _grid_sample, "warp": _warp}
