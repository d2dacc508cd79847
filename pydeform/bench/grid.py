"""`grid_sample` against PyTorch's, in every mode.

    python -m pydeform.bench.grid [--threads N] [--problems "maps bilinear zeros,..."] [--rounds N]

prints one JSON object: problem -> "times" -> candidate -> seconds, all in float32. "pydeform" and "pydeform training"
(forward and all gradients) are this library, "torch" and "torch training" the same from PyTorch, which is compared with
us first. Before each call the caches are filled with other memory, as in a network.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform._program import without_traceback
from pydeform.bench import timing
from pydeform.bench.timing import installed

DIFFERENCE = 1e-3  # of the largest output
Call = Callable[[], Any]


class Shape(NamedTuple):
    channels: int
    size: tuple[int, ...]
    mode: str
    padding_mode: str

    def what(self) -> str:
        sizes = "x".join(map(str, self.size))
        return f"grid_sample: {self.channels} channels, {sizes}, {self.mode}, {self.padding_mode}"


SIZES = {"image": (3, (512, 512)), "maps": (64, (128, 128)), "volume": (8, (48, 48, 48))}
SHAPES: dict[str, Any] = {
    f"{name} {mode} {padding}": Shape(channels, size, mode, padding)
    for name, (channels, size) in SIZES.items()
    for mode in ("bilinear", "nearest", "bicubic")
    for padding in ("zeros", "border", "reflection")
    if mode != "bicubic" or len(size) == 2
}


class Problem(NamedTuple):
    shape: Shape
    input: Any
    grid: Any
    grad_output: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"mode": self.shape.mode, "padding_mode": self.shape.padding_mode}

    def forward(self) -> Any:
        return pydeform.grid_sample(self.input, self.grid, **self.options)

    def training(self) -> Any:
        return self.forward(), pydeform.grid_sample_backward(self.grad_output, self.input, self.grid, **self.options)


def problem(shape: Shape) -> Problem:
    """As many points as pixels, each some pixels from its own place, about a tenth of them outside."""
    rng = np.random.default_rng(1234)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape.size]
    places = np.stack(np.meshgrid(*axes, indexing="ij")[::-1], -1)[None]
    grid = places + rng.standard_normal(places.shape, np.float32) * np.float32(0.05)
    input, grad_output = rng.standard_normal((2, 1, shape.channels, *shape.size), np.float32)
    return Problem(shape, input, grid, grad_output)


def torch_calls(p: Problem, threads: int) -> dict[str, Call]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    input, grid, grad_output = map(torch.from_numpy, (p.input, p.grid, p.grad_output))

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.grid_sample(input, grid, align_corners=False, **p.options).numpy()

    def training() -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in (input, grid)]
        output = torch.nn.functional.grid_sample(*leaves, align_corners=False, **p.options)
        return output.detach().numpy(), [g.numpy() for g in torch.autograd.grad(output, leaves, grad_output)]

    return {"torch": forward, "torch training": training}


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    p = problem(SHAPES[name])
    result, progress = timing.begun(name, p.shape.what(), threads)
    others = torch_calls(p, threads) if installed("torch") else {}
    ours, grads = p.training()
    if others:
        theirs, their_grads = others["torch training"]()
        for what, one, other in zip(("output", *grads._fields), (ours, *grads), (theirs, *their_grads), strict=True):
            difference = float(np.abs(one - other).max())
            result[f"largest difference, {what}"] = difference
            if what != "grid" and not difference < DIFFERENCE * np.abs(one).max():  # a kink may lie between the two
                raise SystemExit(f"{name}: {what} of torch differs from pydeform by {difference:.2g}")
    calls = {"pydeform": p.forward, "pydeform training": p.training, **others}
    result["times"] = {n: t._asdict() for n, t in timing.interleaved(calls, rounds, progress, cold=True).items()}
    return result


def ratios(times: dict[str, Any]) -> dict[str, float]:
    """Of medians."""
    found = {"training/forward": times["pydeform training"]["median"] / times["pydeform"]["median"]}
    if "torch" in times:
        found["torch/ours"] = times["torch"]["median"] / times["pydeform"]["median"]
        found["torch/ours, training"] = times["torch training"]["median"] / times["pydeform training"]["median"]
    return found


bench = timing.Problems("pydeform.bench.grid", SHAPES, measure, ratios)

if __name__ == "__main__":
    sys.exit(without_traceback("benchmark", bench.main))
