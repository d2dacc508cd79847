"""What the results of one random problem must be: the oracle's, and the same bits however they are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import pydeform
from tests import conftest
from tests.cases import gather, grid
from tests.cases.conv import AXES, solve_oracle
from tests.fuzz.problems import COORDINATES, Problem
from tests.reference import deform_conv2d, roi
from tests.reference import gather as gather_reference
from tests.reference import grid as grid_reference
from tests.reference.deform_conv import offset_of_positions
from tests.test_deform_conv2d import LAYOUTS, Guard


def check(problem: Problem, rng: np.random.Generator, backend: conftest.Backend) -> None:
    """Raises AssertionError, or whatever an operator raised."""
    arrays, grad_output = problem.arrays, problem.grad_output
    with Guard(grad_output, *arrays.values()):
        results = solve(problem, backend, arrays, grad_output)
    compare(problem if backend.on_cpu else flushed(problem), results)
    if backend.on_cpu:
        odd = {name: _layout(rng, a) for name, a in arrays.items()}
        odd_grad = _layout(rng, grad_output)
        with Guard(odd_grad, *odd.values()), _otherwise(rng):
            again = solve(problem, backend, odd, odd_grad)
        same_bits(again, results, "in other layouts, on threads, in poisoned memory")
    else:
        again = solve(problem, backend, arrays, grad_output, deterministic=True)
        same_bits(again, solve(problem, backend, arrays, grad_output, deterministic=True), "on another run")


def solve(
    problem: Problem, backend: conftest.Backend, arrays: dict[str, Any], grad_output: Any, **options: Any
) -> dict[str, Any]:
    """The output and every gradient, as NumPy arrays."""
    sent = {name: backend.array(a) for name, a in arrays.items()}
    output = getattr(pydeform, problem.operator)(**sent, **problem.options)
    backward = getattr(pydeform, f"{problem.operator}_backward")
    grads = backward(backend.array(grad_output), **sent, **problem.of_backward, **options)._asdict()
    return {"output": backend.numpy(output)} | {name: backend.numpy(grad) for name, grad in grads.items()}


def compare(problem: Problem, results: dict[str, Any]) -> None:
    """With the oracle, in all that it can tell of this problem."""
    if "output" in problem.beyond_oracle:
        return
    roundings = rounded_terms(problem) | rounded_sums(problem) | rounded_softmax(problem)
    roundings |= rounded_cubics(problem) | rounded_means(problem)
    for name, want in oracle(problem).items():
        if want is None:
            assert results[name] is None, f"{name} should be None"
        elif name not in problem.beyond_oracle:
            _assert_close(results[name], want, problem, name, problem.slack + roundings.get(name, 0.0))


def flushed(problem: Problem) -> Problem:
    """As CUDA reads it, where float32 has no subnormal numbers: an offset of -1e-40 is none."""

    def of(array: Any) -> Any:
        if array is None or array.dtype == np.float64:
            return array
        wide = array.astype(np.float64)
        return np.where(abs(wide) < np.finfo(np.float32).tiny, np.copysign(0, wide), wide).astype(array.dtype)

    arrays = {name: of(array) for name, array in problem.arrays.items()}
    return problem._replace(arrays=arrays, grad_output=of(problem.grad_output))


def rounded_terms(problem: Problem) -> dict[str, Any]:
    """What may be lost where each sample is rounded to a half type before it is multiplied: half a unit in the last
    place of each term, however little the terms leave of each other, and of the sum."""
    half = problem.dtype
    if "conv" not in problem.operator or conftest._tolerance[half] == conftest.TOLERANCE[half]:
        return {}
    arrays = {name: a if a is None or name in COORDINATES else abs(a) for name, a in problem.arrays.items()}
    terms = oracle(problem._replace(arrays=arrays, grad_output=abs(problem.grad_output)))
    unit = 1.01 * 2.0 ** {"float16": -11, "bfloat16": -8}[half]
    with np.errstate(all="ignore"):
        return {name: 2 * unit * terms[name] for name in ("output", "weight")}


def rounded_sums(problem: Problem) -> dict[str, Any]:
    """What float32 may lose of a position's gradient, a sum over all images and pixels that may leave little."""
    if problem.operator != "active_conv2d" or problem.dtype == "float64":
        return {}
    arrays, (batch, _, *out) = dict(problem.arrays), problem.grad_output.shape
    positions, kernel = arrays.pop("positions"), arrays["weight"].shape[2:]
    arrays["offset"] = offset_of_positions(positions, batch, tuple(out), kernel)
    options = {**problem.options, "dilation": (1, 1), "mask": None}
    with np.errstate(all="ignore"):
        terms = deform_conv2d.backward(problem.grad_output, **arrays, **options)["offset"]
        return {"positions": 2.0**-20 * abs(terms).sum(axis=(0, 2, 3))}


def rounded_softmax(problem: Problem) -> dict[str, Any]:
    """What may be lost where weights that are no short numbers multiply terms that may leave little."""
    if problem.operator != "ms_deform_attn_fused" or not problem.grad_output.size:
        return {}
    unit = 2.0**-49 if problem.dtype == "float64" else 2.0**-20
    a = {name: np.asarray(array).astype(np.float64) for name, array in problem.arrays.items()}
    value, grad = abs(a["value"]).max(), abs(problem.grad_output.astype(np.float64)).max()
    of_dot = unit * a["value"].shape[3] * grad * value
    longest = max(max(size) for size in problem.options["spatial_shapes"])
    offsets = abs(a["sampling_offsets"])
    reach = offsets[offsets < 1000].max(initial=1)  # others lead outside
    count = a["attention_logits"][0, 0].size
    return {
        "output": unit * value,
        "value": unit * grad * a["value"].shape[2] * a["attention_logits"].size,
        "attention_logits": of_dot,
        "sampling_offsets": 2 * of_dot * longest,
        "reference_points": 2 * of_dot * longest * reach * count,
    }


def rounded_cubics(problem: Problem) -> dict[str, Any]:
    """What may be lost of a cubic's pixels, whose shares and slopes are sums that may leave little of each other, as
    may the pixels themselves."""
    if problem.options.get("mode") != "bicubic" or not problem.grad_output.size:
        return {}
    unit = 2.0**-47 if problem.dtype == "float64" else 2.0**-18
    image, grad = (abs(a.astype(np.float64)) for a in (problem.arrays["input"], problem.grad_output))
    return {
        "output": unit * image.max(),
        "input": unit * grad.max() * grad[0, 0].size,
    } | dict.fromkeys(("grid", "displacement"), unit * image.max() * grad.max() * len(image[0]) * max(image.shape[2:]))


def rounded_means(problem: Problem) -> dict[str, Any]:
    """What may be lost of means whose terms leave little of each other; and of a box's gradient: bins' means over an
    edge less those over all, which may be equal, over a bin's length."""
    if problem.operator != "prroi_pool" or not problem.grad_output.size:
        return {}
    unit = 2.0**-49 if problem.dtype == "float64" else 2.0**-20
    image, grad = (abs(a.astype(np.float64)) for a in (problem.arrays["input"], problem.grad_output))
    boxes, (rows, columns) = problem.arrays["boxes"].astype(np.float64), problem.options["output_size"]
    sides = (boxes[:, 3:] - boxes[:, 1:3]) * problem.options["spatial_scale"] / (columns, rows)
    with np.errstate(all="ignore"):
        terms = oracle(problem._replace(arrays={**problem.arrays, "input": image}, grad_output=grad))
        lost = unit * image.max() * grad.sum(axis=(1, 2, 3)) / abs(sides).min(axis=1)
        of_boxes = np.nan_to_num(lost, nan=0.0, posinf=0.0)[:, None] * problem.options["spatial_scale"]
        return {"output": unit * terms["output"], "input": unit * terms["input"], "boxes": of_boxes}


def _assert_close(got: Any, want: Any, problem: Problem, name: str, slack: Any) -> None:
    dtype = (problem.grad_output if name == "output" else problem.arrays[name]).dtype.name
    if np.any(slack) and got.dtype.name == dtype:
        with np.errstate(all="ignore"):
            wrong = ~(abs(got - want) <= slack)
        want = np.where(wrong, want, got.astype(np.float64))
    if dtype != problem.dtype and got.dtype.name == dtype:  # coordinates in float32, beside data that is rounded more
        got, dtype = got.astype(problem.grad_output.dtype), problem.dtype
    if got.dtype == np.float16:  # half a step of its smallest numbers
        with np.errstate(all="ignore"):
            want = np.where(abs(got.astype(np.float64) - want) <= 2.0**-25, got.astype(np.float64), want)
    conftest.assert_close(got, want, dtype, name)


def oracle(problem: Problem) -> dict[str, Any]:
    arrays, options, grad_output = problem.arrays, problem.options, problem.grad_output
    with np.errstate(all="ignore"):
        if problem.operator == "deform_conv2d":  # whose oracle is another one than that of any number of axes
            arguments = {**arrays, **options}
            return {
                "output": deform_conv2d.forward(**arguments),
                **deform_conv2d.backward(grad_output, **arguments),
            }
        if problem.operator in AXES:
            output, grads = solve_oracle(problem.operator, arrays, options, grad_output)
            return {"output": output, **grads}
        reference = gather_reference if problem.operator in gather.OPERATORS else roi
        reference = grid_reference if problem.operator in (*grid.CASES, "affine_grid") else reference
        forward, backward = (getattr(reference, name) for name in (problem.operator, f"{problem.operator}_backward"))
        return {"output": forward(**arrays, **options), **backward(grad_output, **arrays, **problem.of_backward)}


def same_bits(got: dict[str, Any], want: dict[str, Any], what: str) -> None:
    for name, array in want.items():
        if array is None:
            assert got[name] is None, name
        else:
            conftest.assert_same_bits(got[name], array, f"{name} {what}")


def _layout(rng: np.random.Generator, array: Any) -> Any:
    if array is None or rng.random() < 0.5:
        return array
    return LAYOUTS[rng.integers(len(LAYOUTS))](array)


class _Poisoned:
    """numpy, whose new memory holds what nobody may read."""

    def __init__(self, byte: int | None, rng: np.random.Generator) -> None:
        self._byte, self._rng = byte, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = float) -> Any:
        array = np.empty(shape, dtype)
        if array.nbytes:
            bytes_ = array.reshape(-1).view(np.uint8)
            bytes_[...] = self._rng.integers(0, 256, bytes_.size) if self._byte is None else self._byte
        return array


@contextlib.contextmanager
def _otherwise(rng: np.random.Generator) -> Iterator[None]:
    """Several threads however small the problem, and memory full of NaN, of zeros or of anything."""
    from pydeform.cpu.conv import plan as conv_plan
    from pydeform.cpu.core import memory
    from pydeform.cpu.gather import plan as gather_plan
    from pydeform.cpu.grid import plan as grid_plan
    from pydeform.cpu.roi import plan as roi_plan

    places = ((memory, "np", _Poisoned([0xFF, 0, None][rng.integers(3)], rng)),)
    places += ((memory.Workspace, "take", lambda workspace: memory.workspace(*workspace._parts)),)  # no spare one
    places += tuple((module, "SERIAL_FLOPS", 0) for module in (conv_plan, gather_plan, grid_plan, roi_plan))
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        with pydeform.num_threads(int(rng.integers(1, 5))):
            yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)
