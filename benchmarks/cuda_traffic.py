"""Memory requests of the CUDA kernels, counted on the emulated device: no GPU needed, and no time measured.

    python benchmarks/cuda_traffic.py [--capability 90] [--dtype float16]

prints a Markdown table of the source lines that make the most requests of a warp: 32-byte sectors of global memory and
passes over the banks of shared memory for each, beside the fewest that could have moved the same bytes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import pydeform
from pydeform.bench import timing
from tests.cuda_emulation import device

LINES = 14  # of each kind, those with the most traffic


def arrays(dtype: Any) -> tuple[dict[str, Any], Any]:
    """One image of 64 channels, 16 x 24, smooth offsets of a pixel or so, as networks learn them; 64 outputs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :24]
    smooth = np.sin(0.2 * y + 0.3 * x + rng.uniform(0, 6, (1, 18, 1, 1))) + rng.normal(0, 0.1, (1, 18, 16, 24))
    given = {
        "input": rng.normal(0, 1, (1, 64, 16, 24)),
        "offset": smooth,
        "weight": rng.normal(0, 0.1, (64, 64, 3, 3)),
        "mask": rng.random((1, 9, 16, 24)),
    }
    return {name: array.astype(dtype) for name, array in given.items()}, rng.normal(0, 1, (1, 64, 16, 24)).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", default="90")
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    device.install()
    given, grad_output = arrays(options.dtype)
    with device.settings(check=True, profile=True, capability=options.capability) as run:
        sent = {name: device.cupy.asarray(array) for name, array in given.items()}
        pydeform.deform_conv2d(**sent, padding=1)
        pydeform.deform_conv2d_backward(device.cupy.asarray(grad_output), **sent, padding=1)
    rows = []
    for memory in ("global", "shared"):
        found = [(key, c) for key, c in run.counters().items() if key[2] == memory]
        for (line, kind, _), c in sorted(found, key=lambda item: -item[1].requests)[:LINES]:
            passes, least = (c.sectors, c.least_sectors) if memory == "global" else (c.wavefronts, c.least_wavefronts)
            rows.append((line, kind, memory, c.requests, f"{passes / c.requests:.2f}", f"{least / c.requests:.2f}"))
    print(timing.table(("line", "access", "memory", "requests", "sectors or passes each", "at least"), rows))


if __name__ == "__main__":
    main()
