"""Deformable convolution on a GPU against torchvision, with a plain convolution and bare products as floors.

    python -m pydeform.bench.cuda_deform_conv2d [--shapes G1,G3] [--dtypes float16,tf32] [--seconds N]

prints one JSON object: shape -> dtype -> "forward" and "backward" -> candidate -> seconds. "tf32" is float32 with
allow_tf32, for everybody. "dense" is torch's plain convolution of that size, "products" are the bare matrix products
(one forward, two backward): less than that takes only who computes less.

Seconds are the device's (cuda_timing.py); what the host takes for a call stands beside them as "host". Inputs rotate
among copies that together exceed the L2 cache twice. Everything runs on one stream, and is compared on values before
it is timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import pydeform
from pydeform.bench import cuda_timing, timing
from pydeform.bench.cuda_timing import Call
from pydeform.bench.deform_conv2d import TAPS, Problem, Shape, problem
from pydeform.bench.timing import installed, names_among

SHAPES = {
    "G1": Shape(16, 256, 56, 56, 1, 1, True),
    "G2": Shape(16, 256, 28, 28, 1, 1, True),
    "G3": Shape(1, 512, 38, 50, 2, 4, False),
    "G4": Shape(8, 64, 128, 128, 1, 1, True),
    "G5": Shape(1, 64, 512, 512, 1, 1, True),
}
SMALL = ("G2", "G3")  # float64 only on these
DTYPES = ("float16", "float32", "bfloat16", "tf32", "float64")
# Largest difference from torchvision in float32 (of float64 in float64) on the same numbers, over the largest value.
TOLERANCE = {"float16": 5e-3, "bfloat16": 4e-2, "tf32": 5e-3, "float32": 1e-4, "float64": 1e-11}
NAMES = ("input", "offset", "weight", "bias", "mask")
LIBRARIES = ("cupy-cuda12x", "cupy-cuda13x", "torch", "torchvision", "numpy", "ml_dtypes")
MOST_COPIES = 32


# Arrays --------------------------------------------------------------------------------------------------------------
def storage(dtype: str) -> str:
    return "float32" if dtype == "tf32" else dtype


def on_device(array: Any, dtype: str) -> Any:
    """`array` rounded to `dtype`, as a CuPy array."""
    if array is None:
        return None
    kind = importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return importlib.import_module("cupy").asarray(array.astype(kind))


def sent(p: Problem, dtype: str) -> Problem:
    return Problem(p.shape, *(on_device(array, storage(dtype)) for array in p[1:]))


def copied(p: Problem) -> Problem:
    return Problem(p.shape, *(None if array is None else array.copy() for array in p[1:]))


def copies(p: Problem, cache: int) -> list[Problem]:
    """So many that the forward's inputs exceed the cache twice."""
    size = sum(array.nbytes for array in (getattr(p, name) for name in NAMES) if array is not None)
    return [p, *(copied(p) for _ in range(min(MOST_COPIES, math.ceil(2 * cache / size)) - 1))]


def tensor(array: Any) -> Any:
    """The same memory as a torch tensor; CuPy exports no bfloat16."""
    torch = importlib.import_module("torch")
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def leaves(p: Problem) -> list[Any]:
    return [None if a is None else tensor(a).detach().requires_grad_() for a in (getattr(p, name) for name in NAMES)]


# Candidates ----------------------------------------------------------------------------------------------------------
def ours(problems: Sequence[Problem], dtype: str) -> dict[str, dict[str, Call]]:
    tf32: dict[str, Any] = {"allow_tf32": True} if dtype == "tf32" else {}

    def forward(number: int) -> Any:
        p = problems[number % len(problems)]
        return pydeform.deform_conv2d(p.input, p.offset, p.weight, p.bias, **p.options, **tf32)

    def backward(number: int, **options: Any) -> Any:
        p = problems[number % len(problems)]
        return pydeform.deform_conv2d_backward(
            p.grad_output, p.input, p.offset, p.weight, p.bias, **p.options, **tf32, **options
        )

    return {
        "forward": {"pydeform": forward},
        "backward": {
            "pydeform": backward,
            "pydeform deterministic": lambda number: backward(number, deterministic=True),
        },
    }


def recorded(
    operator: Callable[[list[Any], Problem], Any], problems: Sequence[Problem], names: Sequence[str]
) -> dict[str, Call]:
    """Forward and backward of a torch function; the backward's graph is recorded once for each copy."""
    torch = importlib.import_module("torch")
    arguments = [leaves(p) for p in problems]
    grads = [tensor(p.grad_output) for p in problems]
    graphs = [operator(a, p) for a, p in zip(arguments, problems, strict=True)]
    wanted = [
        [leaf for name, leaf in zip(NAMES, a, strict=True) if name in names and leaf is not None] for a in arguments
    ]

    def forward(number: int) -> Any:
        at = number % len(problems)
        with torch.no_grad():
            return operator(arguments[at], problems[at])

    def backward(number: int) -> Any:
        at = number % len(problems)
        return torch.autograd.grad(graphs[at], wanted[at], grads[at], retain_graph=True)

    return {"forward": forward, "backward": backward}


def torchvision_call(arguments: list[Any], p: Problem) -> Any:
    x, offset, weight, bias, mask = arguments
    d = p.shape.dilation
    operator = importlib.import_module("torchvision.ops").deform_conv2d
    return operator(x, offset, weight, bias, padding=d, dilation=d, mask=mask)


def dense_call(arguments: list[Any], p: Problem) -> Any:
    x, _, weight, bias, _ = arguments
    d = p.shape.dilation
    return importlib.import_module("torch").nn.functional.conv2d(x, weight, bias, padding=d, dilation=d)


def products(p: Problem) -> dict[str, Call]:
    """The columns are larger than the cache wherever that matters, so they need no copies."""
    torch = importlib.import_module("torch")
    n, c, h, w = p.shape[:4]
    weight = tensor(p.weight).reshape(c, -1)  # [O, CK]
    grad = tensor(p.grad_output).permute(0, 2, 3, 1).reshape(n * h * w, c)  # [L, O]
    columns = torch.empty((n * h * w, weight.shape[1]), dtype=weight.dtype, device=weight.device).normal_()  # [L, CK]
    return {
        "forward": lambda _number: torch.mm(columns, weight.t()),
        "backward": lambda _number: (torch.mm(grad, weight), torch.mm(grad.t(), columns)),
    }


def peers(problems: Sequence[Problem], dtype: str) -> dict[str, dict[str, Call]]:
    """Those that are installed; torchvision has no bfloat16."""
    found: dict[str, dict[str, Call]] = {}
    if installed("torchvision") and dtype != "bfloat16":
        found["torchvision"] = recorded(torchvision_call, problems, NAMES)
    if installed("torch"):
        found["dense"] = recorded(dense_call, problems, ("input", "weight", "bias"))
        found["products"] = products(problems[0])
    return found


def candidates(problems: Sequence[Problem], dtype: str) -> dict[str, dict[str, Call]]:
    calls = ours(problems, dtype)
    for name, pair in peers(problems, dtype).items():
        for what, call in pair.items():
            calls[what][name] = call
    return calls


def set_precision(dtype: str) -> None:
    """What torch may do with float32."""
    if installed("torch"):
        torch = importlib.import_module("torch")
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"


# Values --------------------------------------------------------------------------------------------------------------
def differences(p: Problem, dtype: str) -> dict[str, float]:
    """Largest difference of each of our results from torchvision's, in float32 at least, over the largest value.

    torchvision computes coordinates in the arrays' dtype: in float16 it samples somewhere else on a large image.
    """
    if not installed("torchvision"):
        return {}
    wide = "float64" if dtype == "float64" else "float32"
    widened = Problem(p.shape, *(None if a is None else a.astype(wide) for a in p[1:]))
    set_precision("float32")
    theirs = recorded(torchvision_call, [widened], NAMES)
    expected = [theirs["forward"](0), *theirs["backward"](0)]
    calls = ours([p], dtype)
    got = {"output": calls["forward"]["pydeform"](0)}
    for suffix, name in (("", "pydeform"), (" deterministic", "pydeform deterministic")):
        grads = calls["backward"][name](0)._asdict()
        got |= {f"{key}{suffix}": grad for key, grad in grads.items() if grad is not None}
    expected += expected[1:]
    return {name: _difference(a, b) for (name, a), b in zip(got.items(), expected, strict=True)}


def _difference(array: Any, expected: Any) -> float:
    got, want = tensor(array).double(), expected.double()
    return float((got - want).abs().max() / want.abs().max())


# Together ------------------------------------------------------------------------------------------------------------
def measure(name: str, dtype: str, cache: int, progress: Callable[[str], None]) -> dict[str, Any]:
    progress("setting up")
    p = sent(problem(SHAPES[name]), dtype)
    result: dict[str, Any] = {"difference": differences(p, dtype)}
    result["wrong"] = [what for what, value in result["difference"].items() if not value < TOLERANCE[dtype]]
    set_precision(dtype)
    for what, calls in candidates(copies(p, cache), dtype).items():

        def told(text: str, what: str = what) -> None:
            progress(f"{what}: {text}")

        result[what] = {n: t._asdict() for n, t in cuda_timing.interleaved(calls, told).items()}
    return result


def run(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    seconds: float,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """shape -> dtype -> measurements, until the time is over; `keep` gets what there is after each of them."""
    pairs = ((name, dtype) for dtype in dtypes for name in shapes if dtype != "float64" or name in SMALL)
    return cuda_timing.measured(pairs, measure, seconds, keep)


def wrong(results: dict[str, Any]) -> list[str]:
    """What differs from torchvision by more than rounding."""
    return [
        f"{shape} {dtype}: {what} differs by {result['difference'][what]:.2g} of the largest value"
        for shape, by_dtype in results.items()
        for dtype, result in by_dtype.items()
        for what in result["wrong"]
    ]


def operations(shape: Shape) -> int:
    """Of the forward's products; the backward has twice as many."""
    return 2 * shape.batch * shape.height * shape.width * shape.channels**2 * TAPS


def report(results: dict[str, Any], what: str) -> str:
    """Microseconds of the device, and how many times as long the others take. "host" is what our call costs the CPU."""
    rows = []
    for name, by_dtype in results.items():
        for dtype, result in by_dtype.items():
            timings = result[what]
            our = timings["pydeform"]["median"]
            work = operations(SHAPES[name]) * (2 if what == "backward" else 1)
            row = [f"{name} {dtype}", f"{our * 1e6:.1f}", f"{work / our / 1e12:.1f}"]
            for other in ("torchvision", "dense", "products", "pydeform deterministic"):
                row.append(f"{timings[other]['median'] / our:.2f}" if other in timings else "-")
            rows.append([*row, f"{timings['pydeform']['host'] * 1e6:.0f}"])
    header = [what, "us", "TFLOP/s", "torchvision/ours", "dense/ours", "products/ours", "deterministic/ours", "host us"]
    if what == "forward":
        header.remove("deterministic/ours")
        rows = [row[:6] + row[7:] for row in rows]
    return timing.table(header, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=",".join(SHAPES), type=names_among("shapes", SHAPES))
    parser.add_argument("--dtypes", default=",".join(DTYPES), type=names_among("dtypes", DTYPES))
    parser.add_argument("--seconds", type=float, default=180, help="begin no measurement after this time")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pydeform.bench.cuda_deform_conv2d")
    add_options(parser)
    options = parser.parse_args(argv)
    results = run(options.shapes, options.dtypes, options.seconds)
    print(json.dumps(results))
    return 1 if wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
