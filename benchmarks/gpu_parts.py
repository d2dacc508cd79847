"""What the stages of gpu.py do on the device, each in a process of its own: `python benchmarks/gpu_parts.py PART`.

They print what they find. A figure that nobody measured before is no reason to fail: only an error is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "numba", "ml_dtypes", "torch", "torchvision", "pytest", "cupy-cuda12x", "cupy-cuda13x")
DTYPES = ("float64", "float32", "float16", "bfloat16")
PROCESSES = 14  # that compile at once, at most
REPEATS = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--share", default="0/1", help="K/N: compile each N-th kernel, from the K-th on")
    options = parser.parse_args()
    if options.part == "compile-share":
        compile_share(*map(int, options.share.split("/")))
        return 0
    return PARTS[options.part]() or 0


def kind_of(dtype: str) -> Any:
    return importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


# Versions ------------------------------------------------------------------------------------------------------------
def versions() -> None:
    """First whatever may be missing: without Numba there is no CPU to compare with."""
    import cupy

    from pydeform.bench import cuda_timing

    for name in PACKAGES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is not installed")
    importlib.import_module("numba")
    print("Python", sys.version.split()[0], "on", os.cpu_count(), "processors")
    for name, value in cuda_timing.environment().items():
        print(f"{name}: {value}")
    print("NVRTC", cupy.cuda.nvrtc.getVersion())
    # Part of the key of CuPy's cache of kernels: who compiles on another machine needs to know it.
    print("CuPy adds", importlib.import_module("cupy._core.core").assemble_cupy_compiler_options(()))


# Compiling -----------------------------------------------------------------------------------------------------------
def kernels_to_compile() -> list[tuple[Any, str]]:
    """(code, expression) of all that `exercise` launches, found by calling everything and launching nothing."""
    from pydeform.cuda.core import launch

    found: dict[tuple[Any, str], None] = {}

    class Nothing:
        def __call__(self, *_: Any, **__: Any) -> None:
            """In place of a kernel."""

    def look_up(code: Any, expression: str, _: Any) -> Nothing:
        found[code, expression] = None
        return Nothing()

    real, launch._kernel = launch._kernel, look_up
    try:
        exercise()
    finally:
        launch._kernel = real
    return list(found)


def compile_all() -> int:
    """CuPy compiles one kernel at a time in a process, so as many processes as there are processors."""
    workers = min(os.cpu_count() or 1, PROCESSES)
    print(workers, "processes")
    commands = [[sys.executable, __file__, "compile-share", "--share", f"{part}/{workers}"] for part in range(workers)]
    running = [subprocess.Popen(command) for command in commands]
    return max(abs(process.wait()) for process in running)


def compile_share(part: int, parts: int) -> None:
    from pydeform.cuda.core import launch

    mine = kernels_to_compile()[part::parts]
    for code, expression in mine:
        launch.kernel(code, expression)
    print(f"{len(mine)} kernels compiled")


# Values --------------------------------------------------------------------------------------------------------------
def values(size: int = 14, channels: int = 64, sums: Sequence[int] = (8, 72, 256)) -> None:
    """Against float64 on the CPU. Offset groups in turn and twice: plans of one kernel must not disturb each other."""
    worst: dict[str, float] = {}
    for turn in range(2):
        for offset_groups in (1, 4, 1, 2):
            for dtype in DTYPES:
                arrays = problem(channels, channels, size, offset_groups, dtype)
                for name, error in errors(arrays, dtype):
                    print(f"turn {turn}, {offset_groups} offset groups, {dtype:8} {name:28} {error:.2e}")
                    worst[dtype] = max(worst.get(dtype, 0.0), error)
    for c in sums:
        arrays = {name: abs(a) for name, a in problem(c, 32, size, 1, "float32").items()}
        for name, error in errors(arrays, "float32"):
            print(f"float32, K = {9 * c:4}, nothing negative: {name:28} {error:.2e}")
    print("largest error over the largest value:", ", ".join(f"{dtype} {e:.1e}" for dtype, e in worst.items()))


def problem(channels: int, outputs: int, size: int, offset_groups: int, dtype: str) -> dict[str, Any]:
    """In float64, but made of numbers that the dtype has."""
    rng = np.random.default_rng(channels + offset_groups)
    shapes = {
        "input": (2, channels, size, size),
        "offset": (2, 18 * offset_groups, size, size),
        "weight": (outputs, channels, 3, 3),
        "bias": (outputs,),
        "mask": (2, 9 * offset_groups, size, size),
        "grad_output": (2, outputs, size, size),
    }
    return {name: rng.standard_normal(s).astype(kind_of(dtype)).astype(np.float64) for name, s in shapes.items()}


def errors(arrays: dict[str, Any], dtype: str) -> list[tuple[str, float]]:
    """Of the output and of each gradient, over the largest value."""
    import cupy

    sent = {name: cupy.asarray(a.astype(kind_of(dtype))) for name, a in arrays.items()}
    found = []
    for got, want in zip(results(sent), results(arrays), strict=True):
        for (name, mine), right in zip(got.items(), want.values(), strict=True):
            difference = np.abs(cupy.asnumpy(mine).astype(np.float64) - right)
            found.append((name, float(difference.max() / np.abs(right).max())))
    return found


def results(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Of deform_conv2d and conv2d."""
    import pydeform

    x, offset, weight, bias, mask, y = (
        arrays[name] for name in ("input", "offset", "weight", "bias", "mask", "grad_output")
    )
    deformed = pydeform.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
    deformed_grads = pydeform.deform_conv2d_backward(y, x, offset, weight, bias, padding=1, mask=mask)
    plain = pydeform.conv2d(x, weight, bias, padding=1)
    plain_grads = pydeform.conv2d_backward(y, x, weight, bias, padding=1)
    return [
        {"deform_conv2d": deformed, **{f"deform_conv2d, {k}": v for k, v in deformed_grads._asdict().items()}},
        {"conv2d": plain, **{f"conv2d, {k}": v for k, v in plain_grads._asdict().items()}},
    ]


# Times of each kernel ------------------------------------------------------------------------------------------------
class Timed:
    """A compiled kernel that notes two events for each launch."""

    def __init__(self, function: Any, expression: str, launches: list[tuple[str, Any, Any]]) -> None:
        self.__dict__.update(function=function, expression=expression, launches=launches)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.function, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        import cupy

        events = cupy.cuda.Event(), cupy.cuda.Event()
        events[0].record()
        self.function(*arguments, **options)
        events[1].record()
        self.launches.append((self.expression, *events))


def kernel_times(names: Sequence[str] = ("G1", "G3", "G4"), repeats: int = REPEATS) -> None:
    """Medians of every kernel of a forward and a backward. Those of CuPy itself are not ours and not here."""
    import cupy

    from pydeform.bench import cuda_deform_conv2d as bench
    from pydeform.bench import cuda_timing
    from pydeform.bench.deform_conv2d import problem
    from pydeform.cuda.core import launch

    launches: list[tuple[str, Any, Any]] = []
    real = launch._kernel
    launch._kernel = lambda code, expression, on: Timed(real(code, expression, on), expression, launches)
    wait = cuda_timing.waiter()
    try:
        for name in names:
            p = problem(bench.SHAPES[name])
            for dtype in ("float16", "float32", "tf32"):
                calls = bench.ours([bench.sent(p, dtype)], dtype)
                for call in (calls["forward"]["pydeform"], calls["backward"]["pydeform"]):
                    call(0)
                launches.clear()
                for _ in range(repeats):
                    wait(0.01)  # until all is queued, so that no kernel waits for the host
                    calls["forward"]["pydeform"](0)
                    calls["backward"]["pydeform"](0)
                launches[-1][2].synchronize()
                print_times(f"{name}, {dtype}", launches, repeats, cupy.cuda.get_elapsed_time)
    finally:
        launch._kernel = real


def print_times(title: str, launches: list[tuple[str, Any, Any]], repeats: int, elapsed: Callable[..., float]) -> None:
    times: dict[str, list[float]] = {}
    for expression, before, after in launches:
        times.setdefault(expression, []).append(1e3 * elapsed(before, after))
    for expression, microseconds in times.items():
        print(f"{title}: {len(microseconds) / repeats:4.1f} x {np.median(microseconds):8.1f} us  {expression}")


def once() -> None:
    """One forward and one backward of G1 in float16, for a profiler."""
    from pydeform.bench import cuda_deform_conv2d as bench
    from pydeform.bench.deform_conv2d import problem

    calls = bench.ours([bench.sent(problem(bench.SHAPES["G1"]), "float16")], "float16")
    calls["forward"]["pydeform"](0)
    calls["backward"]["pydeform"](0)
    importlib.import_module("cupy").cuda.Device().synchronize()


# PyTorch -------------------------------------------------------------------------------------------------------------
def torch_graphs_and_streams() -> int:
    """What users do: capture without naming a stream, use two streams, replay after others had memory in between."""
    torch = importlib.import_module("torch")
    import pydeform

    outcomes: list[bool] = []

    def compare(what: str, got: Any, want: Any) -> None:
        torch.cuda.synchronize()
        outcomes.append(bool(torch.equal(got, want)))
        difference = "" if outcomes[-1] else f", at most by {float((got.float() - want.float()).abs().max()):.2e}"
        print(f"{what}: {'same bits' if outcomes[-1] else 'DIFFERENT'}{difference}")

    def arrays(dtype: Any) -> tuple[Any, Any, Any]:
        shapes = (2, 32, 20, 24), (2, 18, 20, 24), (32, 32, 3, 3)
        return tuple(torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype) for shape in shapes)  # type: ignore[return-value]

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, offset, weight = arrays(dtype)
        want = pydeform.deform_conv2d(x, offset, weight, padding=1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = pydeform.deform_conv2d(x, offset, weight, padding=1)
        graph.replay()
        compare(f"graph, {dtype}", got, want)
        others = [torch.full_like(x, float("nan")) for _ in range(64)]  # where the capture's temporaries lay
        with torch.cuda.stream(torch.cuda.Stream()):
            others += [torch.full_like(x, float("nan")) for _ in range(64)]
        torch.cuda.synchronize()
        got.zero_()
        graph.replay()
        compare(f"graph, {dtype}, replayed after {len(others)} allocations", got, want)
        for number in range(2):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = pydeform.deform_conv2d(x, offset, weight, padding=1)
            compare(f"stream {number}, {dtype}", got, want)
    return 0 if all(outcomes) else 1


# What sanitizers watch -----------------------------------------------------------------------------------------------
def exercise(few: bool = False) -> None:
    """Every family of kernels on small problems; few: one shape of plane convolutions in float16 and float32.

    Without CuPy's pool, in which an access beyond an array is an access to another one.
    """
    import cupy
    import ml_dtypes

    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)[: 2 if few else 4]
    # (batch, channels, height, width, outputs, groups, offset groups): tiles with ragged edges, groups, depthwise
    shapes = ((2, 40, 9, 7, 72, 1, 2), (1, 32, 6, 11, 48, 2, 1), (2, 6, 7, 5, 6, 6, 3))
    for shape in shapes[: 1 if few else 3]:
        for dtype in dtypes:
            exercise_convolutions(lambda a, dtype=dtype: cupy.asarray(a.astype(dtype)), rng, *shape)
    # What is compiled anew for another number of axes, or for one offset of all pixels: for many channels and for few.
    for dtype in () if few else dtypes[:2]:
        for c, o in ((40, 72), (3, 5)):
            exercise_axes(lambda a, dtype=dtype: cupy.asarray(a.astype(dtype)), rng, c, o)
    for h, w in () if few else ((9, 7), (36, 41)):
        for dtype in dtypes:
            exercise_roi(lambda a, dtype=dtype: cupy.asarray(a.astype(dtype)), rng, h, w)
    for channels in () if few else (32, 3):
        for dtype in dtypes:
            exercise_gather(lambda a, dtype=dtype: cupy.asarray(a.astype(dtype)), rng, channels)
    for size in () if few else ((9, 7), (4, 5, 3)):
        for dtype in dtypes:
            exercise_grid(lambda a, dtype=dtype: cupy.asarray(a.astype(dtype)), rng, size)
    cupy.cuda.Device().synchronize()
    print("every kernel ran")


def exercise_convolutions(
    send: Any, rng: Any, n: int, c: int, h: int, w: int, o: int, groups: int, offset_groups: int
) -> None:
    import pydeform

    def array(*shape: int) -> Any:
        return send(rng.standard_normal(shape))

    x, weight, bias, y = array(n, c, h, w), array(o, c // groups, 3, 3), array(o), array(n, o, h, w)
    offset, mask = array(n, 18 * offset_groups, h, w), array(n, 9 * offset_groups, h, w)
    pydeform.conv2d(x, weight, bias, padding=1, groups=groups)
    pydeform.conv2d_backward(y, x, weight, bias, padding=1, groups=groups)
    for allow_tf32 in (False, True):
        pydeform.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask, allow_tf32=allow_tf32)
    for deterministic in (False, True):
        pydeform.deform_conv2d_backward(y, x, offset, weight, bias, padding=1, mask=mask, deterministic=deterministic)


def exercise_axes(send: Any, rng: Any, c: int, o: int) -> None:
    """conv1d, conv3d, deform_conv1d, deform_conv3d and active_conv2d."""
    import pydeform

    def array(*shape: int) -> Any:
        return send(rng.standard_normal(shape))

    for size in ((23,), (5, 6, 4)):
        axes, taps = len(size), 3 ** len(size)
        x, weight, bias, y = array(2, c, *size), array(o, c, *(3,) * axes), array(o), array(2, o, *size)
        offset, mask = array(2, axes * taps, *size), array(2, taps, *size)
        name = f"conv{axes}d"
        getattr(pydeform, name)(x, weight, bias, padding=1)
        getattr(pydeform, f"{name}_backward")(y, x, weight, bias, padding=1)
        getattr(pydeform, f"deform_{name}")(x, offset, weight, bias, padding=1, mask=mask)
        for deterministic in (False, True):
            options = {"padding": 1, "mask": mask, "deterministic": deterministic}
            getattr(pydeform, f"deform_{name}_backward")(y, x, offset, weight, bias, **options)
    x, weight, bias, y = array(2, c, 9, 7), array(o, c, 3, 3), array(o), array(2, o, 9, 7)
    positions = array(18)
    pydeform.active_conv2d(x, positions, weight, bias, padding=1)
    for deterministic in (False, True):
        pydeform.active_conv2d_backward(y, x, positions, weight, bias, padding=1, deterministic=deterministic)


def exercise_gather(send: Any, rng: Any, channels: int) -> None:
    """Attention, aggregation, DCNv3 and DCNv4, in groups of so many channels, with places far and near."""
    import pydeform

    def array(*shape: int) -> Any:
        return send(rng.standard_normal(shape))

    groups, shapes, points = 3, ((5, 7), (3, 2)), 4
    value, y, weights = array(2, 41, groups, channels), array(2, 9, groups * channels), array(2, 9, groups, 2, points)
    places, boxes = array(2, 9, groups, 2, points, 2), array(2, 9, 2, 4)
    image, out = array(2, 6, 5, groups * channels), array(2, 6, 5, groups * channels)
    seen, shared = send(rng.uniform(0, 1, (2, 9, points, 2, 2))), array(2, 9, points, 2, 1, groups)
    for name, grad, arrays, options in (
        ("ms_deform_attn", y, (value, shapes, places, weights), {}),
        ("ms_deform_attn", y, (value, shapes, places, weights), {"method": "discrete"}),
        ("ms_deform_attn_fused", y, (value, shapes, boxes, places, weights), {}),
        ("deform_aggregation", y, (array(2, 41, groups * channels), ((shapes[0],), (shapes[1],)), seen, shared), {}),
        ("dcnv3", out, (image, array(2, 6, 5, groups * 18), array(2, 6, 5, groups * 9)), {"groups": groups}),
        ("dcnv4", out, (image, array(2, 6, 5, 88)), {"groups": groups}),
    ):
        getattr(pydeform, name)(*arrays, **options)
        for deterministic in (False, True):
            getattr(pydeform, f"{name}_backward")(grad, *arrays, **options, deterministic=deterministic)


def exercise_grid(send: Any, rng: Any, size: tuple[int, ...]) -> None:
    """grid_sample and warp in every mode, with points inside and outside."""
    import pydeform

    axes = len(size)
    x, y = (send(rng.standard_normal((2, 5, *size))) for _ in range(2))
    grid, moves = send(rng.uniform(-2, 2, (2, *size, axes))), send(3 * rng.standard_normal((2, axes, *size)))
    for mode in ("bilinear", "nearest", "bicubic")[: 5 - axes]:
        for name, places, padding in (("grid_sample", grid, "reflection"), ("warp", moves, "border")):
            options = {"mode": mode, "padding_mode": padding}
            getattr(pydeform, name)(x, places, **options)
            for deterministic in (False, True):
                getattr(pydeform, f"{name}_backward")(y, x, places, **options, deterministic=deterministic)


def exercise_roi(send: Any, rng: Any, h: int, w: int) -> None:
    """Every RoI operator, with classes of many channels and of few. `send` makes a device's array of NumPy's."""
    import pydeform

    def array(*shape: int) -> Any:
        return send(rng.standard_normal(shape))

    size = 3  # bins, groups and parts on each axis
    corners = rng.uniform(-3, max(h, w), (5, 5))  # across every border, and some upside down
    corners[:, 0] = 0, 1, 1, 0, 1
    boxes = send(corners)
    turned = send(np.concatenate([corners, rng.uniform(-3, 3, (5, 1))], axis=1))
    moved = {"needs": ("input", "boxes")}
    for c in (40, 2):
        x, y = array(2, c, h, w), array(5, c, size, size)
        cells = array(2, c * size**2, h, w)
        offset, trans, mask = array(5, 2, size, size), array(5, 4, size, size), array(5, 1, size, size)
        psroi = {"output_dim": c, "pooled_size": size, "group_size": size, "sample_per_part": 2, "trans_std": 0.1}
        for name, arrays, options, needs in (
            ("roi_pool", (x, boxes), {"output_size": size}, {}),
            ("roi_align", (x, boxes), {"output_size": size, "aligned": True}, moved),
            ("roi_align", (x, boxes), {"output_size": size, "sampling_ratio": 2, "mode": "max"}, moved),
            ("roi_align_rotated", (x, turned), {"output_size": size}, {}),
            ("prroi_pool", (x, boxes), {"output_size": size}, moved),
            ("ps_roi_pool", (cells, boxes), {"output_size": size}, {}),
            ("ps_roi_align", (cells, boxes), {"output_size": size}, {}),
            ("deform_roi_pool", (x, boxes, offset), {"output_size": size, "mask": mask}, {}),
            ("deform_psroi_pool", (cells, boxes, trans), {**psroi, "mask": mask}, {}),
        ):
            getattr(pydeform, name)(*arrays, **options)
            getattr(pydeform, f"{name}_backward")(y, *arrays, **options, **needs)


PARTS: dict[str, Callable[[], int | None]] = {
    "versions": versions,
    "compile": compile_all,
    "compile-share": lambda: None,
    "values": values,
    "times": kernel_times,
    "once": once,
    "torch": torch_graphs_and_streams,
    "exercise": exercise,
    "exercise-few": lambda: exercise(few=True),
}


if __name__ == "__main__":
    sys.exit(main())
