"""Everything that needs a GPU, in one go of at most 9 minutes and without a network: `make gpu`.

    python benchmarks/gpu.py                    tests, compute-sanitizer, benchmarks; whatever is missing is skipped
    python benchmarks/gpu.py --only memcheck,interop    stages whose name has one of these in it
    python benchmarks/gpu.py --list             the stages and the seconds that each may take

Each stage is a process of its own, so that a kernel that poisons its CUDA context spoils one stage only, and is killed
when its time is over. Nothing is installed: stages take the CuPy, PyTorch and pytest that this Python has. Logs and the
summary go to build/gpu/, timings to benchmarks/results/<device>/, and a copy of all to $OUT where that is set.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 530.0  # for all stages together
FEWEST = 5.0  # a stage that would get less is not begun
SANITIZER_FAULT = 86  # exit status that says that compute-sanitizer found something
NO_TESTS = 5  # pytest's
# In the order of their worth: when time runs out, the last ones are missing.
COMPILE = 60  # many processes at once: what later stages find in CuPy's cache
EXERCISE = 40
FIRST_TESTS = {"test_cuda_primitives": 50, "test_deform_conv2d": 110, "test_conv2d": 50, "test_roi": 60}
TOOLS = {"memcheck": 50, "racecheck": 60, "initcheck": 40, "synccheck": 40}
BENCHMARKS = {"cuda_deform_conv2d": 150, "cuda_roi": 60}
LAST_TESTS = {
    "test_interop_cuda": 40,
    "test_vectors": 30,
    "test_vectors_roi": 30,
    "test_cuda_names": 20,
    "test_cuda_compile": 90,
    "test_properties": 40,
    "test_analysis": 20,
    "test_errors": 20,
}
DEVICE = """
import json
import cupy
properties = cupy.cuda.runtime.getDeviceProperties(0)
print(json.dumps({"name": properties["name"].decode(), "cupy": cupy.__version__,
                  "driver": cupy.cuda.runtime.driverGetVersion(), "runtime": cupy.cuda.runtime.runtimeGetVersion()}))
"""


class Stage(NamedTuple):
    name: str
    command: Sequence[str]
    seconds: float
    skip: str = ""  # why it cannot run here


class Outcome(NamedTuple):
    name: str
    state: str  # passed, failed, killed or skipped
    seconds: float
    detail: str


# What there is to do -------------------------------------------------------------------------------------------------
def stages(device: str) -> list[Stage]:
    return [
        Stage("compile", [sys.executable, __file__, "--compile"], COMPILE),
        Stage("exercise", [sys.executable, __file__, "--exercise"], EXERCISE),
        *(pytest_stage(name, seconds) for name, seconds in FIRST_TESTS.items()),
        *(benchmark_stage(name, seconds, device) for name, seconds in BENCHMARKS.items()),
        *(sanitizer_stage(tool, seconds) for tool, seconds in TOOLS.items()),
        *(pytest_stage(name, seconds) for name, seconds in LAST_TESTS.items()),
    ]


def pytest_stage(name: str, seconds: float) -> Stage:
    path = ROOT / "tests" / f"{name}.py"
    if not path.is_file():
        return Stage(name, (), seconds, "there is no such file")
    missing = missing_imports([path, ROOT / "tests" / "conftest.py"])
    if importlib.util.find_spec("pytest") is None:
        missing = ["pytest", *missing]
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "--maxfail=40", "-p", "no:cacheprovider"]
    return Stage(name, [*command, str(path)], seconds, f"not installed: {', '.join(missing)}" if missing else "")


def missing_imports(paths: Iterable[Path]) -> list[str]:
    """Packages that these files import when they are loaded, and that this Python does not have."""
    needed: dict[str, None] = {}
    for path in paths:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                needed |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                needed[node.module.partition(".")[0]] = None
    own = {"tests", "pydeform"}
    return [name for name in needed if name not in own and importlib.util.find_spec(name) is None]


def benchmark_stage(name: str, seconds: float, device: str) -> Stage:
    output = RESULTS / device / f"{name.removeprefix('cuda_')}.json"
    # It stops by itself before it would be killed, with what it has.
    command = [sys.executable, f"benchmarks/bench_{name}.py", "--output", str(output), "--seconds", str(seconds - 20)]
    return Stage(name, command, seconds)


def sanitizer_stage(tool: str, seconds: float) -> Stage:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return Stage(tool, (), seconds, "compute-sanitizer is not installed")
    flags = ["--tool", tool, "--error-exitcode", str(SANITIZER_FAULT), "--print-limit", "20"]
    return Stage(tool, [program, *flags, sys.executable, __file__, "--exercise"], seconds)


def kernels_to_compile() -> list[tuple[str, str]]:
    """(operator, expression) of all that `exercise` launches, found by calling everything and launching nothing."""
    from pydeform.cuda import _launch

    found: dict[tuple[str, str], None] = {}

    class Nothing:
        def __call__(self, *_: Any, **__: Any) -> None:
            """In place of a kernel."""

    def look_up(operator: str, expression: str, _: Any) -> Nothing:
        found[operator, expression] = None
        return Nothing()

    real, _launch._kernel = _launch._kernel, look_up
    try:
        exercise()
    finally:
        _launch._kernel = real
    return list(found)


def compile_all(workers: int) -> int:
    """CuPy compiles one kernel at a time in a process, so as many processes as there are processors."""
    import cupy

    print(f"numba {importlib.import_module('numba').__version__}, numpy {importlib.import_module('numpy').__version__}")
    print(f"NVRTC {cupy.cuda.nvrtc.getVersion()}, {workers} processes")
    commands = [[sys.executable, __file__, "--compile-part", f"{part}/{workers}"] for part in range(workers)]
    running = [subprocess.Popen(command) for command in commands]
    return max(abs(process.wait()) for process in running)


def compile_part(part: int, parts: int) -> None:
    from pydeform.cuda import _launch

    mine = kernels_to_compile()[part::parts]
    for operator, expression in mine:
        _launch.kernel(operator, expression)
    print(f"{len(mine)} kernels compiled")


def exercise() -> None:
    """Every family of kernels on small problems, for the sanitizers.

    Without CuPy's pool, in which an access beyond an array is an access to another one.
    """
    import cupy
    import ml_dtypes
    import numpy as np

    import pydeform

    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
    # (batch, channels, height, width, outputs, groups, offset groups): tiles with ragged edges, groups, depthwise
    for n, c, h, w, o, groups, offset_groups in (
        (2, 40, 9, 7, 72, 1, 2),
        (1, 32, 6, 11, 48, 2, 1),
        (2, 6, 7, 5, 6, 6, 3),
    ):
        for dtype in dtypes:

            def array(*shape: int, dtype: Any = dtype) -> Any:
                return cupy.asarray(rng.standard_normal(shape).astype(dtype))

            x, weight, bias, y = array(n, c, h, w), array(o, c // groups, 3, 3), array(o), array(n, o, h, w)
            offset, mask = array(n, 18 * offset_groups, h, w), array(n, 9 * offset_groups, h, w)
            pydeform.conv2d(x, weight, bias, padding=1, groups=groups)
            pydeform.conv2d_backward(y, x, weight, bias, padding=1, groups=groups)
            for allow_tf32 in (False, True):
                pydeform.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask, allow_tf32=allow_tf32)
            for deterministic in (False, True):
                pydeform.deform_conv2d_backward(
                    y, x, offset, weight, bias, padding=1, mask=mask, deterministic=deterministic
                )
    for h, w in ((9, 7), (36, 41)):
        for dtype in dtypes:
            exercise_roi(lambda a, dtype=dtype: cupy.asarray(a.astype(dtype)), rng, h, w)
    cupy.cuda.Device().synchronize()
    print("every kernel ran")


def exercise_roi(send: Any, rng: Any, h: int, w: int) -> None:
    """Every RoI operator, with classes of many channels and of few. `send` makes a device's array of NumPy's."""
    import pydeform

    def array(*shape: int) -> Any:
        return send(rng.standard_normal(shape))

    size = 3  # bins, groups and parts on each axis
    corners = rng.uniform(-3, max(h, w), (5, 5))  # across every border, and some upside down
    corners[:, 0] = 0, 1, 1, 0, 1
    boxes = send(corners)
    for c in (40, 2):
        x, y = array(2, c, h, w), array(5, c, size, size)
        cells = array(2, c * size**2, h, w)
        offset, trans, mask = array(5, 2, size, size), array(5, 4, size, size), array(5, 1, size, size)
        psroi = {"output_dim": c, "pooled_size": size, "group_size": size, "sample_per_part": 2, "trans_std": 0.1}
        for name, arrays, options in (
            ("roi_pool", (x, boxes), {"output_size": size}),
            ("roi_align", (x, boxes), {"output_size": size, "aligned": True}),
            ("roi_align", (x, boxes), {"output_size": size, "sampling_ratio": 2, "mode": "max"}),
            ("ps_roi_pool", (cells, boxes), {"output_size": size}),
            ("ps_roi_align", (cells, boxes), {"output_size": size}),
            ("deform_roi_pool", (x, boxes, offset), {"output_size": size, "mask": mask}),
            ("deform_psroi_pool", (cells, boxes, trans), {**psroi, "mask": mask}),
        ):
            getattr(pydeform, name)(*arrays, **options)
            getattr(pydeform, f"{name}_backward")(y, *arrays, **options)


# Running it ----------------------------------------------------------------------------------------------------------
def run_all(planned: Sequence[Stage], folder: Path, copies: Path | None, seconds: float) -> list[Outcome]:
    """Logs and the summary are complete after every stage, for whoever is stopped in the middle."""
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    for stage in planned:
        say(f"{stage.name} ...")
        left = seconds - (time.monotonic() - begin)
        outcomes.append(run(stage, folder / f"{stage.name}.log", left))
        say(line(outcomes[-1]))
        write_summary(outcomes, folder, copies)
    return outcomes


def run(stage: Stage, log: Path, left: float) -> Outcome:
    if stage.skip:
        return Outcome(stage.name, "skipped", 0.0, stage.skip)
    if left < FEWEST:
        return Outcome(stage.name, "skipped", 0.0, "no time left")
    allowed = min(stage.seconds, left)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYDEFORM_TEST_BACKENDS": "cuda"}
    begin = time.monotonic()
    with log.open("w") as file:
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(allowed)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    state, detail = judge(status, log.read_text(errors="replace"))
    if state == "killed":
        detail = f"after {allowed:.0f} s; last: {detail}"
    return Outcome(stage.name, state, time.monotonic() - begin, detail)


def judge(status: int | None, output: str) -> tuple[str, str]:
    """(state, the line of the output that says most)."""
    lines = [text.strip("= ") for text in output.splitlines() if text.strip("= ")]
    last = lines[-1] if lines else "no output"
    if status is None:
        return "killed", last
    unsupported = [text for text in lines if re.search("device not supported", text, re.IGNORECASE)]
    if unsupported:
        return "skipped", unsupported[0]
    if status == NO_TESTS:
        return "skipped", last
    if status == 0:
        only_skipped = re.fullmatch(r"\d+ skipped.* in [\d.]+s.*", last)
        return ("skipped" if only_skipped else "passed"), last
    errors = [text for text in lines if re.match(r"(ERROR|RACECHECK) SUMMARY: [1-9]", text)]
    return "failed", f"exit status {status}: {errors[0] if errors else last}"


# Telling it ----------------------------------------------------------------------------------------------------------
def say(text: str) -> None:
    sys.stderr.write(f"gpu: {text}\n")
    sys.stderr.flush()


def line(outcome: Outcome) -> str:
    return f"{outcome.state:8}{outcome.seconds:6.1f} s  {outcome.name}: {outcome.detail}"


def write_summary(outcomes: Sequence[Outcome], folder: Path, copies: Path | None) -> None:
    """summary.json, and in `copies` all logs in one file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.json"
    summary.write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1) + "\n")
    if copies is None:
        return
    copies.mkdir(parents=True, exist_ok=True)
    shutil.copy(summary, copies)
    with (copies / "log.txt").open("w") as file:
        for outcome in outcomes:
            file.write(f"\n##### {line(outcome)}\n")
            log = folder / f"{outcome.name}.log"
            if outcome.state != "skipped" and log.is_file():
                file.write(log.read_text(errors="replace"))


def copy_results(device: str, copies: Path, since: float) -> None:
    for path in (RESULTS / device).glob("*.json"):
        if path.stat().st_mtime >= since:
            shutil.copy(path, copies)


def find_device() -> tuple[dict[str, Any], str]:
    """(what CuPy says of the first GPU, folder name such as nvidia-h200); leaves when there is none."""
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(f"gpu: this needs CuPy and a GPU that it can use: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found, "-".join(re.findall(r"[a-z0-9]+", found["name"].lower()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="stages whose name has one of these words in it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--list", action="store_true", help="name the stages and run none")
    parser.add_argument("--exercise", action="store_true", help="what compute-sanitizer watches")
    parser.add_argument("--compile", action="store_true", help="compile all that --exercise launches")
    parser.add_argument("--compile-part", help="K/N: each N-th of them, from the K-th on, from 0")
    options = parser.parse_args()
    if options.exercise:
        exercise()
        return 0
    if options.compile:
        return compile_all(min(os.cpu_count() or 1, 14))
    if options.compile_part:
        compile_part(*map(int, options.compile_part.split("/")))
        return 0
    if options.list:
        for stage in stages("<device>"):
            print(f"{stage.seconds:4.0f} s  {stage.name}{f' (skipped: {stage.skip})' if stage.skip else ''}")
        return 0
    begin, since = time.monotonic(), time.time()
    description, device = find_device()
    say(json.dumps(description))
    copies = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    shutil.rmtree(LOGS, ignore_errors=True)
    words = options.only.split(",")
    planned = [stage for stage in stages(device) if any(word in stage.name for word in words)]
    outcomes = run_all(planned, LOGS, copies, options.seconds - (time.monotonic() - begin))
    if copies is not None:
        copy_results(device, copies, since)
    print("\n".join(map(line, outcomes)))
    counts = {state: sum(o.state == state for o in outcomes) for state in ("passed", "failed", "killed", "skipped")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["failed"] or counts["killed"] else 0


if __name__ == "__main__":
    sys.exit(main())
