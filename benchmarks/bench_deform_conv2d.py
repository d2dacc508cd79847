"""deform_conv2d on the CPU: speed against peers and bare matrix products, memory, scaling, compile time.

    python benchmarks/bench_deform_conv2d.py                      everything, about 12 minutes on 2 cores
    python benchmarks/bench_deform_conv2d.py --quick              the same with fewer rounds and threads
    python benchmarks/bench_deform_conv2d.py --shapes W1,W5 --threads 2
    python benchmarks/bench_deform_conv2d.py --scaling            only that part; likewise --speed --memory --compile

Times are milliseconds, median/minimum. How they are taken: pydeform/bench/timing.py. What is run: its neighbour
deform_conv2d.py. Results of a partial run go to a file only where --output names one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import _timing

import pydeform
from pydeform.bench import deform_conv2d as bench
from pydeform.bench import timing

PARTS = ("speed", "scaling", "memory", "compile")
MEMORY_SHAPE = "W6"
SCALING_SHAPE = "W1"
MEGABYTE = 10**6
SLACK = 32 * MEGABYTE  # bytes allowed beside the channels-last copies

MEMORY_SETUP = """
from pydeform.bench import deform_conv2d as bench

small, large = (bench.problem(bench.SHAPES[name]) for name in ("W5", "{shape}"))
for call in (bench.ours_forward, bench.ours_backward):
    call(small)  # compiles
calls = {{"forward": lambda: bench.ours_forward(large), "backward": lambda: bench.ours_backward(large)}}
"""

COMPILE_SETUP = """
rng = np.random.default_rng(0)
x, offset, mask, grad = (rng.standard_normal((1, c, 32, 32), np.float32) for c in (16, 18, 9, 16))
weight, bias = rng.standard_normal((16, 16, 3, 3), np.float32), np.zeros(16, np.float32)
calls = {
    "forward": lambda: pydeform.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask),
    "backward": lambda: pydeform.deform_conv2d_backward(grad, x, offset, weight, bias, padding=1, mask=mask),
}
"""


def speed(threads: list[int], shapes: list[str], rounds: int, runtimes: bool) -> dict[str, Any]:
    results = {}
    for count in threads:
        results[str(count)] = bench.run(count, shapes, rounds, runtimes)
        for what in ("forward", "training"):
            print(f"\nthreads {count}\n{bench.report(results[str(count)], what)}", flush=True)
    return results


def scaling(rounds: int) -> dict[str, Any]:
    """One process, one and two threads in turn: two runs a minute apart would differ by more than the answer."""
    p = bench.problem(bench.SHAPES[SCALING_SHAPE])

    def with_threads(count: int, call: Any) -> Any:
        def run() -> None:
            pydeform.set_num_threads(count)
            call(p)

        return run

    result = {}
    for what, call in (("forward", bench.ours_forward), ("backward", bench.ours_backward)):
        calls = {str(count): with_threads(count, call) for count in (1, 2)}
        timings = timing.interleaved(calls, 2 * rounds, timing.show_progress)
        ratio = timings["1"].median / timings["2"].median
        result[what] = {"1": timings["1"]._asdict(), "2": timings["2"]._asdict(), "ratio": ratio}
        best = timings["1"].minimum / timings["2"].minimum
        print(f"{SCALING_SHAPE} {what}: {ratio:.2f} times as fast on 2 threads as on 1 ({best:.2f} by the minima)")
    return {SCALING_SHAPE: result}


def memory(threads: int) -> dict[str, Any] | None:
    extra = _timing.extra_memory(MEMORY_SETUP.format(shape=MEMORY_SHAPE), threads)
    if extra is None:
        print("memory: not measured, this system does not tell the peak of a call")
        return None
    n, c, h, w = bench.SHAPES[MEMORY_SHAPE][:4]
    copy = 4 * n * c * h * w
    result = {}
    for what, copies in (("forward", 1), ("backward", 2)):
        bound = copies * copy + SLACK
        result[what] = {"extra": extra[what], "bound": bound, "copies": copies}
        print(
            f"{MEMORY_SHAPE} {what}, threads {threads}: peak {extra[what] / MEGABYTE:.1f} MB beyond inputs and results "
            f"(bound {bound / MEGABYTE:.1f}: channels-last copies, {copies}, and 32 MB)"
        )
    return {MEMORY_SHAPE: result}


def compilation() -> dict[str, Any]:
    result = _timing.compile_seconds(COMPILE_SETUP)
    for state, seconds in result.items():
        parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        print(f"first call, {state}, seconds after import numpy: {parts}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(bench.SHAPES), type=timing.names_among("shapes", bench.SHAPES))
    parser.add_argument("--threads", default="1,2", help="numbers of threads to measure speed with")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7, and the most threads only")
    parser.add_argument(
        "--avx2",
        action="store_true",
        help="no wider vectors; without OpenVINO and onnxruntime, which use them anyway, and bfloat16",
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>/deform_conv2d.json")
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true")
    options = parser.parse_args()
    parts = [part for part in PARTS if getattr(options, part)] or list(PARTS)
    threads = [int(count) for count in options.threads.split(",")]
    threads, rounds = (threads[-1:], 3) if options.quick else (threads, 7)
    if options.avx2:
        _timing.force_avx2()

    result: dict[str, Any] = {"rounds": rounds}
    if "speed" in parts:
        result["speed"] = speed(threads, options.shapes, rounds, not options.avx2)
        print()
    if "scaling" in parts:
        result["scaling"] = scaling(rounds)
    if "memory" in parts:
        result["memory"] = memory(max(threads))
    if "compile" in parts:
        result["compile"] = compilation()

    whole = parts == list(PARTS) and options.shapes == list(bench.SHAPES) and not options.quick
    path = options.output or (_timing.RESULTS / _timing.device_slug() / "deform_conv2d.json" if whole else None)
    if path is not None:
        _timing.write(result, path)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
