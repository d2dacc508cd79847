"""Convolutions over one to three axes on the CPU: speed against PyTorch's grid_sample and bare matrix products.

    python benchmarks/bench_conv.py                       all problems on 1 and 2 threads
    python benchmarks/bench_conv.py --quick               fewer rounds, the most threads only
    python benchmarks/bench_conv.py --problems 1-D,3-D --threads 2
    python benchmarks/bench_conv.py --avx2                no wider vectors, on either side

Times are milliseconds, median/minimum. How they are taken: pydeform/bench/timing.py. What is run: its neighbour
conv.py. Results of a partial run go to a file only where --output names one.
"""

from __future__ import annotations

import sys

import _timing

from pydeform.bench.conv import bench

if __name__ == "__main__":
    sys.exit(_timing.time_problems(__doc__, "conv", bench, may_force_avx2=True))
