"""grid_sample on the CPU: speed against PyTorch's, in every mode.

    python benchmarks/bench_grid.py                       all problems on 1 and 2 threads
    python benchmarks/bench_grid.py --quick               fewer rounds, the most threads only
    python benchmarks/bench_grid.py --problems "maps bilinear zeros,image nearest zeros" --threads 2
    python benchmarks/bench_grid.py --avx2                no wider vectors, on either side

Times are milliseconds, median/minimum, with cold caches. How they are taken: pydeform/bench/timing.py. What is run: its
neighbour grid.py. Results of a partial run go to a file only where --output names one.
"""

from __future__ import annotations

import sys

import _timing

from pydeform.bench.grid import bench

if __name__ == "__main__":
    sys.exit(_timing.time_problems(__doc__, "grid", bench, may_force_avx2=True))
