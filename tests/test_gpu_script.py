"""`make gpu` without a GPU: stages that stand in for the real ones show what it does when something goes wrong."""

import json
import os
import runpy
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import pydeform
from tests.conftest import needs_emulation
from tests.cuda_emulation import nvrtc

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
GPU = runpy.run_path(str(SCRIPT))
PARTS = runpy.run_path(str(SCRIPT.with_name("gpu_parts.py")))
MEASUREMENTS = runpy.run_path(str(SCRIPT.with_name("cuda_measurements.py")))
Stage, Outcome = GPU["Stage"], GPU["Outcome"]


def stage(name, program="", seconds=20, **options):
    return Stage(name, [sys.executable, "-c", program], seconds, **options)


def run(*planned, folder, copies=None, seconds=60):
    return {outcome.name: outcome for outcome in GPU["run_all"](planned, folder, copies, seconds)}


def test_each_stage_ends_in_its_way(tmp_path, capsys):
    outcomes = run(
        stage("good", "print('3 passed in 0.1s')"),
        stage("bad", "import sys; print('1 failed'); sys.exit(1)"),
        stage("crash", "import os; os.abort()"),
        stage("slow", "import time; print('half of it', flush=True); time.sleep(60)", seconds=1.0),
        stage("missing", skip="compute-sanitizer is not installed"),
        stage("after", "print('still running')"),
        folder=tmp_path,
    )
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        "good": "passed",
        "bad": "failed",
        "crash": "failed",
        "slow": "killed",
        "missing": "skipped",
        "after": "passed",
    }
    assert outcomes["good"].detail == "3 passed in 0.1s"
    assert outcomes["bad"].detail == "exit status 1: 1 failed"
    assert outcomes["crash"].detail == "exit status -6: no output"
    assert outcomes["slow"].detail == "after 1 s; last: half of it"
    assert outcomes["slow"].seconds < 10
    assert outcomes["missing"].detail == "compute-sanitizer is not installed"
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "gpu: good ..." and shown[1].startswith("gpu: passed") and len(shown) == 12


def test_what_a_stage_started_is_killed_with_it(tmp_path):
    pid = tmp_path / "pid"
    program = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    outcomes = run(stage("slow", program, seconds=3.0), folder=tmp_path)
    assert outcomes["slow"].state == "killed"
    status = Path("/proc") / pid.read_text() / "status"
    end = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_time_that_is_over_skips_the_rest(tmp_path, monkeypatch):
    monkeypatch.setitem(GPU["run"].__globals__, "FEWEST", 0.5)
    outcomes = run(
        stage("long", "import time; time.sleep(60)"), stage("rest", "print('ran')"), folder=tmp_path, seconds=1.0
    )
    assert outcomes["long"].state == "killed" and outcomes["long"].detail.startswith("after 1 s")
    assert outcomes["rest"] == Outcome("rest", "skipped", 0.0, "no time left")


def test_copies_are_complete_after_every_stage(tmp_path):
    copies = tmp_path / "copies"
    look = f"assert 'first output' in open({str(copies / 'log.txt')!r}).read(); print('second')"
    run(
        stage("one", "print('first output')"),
        stage("two", look),
        stage("three", skip="no reason"),
        folder=tmp_path / "logs",
        copies=copies,
    )
    sections = (copies / "log.txt").read_text().split("\n##### ")[1:]
    assert [section.splitlines()[1:] for section in sections] == [["first output"], ["second"], []]
    summary = json.loads((copies / "summary.json").read_text())
    assert [(entry["name"], entry["state"]) for entry in summary] == [
        ("one", "passed"),
        ("two", "passed"),
        ("three", "skipped"),
    ]
    assert sorted(path.name for path in copies.iterdir()) == ["log.txt", "summary.json"]


def test_stages_know_where_they_are(tmp_path):
    program = "import os, pydeform; print(os.environ['PYDEFORM_TEST_BACKENDS'], pydeform.__file__)"
    assert run(stage("where", program), folder=tmp_path)["where"].detail == f"cuda {ROOT / 'pydeform' / '__init__.py'}"


@pytest.mark.parametrize(
    "status, output, expected",
    [
        (0, "...\n==== 2 passed, 1 skipped in 0.5s ====\n", ("passed", "2 passed, 1 skipped in 0.5s")),
        (0, "sss\n3 skipped in 0.5s\n", ("skipped", "3 skipped in 0.5s")),
        (5, "no tests ran in 0.01s", ("skipped", "no tests ran in 0.01s")),
        (1, "x\n1 failed, 2 passed in 1.0s", ("failed", "exit status 1: 1 failed, 2 passed in 1.0s")),
        (86, "========= ERROR SUMMARY: 3 errors\nbye", ("failed", "exit status 86: ERROR SUMMARY: 3 errors")),
        (0, "========= ERROR SUMMARY: 0 errors", ("passed", "ERROR SUMMARY: 0 errors")),
        (
            86,
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            ("failed", "exit status 86: RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
        ),
        (1, "========= Error: Device not supported\nmore", ("skipped", "Error: Device not supported")),
        (None, "", ("killed", "no output")),
    ],
)
def test_verdicts(status, output, expected):
    assert GPU["judge"](status, output) == expected


def test_missing_packages_are_found_before_a_test_fails_for_them(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text("import os, numpy.linalg, nowhere.at.all\nfrom absent import x\nfrom tests.conftest import y\n")
    assert GPU["missing_imports"]([path]) == ["nowhere", "absent"]


def test_stages_are_made_of_files_that_exist():
    planned = [*GPU["stages"]("some-device"), *GPU["spare_stages"]()]
    assert len({entry.name for entry in planned}) == len(planned)
    assert not [entry.name for entry in planned if entry.skip == "there is no such file"]
    scripts = [Path(word) for entry in planned for word in entry.command if word.startswith("benchmarks/")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    own = [entry.command[2] for entry in planned if GPU["PARTS"] in entry.command[:2]]
    assert {"versions", "compile", "values", "times", "exercise"} <= set(own) and set(own) <= set(PARTS["PARTS"])


def test_limits_fit_in_nine_minutes(monkeypatch):
    """Also where every tool is installed."""
    monkeypatch.setitem(GPU["program"].__globals__, "program", lambda name: name)
    planned = GPU["stages"]("some-device")
    assert not [entry.name for entry in planned if "installed" in entry.skip and "cupy" not in entry.skip]
    assert sum(entry.seconds for entry in planned) <= GPU["SECONDS"] < 9 * 60
    assert [entry.name for entry in planned[:6]] == [
        *("versions", "compile", "test_cuda_primitives", "measure", "values", "memcheck")
    ]


def test_parts_can_be_run_one_by_one():
    assert [entry.name for entry in GPU["chosen"]("some-device", ["values", "initcheck"])] == ["values", "initcheck"]
    everything = GPU["chosen"]("some-device", [])
    assert len(everything) == len(GPU["stages"]("")) + len(GPU["spare_stages"]())
    with pytest.raises(ValueError, match="no such part: speed; there are versions, compile"):
        GPU["chosen"]("some-device", ["speed"])
    done = subprocess.run([sys.executable, str(SCRIPT), "speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such part: speed" in done.stderr


def test_what_the_sanitizers_watch_is_sound(monkeypatch):
    """With NumPy in CuPy's place: the shapes fit, and every option that is asked for exists."""
    cupy = types.ModuleType("cupy")
    cupy.asarray = np.asarray
    cupy.cuda = types.SimpleNamespace(
        set_allocator=lambda allocator: None, Device=lambda: types.SimpleNamespace(synchronize=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    calls = []
    planes = {"conv2d", "conv2d_backward", "deform_conv2d", "deform_conv2d_backward"}
    others = ("conv1d", "conv3d", "deform_conv1d", "deform_conv3d", "active_conv2d")
    for name in (*planes, *others, *(f"{name}_backward" for name in others)):
        function = getattr(pydeform, name)
        monkeypatch.setattr(
            pydeform, name, lambda *a, f=function, n=name, **k: calls.append((n, a[0].dtype.name)) or f(*a, **k)
        )
    PARTS["exercise"]()
    of_planes = [call for call in calls if call[0] in planes]
    assert len(set(of_planes)) == 16 and len(of_planes) == 3 * 4 * 6
    assert len(set(calls) - set(of_planes)) == 2 * 2 * len(others)
    calls.clear()
    PARTS["exercise"](few=True)
    assert len(set(calls)) == 8 and len(calls) == 2 * 6


# On the emulated device ----------------------------------------------------------------------------------------------
def forget_plans():
    """And all else that the launch code keeps."""
    from pydeform.cuda.core import launch

    for name, loaded in list(sys.modules.items()):
        if name.startswith("pydeform.cuda."):
            for value in vars(loaded).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    launch._allowed.clear()


@pytest.fixture
def gpu(emulated, monkeypatch):
    """As a GPU looks to the parts: one that can be waited for, and that has an allocator and a clock."""
    import cupy

    from pydeform.bench import cuda_timing
    from tests.cuda_emulation import device, streams

    core = types.SimpleNamespace(assemble_cupy_compiler_options=lambda options: ("-DX=1", *options))
    monkeypatch.setitem(sys.modules, "cupy._core.core", core)
    monkeypatch.setattr(cupy.cuda, "set_allocator", lambda allocator: None, raising=False)
    monkeypatch.setattr(streams.Event, "synchronize", lambda self: None)
    monkeypatch.setattr(streams.Device, "synchronize", lambda self: None)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda a, b: 0.5)
    monkeypatch.setattr(cuda_timing, "environment", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(cuda_timing, "waiter", lambda: lambda seconds: None)
    forget_plans()
    with device.settings(capability="90", processors=1):
        yield cupy
    forget_plans()


@needs_emulation
def test_versions_are_told(gpu, capsys):
    PARTS["versions"]()
    said = capsys.readouterr().out
    assert f"numpy {np.__version__}" in said and "torchvision" in said and "clocks.sm: 1980 MHz" in said
    assert "NVRTC (0, 0)" in said and "CuPy adds ('-DX=1',)" in said


@needs_emulation
def test_what_is_compiled_ahead_is_what_is_launched(gpu, monkeypatch):
    """All of it, in one part of three."""
    from pydeform.cuda import kernels
    from pydeform.cuda.core import launch

    found = PARTS["kernels_to_compile"]()
    compiled = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, "kernel", lambda code, expression: compiled.append((code, expression)))
        patch.setitem(PARTS["compile_share"].__globals__, "kernels_to_compile", lambda: found)
        for part in range(3):
            PARTS["compile_share"](part, 3)
    assert sorted(compiled) == sorted(found)
    assert len(set(found)) == len(found) > 150
    assert {code for code, _ in found} == set(kernels.CODES)
    assert any("Wgmma" in expression for _, expression in found)


@needs_emulation
def test_measurements_count_what_they_do(gpu, capsys):
    """Four blocks of 8 warps, one turn: every one of the 3 x 7 launches adds what it says."""
    MEASUREMENTS["main"](turns=2, blocks=1, stride=64)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        *(f"adds, {together} warps at one place" for together in (" 1", " 9", "36")),
        "sum of all 21504, of 21504",
        "a turn of 48 KB each, 4 lines a load",
        "a turn of 48 KB each, 8 lines a load",
        "fence, nothing on its way",
        "fence, a load on its way",
    ]
    assert "multiply 250000 ns, load 250000 ns, both 250000 ns; both / sum 0.50" in said[4]


@needs_emulation
def test_measurements_do_what_is_right(gpu):
    """Under the checks of the emulated device, and each load of a warp lies in as many lines as are asked for."""
    from tests.cuda_emulation import device

    expressions = ("add_rate", "share<4>", "share<8>", "fence_cost")
    module = gpu.RawModule(code=MEASUREMENTS["source"](), architecture="90a", name_expressions=expressions)
    with device.settings(check=True, schedule=3, capability="90"):
        MEASUREMENTS["measure_adds"](module.get_function("add_rate"), 1, 2, places=40)
        MEASUREMENTS["measure_fences"](module.get_function("fence_cost"), 2, 64)
    for lines in (4, 8):
        data, out = gpu.zeros(16384, np.uint32), gpu.ones(512, np.float32)
        with device.settings(profile=True, capability="90") as run:
            arguments = data, out, np.int32(1), np.int32(3)
            module.get_function(f"share<{lines}>")((1,), (512,), arguments, shared_mem=32768)
        (found,) = run.kernels().values()
        loads = 8 * 12  # of 512 bytes
        assert found.operand_bytes == loads * 512 == 2 * 4 * (64 + 128) * 32
        assert found.global_passes == loads * lines + 512 * 4 // 128
        assert not out.get().any()


@pytest.mark.skipif(not nvrtc.toolkits(), reason="NVRTC is not installed")
@pytest.mark.parametrize("architecture", ["75", "80", "90a"])
def test_measurements_compile_without_spills(architecture):
    expressions = ["add_rate", *(("share<4>", "share<8>", "fence_cost") if architecture == "90a" else ())]
    for expression in expressions:
        source = MEASUREMENTS["source"]()
        found, remarks = nvrtc.cached(nvrtc.toolkits()[-1], source, expression, architecture, ("-std=c++17",))
        assert not remarks and not found.stack and not found.spill_stores and found.registers <= 128


@needs_emulation
def test_values_are_near_those_of_float64(gpu, capsys):
    PARTS["values"](size=5, channels=16, sums=(2, 8))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * 4 * 4 * 10 + 2 * 10 + 1
    groups = [line.split()[2] for line in said if "deform_conv2d  " in line and ", float16 " in line]
    assert groups == ["1", "4", "1", "2"] * 2
    largest = dict(text.split() for text in said[-1].partition(": ")[2].split(", "))
    bounds = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
    assert largest.keys() == bounds.keys()
    for dtype, bound in bounds.items():
        assert float(largest[dtype]) < bound, dtype
    assert any(line.startswith("float32, K =   72, nothing negative") for line in said)


@needs_emulation
def test_every_kernel_is_timed(gpu, capsys, monkeypatch):
    from pydeform.bench import cuda_deform_conv2d as bench
    from pydeform.bench.deform_conv2d import Shape

    monkeypatch.setattr(bench, "SHAPES", {"G1": Shape(1, 16, 5, 6, 1, 1, True)})
    PARTS["kernel_times"](("G1",), repeats=2)
    said = capsys.readouterr().out.splitlines()
    for dtype in ("float16", "float32", "tf32"):
        lines = [line for line in said if line.startswith(f"G1, {dtype}:")]
        assert any("1.0 x    500.0 us  forward<" in line for line in lines)
        assert any("backward_data<" in line for line in lines) and any("backward_weight<" in line for line in lines)
        assert any("to_channels_last<" in line for line in lines)
    PARTS["once"]()


def test_graphs_that_differ_are_a_failure(monkeypatch, capsys):
    """With tensors of the CPU in place of CUDA's: first nothing differs, then everything."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(pydeform, "deform_conv2d", lambda x, offset, weight, padding: x * padding)
    cuda = types.SimpleNamespace(
        synchronize=lambda: None,
        current_stream=lambda: None,
        stream=lambda stream: nullcontext(),
        graph=lambda graph: nullcontext(),
        Stream=lambda: types.SimpleNamespace(wait_stream=lambda other: None),
    )
    cuda.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: None)
    randn = torch.randn
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "randn", lambda shape, device, dtype: randn(shape, dtype=dtype))
    monkeypatch.setattr(torch, "equal", lambda a, b: outcome)
    for outcome, status in ((True, 0), (False, 1)):
        assert PARTS["torch_graphs_and_streams"]() == status
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 12 and all(("same bits" if outcome else "DIFFERENT, at most by") in line for line in said)


def test_without_a_gpu_it_says_so():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: this needs CuPy and a GPU that it can use: ")
