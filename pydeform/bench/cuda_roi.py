"""RoI pooling on a GPU: what torchvision has too against torchvision, deformable pooling against targets.

    python -m pydeform.bench.cuda_roi [--problems parts,align] [--dtypes float16,float32] [--seconds N]

prints one JSON object: problem -> dtype -> "forward" and "backward" -> candidate -> seconds. Our backward computes all
gradients that there are: of the input, and of the offsets ("trans") where the operator has some. torchvision's is
autograd.grad of the input alone, of an output that is kept.

Seconds are the device's (cuda_timing.py); what the host takes for a call stands beside them as "host". Inputs rotate
among copies that together exceed the L2 cache twice. Everything runs on one stream, and is compared on values before
it is timed: with torchvision in float32, or else, in 16 bits, with ourselves in float32 ("compared with").
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pydeform.bench import cuda_timing, roi, timing
from pydeform.bench.cuda_deform_conv2d import on_device, tensor
from pydeform.bench.cuda_timing import Call
from pydeform.bench.roi import Problem
from pydeform.bench.timing import installed, names_among

PROBLEMS = {  # in the order of their worth
    "parts": "deform_psroi_pool: 512 boxes on 256x38x50, one group, 7x7 bins of 4x4 points",
    "align": "roi_align: 512 boxes on 256x100x136, 7x7 bins of 2x2 points",
    "parts large": "deform_psroi_pool: 512 boxes on 256x100x136, one group, 7x7 bins of 4x4 points",
    "ps_align": "ps_roi_align: 300 boxes on 1029x38x50, 7x7 bins of 2x2 points, 21 outputs",
    "R-FCN": "deform_psroi_pool: 300 boxes on 1029x38x50, 7x7 groups, 21 outputs, 4x4 points a bin, one offset a bin",
    "R-FCN by class": "the same with an offset for each of 21 classes",
}
DTYPES = ("float16", "float32", "bfloat16")
SHARED = ("roi_align", "ps_roi_align")  # operators that torchvision has too
# Largest difference from the same numbers in float32, over the largest value.
TOLERANCE = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4}
FASTER = {"forward": 2.0, "backward": 3.0}  # targets: so many times as fast as torchvision,
SOONER = {"parts": 90e-6, "parts large": 90e-6}  # and the forward's seconds in 16 bits
LIBRARIES = ("cupy-cuda12x", "cupy-cuda13x", "torch", "torchvision", "numpy", "ml_dtypes")
MOST_COPIES = 128
# Boxes of 16 bits lie on a coarse grid. With a spatial_scale that is a power of two, some of their points are exactly
# where the image ends, and who rounds in another order may see them outside. With this times it, none is.
OFF_BORDERS = 0.999


# Arrays --------------------------------------------------------------------------------------------------------------
def problem(name: str) -> Problem:
    """One of the CPU benchmark's, or made of the arrays of those."""
    if name == "ps_align":
        p = roi.problem("R-FCN")
        options = {"output_size": roi.BINS, "spatial_scale": p.options["spatial_scale"], "sampling_ratio": 2}
        arrays = {key: p.arrays[key] for key in ("input", "boxes")}
        p = Problem("ps_roi_align", arrays, options, p.grad_output)
    elif name == "parts large":
        p, large = roi.problem("parts"), roi.problem("align")
        p = p._replace(
            arrays={**p.arrays, **large.arrays},
            options={**p.options, "spatial_scale": large.options["spatial_scale"]},
        )
    else:
        p = roi.problem(name)
    return p._replace(options={**p.options, "spatial_scale": OFF_BORDERS * p.options["spatial_scale"]})


def mapped(p: Problem, change: Callable[[Any], Any]) -> Problem:
    arrays = {name: change(array) for name, array in p.arrays.items()}
    return p._replace(arrays=arrays, grad_output=change(p.grad_output))


def copies(p: Problem, cache: int) -> list[Problem]:
    """So many that the forward's inputs exceed the cache twice."""
    size = sum(array.nbytes for array in p.arrays.values())
    many = min(MOST_COPIES, math.ceil(2 * cache / size))
    return [p, *(mapped(p, lambda array: array.copy()) for _ in range(many - 1))]


# Candidates ----------------------------------------------------------------------------------------------------------
def rotating(call: Callable[[int], Any], many: int) -> Call:
    """`call` with one copy after the other. A block of calls may have fewer of them than there are copies, and would
    find in the cache what the block before it read: so each goes on where the last one ended."""
    turns = itertools.cycle(range(many))
    return lambda _number: call(next(turns))


def ours(problems: Sequence[Problem]) -> dict[str, Call]:
    return {
        "forward": rotating(lambda at: problems[at].forward(), len(problems)),
        "backward": rotating(lambda at: problems[at].backward(), len(problems)),
    }


def torchvisions(problems: Sequence[Problem]) -> tuple[dict[str, Call], str]:
    """Forward and backward, or none and the reason why. The backward's graph is recorded once for each copy."""
    if problems[0].operator not in SHARED:
        return {}, "no such operator"
    if not (installed("torch") and installed("torchvision")):
        return {}, "not installed"
    torch, ops = importlib.import_module("torch"), importlib.import_module("torchvision.ops")
    inputs = [tensor(p.arrays["input"]).detach().requires_grad_() for p in problems]
    boxes = [tensor(p.arrays["boxes"]) for p in problems]
    grads = [tensor(p.grad_output) for p in problems]
    operators = [getattr(ops, p.operator) for p in problems]

    def record(at: int) -> Any:
        return operators[at](inputs[at], boxes[at], **problems[at].options)

    def forward(at: int) -> Any:
        with torch.no_grad():
            return record(at)

    def backward(at: int) -> Any:
        return torch.autograd.grad(graphs[at], inputs[at], grads[at], retain_graph=True)

    try:
        graphs = [record(at) for at in range(len(problems))]
        backward(0)
    except RuntimeError as error:  # also of torch's NotImplementedError
        if not isinstance(error, NotImplementedError) and "not implemented for" not in str(error):
            raise
        return {}, f"not supported: {str(error).splitlines()[0]}"
    many = len(problems)
    return {"forward": rotating(forward, many), "backward": rotating(backward, many)}, ""


# Values --------------------------------------------------------------------------------------------------------------
def solved(p: Problem) -> dict[str, Any]:
    """Our output and every gradient."""
    return {"output": p.forward(), **{name: g for name, g in p.backward()._asdict().items() if g is not None}}


def differences(p: Problem, dtype: str) -> tuple[str, dict[str, float]]:
    """(with whom, largest difference of each of our results over the largest value); torch does the arithmetic.

    On the same numbers in float32: in 16 bits torchvision rounds coordinates too, and samples somewhere else.
    """
    if not installed("torch"):
        return "", {}
    wide = mapped(p, lambda array: array.astype("float32"))
    theirs, _ = torchvisions([wide])
    if theirs:
        peer, expected = "torchvision", {"output": theirs["forward"](0), "input": theirs["backward"](0)[0]}
    elif dtype != "float32":
        peer, expected = "ourselves in float32", {name: tensor(array) for name, array in solved(wide).items()}
    else:
        return "", {}
    got = solved(p)
    if set(got) != set(expected):
        raise ValueError(f"{p.operator} gives {', '.join(got)}, and {peer} {', '.join(expected)}")
    return peer, {name: _difference(array, expected[name]) for name, array in got.items()}


def _difference(array: Any, expected: Any) -> float:
    got, want = tensor(array).double(), expected.double()
    if got.shape != want.shape:
        return math.inf
    return float((got - want).abs().max() / want.abs().max())


# Together ------------------------------------------------------------------------------------------------------------
def measure(given: Problem, dtype: str, cache: int, progress: Callable[[str], None]) -> dict[str, Any]:
    progress("setting up")
    p = mapped(given, lambda array: on_device(array, dtype))
    peer, found = differences(p, dtype)
    many = copies(p, cache)
    theirs, reason = torchvisions(many)
    result: dict[str, Any] = {
        "compared with": peer,
        "difference": found,
        "wrong": [what for what, value in found.items() if not value < TOLERANCE[dtype]],
        "no torchvision": reason,
    }
    for what, call in ours(many).items():

        def told(text: str, what: str = what) -> None:
            progress(f"{what}: {text}")

        calls = {"pydeform": call}
        if theirs:
            calls["torchvision"] = theirs[what]
        result[what] = {n: t._asdict() for n, t in cuda_timing.interleaved(calls, told).items()}
    return result


def run(
    problems: Sequence[str],
    dtypes: Sequence[str],
    seconds: float,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """problem -> dtype -> measurements, until the time is over; `keep` gets what there is after each of them."""
    pairs = ((name, dtype) for name in problems for dtype in dtypes)
    made = functools.lru_cache(maxsize=1)(problem)  # its dtypes come one after the other
    return cuda_timing.measured(pairs, lambda name, *rest: measure(made(name), *rest), seconds, keep)


def wrong(results: dict[str, Any]) -> list[str]:
    """What differs by more than rounding."""
    return [
        f"{name} {dtype}: {what} differs from {result['compared with']} by {result['difference'][what]:.2g} of the "
        "largest value"
        for name, by_dtype in results.items()
        for dtype, result in by_dtype.items()
        for what in result["wrong"]
    ]


def target(name: str, dtype: str, what: str, timings: dict[str, Any]) -> tuple[str, float] | None:
    """(the target, how many times as good as that we are), where there is one and it can be judged."""
    our = timings["pydeform"]["median"]
    if "torchvision" in timings:
        return f"{FASTER[what]:g} times", timings["torchvision"]["median"] / our / FASTER[what]
    if what == "forward" and name in SOONER and dtype != "float32":
        return f"{SOONER[name] * 1e6:.0f} us", SOONER[name] / our
    return None


def report(results: dict[str, Any], what: str) -> str:
    """Microseconds of the device, and how many times as long torchvision takes. A target is met where "target/ours" is
    at least 1. "host" is what our call costs the CPU."""
    rows = []
    for name, by_dtype in results.items():
        for dtype, result in by_dtype.items():
            timings = result[what]
            our = timings["pydeform"]
            row = [f"{name} {dtype}", f"{our['median'] * 1e6:.1f}", f"{our['minimum'] * 1e6:.1f}"]
            aim = target(name, dtype, what, timings)
            if "torchvision" in timings:
                theirs = timings["torchvision"]["median"]
                row += [f"{theirs * 1e6:.1f}", f"{theirs / our['median']:.2f}"]
            else:
                row += ["-", "-"]
            row += [aim[0], f"{aim[1]:.2f}"] if aim else ["-", "-"]
            rows.append([*row, f"{our['host'] * 1e6:.0f}"])
    header = [what, "us", "minimum", "torchvision us", "torchvision/ours", "target", "target/ours", "host us"]
    return timing.table(header, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", default=",".join(PROBLEMS), type=names_among("problems", PROBLEMS))
    parser.add_argument("--dtypes", default=",".join(DTYPES), type=names_among("dtypes", DTYPES))
    parser.add_argument("--seconds", type=float, default=60, help="begin no measurement after this time")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pydeform.bench.cuda_roi")
    add_options(parser)
    options = parser.parse_args(argv)
    results = run(options.problems, options.dtypes, options.seconds)
    print(json.dumps(results))
    return 1 if wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
