"""Attention, DCNv3 and DCNv4, and aggregation against what people run on a CPU for want of them.

    python -m pydeform.bench.gather [--threads N] [--problems rf-detr,encoder] [--rounds N]

prints one JSON object: problem -> "times" -> candidate -> seconds, all in float32. "pydeform" and "pydeform training"
(forward and all gradients) are this library. "grid_sample" is the form of the models' own PyTorch code, "loop" thirty
lines of Numba, "reading" only adds up the pixels that the samples read. What computes is compared with us first.
Before each call the caches are filled with other memory, as in a network.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform._program import without_traceback
from pydeform.bench import timing
from pydeform.bench.timing import installed

DIFFERENCE = 1e-3  # of the largest output
Call = Callable[[], Any]


class Attention(NamedTuple):
    queries: int
    levels: tuple[tuple[int, int], ...]
    heads: int
    channels: int
    points: int
    dense: bool = False  # a query for each pixel, looking around it
    operator: str = "ms_deform_attn"

    def what(self) -> str:
        sizes = ", ".join(f"{h}x{w}" for h, w in self.levels)
        return f"ms_deform_attn: {self.queries} queries, {self.heads}x{self.channels}, {self.points} points of {sizes}"


class Dcn(NamedTuple):
    """3x3, stride 1, groups of 16 channels, as in InternImage and FlashInternImage."""

    operator: str
    size: int
    channels: int

    def what(self) -> str:
        return f"{self.operator}: {self.size}x{self.size}x{self.channels}, 3x3, groups of 16 channels"


class Aggregation(NamedTuple):
    anchors: int
    points: int
    cameras: int
    scales: tuple[tuple[int, int], ...]
    channels: int
    groups: int
    operator: str = "deform_aggregation"

    def what(self) -> str:
        views = f"{self.cameras} cameras, {len(self.scales)} scales"
        return f"deform_aggregation: {views}, {self.anchors} anchors, {self.points} points, {self.channels} channels"


SHAPES: dict[str, Any] = {
    "rf-detr": Attention(1300, ((48, 48),), 16, 16, 2),
    "rf-detr keypoints": Attention(22100, ((48, 48),), 16, 16, 2),
    "rt-detr": Attention(300, ((80, 80), (40, 40), (20, 20)), 8, 32, 4),
    "encoder": Attention(17821, ((100, 134), (50, 67), (25, 34), (13, 17)), 8, 32, 4, True),
    "sparse4d": Aggregation(900, 13, 6, ((64, 176), (32, 88), (16, 44), (8, 22)), 256, 8),
} | {
    f"{operator} {size}": Dcn(operator, size, channels)
    for operator in ("dcnv3", "dcnv4")
    for size, channels in ((56, 128), (28, 256), (14, 512), (7, 1024))
}


class Problem(NamedTuple):
    shape: Any  # one of SHAPES
    arrays: dict[str, Any]
    options: dict[str, Any]

    def forward(self) -> Any:
        return getattr(pydeform, self.shape.operator)(**self.arrays, **self.options)

    def training(self) -> Any:
        backward, output = getattr(pydeform, f"{self.shape.operator}_backward"), self.forward()
        return output, backward(output, **self.arrays, **self.options)


def problem(shape: Attention | Dcn | Aggregation) -> Problem:
    """float32; locations as they are in a trained model: around a query's own place, and for cameras mostly outside."""
    rng = np.random.default_rng(1234)

    def normal(*size: int) -> Any:
        return rng.standard_normal(size, np.float32)

    if isinstance(shape, Dcn):
        groups = shape.channels // 16
        positions, taps = (1, shape.size, shape.size), 9 * groups
        offset, mask = normal(*positions, 2 * taps), rng.random((*positions, taps), np.float32)
        arrays = {"input": normal(*positions, shape.channels), "offset": offset, "mask": mask}
        if shape.operator == "dcnv4":
            parts = (offset.reshape(*positions, groups, 18), mask.reshape(*positions, groups, 9))
            packed = np.concatenate(parts, -1).reshape(*positions, 27 * groups)
            filled = np.zeros((*positions, -packed.shape[-1] % 8), np.float32)
            arrays = {"input": arrays["input"], "offset_mask": np.concatenate([packed, filled], -1)}
        return Problem(shape, arrays, {"groups": groups})
    if isinstance(shape, Aggregation):
        pixels = shape.cameras * sum(h * w for h, w in shape.scales)
        places = rng.uniform(-0.75, 1.75, (1, shape.anchors, shape.points, shape.cameras, 2)).astype(np.float32)
        weights = rng.random((1, *places.shape[1:4], len(shape.scales), shape.groups), np.float32)
        arrays = {"features": normal(1, pixels, shape.channels), "sampling_locations": places, "weights": weights}
        return Problem(shape, arrays, {"spatial_shapes": (shape.scales,) * shape.cameras})
    sizes = np.array(shape.levels)
    moves = normal(1, shape.queries, shape.heads, len(sizes), shape.points, 2)
    if shape.dense:
        centres = np.concatenate([_centres(h, w) for h, w in shape.levels])
        moves *= np.float32(3) / sizes[:, None, ::-1].astype(np.float32)
    else:
        centres = rng.random((shape.queries, 2), np.float32)
        moves *= np.float32(0.05)
    arrays = {
        "value": normal(1, int(sizes.prod(axis=1).sum()), shape.heads, shape.channels),
        "sampling_locations": moves + centres[None, :, None, None, None].astype(np.float32),
        "attention_weights": rng.random(moves.shape[:-1], np.float32),
    }
    return Problem(shape, arrays, {"spatial_shapes": shape.levels})


def _centres(height: int, width: int) -> Any:
    rows, columns = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([columns, rows], -1).reshape(-1, 2)


# What others do -------------------------------------------------------------------------------------------------------


def grid_sample_call(p: Problem, threads: int) -> Call:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    tensors = {name: torch.from_numpy(array) for name, array in p.arrays.items()}

    def sampled(maps: Any, grid: Any) -> Any:
        return torch.nn.functional.grid_sample(maps, 2 * grid - 1, align_corners=False)

    def attention() -> Any:
        value, where, weights = tensors.values()
        batch, queries, heads, levels, points, _ = where.shape
        parts = value.split([h * w for h, w in p.shape.levels], 1)
        found = []
        for level, (part, size) in enumerate(zip(parts, p.shape.levels, strict=True)):
            maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, -1, *size)
            found.append(sampled(maps, where[:, :, :, level].transpose(1, 2).flatten(0, 1)))
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
        output = (torch.stack(found, -2).flatten(-2) * weights).sum(-1)
        return output.view(batch, -1, queries).transpose(1, 2).contiguous().numpy()

    def dcn() -> Any:
        image, groups, side = tensors["input"], p.options["groups"], p.shape.size
        if p.shape.operator == "dcnv3":
            offset, mask = tensors["offset"].view(side, side, groups, 9, 2), tensors["mask"].view(side, side, groups, 9)
        else:
            packed = tensors["offset_mask"][0, ..., : 27 * groups].reshape(side, side, groups, 27)
            offset, mask = packed[..., :18].reshape(side, side, groups, 9, 2), packed[..., 18:]
        axis = torch.arange(side, dtype=torch.float32)
        taps = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)) - 1
        middle = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        grid = (middle[:, :, None, None] + taps + offset + 0.5) / side
        grid = grid.permute(2, 0, 1, 3, 4).reshape(groups, side * side, 9, 2)
        maps = image[0].view(side * side, groups, -1).permute(1, 2, 0).reshape(groups, -1, side, side)
        output = (sampled(maps, grid) * mask.permute(2, 0, 1, 3).reshape(groups, 1, side * side, 9)).sum(-1)
        return output.permute(2, 0, 1).reshape(image.shape).numpy()

    def aggregation() -> Any:
        features, where, weights = tensors.values()
        sizes, cameras = p.shape.scales, p.shape.cameras
        parts = features.split([h * w for h, w in sizes] * cameras, 1)
        output: Any = 0
        for (camera, scale), part in zip(itertools.product(range(cameras), range(len(sizes))), parts, strict=True):
            grid = where[:, :, :, camera]
            seen = ((grid > 0) & (grid < 1)).all(-1)
            found = sampled(part.transpose(1, 2).reshape(1, -1, *sizes[scale]), grid) * seen
            share = weights[:, :, :, camera, scale].permute(0, 3, 1, 2)
            output = output + (found.unflatten(1, (p.shape.groups, -1)) * share[:, :, None]).sum(-1)
        return output.flatten(1, 2).transpose(1, 2).contiguous().numpy()

    return {Attention: attention, Dcn: dcn, Aggregation: aggregation}[type(p.shape)]


def _loop(value: Any, levels: Any, where: Any, weights: Any, output: Any) -> None:
    """What one writes in an afternoon: thirty lines, one thread."""
    half, one = np.float32(0.5), np.float32(1)
    for q in range(where.shape[1]):
        for m in range(where.shape[2]):
            total = output[q, m]
            total[:] = 0
            start = 0
            for level in range(where.shape[3]):
                height, width = levels[level]
                for k in range(where.shape[4]):
                    x = where[0, q, m, level, k, 0] * np.float32(width) - half
                    y = where[0, q, m, level, k, 1] * np.float32(height) - half
                    if not (-1 < x < width and -1 < y < height):
                        continue
                    left, top = math.floor(x), math.floor(y)
                    right_share, low_share = x - np.float32(left), y - np.float32(top)
                    for corner in range(4):
                        row, column = int(top) + corner // 2, int(left) + corner % 2
                        if 0 <= row < height and 0 <= column < width:
                            share = weights[0, q, m, level, k]
                            share *= low_share if corner // 2 else one - low_share
                            share *= right_share if corner % 2 else one - right_share
                            pixel = value[0, start + row * width + column, m]
                            for c in range(value.shape[3]):
                                total[c] += share * pixel[c]
                start += height * width


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    compiled: Callable[..., None] = importlib.import_module("numba").njit(fastmath=True, nogil=True)(function)
    return compiled


def loop_call(p: Problem) -> Call:
    value, where, weights = p.arrays.values()
    levels, shape, loop = np.array(p.shape.levels), (where.shape[1], *value.shape[2:]), _compiled(_loop)

    def call() -> Any:
        output = np.empty(shape, np.float32)
        loop(value, levels, where, weights, output)
        return output.reshape(1, shape[0], -1)

    return call


def _add_up(features: Any, starts: Any, pixels: Any, output: Any) -> None:
    for a in range(output.shape[0]):
        total = output[a]
        total[:] = 0
        for i in range(starts[a], starts[a + 1]):
            one, two, three, four = pixels[i]
            for c in range(total.size):
                total[c] += (features[one, c] + features[two, c]) + (features[three, c] + features[four, c])


class Reads(NamedTuple):
    """Samples of one map: which output each is for, where it lies on each axis, of what size the map is, and which rows
    of features its pixels are: `first`, and `step` more for each pixel."""

    output: Any
    y: Any
    x: Any
    size: tuple[int, int]
    first: Any
    step: int


def _reads(p: Problem) -> Iterator[Reads]:
    if isinstance(p.shape, Dcn):
        side, groups = p.shape.size, p.options["groups"]
        moves = p.arrays["offset"].reshape(side, side, groups, 9, 2)
        y, x, group, tap = np.indices(moves.shape[:-1])  # taps column by column
        places = (y + tap % 3 - 1 + moves[..., 1], x + tap // 3 - 1 + moves[..., 0])
        yield Reads((y * side + x) * groups + group, *places, (side, side), group, groups)
        return
    spread = isinstance(p.shape, Aggregation)
    where = p.arrays["sampling_locations"][0]
    shapes = p.options["spatial_shapes"] if spread else tuple((size,) for size in p.shape.levels)
    start, heads = 0, 1 if spread else where.shape[1]
    for column, of_column in enumerate(shapes):
        x, y = np.moveaxis(where[:, :, column], -1, 0)
        query, head = np.indices(x.shape)[:2]
        head = 0 * head if spread else head
        for h, w in of_column:
            yield Reads(query * heads + head, y * h - 0.5, x * w - 0.5, (h, w), start * heads + head, heads)
            start += h * w


def reading_call(p: Problem) -> Call:
    """Add up the four pixels of each sample inside: the time to read them once, on one thread."""
    found = []
    for output, y, x, (h, w), first, step in _reads(p):
        inside = (y > -0.5) & (y < h - 0.5) & (x > -0.5) & (x < w - 0.5)
        rows, columns = (
            [np.clip(np.floor(at).astype(int) + k, 0, n - 1) for k in (0, 1)] for at, n in ((y, h), (x, w))
        )
        places = [(first + step * (row * w + column))[inside] for row in rows for column in columns]
        found.append(np.stack([output[inside], *places], -1))
    listed = np.concatenate(found)
    listed = listed[np.argsort(listed[:, 0], kind="stable")]
    like, whole = p.forward(), next(iter(p.arrays.values()))
    channels = whole.shape[-1] // p.options.get("groups", 1)
    features, outputs = whole.reshape(-1, channels), like.size // channels
    starts, pixels = np.searchsorted(listed[:, 0], np.arange(outputs + 1)), np.ascontiguousarray(listed[:, 1:])
    output, add_up = np.empty((outputs, channels), np.float32), _compiled(_add_up)

    def call() -> Any:
        add_up(features, starts, pixels, output)
        return output

    return call


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    p = problem(SHAPES[name])
    result, progress = timing.begun(name, p.shape.what(), threads)
    others: dict[str, Call] = {"loop": loop_call(p)} if isinstance(p.shape, Attention) and threads == 1 else {}
    if installed("torch"):
        others["grid_sample"] = grid_sample_call(p, threads)
    ours = p.forward()
    for other, call in others.items():
        difference = float(np.abs(call() - ours).max())
        result[f"largest difference, {other}"] = difference
        if not difference < DIFFERENCE * np.abs(ours).max():
            raise SystemExit(f"{name}: {other} differs from pydeform by {difference:.2g}")
    calls: dict[str, Call] = {"pydeform": p.forward, "pydeform training": p.training, **others}
    if threads == 1 and p.shape.operator != "dcnv4":  # which reads as dcnv3 does
        calls["reading"] = reading_call(p)
    times = timing.interleaved(calls, rounds, progress, cold=True)
    if isinstance(
        p.shape, Dcn
    ):  # whose maps are small: in a loop, as layers of other networks are timed, they stay cached
        times |= {f"{n}, repeated": t for n, t in timing.interleaved(calls, rounds, progress).items()}
    result["times"] = {name: t._asdict() for name, t in times.items()}
    return result


def ratios(times: dict[str, Any]) -> dict[str, float]:
    """Of medians."""
    ours = times["pydeform"]["median"]
    found = {"training/forward": times["pydeform training"]["median"] / ours}
    for how in ("", ", repeated"):
        if f"grid_sample{how}" in times:
            found[f"grid_sample/ours{how}"] = times[f"grid_sample{how}"]["median"] / times[f"pydeform{how}"]["median"]
    for bound in ("loop", "reading"):
        if bound in times:
            found[f"ours/{bound}"] = ours / times[bound]["median"]
    return found


bench = timing.Problems("pydeform.bench.gather", SHAPES, measure, ratios)

if __name__ == "__main__":
    sys.exit(without_traceback("benchmark", bench.main))
