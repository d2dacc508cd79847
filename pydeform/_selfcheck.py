"""`pydeform check` and `pydeform warmup`: every operator on small problems, and what its results must equal."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import pydeform
from pydeform.testing import gradcheck

CHANNELS = (2, 20)  # of a group: few and many go different ways
VECTORS = Path(__file__).parent / "data" / "vectors.npz"
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Relative to the largest value, against float64 on the same numbers: rounding of sums, then of half types' results.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


class Problem(NamedTuple):
    """One operator's arguments: float64 arrays, exact in every dtype that we have, and options."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    grad_output: Any


class Backend(NamedTuple):
    name: str
    send: Callable[[Any], Any]
    fetch: Callable[[Any], Any]


CPU = Backend("cpu", lambda a: a, lambda a: a)


class Result(NamedTuple):
    operator: str
    backend: str
    dtype: str
    evidence: str  # what was compared
    failure: str  # first line of the first failure; empty: none


def operators() -> list[str]:
    """The public functions that have a backward."""
    return [name for name in pydeform.__all__ if f"{name}_backward" in pydeform.__all__]


def backends() -> list[Backend]:
    """The CPU, and the GPU where CuPy finds one."""
    found = [CPU]
    if importlib.util.find_spec("cupy") is not None:
        cupy = importlib.import_module("cupy")
        if cupy.is_available():
            found.append(Backend("cuda", cupy.asarray, cupy.asnumpy))
    return found


# For which no other system has vectors: deformable convolutions with such an offset.
SPECIAL = dict.fromkeys(("conv1d", "conv2d", "conv3d"), "zero offset") | {"active_conv2d": "one offset for all"}


def problem(operator: str, channels: int = 2) -> Problem:
    """Small, with no two sizes alike, and no sampling point within 1/8 of a kink. `channels` of each of two groups."""
    if "roi" in operator:
        return _roi_problem(operator, channels)
    if operator in GATHER:
        return _gather_problem(operator, channels)
    if operator in GRID:
        return _grid_problem(operator, channels)
    rng = np.random.default_rng(7)

    def eighths(*shape: int) -> Any:
        return rng.integers(-8, 9, shape) / 8

    def between_pixels(*shape: int) -> Any:
        return rng.integers(-2, 3, shape) + rng.integers(1, 8, shape) / 8

    axes = _axes(operator)
    kernel, size = (2, 3, 2)[-axes:], (2, 3, 8)[-axes:]
    taps = math.prod(kernel)
    arrays = {"input": eighths(2, 2 * channels, *(3, 5, 6)[-axes:])}
    arrays |= {"weight": eighths(6, channels, *kernel), "bias": eighths(6)}
    options: dict[str, Any] = {"stride": (1, 2, 1)[-axes:], "padding": (0, 1, 2)[-axes:], "dilation": (1, 1, 2)[-axes:]}
    if operator.startswith("conv"):
        options["groups"] = 2
    elif operator.startswith("deform_conv"):
        arrays["offset"] = between_pixels(2, 2 * axes * taps, *size)
        arrays["mask"] = rng.integers(0, 9, (2, 2 * taps, *size)) / 8
    elif operator == "active_conv2d":
        arrays["positions"], size = between_pixels(2 * axes * taps), (3, 9)
        del options["dilation"]
    else:
        raise NotImplementedError(f"check: no problem for {operator}")
    return Problem(arrays, options, eighths(2, 6, *size))


def _axes(operator: str) -> int:
    """Of a convolution."""
    return int(operator[-2])


def problems(operator: str) -> Iterator[Problem]:
    """Those that together go every way: few and many channels of a group, or one, and few samples of a large image."""
    for channels in CHANNELS:
        yield problem(operator, channels)
    if operator in ("ms_deform_attn", "ms_deform_attn_fused"):
        p = problem(operator)
        yield p._replace(options={**p.options, "method": "discrete"})
    elif operator == "grid_sample":
        p = problem(operator)
        for options in ({"mode": "nearest"}, {"mode": "bicubic", "padding_mode": "border"}):
            yield p._replace(options={**p.options, **options})
        yield _of_volumes(p)
    elif operator in CONV:
        yield from (
            depthwise := _depthwise(problem(operator)),
            _few_samples(problem(operator), _axes(operator)),
            _few_samples(depthwise, _axes(operator)),
        )


def _depthwise(p: Problem) -> Problem:
    """A convolution's problem with one input and one output channel in each group."""
    channels = p.arrays["input"].shape[1]
    arrays = {**p.arrays, "weight": p.arrays["weight"][:channels, :1], "bias": p.arrays["bias"][:channels]}
    options = {name: channels if name == "groups" else value for name, value in p.options.items()}
    return Problem(arrays, options, p.grad_output[:, :channels])


def _few_samples(p: Problem, axes: int) -> Problem:
    """A convolution's problem with a larger image, of which only the first output is left."""
    first = (..., *[slice(1)] * axes)
    arrays = {name: array[first] if name in ("offset", "mask") else array for name, array in p.arrays.items()}
    arrays["input"] = np.tile(arrays["input"], (1, 1, *[5 if axes > 1 else 10] * axes))
    return Problem(arrays, {**p.options, "stride": 100}, p.grad_output[first])


CONV = (*SPECIAL, "deform_conv1d", "deform_conv2d", "deform_conv3d")
GRID = ("grid_sample", "warp", "affine_grid")


def _grid_problem(operator: str, channels: int) -> Problem:
    """Images of 4 x 8 pixels. Points lie between pixels, some of them outside."""
    rng = np.random.default_rng(10)

    def eighths(*shape: int) -> Any:
        return rng.integers(-8, 9, shape) / 8

    if operator == "affine_grid":
        return Problem({"theta": eighths(2, 2, 3)}, {"size": (2, channels, 4, 8)}, eighths(2, 4, 8, 2))
    input = eighths(2, channels, 4, 8)
    if operator == "warp":
        displacement = rng.integers(-3, 4, (2, 2, 4, 8)) + rng.integers(1, 8, (2, 2, 4, 8)) / 8
        return Problem({"input": input, "displacement": displacement}, {}, eighths(2, channels, 4, 8))
    grid = _between_pixels(rng, (2, 5, 3), (8, 4))
    return Problem({"input": input, "grid": grid}, {"padding_mode": "reflection"}, eighths(2, channels, 5, 3))


def _between_pixels(rng: Any, shape: tuple[int, ...], size: tuple[int, ...]) -> Any:
    """Numbers from -1 to 1, and somewhat beyond, for pixels i + 1/4 or i + 3/4 of axes of so many."""
    halves = 2 * rng.integers(-1, 2 * np.array(size) + 1, (*shape, len(size))) + 1
    return halves / (2 * np.array(size)) - 1


def _of_volumes(p: Problem) -> Problem:
    """`grid_sample`'s problem with one axis more."""
    rng, input = np.random.default_rng(11), p.arrays["input"]
    arrays = {"input": np.stack([input, input[..., ::-1]], 2), "grid": _between_pixels(rng, (2, 2, 2, 3), (8, 4, 2))}
    return Problem(arrays, p.options, rng.integers(-8, 9, (*input.shape[:2], 2, 2, 3)) / 8)


GATHER = ("ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation", "dcnv3", "dcnv4")


def _gather_problem(operator: str, channels: int) -> Problem:
    """`channels` of each of two groups. Two maps of 4 and 8 pixels an axis, or two cameras with such scales."""
    rng = np.random.default_rng(9)

    def eighths(*shape: int) -> Any:
        return rng.integers(-8, 9, shape) / 8

    def locations(*shape: int) -> Any:  # between the pixels of both maps, some of them outside
        return (2 * rng.integers(-1, 17, (*shape, 2)) + 1) / 32

    if operator.startswith("dcn"):
        offset = rng.integers(-2, 3, (2, 3, 3, 24)) + rng.integers(1, 8, (2, 3, 3, 24)) / 8
        mask = rng.integers(0, 9, (2, 3, 3, 12)) / 8
        arrays = {"input": eighths(2, 5, 6, 2 * channels), "offset": offset, "mask": mask}
        if operator == "dcnv4":
            groups = [part for k in range(2) for part in (offset[..., 12 * k :][..., :12], mask[..., 6 * k :][..., :6])]
            arrays = {"input": arrays["input"], "offset_mask": np.concatenate([*groups, np.zeros((2, 3, 3, 4))], -1)}
        options: dict[str, Any] = {"kernel_size": (2, 3), "stride": (2, 2), "groups": 2, "padding": ((1, 0), 1)}
        return Problem(arrays, options, eighths(2, 3, 3, 2 * channels))
    levels = ((4, 8), (8, 4))
    if operator == "deform_aggregation":
        features = {"features": eighths(2, 128, 2 * channels), "sampling_locations": locations(2, 5, 3, 2)}
        weights = eighths(2, 5, 3, 2, 2, 2)
        return Problem({**features, "weights": weights}, {"spatial_shapes": (levels,) * 2}, eighths(2, 5, 2 * channels))
    options = {"spatial_shapes": levels, "points": (3, 2)}
    weights = eighths(2, 6, 2, 5)
    if operator == "ms_deform_attn":
        more = {"sampling_locations": locations(2, 6, 2, 5), "attention_weights": weights}
    else:
        offsets = rng.integers(-2, 2, (2, 6, 2, 5, 2)) + 0.5
        points = (2 * rng.integers(0, 8, (2, 6, 1, 2)) + 1) / 16
        more = {"reference_points": points, "sampling_offsets": offsets, "attention_logits": weights}
    return Problem({"value": eighths(2, 64, 2, channels), **more}, options, eighths(2, 6, 2 * channels))


WITH_BOXES = ("prroi_pool", "roi_align")  # have a gradient of their boxes
# Four boxes of 2 x 4 pixels of the input, inside and across its borders, times two for a spatial_scale of 1/2. Those of
# deform_psroi_pool are rounded, and end one pixel later; points of those that are turned keep away from the last that
# count.
BOXES = [[0, 1.5, 1.5, 9.5, 5.5], [1, -0.5, 3.5, 7.5, 7.5], [1, 5.5, -0.5, 13.5, 3.5], [0, 3.5, 5.5, 11.5, 9.5]]
TURNED_BOXES = [[0, 5.5, 3.5, 8, 4, 0.5], [1, 3.5, 5.5, 8, 4, -1.25], [1, 9.5, 1.5, 8, 4, 2], [0, 7.5, 7.5, 8, 4, -1]]
ROUNDED_BOXES = [[0, 1.25, 0.75, 8.25, 3.75], [1, -0.75, 3.25, 6.25, 6.25], [1, 5, -1, 12, 2], [0, 3, 5.25, 9.75, 7.75]]


def _roi_problem(operator: str, channels: int) -> Problem:
    """`channels` of the output, or of each of two classes. Points lie 1/4 from pixels and, where those are a border,
    from half way between them. No two pixels of a channel are equal, so that a maximum has no kink."""
    rng = np.random.default_rng(8)
    boxes = np.array({"deform_psroi_pool": ROUNDED_BOXES, "roi_align_rotated": TURNED_BOXES}.get(operator, BOXES))
    count, pooled, out_channels, in_channels = len(boxes), (1, 2), channels, channels
    options: dict[str, Any] = {"spatial_scale": 0.5}
    optional: dict[str, Any] = {}
    if operator == "deform_psroi_pool":
        pooled, out_channels, in_channels = (2, 2), 2 * channels, 8 * channels
        options |= {"output_dim": out_channels, "pooled_size": 2, "group_size": 2, "part_size": 3}
        options |= {"sample_per_part": 2, "trans_std": 0.125}
        # The width is twice the height: half the offset moves as far, an odd number of quarters of a pixel.
        optional["trans"] = (2 * rng.integers(-2, 2, (count, 4, 3, 3)) + 1) / np.array([2, 1, 2, 1]).reshape(4, 1, 1)
    elif operator == "deform_roi_pool":
        options |= {"output_size": pooled, "sampling_ratio": 2, "gamma": 0.25}
        optional["offset"] = rng.integers(-2, 3, (count, 2, *pooled)).astype(float)
    elif operator in ("roi_pool", "roi_align", "roi_align_rotated", "prroi_pool", "ps_roi_pool", "ps_roi_align"):
        options |= {"output_size": pooled} | ({"sampling_ratio": 2} if "align" in operator else {})
        in_channels *= pooled[0] * pooled[1] if operator.startswith("ps_") else 1
    else:
        raise NotImplementedError(f"check: no problem for {operator}")
    if optional:
        optional["mask"] = rng.integers(1, 9, (count, 1, *pooled)) / 8
    pixels = np.stack([rng.permutation(30) for _ in range(2 * in_channels)]).reshape(2, in_channels, 5, 6)
    grad_output = rng.integers(-8, 9, (count, out_channels, *pooled)) / 8
    return Problem({"input": (pixels - 15) / 8, "boxes": boxes, **optional}, options, grad_output)


def run(operator: str, p: Problem, backend: Backend, dtype: Any) -> dict[str, Any]:
    """Output and gradients as float64 NumPy arrays, by name."""
    forward, backward = (getattr(pydeform, name) for name in (operator, f"{operator}_backward"))
    sent = {name: backend.send(array.astype(dtype)) for name, array in p.arrays.items()}
    output = forward(**sent, **p.options)
    results = {"output": output}
    if p.grad_output is not None:
        grads = backward(backend.send(p.grad_output.astype(dtype)), **sent, **p.options)._asdict()
        results |= {f"gradient of {name}": grad for name, grad in grads.items() if grad is not None}
    if output.dtype != dtype:
        raise AssertionError(f"output has dtype {output.dtype}, expected {np.dtype(dtype)}")
    return {name: backend.fetch(array).astype(np.float64) for name, array in results.items()}


def vectors(operator: str) -> Iterator[tuple[str, Problem, dict[str, Any], dict[str, Any]]]:
    """(name, problem, expected results, meta) of each bundled vector; tests/vectors/bundle.py describes the file."""
    with np.load(VECTORS) as file:
        arrays = dict(file)
    for name, place in json.loads(str(arrays.pop("same"))).items():
        arrays[name] = arrays[place]
    for name in sorted({key.rpartition("/")[0] for key in arrays if key.startswith(f"{operator}/")}):
        entries = {key.removeprefix(f"{name}/"): a for key, a in arrays.items() if key.startswith(f"{name}/")}
        options, meta = json.loads(str(entries["options"])), json.loads(str(entries["meta"]))
        grads = {f"gradient of {n}": grad for n, grad in _named(entries, "gin__").items()}
        problem = Problem(_named(entries, "in__"), options, entries.get("gout__output"))
        yield name, problem, {"output": entries["out__output"], **grads}, meta


def _named(entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): array for key, array in entries.items() if key.startswith(prefix)}


def _compare(where: str, got: dict[str, Any], expected: dict[str, Any], rtol: float, atol: float) -> None:
    for name, want in expected.items():
        if not np.allclose(got[name], want, rtol=rtol, atol=atol, equal_nan=True):
            raise AssertionError(f"{where}: {name} differs by {np.abs(got[name] - want).max():.2g}")


def _check_vectors(operator: str, backend: Backend) -> int:
    count = 0
    for name, p, expected, meta in vectors(operator):
        _compare(name, run(operator, p, backend, np.float64), expected, meta["rtol"], meta["atol"])
        count += 1
    return count


def _check_special_case(operator: str, backend: Backend) -> None:
    """It equals the deformable convolution, which the vectors vouch for, whose offsets are 0, or all alike."""
    p, axes = problem(operator), _axes(operator)
    positions = p.arrays.get("positions", np.zeros(axes * math.prod(p.arrays["weight"].shape[2:])))
    batch, _, *size = p.grad_output.shape
    offset = np.broadcast_to(positions.reshape(1, -1, *[1] * axes), (batch, positions.size, *size))
    arrays = {name: array for name, array in p.arrays.items() if name != "positions"}
    options = {name: value for name, value in p.options.items() if name != "groups"}
    expected = run(
        f"deform_conv{axes}d", Problem({**arrays, "offset": offset}, options, p.grad_output), backend, np.float64
    )
    of_offset = expected.pop("gradient of offset")
    if "positions" in p.arrays:
        expected["gradient of positions"] = of_offset.sum(axis=(0, *range(2, 2 + axes)))
    _compare(SPECIAL[operator], run(operator, p, backend, np.float64), expected, 1e-12, 1e-12)


def _check_gradients(operator: str, backend: Backend) -> None:
    p = problem(operator)
    forward, backward = (getattr(pydeform, name) for name in (operator, f"{operator}_backward"))
    wrt = [name for name in p.arrays if name != "boxes"]
    more = {}
    if operator in WITH_BOXES:
        more["corners"] = p.arrays["boxes"][:, 1:]  # an argument of its own, since a batch index has no neighbours
        wrt.append("corners")

    def send(arguments: dict[str, Any]) -> dict[str, Any]:
        if "corners" in arguments:
            corners = arguments.pop("corners")
            arguments["boxes"] = np.concatenate([arguments["boxes"][:, :1], corners], axis=1)
        return {n: backend.send(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}

    def grads(grad_output: Any, **arguments: Any) -> dict[str, Any]:
        needs = [name for name in p.arrays if name in wrt or (name == "boxes" and more)]
        found = backward(backend.send(grad_output), **send(arguments), needs=needs)._asdict()
        found = {name: None if grad is None else backend.fetch(grad) for name, grad in found.items()}
        return {**found, "corners": found["boxes"][:, 1:].copy()} if more else found

    gradcheck(
        lambda **arguments: backend.fetch(forward(**send(arguments))), grads, {**p.arrays, **p.options, **more}, wrt=wrt
    )


def _check_numbers(operator: str, backend: Backend, dtype: str) -> None:
    """Against float64 on the CPU, which the vectors and finite differences vouch for."""
    for p in problems(operator):
        got, want = run(operator, p, backend, DTYPES[dtype]), run(operator, p, CPU, np.float64)
        for name, expected in want.items():
            first = next(iter(p.arrays))
            where = f"{dtype}, {first} {p.arrays[first].shape}"
            _compare(where, got, {name: expected}, 0, TOLERANCE[dtype] * abs(expected).max())


def check(operator: str, backend: Backend, dtype: str) -> Result:
    """float64 must equal what other systems computed and finite differences; the other dtypes must equal float64."""
    evidence, failure = "float64", ""
    try:
        if dtype == "float64":
            evidence = "finite differences"
            count = _check_vectors(operator, backend)
            if count:
                evidence = f"{count} vectors, {evidence}"
            if operator in SPECIAL:
                evidence = f"{SPECIAL[operator]}, {evidence}"
                _check_special_case(operator, backend)
            _check_gradients(operator, backend)
        if (backend, dtype) != (CPU, "float64"):
            _check_numbers(operator, backend, dtype)
    except Exception as error:  # whatever it is, the table says it, and the other rows are still of interest
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return Result(operator, backend.name, dtype, evidence, failure)
