"""Memory requests of the CUDA kernels, counted on the emulated device: no GPU needed, and no time measured.

    python benchmarks/cuda_traffic.py [--operator deform_conv2d] [--capability 90] [--dtype float16] [--outputs 64]

prints two Markdown tables. The first has, for each kernel and summed over all its blocks, cycles of one multiprocessor:
of the data path, which moves 128 bytes in each (requests of global and of shared memory, and what wgmma reads of its
operands, if one path serves them all, as `make gpu` measures), and of the tensor cores at the rate that NVIDIA states;
and the bytes of the second level of cache, with the first as tests/cuda_emulation/counters.cpp models it. The second
table has the source lines that make the most requests of a warp: 32-byte sectors of global memory and passes over the
banks of shared memory for each, beside the fewest that could have moved the same bytes.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform.bench import roi, timing
from tests.cuda_emulation import device
from tests.cuda_emulation.traffic import PASS, Traffic

LINES = 14  # of each kind, those with the most traffic
BOXES = 12  # of RoI pooling
# Multiply-adds of 16-bit types that a multiprocessor's tensor cores do in a cycle; of tf32, half as many.
TENSOR_RATE = {"75": 512, "80": 1024, "90": 2048}


class Problem(NamedTuple):
    arrays: dict[str, Any]
    options: dict[str, Any]
    grad_output: Any


def deform_conv2d(outputs: int = 64) -> Problem:
    """One image of 64 channels, 16 x 24, smooth offsets of a pixel or so, as networks learn them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :24]
    smooth = np.sin(0.2 * y + 0.3 * x + rng.uniform(0, 6, (1, 18, 1, 1))) + rng.normal(0, 0.1, (1, 18, 16, 24))
    given = {
        "input": rng.normal(0, 1, (1, 64, 16, 24)),
        "offset": smooth,
        "weight": rng.normal(0, 0.1, (outputs, 64, 3, 3)),
        "mask": rng.random((1, 9, 16, 24)),
    }
    return Problem(given, {"padding": 1}, rng.normal(0, 1, (1, outputs, 16, 24)))


def deform_psroi_pool() -> Problem:
    """The first boxes of the benchmark: one group of 256 channels, 38 x 50, 7 x 7 bins of 4 x 4 points."""
    p = roi.problem("parts")
    given = {name: array if name == "input" else array[:BOXES] for name, array in p.arrays.items()}
    return Problem(given, p.options, p.grad_output[:BOXES])


def roi_align() -> Problem:
    """The same boxes on the same input, with 2 x 2 points in a bin."""
    p = deform_psroi_pool()
    given = {name: p.arrays[name] for name in ("input", "boxes")}
    sizes = {"output_size": roi.BINS, "spatial_scale": p.options["spatial_scale"]}
    return Problem(given, {**sizes, "sampling_ratio": 2, "aligned": True}, p.grad_output)


PROBLEMS = {"deform_conv2d": deform_conv2d, "deform_psroi_pool": deform_psroi_pool, "roi_align": roi_align}


def kernels(found: dict[str, Traffic], rate: int) -> str:
    rows = []
    for name, t in sorted(found.items(), key=lambda item: -item[1].data_path_cycles):
        tensor = (t.multiply_adds + 2 * t.tf32_multiply_adds) / rate
        parts = (t.global_passes, t.shared_passes, t.operand_bytes // PASS)
        rows.append((f"`{name}`", t.launches, t.data_path_cycles, *parts, f"{tensor:.0f}", f"{t.l2_bytes / 1e6:.3f}"))
    columns = ("kernel", "launches", "data path", "global", "shared", "operands", "tensor cores", "L2, MB")
    return timing.table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", choices=PROBLEMS, default="deform_conv2d")
    parser.add_argument("--capability", default="90")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--outputs", type=int, default=64, help="channels that deform_conv2d makes")
    options = parser.parse_args()
    device.install()
    of_outputs = (options.outputs,) if options.operator == "deform_conv2d" else ()
    p = PROBLEMS[options.operator](*of_outputs)
    with device.settings(check=True, profile=True, capability=options.capability) as run:
        sent = {name: device.cupy.asarray(array.astype(options.dtype)) for name, array in p.arrays.items()}
        grad_output = device.cupy.asarray(p.grad_output.astype(options.dtype))
        getattr(pydeform, options.operator)(**sent, **p.options)
        getattr(pydeform, f"{options.operator}_backward")(grad_output, **sent, **p.options)
    print(kernels(run.kernels(), TENSOR_RATE[options.capability]), "\n")
    rows = []
    for memory in ("global", "shared"):
        found = [(key, c) for key, c in run.counters().items() if key[2] == memory]
        for (line, kind, _), c in sorted(found, key=lambda item: -item[1].requests)[:LINES]:
            passes, least = (c.sectors, c.least_sectors) if memory == "global" else (c.wavefronts, c.least_wavefronts)
            rows.append((line, kind, memory, c.requests, f"{passes / c.requests:.2f}", f"{least / c.requests:.2f}"))
    print(timing.table(("line", "access", "memory", "requests", "sectors or passes each", "at least"), rows))


if __name__ == "__main__":
    main()
