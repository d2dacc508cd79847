"""Everything that needs a GPU, in one go of at most 9 minutes and without a network: `make gpu`.

    python benchmarks/gpu.py                     all parts in their order; whatever is missing is skipped
    python benchmarks/gpu.py values memcheck     these only, each with its own time limit
    python benchmarks/gpu.py --list              the parts and the seconds that each may take

Parts are in the order of their worth: what would explain a failure of the next one comes before it. The limits of those
that always run add up to less than 9 minutes; the others run in what is left of these.

Each part is a process of its own, so that a kernel that poisons its CUDA context spoils one part only, and is killed
when its time is over. Nothing is installed: parts take the CuPy, PyTorch and pytest that this Python has. Logs and the
summary go to benchmarks/results/<device>/gpu/, timings beside it, and a copy of all to $OUT where that is set.
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
RESULTS = ROOT / "benchmarks" / "results"
PARTS = "benchmarks/gpu_parts.py"
SECONDS = 535.0  # for all parts together
FEWEST = 5.0  # a part that would get less is not begun
SANITIZER_FAULT = 86  # exit status that says that compute-sanitizer found something
NO_TESTS = 5  # pytest's
METRICS = (
    *("gpu__time_duration.sum", "sm__cycles_elapsed.max", "sm__inst_executed.sum", "sm__inst_issued.sum"),
    *("sm__inst_executed_pipe_tensor.sum", "l1tex__data_pipe_lsu_wavefronts.sum", "l1tex__data_bank_reads.sum"),
    *("l1tex__data_bank_writes.sum", "lts__t_sectors_op_red.sum", "lts__t_bytes.sum", "dram__bytes.sum"),
    *(
        f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio"
        for why in ("barrier", "long_scoreboard", "gmma")
    ),
)
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
    """Those that always run; `spare_stages` has the rest."""
    return [
        own_stage("versions", 15),
        own_stage("compile", 60),
        pytest_stage("test_cuda_primitives", 40),
        Stage("measure", [sys.executable, "benchmarks/cuda_measurements.py"], 20),
        own_stage("values", 60),
        sanitizer_stage("memcheck", "exercise-few", 35),
        sanitizer_stage("racecheck", "exercise-few", 35),
        own_stage("times", 40),
        profiler_stage(40),
        own_stage("torch", 25, "torch"),
        pytest_stage("test_interop_cuda", 25),
        pytest_stage("test_deform_conv2d", 40),
        pytest_stage("test_roi", 25),
        benchmark_stage("cuda_deform_conv2d", 50, device),
        benchmark_stage("cuda_roi", 20, device),
    ]


def spare_stages() -> list[Stage]:
    return [
        pytest_stage("test_conv2d", 50),
        own_stage("exercise", 40),
        *(sanitizer_stage(tool, "exercise", 60) for tool in ("initcheck", "synccheck")),
        sanitizer_stage("memcheck", "exercise", 60)._replace(name="memcheck-all"),
        *(pytest_stage(f"test_{name}", 30) for name in ("vectors", "vectors_roi", "cuda_names", "properties")),
        *(pytest_stage(f"test_{name}", 30) for name in ("analysis", "errors")),
        pytest_stage("test_cuda_compile", 90),
    ]


def own_stage(name: str, seconds: float, needs: str = "cupy") -> Stage:
    missing = importlib.util.find_spec(needs) is None
    return Stage(name, [sys.executable, PARTS, name], seconds, f"not installed: {needs}" if missing else "")


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
    command = [sys.executable, f"benchmarks/bench_{name}.py", "--output", str(output), "--seconds", str(seconds - 10)]
    return Stage(name, command, seconds)


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def sanitizer_stage(tool: str, part: str, seconds: float) -> Stage:
    found = program("compute-sanitizer")
    if found is None:
        return Stage(tool, (), seconds, "compute-sanitizer is not installed")
    flags = ["--tool", tool, "--error-exitcode", str(SANITIZER_FAULT), "--print-limit", "20"]
    return Stage(tool, [found, *flags, sys.executable, PARTS, part], seconds)


def profiler_stage(seconds: float) -> Stage:
    """One launch each of the kernels that do the work, at the clocks that the device chooses."""
    found = program("ncu")
    if found is None:
        return Stage("ncu", (), seconds, "ncu is not installed")
    kernels = "regex:forward|backward_data|backward_weight|to_channels_last"
    flags = ["--clock-control", "none", "--kernel-name", kernels, "--metrics", ",".join(METRICS)]
    return Stage("ncu", [found, *flags, sys.executable, PARTS, "once"], seconds)


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


def chosen(device: str, names: Sequence[str]) -> list[Stage]:
    every = {stage.name: stage for stage in [*stages(device), *spare_stages()]}
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ValueError(f"no such part: {', '.join(unknown)}; there are {', '.join(every)}")
    return [every[name] for name in names] or list(every.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--list", action="store_true", help="name the parts and run none")
    options = parser.parse_args()
    if options.list:
        for stage in [*stages("<device>"), *spare_stages()]:
            print(f"{stage.seconds:4.0f} s  {stage.name}{f' (skipped: {stage.skip})' if stage.skip else ''}")
        return 0
    try:
        chosen("", options.parts)
    except ValueError as error:
        parser.error(str(error))
    begin, since = time.monotonic(), time.time()
    description, device = find_device()
    say(json.dumps(description))
    copies = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    logs = RESULTS / device / "gpu"
    planned = chosen(device, options.parts)
    outcomes = run_all(planned, logs, copies, options.seconds - (time.monotonic() - begin))
    if copies is not None:
        copy_results(device, copies, since)
    print("\n".join(map(line, outcomes)))
    counts = {state: sum(o.state == state for o in outcomes) for state in ("passed", "failed", "killed", "skipped")}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["failed"] or counts["killed"] else 0


if __name__ == "__main__":
    sys.exit(main())
