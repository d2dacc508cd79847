"""RoI pooling on the CPU: speed against peers, and of the backward against the forward.

    python benchmarks/bench_roi.py                       all problems on 1 and 2 threads
    python benchmarks/bench_roi.py --quick               fewer rounds, the most threads only
    python benchmarks/bench_roi.py --problems align,parts --threads 2

Times are milliseconds, median/minimum. How they are taken: pydeform/bench/timing.py. What is run: its neighbour roi.py.
Results of a partial run go to a file only where --output names one.
"""

from __future__ import annotations

import sys

import _timing

from pydeform.bench.roi import bench

if __name__ == "__main__":
    sys.exit(_timing.time_problems(__doc__, "roi", bench))
