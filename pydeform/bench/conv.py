"""Convolutions over one to three axes, depthwise and active ones, against what PyTorch users write for want of them.

    python -m pydeform.bench.conv [--threads N] [--problems 1-D,3-D] [--rounds N]

prints one JSON object: problem -> "times" -> candidate -> seconds, all in float32. "pydeform" and "pydeform training"
(forward and all gradients) are this library. "grid_sample" computes the same thing, is compared with it first, and is
one call of PyTorch's for each tap and then a matrix product, or a sum where a convolution is depthwise. "products ..."
is the bare matrix product without any sampling, "three products ..." those of a forward and its gradients.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform._program import without_traceback
from pydeform.bench import timing
from pydeform.bench.deform_conv2d import blas_calls, fastest
from pydeform.bench.timing import installed

# Of the largest output: grid_sample's coordinates are parts of an image, and lose more the longer an axis is.
DIFFERENCE = 1e-3
Call = Callable[[], Any]


class Shape(NamedTuple):
    """A convolution of stride 1 that keeps the size and the number of channels."""

    operator: str
    batch: int
    channels: int
    size: tuple[int, ...]
    kernel: int
    dilation: int = 1
    depthwise: bool = False

    def what(self) -> str:
        size, kernel = ("x".join(map(str, side)) for side in (self.size, (self.kernel,) * len(self.size)))
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        depthwise = ", depthwise" if self.depthwise else ""
        return f"{self.operator}: {self.batch}x{self.channels}x{size}, {kernel} taps{dilated}{depthwise}"


SHAPES = {
    "1-D": Shape("deform_conv1d", 8, 64, (4096,), 7),
    "3-D": Shape("deform_conv3d", 1, 32, (16, 32, 32), 3),
    "depthwise 2-D": Shape("deform_conv2d", 1, 96, (56, 56), 7, 3, True),
    "depthwise 3-D": Shape("deform_conv3d", 1, 48, (24, 24, 24), 5, 1, True),
    "active": Shape("active_conv2d", 1, 64, (56, 56), 3),
}


class Problem(NamedTuple):
    shape: Shape
    arrays: dict[str, Any]
    options: dict[str, Any]
    grad_output: Any

    def forward(self) -> Any:
        return getattr(pydeform, self.shape.operator)(**self.arrays, **self.options)

    def training(self) -> Any:
        backward = getattr(pydeform, f"{self.shape.operator}_backward")
        return self.forward(), backward(self.grad_output, **self.arrays, **self.options)


def problem(shape: Shape) -> Problem:
    """Offsets from normal(0, 2), a weight that keeps the variance. float32."""
    rng = np.random.default_rng(1234)

    def normal(*size: int) -> Any:
        return rng.standard_normal(size, np.float32)

    axes, taps, group = len(shape.size), shape.kernel ** len(shape.size), 1 if shape.depthwise else shape.channels
    moves = {"positions": 2 * normal(axes * taps)}
    if shape.operator != "active_conv2d":
        moves = {"offset": 2 * normal(shape.batch, axes * taps, *shape.size)}
    weight = normal(shape.channels, group, *(shape.kernel,) * axes) / np.float32(math.sqrt(group * taps))
    arrays = {"input": normal(shape.batch, shape.channels, *shape.size), **moves, "weight": weight}
    options: dict[str, Any] = {"padding": "same"}
    if shape.dilation > 1:
        options["dilation"] = shape.dilation
    return Problem(shape, arrays, options, normal(shape.batch, shape.channels, *shape.size))


def grid_sample_call(p: Problem, threads: int) -> Call:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    shape, arrays = p.shape, {name: torch.from_numpy(array) for name, array in p.arrays.items()}
    axes, size = len(shape.size), torch.tensor(shape.size)
    taps = list(itertools.product(range(shape.kernel), repeat=axes))
    middle = shape.kernel // 2
    places = torch.stack(torch.meshgrid(*map(torch.arange, shape.size), indexing="ij"), -1)
    if "offset" in arrays:
        moves = arrays["offset"].view(shape.batch, len(taps), axes, *shape.size)
    else:
        moves = arrays["positions"].view(1, len(taps), axes, *(1,) * axes).expand(-1, -1, -1, *shape.size)
    image, weight = arrays["input"], arrays["weight"]
    if axes == 1:  # a signal is an image of one row
        image = image[:, :, None]

    def sampled(tap: int) -> Any:
        start = places + torch.tensor([(k - middle) * shape.dilation for k in taps[tap]])
        grid = ((2 * (start + moves[:, tap].movedim(1, -1)) + 1) / size - 1).expand(shape.batch, *[-1] * (axes + 1))
        if axes == 1:
            grid = torch.cat((grid, torch.zeros_like(grid)), -1)[:, None]
        samples = torch.nn.functional.grid_sample(image, grid.flip(-1) if axes > 1 else grid, align_corners=False)
        return samples.reshape(shape.batch, shape.channels, -1)

    def call() -> Any:
        if shape.depthwise:
            scales = weight.reshape(shape.channels, -1)
            output = sum(sampled(tap) * scales[:, tap, None] for tap in range(len(taps)))
        else:
            columns = torch.stack([sampled(tap) for tap in range(len(taps))], 2)
            output = weight.reshape(shape.channels, -1) @ columns.reshape(shape.batch, -1, columns.shape[-1])
        return output.reshape(p.grad_output.shape).numpy()

    return call


def product_calls(p: Problem, threads: int) -> dict[str, Call]:
    """Forward [O, CK] [CK, L], columns [CK, O] [O, L], weight [O, L] [L, CK], image by image; none if depthwise."""
    if p.shape.depthwise:
        return {}
    weight, grad = p.arrays["weight"].reshape(p.shape.channels, -1), p.grad_output[0].reshape(p.shape.channels, -1)
    columns = np.resize(p.grad_output, (weight.shape[1], grad.shape[1]))
    pairs = [(weight, columns), (weight.T, grad), (grad, columns.T)]
    one, three = (blas_calls(pairs[:number], p.shape.batch, threads) for number in (1, 3))
    return {**one, **{f"three {name}": call for name, call in three.items()}}


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    p = problem(SHAPES[name])
    result, progress = timing.begun(name, p.shape.what(), threads)
    calls: dict[str, Call] = {"pydeform": p.forward, "pydeform training": p.training}
    if installed("torch"):
        calls["grid_sample"] = grid_sample_call(p, threads)
        ours = p.forward()
        result["largest difference"] = difference = float(np.abs(calls["grid_sample"]() - ours).max())
        if not difference < DIFFERENCE * np.abs(ours).max():
            raise SystemExit(f"{name}: grid_sample differs from pydeform by {difference:.2g}")
    calls |= product_calls(p, threads)
    result["times"] = {n: t._asdict() for n, t in timing.interleaved(calls, rounds, progress).items()}
    return result


def ratios(times: dict[str, Any]) -> dict[str, float]:
    """Of medians, the fastest BLAS at hand for each of the products."""
    ours, found = times["pydeform"]["median"], {}
    if "grid_sample" in times:
        found["grid_sample/ours"] = times["grid_sample"]["median"] / ours
    for name, what, mine in (
        ("ours/product", "products", ours),
        ("training/three products", "three", times["pydeform training"]["median"]),
    ):
        if (bare := fastest(times, (what,))) is not None:
            found[name] = mine / bare[1]
    return found


bench = timing.Problems("pydeform.bench.conv", SHAPES, measure, ratios)

if __name__ == "__main__":
    sys.exit(without_traceback("benchmark", bench.main))
