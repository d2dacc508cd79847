"""Attention, DCNv3, DCNv4 and aggregation on the CPU: speed against PyTorch's grid_sample and plain loops.

    python benchmarks/bench_gather.py                       all problems on 1 and 2 threads
    python benchmarks/bench_gather.py --quick               fewer rounds, the most threads only
    python benchmarks/bench_gather.py --problems rf-detr,sparse4d --threads 2
    python benchmarks/bench_gather.py --avx2                no wider vectors, on either side

Times are milliseconds, median/minimum, with cold caches. How they are taken: pydeform/bench/timing.py. What is run: its
neighbour gather.py. Results of a partial run go to a file only where --output names one.
"""

from __future__ import annotations

import sys

import _timing

from pydeform.bench.gather import bench

if __name__ == "__main__":
    sys.exit(_timing.time_problems(__doc__, "gather", bench, may_force_avx2=True))
