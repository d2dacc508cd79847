"""Time calls on a GPU: the device's own time of each, apart from what the host takes to ask for it.

A kernel that only waits goes first, until the host has queued a block of calls with an event between any two. So the
device never waits for the host in between, however short the kernels are.
"""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from pydeform.bench import timing

ROUNDS = 3
BLOCK = 0.03  # seconds of the device in one block
FEWEST, MOST = 3, 24  # calls in one block; a stream takes about a thousand launches before the host must wait
SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
WAIT = """
extern "C" __global__ void wait(long long nanoseconds) {
  long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}
"""

Call = Callable[[int], Any]  # with the number of the call, which chooses the copy of the inputs


class Timing(NamedTuple):
    """Seconds, over all calls of all rounds."""

    median: float
    minimum: float
    calls: int
    host: float  # median over the blocks


def block(call: Call, calls: int, wait: Callable[[float], None], ahead: float) -> tuple[list[float], float, bool]:
    """(device's seconds of each call, host's for one, whether the device had to wait for the host)."""
    cupy = importlib.import_module("cupy")
    events = [cupy.cuda.Event() for _ in range(calls + 1)]
    wait(ahead)
    begin = time.perf_counter()
    events[0].record()
    for number, event in enumerate(events[1:]):
        call(number)
        event.record()
    host = (time.perf_counter() - begin) / calls
    late = events[0].done
    events[-1].synchronize()
    seconds = [cupy.cuda.get_elapsed_time(a, b) / 1e3 for a, b in itertools.pairwise(events)]
    return seconds, host, late


def interleaved(calls: dict[str, Call], progress: Callable[[str], None]) -> dict[str, Timing]:
    """Round robin, so that all candidates meet the same clocks. The first calls, which compile, are not counted."""
    wait = waiter()
    plans: dict[str, tuple[int, float]] = {}
    for name, call in calls.items():
        progress(f"warming {name}")
        for number in range(2):
            call(number)
        device, host, _ = block(call, FEWEST, wait, 0.0)
        many = int(min(MOST, max(FEWEST, BLOCK / max(min(device), 1e-6))))
        plans[name] = many, 1.5 * many * host + 1e-3
    device_seconds: dict[str, list[float]] = {name: [] for name in calls}
    host_seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name, call in calls.items():
            progress(f"round {number + 1}/{ROUNDS}, {name}")
            many, ahead = plans[name]
            device, host, late = block(call, many, wait, ahead)
            if late:
                plans[name] = many, 4 * ahead
                device, host, _ = block(call, many, wait, 4 * ahead)
            device_seconds[name] += device
            host_seconds[name].append(host)
    return {
        name: Timing(float(np.median(s)), min(s), len(s), float(np.median(host_seconds[name])))
        for name, s in device_seconds.items()
    }


def waiter() -> Callable[[float], None]:
    """A function that keeps the device busy for some seconds."""
    cupy = importlib.import_module("cupy")
    kernel = cupy.RawKernel(WAIT, "wait")

    def wait(seconds: float) -> None:
        if seconds:
            kernel((1,), (1,), (np.int64(seconds * 1e9),))

    return wait


@contextmanager
def one_stream() -> Iterator[None]:
    """Torch and CuPy on one stream that is not the default."""
    if not timing.installed("torch"):
        with importlib.import_module("cupy").cuda.Stream(non_blocking=True):
            yield
        return
    torch = importlib.import_module("torch")
    stream = torch.cuda.Stream()
    on_stream = importlib.import_module("pydeform.cuda.core.dlpack").on_stream
    with torch.cuda.stream(stream), on_stream(stream.device_index, stream.cuda_stream):
        yield


def measured(
    pairs: Iterable[tuple[str, str]],
    measure: Callable[[str, str, int, Callable[[str], None]], dict[str, Any]],
    seconds: float,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """problem -> dtype -> what `measure` finds for that pair with the second-level cache's bytes, until the time is
    over; `keep` gets what there is after each of them."""
    cupy = importlib.import_module("cupy")
    cache = int(cupy.cuda.Device().attributes["L2CacheSize"])
    begin = time.monotonic()
    results: dict[str, Any] = {}
    with one_stream():
        for name, dtype in pairs:
            if time.monotonic() - begin > seconds:
                print(f"{name} {dtype}: no time left", file=sys.stderr)
                continue

            def progress(text: str, where: str = f"{name} {dtype}") -> None:
                timing.show_progress(f"{where}, {text}")

            results.setdefault(name, {})[dtype] = measure(name, dtype, cache, progress)
            cupy.get_default_memory_pool().free_all_blocks()
            if keep is not None:
                keep(results)
    timing.show_progress("")
    return results


def environment() -> dict[str, Any]:
    """The device, and what nvidia-smi says of it where that answers."""
    cupy = importlib.import_module("cupy")
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    found: dict[str, Any] = {
        "name": properties["name"].decode(),
        "multiprocessors": properties["multiProcessorCount"],
        "L2 bytes": properties["l2CacheSize"],
        "memory bytes": properties["totalGlobalMem"],
        "capability": f"{properties['major']}.{properties['minor']}",
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
    }
    return found | smi()


def smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode:
        return {}
    return dict(zip(SMI, (text.strip() for text in done.stdout.strip().split(",")), strict=False))
