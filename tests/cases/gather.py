"""Problems of the operators that gather: attention, aggregation, DCNv3 and DCNv4, on which the tests agree, named.

Those of grid_sample and warp are in tests/cases/grid.py and become problems here as well.

No two sizes alike where the case allows it. Every number is exact in each dtype, but places on maps whose sizes are no
powers of two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pydeform
from tests.cases import grid
from tests.cases.deform_conv2d import dtype_of
from tests.reference import gather as reference
from tests.reference import grid as grid_reference

OPERATORS = ("ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation", "dcnv3", "dcnv4")
# What says where to sample and may be float32 beside half types.
PLACES = ("sampling_locations", "reference_points", "sampling_offsets", "offset", "grid", "displacement")
DATA = ("value", "features", "input")
DTYPES = ("float64", "float32", "float16", "bfloat16")


class Problem(NamedTuple):
    operator: str
    arrays: dict[str, Any]
    options: dict[str, Any]
    grad_output: Any

    def replaced(self, **arrays: Any) -> Problem:
        return self._replace(arrays={**self.arrays, **arrays})

    @property
    def numbers(self) -> dict[str, Any]:
        """All arrays but sizes."""
        return {name: a for name, a in self.arrays.items() if name != "spatial_shapes"}

    @property
    def place(self) -> str:
        """The argument that says of each sample where it is."""
        names = ("sampling_locations", "sampling_offsets", "offset", "offset_mask", "grid", "displacement")
        return next(name for name in names if name in self.arrays)

    @property
    def data(self) -> str:
        return next(name for name in DATA if name in self.arrays)

    def pixels(self, data: Any) -> Any:
        """A view of data, of its first image: (pixels, ..., channels)."""
        if self.operator in grid.CASES:
            return data[0].reshape(data.shape[1], -1).T
        return data[0].reshape(-1, data.shape[-1]) if self.data == "input" else data[0]

    def of_image(self, b: int) -> Problem:
        arrays = {name: a if name == "spatial_shapes" else a[b : b + 1] for name, a in self.arrays.items()}
        return self._replace(arrays=arrays, grad_output=self.grad_output[b : b + 1])


# Places: pixels along an axis of a map -------------------------------------------------------------------------------

Draw = Callable[..., np.ndarray]


def between_pixels(rng: np.random.Generator, lengths: Any, shape: Any) -> np.ndarray:
    """Odd sixteenths, up to two pixels outside: on a map half as large they are not whole either."""
    return rng.integers(-2, np.asarray(lengths) + 1, shape) + (2 * rng.integers(0, 8, shape) + 1) / 16


def halves(rng: np.random.Generator, lengths: Any, shape: Any) -> np.ndarray:
    """On pixels and half way, on both borders and beyond."""
    return rng.integers(-4, 2 * np.asarray(lengths) + 3, shape) / 2


# Attention ------------------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """For `ms_deform_attn` and, with its references, for `ms_deform_attn_fused`."""

    shapes: tuple[tuple[int, int], ...]
    points: tuple[int, ...]
    heads: int = 2
    channels: int = 5
    batch: int = 2
    queries: int = 3
    flat: bool = True  # one axis for the points of all levels
    method: str = "bilinear"
    references: tuple[bool, int] = (False, 2)  # one a level, and of how many numbers
    offset_scale: float = 0.5

    @property
    def levels(self) -> list[int]:
        return [level for level, count in enumerate(self.points) for _ in range(count)]

    @property
    def leading(self) -> tuple[int, ...]:
        return self.batch, self.queries, self.heads

    def shaped(self, array: np.ndarray, *last: int) -> np.ndarray:
        return array if self.flat else array.reshape(*self.leading, len(self.shapes), self.points[0], *last)


PYRAMID = ((4, 8), (2, 4), (8, 2))
ATTENTION = {
    "three_levels": Attention(PYRAMID, (2, 2, 2), 3, 8, flat=False, references=(True, 2)),
    "ragged": Attention(((4, 8), (2, 4), (1, 2)), (3, 6, 3), 2, 5, references=(False, 4)),
    "ragged_per_level": Attention(((4, 8), (2, 4), (1, 2)), (1, 4, 2), 2, 3, references=(True, 4), offset_scale=0.25),
    "one_point": Attention(((4, 4),), (1,), 8, 32, queries=2),
    "two_points": Attention(((16, 8),), (2,), 2, 16, queries=5, references=(False, 4)),
    "one_pixel": Attention(((1, 1), (1, 8), (8, 1)), (2, 1, 3), 1, 3, queries=4, references=(True, 2)),
    "many_points": Attention(((8, 4),), (37,), 1, 16, batch=1),
    "more_points_than_a_tile": Attention(((4, 2),), (260,), 2, 3, batch=1, queries=2),
    "odd_sizes": Attention(((5, 7), (3, 3)), (4, 4), 2, 19, flat=False, references=(True, 4)),
    "one_channel": Attention(((4, 2), (1, 2)), (5, 3), 3, 1, references=(False, 2)),
    "channels_40": Attention(((2, 4), (4, 2)), (1, 2), 1, 40, references=(False, 4)),
    "channels_70": Attention(((4, 4),), (3,), 2, 70, batch=1),
    "many_queries": Attention(((4, 2),), (2,), 2, 4, batch=3, queries=67),
    "discrete": Attention(PYRAMID, (2, 2, 2), 3, 8, flat=False, method="discrete", references=(True, 2)),
    "discrete_ragged": Attention(((5, 7), (4, 2), (1, 1)), (3, 6, 3), method="discrete", references=(False, 4)),
    "batch_0": Attention(PYRAMID, (1, 2, 3), batch=0),
    "no_queries": Attention(PYRAMID, (2, 2, 2), queries=0, flat=False, references=(True, 4)),
}


def _values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 129, shape) / 64


def _attention(case: Attention, rng: np.random.Generator, draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    pixels = sum(height * width for height, width in case.shapes)
    sizes = np.array([case.shapes[level][::-1] for level in case.levels])  # (width, height) of each point
    locations = (draw(rng, sizes, (*case.leading, *sizes.shape)) + 0.5) / sizes
    arrays = {
        "value": _values(rng, case.batch, pixels, case.heads, case.channels),
        "spatial_shapes": case.shapes,
        "sampling_locations": case.shaped(locations, 2),
        "attention_weights": case.shaped(_values(rng, *case.leading, len(sizes))),
    }
    return arrays, {"points": case.points if case.flat else None, "method": case.method}


def _fused(case: Attention, rng: np.random.Generator, draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """References lie on quarters; offsets lead from them to the places drawn."""
    arrays, options = _attention(case, rng, draw)
    per_level, numbers = case.references
    shape = (case.batch, case.queries, len(case.shapes) if per_level else 1)
    references = rng.integers(0, 5, (*shape, 2)) / 4
    locations = arrays["sampling_locations"].reshape(*case.leading, len(case.levels), 2)
    of_point = np.array(case.levels) if per_level else np.zeros(len(case.levels), int)
    away = locations - references[:, :, None, of_point]
    if numbers == 4:
        boxes = 2.0 ** rng.integers(-2, 1, (*shape, 2))
        counts = np.array([case.points[level] for level in case.levels])[:, None]
        offsets = away * counts / (boxes[:, :, None, of_point] * case.offset_scale)
        references = np.concatenate([references, boxes], -1)
    else:
        offsets = away * [case.shapes[level][::-1] for level in case.levels]
    fused = {
        "value": arrays["value"],
        "spatial_shapes": case.shapes,
        "reference_points": references,
        "sampling_offsets": case.shaped(offsets, 2),
        "attention_logits": arrays["attention_weights"],
    }
    return fused, options | {"offset_scale": case.offset_scale}


# Aggregation ----------------------------------------------------------------------------------------------------------


class Aggregation(NamedTuple):
    shapes: tuple[tuple[tuple[int, int], ...], ...]  # of each scale of each camera
    groups: int = 2
    channels: int = 3  # of a group
    batch: int = 2
    anchors: int = 3
    points: int = 4


AGGREGATION = {
    "two_cameras": Aggregation((((4, 8), (2, 4)), ((4, 8), (2, 4))), 2, 8),
    "cameras_differ": Aggregation((((4, 2), (2, 1)), ((8, 4), (1, 1)), ((2, 8), (1, 8))), 3, 5),
    "one_map": Aggregation((((4, 4),),), 1, 1),
    "channel_per_group": Aggregation((((4, 8), (2, 2), (1, 1)),), 8, 1),
    "groups_5": Aggregation((((2, 4), (1, 2)),), 5, 3, 1, points=2),  # on two threads in shares of 2
    "one_pixel": Aggregation((((1, 1),), ((1, 4),)), 1, 3, points=2),
    "odd_sizes": Aggregation((((5, 7), (3, 4)), ((2, 9), (1, 3))), 2, 19, points=2),
    "channels_16": Aggregation((((4, 4),), ((2, 4),)), 2, 16),
    "channels_32": Aggregation((((4, 4), (2, 2)),), 8, 32, 1, 2, 2),
    "channels_70": Aggregation((((2, 4),), ((4, 2),)), 1, 70),
    "channels_40": Aggregation((((2, 4),), ((4, 2),)), 3, 40, 1),
    "many_points": Aggregation((((4, 4), (2, 2)),), 2, 4, 1, 2, 33),
    "many_anchors": Aggregation((((4, 4),),), 2, 4, 3, 67, 1),
    "batch_0": Aggregation((((4, 8), (2, 4)), ((4, 8), (2, 4))), batch=0),
    "no_anchors": Aggregation((((4, 8), (2, 4)), ((4, 8), (2, 4))), anchors=0),
}


def _aggregation(case: Aggregation, rng: np.random.Generator, draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """Places are pixels of each camera's first scale; on the others they follow from it."""
    pixels = sum(height * width for scales in case.shapes for height, width in scales)
    sizes = np.array([scales[0][::-1] for scales in case.shapes])
    shape = (case.batch, case.anchors, case.points, len(case.shapes))
    arrays = {
        "features": _values(rng, case.batch, pixels, case.groups * case.channels),
        "spatial_shapes": case.shapes,
        "sampling_locations": (draw(rng, sizes, (*shape, 2)) + 0.5) / sizes,
        "weights": _values(rng, *shape, len(case.shapes[0]), case.groups),
    }
    return arrays, {}


# DCNv3, DCNv4 ---------------------------------------------------------------------------------------------------------


class Dcn(NamedTuple):
    in_size: tuple[int, int] = (5, 6)
    groups: int = 2
    channels: int = 4  # of a group
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    offset_scale: float = 1.0
    remove_center: bool = False
    batch: int = 2

    @property
    def options(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups", "offset_scale", "remove_center")
        return {"kernel_size": self.kernel} | {name: getattr(self, name) for name in names}

    @property
    def points(self) -> int:
        return math.prod(self.kernel) - self.remove_center

    @property
    def out_size(self) -> tuple[int, ...]:
        sizes = zip(self.in_size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        return tuple((size + sum(pad) - d * (k - 1) - 1) // s + 1 for size, pad, d, k, s in sizes)


DCN = {
    "kernel_3": Dcn(),
    "every_option": Dcn((7, 6), 3, 5, (3, 5), (2, 1), ((1, 0), (2, 1)), (2, 1), 0.5),
    "remove_center": Dcn((4, 6), 2, 3, remove_center=True),
    "remove_center_5": Dcn((4, 3), 3, 1, (5, 5), (2, 1), ((2, 2), (2, 2)), (1, 1), 2.0, True),
    "even_kernel": Dcn((6, 5), 1, 3, (4, 2), (2, 1), ((1, 1), (1, 0)), (2, 1)),
    "kernel_of_1": Dcn((4, 3), 8, 3, (1, 1), padding=((0, 0), (0, 0))),
    "kernel_5": Dcn((4, 5), 1, 16, (5, 5), (1, 2), ((2, 2), (2, 2))),
    "scale_2": Dcn((4, 5), 3, 4, offset_scale=2.0),
    "scale_07": Dcn((4, 5), 1, 19, (3, 2), padding=((1, 1), (0, 1)), offset_scale=0.7),
    "dilation_2": Dcn((5, 4), 2, 2, (2, 3), padding=((2, 2), (0, 2)), dilation=(2, 2)),
    "padding_asymmetric": Dcn((3, 5), 2, 3, (2, 3), (1, 2), ((0, 3), (4, 1))),
    "one_pixel": Dcn((1, 1), 3, 1, batch=4),
    "row_image": Dcn((1, 9), 2, 5, (1, 4), (1, 2), ((0, 0), (1, 2)), (1, 2)),
    "groups_5": Dcn((3, 4), 5, 2, (2, 2), padding=((0, 1), (0, 0)), batch=1),
    "groups_8": Dcn((3, 4), 8, 1, (2, 2), padding=((0, 0), (0, 0))),
    "channels_32": Dcn((3, 3), 2, 32, (2, 2), padding=((0, 1), (1, 0))),
    "channels_40": Dcn((3, 3), 3, 40, (1, 2), padding=((0, 0), (1, 0)), batch=1),
    "channels_70": Dcn((3, 4), 1, 70, (2, 1), padding=((1, 0), (0, 0)), batch=1),
    "many_pixels": Dcn((11, 7), 1, 4, (2, 2), padding=((0, 1), (0, 1))),
    "batch_0": Dcn(batch=0),
}


def _dcnv3(case: Dcn, rng: np.random.Generator, draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """Offsets of odd sixteenths lead to no pixel, whatever the offset_scale; those of halves may."""
    leading = (case.batch, *case.out_size)
    shape = (*leading, case.groups * case.points * 2)
    whole = rng.integers(-3, 3, shape)
    offset = whole + (rng.integers(0, 2, shape) / 2 if draw is halves else (2 * rng.integers(0, 8, shape) + 1) / 16)
    arrays = {
        "input": _values(rng, case.batch, *case.in_size, case.groups * case.channels),
        "offset": offset,
        "mask": _values(rng, *leading, case.groups * case.points),
    }
    return arrays, case.options


def _dcnv4(case: Dcn, rng: np.random.Generator, draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """What fills up a row is not 0: nothing reads it."""
    arrays, options = _dcnv3(case, rng, draw)
    packed = reference.pack(arrays["offset"], arrays["mask"], case.groups)
    packed[..., case.groups * case.points * 3 :] = 7.5
    return {"input": arrays["input"], "offset_mask": packed}, options


# Of every operator ----------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = {
    "ms_deform_attn": _attention,
    "ms_deform_attn_fused": _fused,
    "deform_aggregation": _aggregation,
    "dcnv3": _dcnv3,
    "dcnv4": _dcnv4,
    **grid.MAKERS,
}
CASES: dict[str, dict[str, Any]] = {
    "ms_deform_attn": ATTENTION,
    "ms_deform_attn_fused": ATTENTION,
    "deform_aggregation": AGGREGATION,
    "dcnv3": DCN,
    "dcnv4": DCN,
    **grid.CASES,
}
# For tests that need not look at every case. The first is ordinary.
_FEW_ATTENTION = ("three_levels", "ragged", "odd_sizes", "discrete_ragged")
_FEW_DCN = ("kernel_3", "every_option", "remove_center_5", "channels_40")
FEW = {
    "ms_deform_attn": _FEW_ATTENTION,
    "ms_deform_attn_fused": (*_FEW_ATTENTION, "ragged_per_level"),
    "deform_aggregation": ("two_cameras", "cameras_differ", "odd_sizes"),
    "dcnv3": _FEW_DCN,
    "dcnv4": _FEW_DCN,
    **grid.FEW,
}
EMPTY = ("batch_0", "no_queries", "no_anchors", "no_points", "no_points_of_a_volume")


def make(operator: str, case: Any, dtype: str = "float64", draw: Draw = between_pixels, seed: int = 0) -> Problem:
    """Of a case or its name; every batch entry different."""
    case = CASES[operator][case] if isinstance(case, str) else case
    rng = np.random.default_rng([seed, case.batch, case.channels])
    arrays, options = MAKERS[operator](case, rng, draw)
    arrays = {n: a if n == "spatial_shapes" else a.astype(dtype_of(dtype)) for n, a in arrays.items()}
    problem = Problem(operator, arrays, options, None)
    grad_output = _values(rng, *shape_of_output(problem)) / 2
    return problem._replace(grad_output=grad_output.astype(dtype_of(dtype)))


def shape_of_output(problem: Problem) -> tuple[int, ...]:
    a = problem.arrays
    if "value" in a:
        weights = a.get("attention_weights", a.get("attention_logits"))
        return *weights.shape[:2], weights.shape[2] * a["value"].shape[3]
    if "features" in a:
        return *a["weights"].shape[:2], a["features"].shape[2]
    if "grid" in a:
        return *a["input"].shape[:2], *a["grid"].shape[1:-1]
    if "displacement" in a:
        return tuple(a["input"].shape)
    return *a[problem.place].shape[:3], a["input"].shape[3]


def solve_oracle(problem: Problem) -> tuple[np.ndarray, dict[str, Any]]:
    """Output and gradients."""
    oracle = grid_reference if problem.operator in grid.CASES else reference
    forward, backward = (getattr(oracle, problem.operator + end) for end in ("", "_backward"))
    arguments = {**problem.arrays, **problem.options}
    with np.errstate(invalid="ignore", over="ignore"):
        return forward(**arguments), backward(problem.grad_output, **arguments)


@functools.cache
def expected(operator: str, name: str, dtype: str = "float64", draw: Draw = between_pixels) -> tuple[Any, Any]:
    """The oracle's output and gradients of a named case."""
    return solve_oracle(make(operator, name, dtype, draw))


def sent(backend: Any, problem: Problem) -> dict[str, Any]:
    """Arrays on a backend; sizes stay as they are."""
    return {n: a if n == "spatial_shapes" else backend.array(a) for n, a in problem.arrays.items()}


def run(backend: Any, problem: Problem, **options: Any) -> np.ndarray:
    """Forward on a backend, NumPy to NumPy."""
    forward = getattr(pydeform, problem.operator)
    return backend.numpy(forward(**sent(backend, problem), **{**problem.options, **options}))


def run_backward(backend: Any, problem: Problem, **options: Any) -> dict[str, Any]:
    backward = getattr(pydeform, f"{problem.operator}_backward")
    grads = backward(backend.array(problem.grad_output), **sent(backend, problem), **{**problem.options, **options})
    assert isinstance(grads, getattr(pydeform, "".join(map(str.capitalize, problem.operator.split("_"))) + "Grads"))
    assert grads._fields == tuple(problem.numbers)
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


def checked(
    backend: Any, problem: Problem, fixed: tuple[str, ...] = ()
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """Forward, backward and arguments for gradcheck, which makes arrays in NumPy; without those that are `fixed`."""

    def forward(**arrays: Any) -> Any:
        return run(backend, problem.replaced(**arrays))

    def backward(grad_output: Any, **arrays: Any) -> Any:
        grads = run_backward(backend, problem.replaced(**arrays)._replace(grad_output=grad_output))
        return {name: grads[name] for name in arrays}

    return forward, backward, {name: a for name, a in problem.numbers.items() if name not in fixed}
