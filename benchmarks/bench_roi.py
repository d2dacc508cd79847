"""RoI pooling on the CPU: speed against peers, and of the backward against the forward.

    python benchmarks/bench_roi.py                       all problems on 1 and 2 threads
    python benchmarks/bench_roi.py --quick               fewer rounds, the most threads only
    python benchmarks/bench_roi.py --problems align,parts --threads 2

Times are milliseconds, median/minimum. How they are taken: pydeform/bench/timing.py. What is run: its neighbour roi.py.
Results of a partial run go to a file only where --output names one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import _timing

from pydeform.bench import roi as bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(bench.PROBLEMS), type=bench.problem_names)
    parser.add_argument("--threads", default="1,2", help="numbers of threads to measure with")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9, and the most threads only")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>/roi.json")
    options = parser.parse_args()
    threads = [int(count) for count in options.threads.split(",")]
    threads, rounds = (threads[-1:], 3) if options.quick else (threads, 9)

    speed: dict[str, Any] = {}
    for count in threads:
        speed[str(count)] = bench.run(count, options.problems, rounds)
        print(f"\nthreads {count}\n{bench.report(speed[str(count)])}", flush=True)
    whole = options.problems == list(bench.PROBLEMS) and not options.quick
    path = options.output or (_timing.RESULTS / _timing.device_slug() / "roi.json" if whole else None)
    if path is not None:
        _timing.write({"rounds": rounds, "speed": speed}, path)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
