"""Three numbers that decide what the CUDA kernels are to become: `python benchmarks/cuda_measurements.py`, on a GPU.

How fast sums in device memory grow, by how many warps add to one place at a time; whether wgmma's operands and loads
from L1 share one path; what a fence between ordinary stores and wgmma costs. The kernels are in cuda_measurements.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 7
PRIMITIVES = "core/primitives.cuh"


def source() -> str:
    primitives = (ROOT / "pydeform" / "cuda" / PRIMITIVES).read_text("utf-8").replace("#pragma once\n", "\n")
    text = (ROOT / "benchmarks" / "cuda_measurements.cu").read_text("utf-8")
    include = f'#include "{PRIMITIVES}"\n'
    if include not in text:
        raise ValueError(f"cuda_measurements.cu does not include {PRIMITIVES}")
    return text.replace(include, f'#line 1 "{PRIMITIVES}"\n{primitives}\n#line 3 "cuda_measurements.cu"\n')


def main(turns: int = 2000, blocks: int = 4, stride: int = 1 << 18) -> None:
    """`blocks` for each multiprocessor where it matters that all are busy."""
    import cupy

    device = cupy.cuda.Device()
    hopper = device.compute_capability == "90"
    processors = int(device.attributes["MultiProcessorCount"])
    module = cupy.RawModule(code=source(), options=("-std=c++17",), name_expressions=["add_rate"])
    measure_adds(module.get_function("add_rate"), blocks * processors, turns // 10 or 1)
    if hopper:
        from pydeform.cuda.core import sm_90a

        measure_sharing(lambda expression: sm_90a.kernel(source(), expression), processors, turns)
        measure_fences(sm_90a.kernel(source(), "fence_cost"), min(turns, 200), stride)
    else:
        print("wgmma and its fences are for compute capability 9.0")


def seconds_of(launch: Callable[[], None]) -> float:
    """The least of some."""
    import cupy

    found = []
    for _ in range(REPEATS):
        events = cupy.cuda.Event(), cupy.cuda.Event()
        events[0].record()
        launch()
        events[1].record()
        events[1].synchronize()
        found.append(cupy.cuda.get_elapsed_time(*events) / 1e3)
    return max(min(found), 1e-9)


def measure_adds(function: Any, blocks: int, turns: int, places: int = 20_000) -> None:
    import cupy

    sums, added = cupy.zeros(places * 128, np.float32), blocks * 8 * 512 * turns
    for together in (1, 9, 36):
        numbers = np.int32(places), np.int32(together), np.int32(turns)
        seconds = seconds_of(lambda n=numbers, f=function: f((blocks,), (256,), (sums, *n)))
        print(f"adds, {together:2} warps at one place: {added / seconds / 1e9:.0f} GB/s")
    print(f"sum of all {float(cupy.asnumpy(sums).sum(dtype=np.float64)):.0f}, of {3 * REPEATS * added / 4:.0f}")


def measure_sharing(kernel: Callable[[str], Any], blocks: int, turns: int) -> None:
    import cupy

    data, out = cupy.zeros(64 * 8 * 8 * 4, np.uint32), cupy.zeros(blocks * 512, np.float32)
    for lines in (4, 8):
        function, times = kernel(f"share<{lines}>"), {}
        for name, work in (("multiply", 1), ("load", 2), ("both", 3)):
            arguments = data, out, np.int32(turns), np.int32(work)
            times[name] = seconds_of(
                lambda f=function, a=arguments: f((blocks,), (512,), a, shared_mem=2 * 8192 + 16384)
            )
        each = ", ".join(f"{name} {1e9 * seconds / turns:.0f} ns" for name, seconds in times.items())
        alone = times["multiply"] + times["load"]
        print(f"a turn of 48 KB each, {lines} lines a load: {each}; both / sum {times['both'] / alone:.2f}")


def measure_fences(function: Any, turns: int, stride: int) -> None:
    """`stride` words lie between the loads of two turns."""
    import cupy

    far = cupy.zeros((turns + 1) * stride, np.uint32)
    for loads in (0, 1):
        cycles = cupy.zeros((turns, 32), np.int64)
        function((1,), (32,), (far, cycles, np.int32(turns), np.int32(stride), np.int32(loads)))
        found = cupy.asnumpy(cycles)[1:].max(axis=1)  # without the first turn, which fetches code
        quartiles = np.percentile(found, (25, 50, 75))
        print(f"fence, {'a load on its way' if loads else 'nothing on its way'}: {quartiles} cycles")


if __name__ == "__main__":
    main()
