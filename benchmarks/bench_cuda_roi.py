"""RoI pooling on a GPU: speed against torchvision, and against targets where nothing else does the same.

    python benchmarks/bench_cuda_roi.py                 everything, about a minute
    python benchmarks/bench_cuda_roi.py --problems parts,align --dtypes float16 --output some.json

How times are taken and what is run: pydeform/bench/cuda_roi.py. A whole run, and one with --output, writes its results
after every measurement, so that one that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import _timing

from pydeform.bench import cuda_roi as bench
from pydeform.bench import cuda_timing, timing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_options(parser)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>/roi.json")
    options = parser.parse_args()
    before = cuda_timing.environment()
    folder = _timing.RESULTS / "-".join(re.findall(r"[a-z0-9]+", before["name"].lower()))
    whole = options.problems == list(bench.PROBLEMS) and options.dtypes == list(bench.DTYPES)
    path = options.output or (folder / "roi.json" if whole else None)

    def keep(results: dict[str, Any]) -> None:
        if path is not None:
            after = cuda_timing.environment()
            header = {
                "gpu": before,
                "gpu afterwards": {k: v for k, v in after.items() if v != before.get(k)},
                "versions": timing.versions(bench.LIBRARIES),
                "problems": {name: bench.PROBLEMS[name] for name in results},
            }
            _timing.write({**header, "speed": results}, path)

    results = bench.run(options.problems, options.dtypes, options.seconds, keep)
    for what in ("forward", "backward"):
        print(f"\n{bench.report(results, what)}")
    mistakes = bench.wrong(results)
    print("\n".join(mistakes))
    if path is not None:
        print(f"written: {path}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
