"""`make gpu` without a GPU: stages that stand in for the real ones show what it does when something goes wrong."""

import json
import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import pydeform
from tests.conftest import needs_emulation

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
GPU = runpy.run_path(str(SCRIPT))
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
    planned = GPU["stages"]("some-device")
    assert len({entry.name for entry in planned}) == len(planned)
    assert not [entry.name for entry in planned if entry.skip == "there is no such file"]
    scripts = [Path(word) for entry in planned for word in entry.command if word.startswith("benchmarks/")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_what_the_sanitizers_watch_is_sound(monkeypatch):
    """With NumPy in CuPy's place: the shapes fit, and every option that is asked for exists."""
    cupy = types.ModuleType("cupy")
    cupy.asarray = np.asarray
    cupy.cuda = types.SimpleNamespace(
        set_allocator=lambda allocator: None, Device=lambda: types.SimpleNamespace(synchronize=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    calls = []
    for name in ("conv2d", "conv2d_backward", "deform_conv2d", "deform_conv2d_backward"):
        function = getattr(pydeform, name)
        monkeypatch.setattr(
            pydeform, name, lambda *a, f=function, n=name, **k: calls.append((n, a[0].dtype.name)) or f(*a, **k)
        )
    GPU["exercise"]()
    assert len(set(calls)) == 16 and len(calls) == 3 * 4 * 6


@needs_emulation
def test_what_is_compiled_ahead_is_what_is_launched(emulated, monkeypatch):
    """All of it, in one part of three."""
    import cupy

    from pydeform.cuda import _launch
    from tests.cuda_emulation import device

    monkeypatch.setattr(cupy.cuda, "set_allocator", lambda allocator: None, raising=False)
    _launch._device.cache_clear()
    with device.settings(capability="90"):
        found = GPU["kernels_to_compile"]()
        compiled = []
        monkeypatch.setattr(
            _launch, "_kernel", lambda operator, expression, on: compiled.append((operator, expression))
        )
        for part in range(3):
            GPU["compile_part"](part, 3)
    _launch._device.cache_clear()
    assert len(set(found)) == len(found) > 150
    assert {operator for operator, _ in found} == {"conv2d", "deform_conv2d", "roi"}
    assert any("Wgmma" in expression for _, expression in found)


def test_without_a_gpu_it_says_so():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: this needs CuPy and a GPU that it can use: ")
