"""What every benchmark here shares: where results go, and measurements that need a fresh process.

The round robin among candidates is in pydeform.bench.timing, where `pydeform bench` finds it as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydeform.bench import timing

RESULTS = Path(__file__).with_name("results")


def device_slug() -> str:
    """A folder name for this machine and its vectors, such as amd-epyc-2-cores-avx2."""
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*$", " ", timing.cpu_name().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", name), str(os.cpu_count()), "cores", vectors()])


def vectors() -> str:
    """The widest that kernels use in a new process."""
    width = timing.python("-c", "from pydeform.cpu.core import simd; print(simd.VECTOR_BYTES)").strip()
    return {"64": "avx512", "32": "avx2"}.get(width, f"{width}-bytes")


def force_avx2() -> None:
    """For all processes from here on, ours and those of libraries that let themselves be told."""
    import llvmlite.binding

    wide = re.compile(r"avx512|avx10|amx|evex512|vp2intersect")
    features = llvmlite.binding.get_host_cpu_features().items()
    os.environ |= {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name, there in features if there and not wide.search(name)),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }


def write(result: dict[str, Any], path: Path) -> None:
    """The result with the machine, versions and date it was measured with. Seconds and bytes throughout."""
    header = {
        "device": {"cpu": timing.cpu_name(), "cores": os.cpu_count(), "system": sys.platform, "vectors": vectors()},
        "versions": timing.versions(),
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, **_rounded(result)}, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Four digits: the rest is noise, and noise in the diff of every later run."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def time_problems(about: str | None, name: str, bench: timing.Problems, *, may_force_avx2: bool = False) -> int:
    """The command line of a benchmark that is nothing but problems: its `run` and `report` for each number of threads.

    A whole run goes to benchmarks/results/<device>/<name>.json. `may_force_avx2`: all peers let themselves be told.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(bench.known), type=timing.names_among("problems", bench.known))
    parser.add_argument("--threads", default="1,2", help="numbers of threads to measure with")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9, and the most threads only")
    if may_force_avx2:
        parser.add_argument("--avx2", action="store_true", help="no wider vectors")
    parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/<device>/{name}.json")
    options = parser.parse_args()
    threads = [int(count) for count in options.threads.split(",")]
    threads, rounds = (threads[-1:], 3) if options.quick else (threads, 9)
    if may_force_avx2 and options.avx2:
        force_avx2()

    speed: dict[str, Any] = {}
    for count in threads:
        speed[str(count)] = bench.run(count, options.problems, rounds)
        print(f"\nthreads {count}\n{bench.report(speed[str(count)])}", flush=True)
    whole = options.problems == list(bench.known) and not options.quick
    path = options.output or (RESULTS / device_slug() / f"{name}.json" if whole else None)
    if path is not None:
        write({"rounds": rounds, "speed": speed}, path)
        print(f"written: {path}")
    return 0


# Linux only: writing 5 to clear_refs sets the peak back to the present size, so that only the call is measured.
_PEAK = """
import json
import pathlib
import numpy as np

def _status(key):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

def _extra_peak(call):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    returned = call()
    kept = sum(a.nbytes for a in (returned if isinstance(returned, tuple) else (returned,)) if a is not None)
    return _status("VmHWM") - before - kept

{setup}
print(json.dumps({{name: _extra_peak(call) for name, call in calls.items()}}))
"""


def extra_memory(setup: str, threads: int) -> dict[str, int] | None:
    """Peak memory of each call beyond what was there before and what it returns. `setup` defines a dict `calls`."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    output = timing.python("-c", _PEAK.format(setup=setup), env=timing.thread_environment(threads))
    result: dict[str, int] = json.loads(output.splitlines()[-1])
    return result


_COMPILE = """
import json
import time
import numpy as np
{setup}

begin = time.perf_counter()
import pydeform  # is part of what the first call costs
seconds = {{"import": time.perf_counter() - begin}}
for name, call in calls.items():
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    steady = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        steady.append(time.perf_counter() - start)
    seconds[name] = first - min(steady)
print(json.dumps({{**seconds, "together": sum(seconds.values())}}))
"""


def compile_seconds(setup: str) -> dict[str, dict[str, float]]:
    """Time to the first result less that of a later one, with an empty cache and then in a process that finds it full.

    Both begin after `import numpy`. `setup` defines a dict `calls`; its functions may use `pydeform`.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "NUMBA_CACHE_DIR": folder}
        return {
            state: json.loads(timing.python("-c", _COMPILE.format(setup=setup), env=env).splitlines()[-1])
            for state in ("cold", "cached")
        }
