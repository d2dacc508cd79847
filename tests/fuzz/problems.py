"""Random problems for every operator, and how much of their results a float64 oracle can tell.

Most coordinates are dyadic numbers, on which every dtype computes exactly: so results in float32 and half types can be
compared with a float64 oracle even where a sample lies on a kink. Coordinates of other kinds (any real number, one
rounding beside an integer) are for float64, or leave out the gradients that may take the kink's other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.cases import gather, grid
from tests.cases.conv import AXES, kind_of
from tests.cases.deform_conv2d import dtype_of
from tests.test_roi import Variant
from tests.test_roi import problem as roi_problem

DTYPES = ("float64", "float32", "float16", "bfloat16")
HALF_TYPES = ("float16", "bfloat16")
COORDINATES = ("positions", "boxes", "trans", *gather.PLACES)  # which may be float32 beside half types


class Problem(NamedTuple):
    operator: str
    arrays: dict[str, Any]
    grad_output: Any
    options: dict[str, Any]
    dtype: str
    kind: str  # of its coordinates
    beyond_oracle: frozenset[str] = frozenset()  # results that the oracle cannot tell; of others it tells everything
    slack: float = 0.0  # absolute, beyond the tolerance of the dtype
    needs: tuple[str, ...] | None = None  # of the backward

    @property
    def of_backward(self) -> dict[str, Any]:
        """Options of the backward."""
        return self.options | ({} if self.needs is None else {"needs": self.needs})


def draw(rng: np.random.Generator, operators: tuple[str, ...]) -> Problem:
    operator = str(rng.choice(operators))
    return MAKERS[operator](rng, operator)


def _some(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def _eighths(rng: np.random.Generator, *shape: int, most: int = 2) -> Any:
    return rng.integers(-8 * most, 8 * most + 1, shape) / 8


def _cast(rng: np.random.Generator, arrays: dict[str, Any], dtype: str) -> dict[str, Any]:
    """In `dtype`; beside half types some of the coordinates, each on its own, in float32."""

    def of(name: str) -> np.dtype[Any]:
        wide = dtype in HALF_TYPES and name in COORDINATES and rng.random() < 0.3
        return dtype_of("float32" if wide else dtype)

    with np.errstate(over="ignore"):
        return {name: None if a is None else a.astype(of(name)) for name, a in arrays.items()}


def _far(rng: np.random.Generator, count: int, dtype: str) -> Any:
    """Numbers that no image reaches, and others that arithmetic may stumble over. All exact in `dtype`."""
    largest = {"float64": 1000, "float32": 126, "float16": 15, "bfloat16": 126}[dtype]
    smallest = {"float64": -1070, "float32": -140, "float16": -24, "bfloat16": -130}[dtype]
    powers = 2.0 ** rng.integers(5, largest + 1, count)
    tiny = 2.0 ** rng.integers(smallest, max(smallest + 10, -100) if dtype != "float16" else -20, count)
    special = rng.choice([0.0, np.nan, np.inf, float(np.finfo(np.float16).max)], count)
    kind = rng.integers(0, 4, count)
    found = np.choose(kind, [powers, tiny if dtype != "float16" else powers, special, powers])
    return found * rng.choice([-1.0, 1.0], count)


def _place(rng: np.random.Generator, array: Any, values: Callable[[int], Any]) -> None:
    """Some of the elements become `values(how many)`."""
    if array.size:
        count = int(rng.integers(1, max(2, array.size // 4)))
        array.flat[rng.integers(0, array.size, count)] = values(count)


def _poison(rng: np.random.Generator, arrays: dict[str, Any]) -> str:
    """One element of one array becomes NaN or infinite."""
    names = [name for name, a in arrays.items() if a is not None and a.size and name not in ("boxes",)]
    if not names:
        return ""
    name = _some(rng, *names)
    arrays[name].flat[rng.integers(arrays[name].size)] = _some(rng, np.nan, np.inf, -np.inf)
    return name


# Convolution ---------------------------------------------------------------------------------------------------------


def _conv_sizes(rng: np.random.Generator, operator: str) -> dict[str, Any]:
    """Of at most some thousand products, which is what a loop in Python takes in some milliseconds."""
    axes = AXES[operator]

    def one_each(low: int, high: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(low, high, axes)))

    while True:
        groups, offset_groups = _some(rng, 1, 1, 2, 3), _some(rng, 1, 1, 2, 3)
        per_group = _some(rng, 1, 2, 3, 5, 17)
        in_channels = groups * per_group
        if _some(rng, True, False):
            in_channels = math.lcm(in_channels, offset_groups)
        else:
            offset_groups = _some(rng, *[n for n in range(1, in_channels + 1) if in_channels % n == 0])
        kernel, size = one_each(1, 4), one_each(1, 9 if axes < 3 else 6)
        stride, dilation = one_each(1, 4), one_each(1, 4)
        if kind_of(operator) == "active":
            dilation = (1,) * axes
        padding: Any = tuple(zip(one_each(0, 3), one_each(0, 3), strict=True))
        out = [
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
        ]
        batch = _some(rng, 0, 1, 1, 2, 3)
        if min(out) >= 1 and batch * in_channels * math.prod(kernel) * math.prod(out) <= 1500:
            break
    return {
        "batch": batch,
        "in_channels": in_channels,
        "out_channels": groups * _some(rng, 1, 2, 3, 9),
        "groups": groups,
        "offset_groups": offset_groups,
        "kernel": kernel,
        "size": size,
        "out": tuple(out),
        "options": {"stride": stride, "padding": padding, "dilation": dilation},
    }


def _convolution(rng: np.random.Generator, operator: str) -> Problem:
    s = _conv_sizes(rng, operator)
    dtype = _some(rng, *DTYPES)
    options = dict(s["options"])
    arrays: dict[str, Any] = {
        "input": _eighths(rng, s["batch"], s["in_channels"], *s["size"]),
        "weight": _eighths(rng, s["out_channels"], s["in_channels"] // s["groups"], *s["kernel"]),
        "bias": _some(rng, None, _eighths(rng, s["out_channels"])),
    }
    kind, beyond, slack = "plain", frozenset[str](), 0.0
    of = kind_of(operator)
    if of == "conv":
        options["groups"] = s["groups"]
    else:
        axes, taps = AXES[operator], s["offset_groups"] * math.prod(s["kernel"])
        kind = _some(rng, "exact", "exact", "far", "ulp", "real")
        if kind == "real" or (kind == "ulp" and dtype in HALF_TYPES):
            dtype = "float64"
        if of == "active":
            del options["dilation"]
            arrays["positions"] = _offsets(rng, kind, dtype, (axes * taps,))
        else:
            arrays["offset"] = _offsets(rng, kind, dtype, (s["batch"], axes * taps, *s["out"]))
            arrays["mask"] = _some(rng, None, _eighths(rng, s["batch"], taps, *s["out"]))
            options["boundary"] = _some(rng, "torchvision", "dcnv2", "dcnv1")
        if kind == "ulp" and dtype == "float32":
            # Beside an integer float32 may round a sample onto it: nearly the same value, but another slope; with
            # dcnv1's jump at the border another value as well.
            beyond, slack = frozenset({"offset", "positions"}), 1e-3
            if options.get("boundary") == "dcnv1":
                options["boundary"] = "torchvision"
    grad_output = _eighths(rng, s["batch"], s["out_channels"], *s["out"])
    arrays, grad_output = _cast(rng, arrays, dtype), grad_output.astype(dtype_of(dtype))
    return Problem(operator, arrays, grad_output, options, dtype, kind, beyond, slack)


def _offsets(rng: np.random.Generator, kind: str, dtype: str, shape: tuple[int, ...]) -> Any:
    if kind == "real":
        return rng.uniform(-4, 4, shape)
    whole = rng.integers(-4, 5, shape).astype(float)
    if kind == "ulp":
        steps, toward = rng.integers(0, 3, shape), rng.choice([-np.inf, np.inf], shape)
        offset = whole.astype(dtype)
        for step in range(2):
            offset = np.where(steps > step, np.nextafter(offset, toward.astype(dtype)), offset)
        return offset
    offset = whole + rng.integers(0, 8, shape) / 8 * rng.integers(0, 2, shape)
    if kind == "far":
        _place(rng, offset, lambda count: _far(rng, count, dtype))
    return offset


# RoI operators -------------------------------------------------------------------------------------------------------

POINTS = (
    "roi_align",
    "ps_roi_align",
    "deform_roi_pool",
    "roi_align_rotated",
)  # whose boxes may say how many points they read


def _variant(rng: np.random.Generator, operator: str, exact: bool) -> Variant:
    few = (1, 2, 4) if exact else (1, 2, 3, 5)
    options: dict[str, Any] = {"spatial_scale": _some(rng, 0.25, 0.5, 1.0, 2.0) if exact else rng.uniform(0.1, 2)}
    classes, channels = 1, _some(rng, 1, 2, 5, 9)
    if operator == "deform_psroi_pool":
        classes = _some(rng, 1, 1, 2, 3)
        channels = classes * _some(rng, 1, 2, 5)
        options |= {"output_dim": channels, "pooled_size": _some(rng, *few), "group_size": _some(rng, 1, 2, 3)}
        options |= {"sample_per_part": _some(rng, *few), "trans_std": _some(rng, 0.0, 0.125, 1.0)}
        options["part_size"] = _some(rng, None, 1, 3)
    else:
        options["output_size"] = _some(rng, *few), _some(rng, *few)
    if operator in POINTS:
        options["sampling_ratio"] = _some(rng, *few) if exact else _some(rng, 0, 0, 1, 3)
    if operator == "roi_align":
        options |= {"aligned": _some(rng, True, False), "mode": _some(rng, "avg", "avg", "max")}
    if operator == "roi_align_rotated":
        options |= {"aligned": _some(rng, True, False), "clockwise": _some(rng, True, False)}
    if operator == "ps_roi_pool":
        options["convention"] = _some(rng, "torchvision", "rfcn")
    if operator == "deform_roi_pool":
        options["gamma"] = _some(rng, 0.0, 0.125, 1.0)
    needs_boxes = operator == "roi_align" and _some(rng, True, False)
    return Variant(operator, options, channels, classes, _some(rng, True, False), _some(rng, True, False), needs_boxes)


def _roi(rng: np.random.Generator, operator: str) -> Problem:
    kind = _some(rng, "exact", "exact", "far", "real", "hostile")
    dtype = "float64" if kind in ("far", "real") else _some(rng, *DTYPES)
    variant = _variant(rng, operator, exact=kind in ("exact", "far"))
    most = 64 if kind == "hostile" else 9  # an oracle takes its time
    size = int(rng.integers(1, most + 1)), int(rng.integers(1, most + 1))
    batch, count = _some(rng, 1, 1, 2, 3), _some(rng, 0, 1, 2, 4)
    corners = rng.integers(-4 * 8, 8 * 13, (count, 4)) / 8
    if kind == "real":
        corners = rng.uniform(-4, 12, (count, 4))
    if kind == "exact" and operator == "deform_psroi_pool" and dtype != "float64":
        # Upside down a box is 0.1 long, which no dtype has exactly: its points may lie on either side of a pixel.
        corners = np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    arrays, grad_output = roi_problem(variant, "float64", corners, batch, size, int(rng.integers(1 << 30)))
    turned = operator == "roi_align_rotated"
    if turned:
        arrays["boxes"][:, 5] = rng.uniform(-7, 7, count) if kind == "real" else rng.integers(-32, 33, count) / 8
    if kind == "far":  # powers of two, so that boxes stay exact
        _place(rng, arrays["boxes"][:, 1:], lambda n: _signed(rng, 2.0 ** rng.integers(3, 40, n)))
    if kind == "hostile":
        arrays["boxes"][:, 1:5] = _hostile_boxes(rng, arrays["boxes"][:, 1:5], dtype)
        _place(rng, arrays["boxes"][:, 5:], lambda n: _hostile(rng, n, dtype))
        if arrays.get(variant.offset_name) is not None:
            _place(rng, arrays[variant.offset_name], lambda n: _hostile(rng, n, dtype))
    arrays = _cast(rng, arrays, dtype)
    # Where a point of a box lies that is both far and turned is a matter of rounding.
    unknown = kind == "hostile" or (kind == "far" and turned)
    beyond = frozenset({"output", *arrays}) if unknown else frozenset[str]()
    slack = 1e-4 if turned and dtype != "float64" else 0.0  # sines in float32, times the slopes of the image
    needs = variant.of_backward.get("needs")
    grad_output = grad_output.astype(dtype_of(dtype))
    return Problem(operator, arrays, grad_output, variant.options, dtype, kind, beyond, slack, needs)


def _signed(rng: np.random.Generator, values: Any) -> Any:
    return values * rng.choice([-1.0, 1.0], len(values))


def _hostile_boxes(rng: np.random.Generator, corners: Any, dtype: str) -> Any:
    """Single corners, or whole boxes around the image: those have points inside, far from one another."""
    far = _hostile(rng, corners.size, dtype).reshape(corners.shape)
    around = np.sort(far.reshape(-1, 2, 2), axis=1).reshape(corners.shape)  # x1 <= x2 and y1 <= y2, NaN last
    both_sides = np.where(np.arange(4) < 2, -1, 1) * abs(around)
    way = rng.integers(0, 3, (len(corners), 1))
    single = np.where(rng.random(corners.shape) < 0.4, far, corners)
    return np.where(way == 0, single, np.where(way == 1, around, both_sides))


def _hostile(rng: np.random.Generator, count: int, dtype: str) -> Any:
    """Of every magnitude that the dtype has, its largest included, NaN and infinite."""
    import ml_dtypes

    limits = ml_dtypes.finfo(dtype_of(dtype))
    least, most = np.log2(float(limits.tiny)), np.log2(float(limits.max))
    # More often from where numbers lie a pixel apart to where an index no longer holds them.
    exponents = np.where(rng.random(count) < 0.5, rng.uniform(least, most, count), rng.uniform(3, min(most, 64), count))
    special = rng.choice([np.nan, np.inf, float(limits.max), 0.0, 2.0**23, 2.0**24 + 1, 2.0**31, 2.0**53], count)
    return _signed(rng, np.where(rng.random(count) < 0.5, 2.0**exponents, special))


# Operators that gather -----------------------------------------------------------------------------------------------


def _gather_case(rng: np.random.Generator, operator: str, exact: bool) -> Any:
    """Of at most some hundred samples. `exact`: places on pixels are exact in each dtype."""
    few, channels = (1, 2, 3), _some(rng, 1, 2, 3, 9, 17)

    def size() -> tuple[int, int]:
        lengths = (1, 2, 4, 8) if exact else (1, 2, 3, 5, 7, 9)
        return _some(rng, *lengths), _some(rng, *lengths)

    if operator == "deform_aggregation":
        cameras, scales = _some(rng, *few), _some(rng, 1, 2)
        shapes = tuple(tuple(size() for _ in range(scales)) for _ in range(cameras))
        sizes = [_some(rng, *few) for _ in range(3)]
        return gather.Aggregation(shapes, sizes[0], channels, _some(rng, 0, 1, 2), *sizes[1:])
    if operator.startswith("dcnv"):
        kernel, dilation = (_some(rng, *few), _some(rng, *few)), (_some(rng, 1, 2), _some(rng, 1, 2))
        pads = tuple((int(a), int(b)) for a, b in rng.integers(0, 3, (2, 2)))
        least = [max(1, d * (k - 1) + 1 - sum(pad)) for d, k, pad in zip(dilation, kernel, pads, strict=True)]
        return gather.Dcn(
            (least[0] + int(rng.integers(0, 3)), least[1] + int(rng.integers(0, 3))),
            *(_some(rng, *few), channels, kernel, (_some(rng, 1, 2), _some(rng, 1, 2)), pads, dilation),
            offset_scale=_some(rng, 1.0, 1.0, 0.5, 2.0) if exact else float(rng.uniform(-2, 2)),
            remove_center=kernel == (3, 3) and _some(rng, True, False),
            batch=_some(rng, 0, 1, 2),
        )
    if operator in grid.CASES:
        return _grid_case(rng, operator, channels, exact)
    counts, levels = (1, 2, 4) if exact else (1, 2, 3, 6), _some(rng, *few)
    flat = _some(rng, True, False)
    points = tuple(_some(rng, *counts) for _ in range(levels))
    return gather.Attention(
        tuple(size() for _ in range(levels)),
        points if flat else points[:1] * levels,
        *(_some(rng, *few), channels, _some(rng, 0, 1, 2), _some(rng, 0, 1, 2, 4), flat),
        method=_some(rng, "bilinear", "bilinear", "discrete"),
        references=(_some(rng, True, False), _some(rng, 2, 4)),
        offset_scale=_some(rng, 0.5, 0.5, 0.25),
    )


def _grid_case(rng: np.random.Generator, operator: str, channels: int, exact: bool) -> Any:
    """`exact` as above: lengths are powers of two, with align_corners one more, or one."""
    axes = _some(rng, 2, 2, 3)
    options = _some(rng, *grid.every_mode(axes))
    more = operator == "grid_sample" and options["align_corners"]
    lengths = ((1, *(n + more for n in (1, 2, 4))) if axes == 3 else (1, *(n + more for n in (2, 4, 8))), range(1, 8))
    size = tuple(int(_some(rng, *lengths[not exact])) for _ in range(axes))
    batch = _some(rng, 0, 1, 1, 2)
    if operator == "warp":
        return grid.Warp(size, channels, options["mode"], options["padding_mode"], batch)
    out = tuple(int(_some(rng, 0, 1, 2, 3, 4, 5)) if axes == 2 else int(_some(rng, 1, 2, 3)) for _ in range(axes))
    return grid.Grid(size, out, channels, **options, batch=batch)


def _affine(rng: np.random.Generator, operator: str) -> Problem:
    """A product of two small matrices: there are no kinks."""
    dtype, axes, batch = _some(rng, *DTYPES), _some(rng, 2, 3), _some(rng, 0, 1, 1, 2, 3)
    size = batch, _some(rng, 0, 1, 5), *(_some(rng, 1, 2, 3, 5, 8) for _ in range(axes))
    theta, grad_output = _eighths(rng, batch, axes, axes + 1), _eighths(rng, batch, *size[2:], axes)
    options = {"size": size, "align_corners": _some(rng, True, False)}
    arrays = {"theta": theta.astype(dtype_of(dtype))}
    return Problem(operator, arrays, grad_output.astype(dtype_of(dtype)), options, dtype, "plain")


def _gather(rng: np.random.Generator, operator: str) -> Problem:
    kind = _some(rng, "exact", "exact", "far", "ulp", "real")
    dtype = "float64" if kind in ("ulp", "real") else _some(rng, *DTYPES)
    case = _gather_case(rng, operator, exact=kind != "real")
    draw = gather.halves if kind != "real" else gather.between_pixels
    made = gather.make(operator, case, "float64", draw, int(rng.integers(1 << 30)))
    arrays, options = dict(made.numbers), dict(made.options)
    if "spatial_shapes" in made.arrays:
        options["spatial_shapes"] = made.arrays["spatial_shapes"]
    arrays = _cast(rng, arrays, dtype)
    place = made.place
    if operator == "dcnv4":
        _move_packed(rng, arrays["offset_mask"], case, kind, dtype)
    else:
        _move(rng, arrays[place], kind, arrays[place].dtype.name)
    return Problem(operator, arrays, made.grad_output.astype(dtype_of(dtype)), options, dtype, kind)


def _move(rng: np.random.Generator, places: Any, kind: str, dtype: str) -> None:
    """In place: anywhere, one rounding away, or some of them far."""
    if kind == "real":
        places += rng.uniform(-0.3, 0.3, places.shape)
    elif kind == "ulp":
        places[...] = np.nextafter(places, rng.choice([-np.inf, np.inf], places.shape))
    elif kind == "far":
        _place(rng, places, lambda count: _far(rng, count, dtype))


def _move_packed(rng: np.random.Generator, packed: Any, case: Any, kind: str, dtype: str) -> None:
    """The offsets of each group alone."""
    for group in range(case.groups):
        first = group * case.points * 3
        _move(rng, packed[..., first : first + 2 * case.points], kind, dtype)


MAKERS: dict[str, Callable[[np.random.Generator, str], Problem]] = {
    **dict.fromkeys(AXES, _convolution),
    "roi_pool": _roi,
    "roi_align": _roi,
    "ps_roi_pool": _roi,
    "ps_roi_align": _roi,
    "deform_roi_pool": _roi,
    "deform_psroi_pool": _roi,
    "roi_align_rotated": _roi,
    "prroi_pool": _roi,
    **dict.fromkeys((*gather.OPERATORS, *grid.CASES), _gather),
    "affine_grid": _affine,
}
ON_CUDA = tuple(name for name in MAKERS if name not in (*gather.OPERATORS, "affine_grid"))
