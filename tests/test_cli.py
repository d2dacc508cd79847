"""Every subcommand, in this process; and the program itself, once."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pydeform
from pydeform import _progress, _selfcheck, cli
from pydeform.bench import deform_conv2d as bench
from pydeform.bench import timing

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "pydeform", "info"], capture_output=True, text=True, check=True)
    assert f"pydeform                {pydeform.__version__}" in done.stdout
    assert not done.stderr


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[:22].strip() for line in lines]
    assert names[:3] == ["python", "pydeform", "numpy"]
    assert {"processor", "threads", "devices", "cache", "extra torch", "extra demo"} <= set(names)


def test_info_imports_no_framework():
    code = "import sys; from pydeform import cli; cli.main(['info']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "jax", "onnx", "matplotlib", "sklearn"}.isdisjoint(done.stdout.splitlines()[-1].split())


def test_info_without_a_cache(monkeypatch, capsys):
    from pydeform.cpu.core import jit

    monkeypatch.setattr(jit, "cache_directory", lambda: None)
    assert cli.main(["info"]) == 0
    assert "none: its folder is not writable" in capsys.readouterr().out


def test_check(monkeypatch, capsys):
    """A row for each operator and dtype. Here of some: test_house has all of them, one by one."""
    some = ["affine_grid", "conv1d", "warp"]
    monkeypatch.setattr(_selfcheck, "operators", lambda: some)
    assert cli.main(["check"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [(row[0], row[2]) for row in rows] == [(name, dtype) for name in some for dtype in _selfcheck.DTYPES]
    assert all(row[-1] == "ok" for row in rows)
    evidence = {row[0]: " ".join(row[3:5]) for row in rows if row[2] == "float64"}
    assert evidence["affine_grid"] == f"{len(list(_selfcheck.vectors('affine_grid')))} vectors,"
    assert evidence["conv1d"] == "zero offset," and evidence["warp"] == "finite differences"


def test_readme_counts_the_vectors():
    counts = {name: len(list(_selfcheck.vectors(name))) for name in _selfcheck.operators()}
    without = {*_selfcheck.SPECIAL, "warp"}  # no other system has it
    assert {name for name, count in counts.items() if count} == set(counts) - without
    convs = {name: count for name, count in counts.items() if "conv" in name and count}
    for name, count in convs.items():
        assert f"{count} of `{name}`" in README
    gathered = sum(counts[name] for name in _selfcheck.GATHER)
    assert f"{gathered} of attention, aggregation, DCNv3 and DCNv4" in README
    sampled = sum(counts.get(name, 0) for name in _selfcheck.GRID)
    assert f"{sampled} of grid sampling" in README
    assert f"{sum(counts.values()) - sum(convs.values()) - gathered - sampled} of the RoI operators" in README


def spoil(monkeypatch, name, change):
    """Let one public function return something slightly wrong."""
    right = getattr(pydeform, name)
    monkeypatch.setattr(pydeform, name, lambda *args, **kwargs: change(right(*args, **kwargs)))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("deform_conv2d", lambda y: y * 1.001, "output differs by"),
        ("deform_conv2d_backward", lambda grads: grads._replace(offset=grads.offset * 1.001), "gradient of offset"),
        ("conv2d_backward", lambda grads: grads._replace(weight=grads.weight[::-1]), "gradient of weight"),
        ("conv2d", lambda y: y.astype(np.float32), "output has dtype float32, expected float64"),
    ],
)
def test_check_fails(monkeypatch, capsys, name, change, said):
    monkeypatch.setattr(_selfcheck, "operators", lambda: ["affine_grid", name.removesuffix("_backward")])
    spoil(monkeypatch, name, change)
    assert cli.main(["check"]) == 1
    output = capsys.readouterr().out
    assert "FAILED" in output
    assert said in output


def test_check_of_gradients_alone(monkeypatch):
    """Finite differences find what no vector covers."""
    monkeypatch.setattr(_selfcheck, "vectors", lambda operator: iter(()))
    spoil(monkeypatch, "deform_conv2d_backward", lambda grads: grads._replace(mask=grads.mask * 1.001))
    result = _selfcheck.check("deform_conv2d", _selfcheck.backends()[0], "float64")
    assert "gradcheck: mask" in result.failure


def test_warmup(tmp_path):
    """Kernels that were compiled are told from those that were loaded, and no call compiles afterwards."""
    code = """
import sys
import pydeform
from pydeform import _selfcheck, cli
from pydeform.cpu.core import jit

if sys.argv[1:]:
    sys.exit(cli.main(["warmup", *sys.argv[1:]]))
assert cli.main(["warmup", "dcnv4"]) == 0
jit.Kernel._compile = lambda kernel, key, arguments: sys.exit(f"compiles {kernel.call}")
for name in ("float32", "float64"):
    for problem in _selfcheck.problems("dcnv4"):
        _selfcheck.run("dcnv4", problem, _selfcheck.CPU, _selfcheck.DTYPES[name])
"""
    for arguments, said in (
        (["dcnv4", "--dtype", "float32"], "cpu: 2 kernels compiled, 0 loaded"),
        (["--dtype", "float32", "dcnv4", "dcnv3"], "cpu: 0 kernels compiled, 2 loaded"),
        ([], "cpu: 2 kernels compiled, 2 loaded"),
    ):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert "warmup 1/" in done.stderr and "dcnv4 float32 gather" in done.stderr
        assert "Warning" not in done.stderr


def test_warmup_of_what_there_is_not(capsys):
    for argv, said in (
        (["deform_conv"], "must be one of active_conv2d, affine_grid, conv1d"),
        (["--dtype", "int8"], "'int8'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["warmup", *argv])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_info_tells_of_the_stranger(monkeypatch, capsys):
    """The package index has another project of the module's name."""
    known = {"pydeform-operators": "1.0", "numpy": "2.0"}

    def version(name):
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["info"]) == 0
    assert "another project" not in capsys.readouterr().out
    known["pydeform"] = "0.5"
    assert cli.main(["info"]) == 0
    assert "A distribution named pydeform, 0.5, is installed as well" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", ""])
def test_numbers_on_the_command_line(number, capsys):
    for argv in (["bench", "--threads", number], ["demo", "--epochs", number], ["demo", "--seeds", number]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
        assert f"must be a whole number >= 1, got '{number}'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--seed", "-1"])
    assert "must be a whole number >= 0, got '-1'" in capsys.readouterr().err


def raising(error):
    def run(*arguments, **options):
        raise error

    return run


@pytest.mark.parametrize("argv", [["warmup"], ["check"], ["bench", "--quick"], ["demo", "--quick"]])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "gone.txt"), 1, "gone.txt"),
        (subprocess.CalledProcessError(3, "peer"), 1, "peer"),
    ],
)
def test_what_a_user_does_or_lacks_is_one_line(monkeypatch, capsys, argv, error, status, said):
    from pydeform import demo

    monkeypatch.setattr(_progress, "progress", raising(error))
    monkeypatch.setattr(bench, "run", raising(error))
    monkeypatch.setattr(demo, "main", raising(error))
    assert cli.main(argv) == status
    message = capsys.readouterr().err
    assert message.startswith(f"pydeform {argv[0]}: ") and said in message and message.count("\n") == 1


def test_faults_of_ours_are_not_hidden(monkeypatch):
    monkeypatch.setattr(_progress, "progress", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["warmup"])


@pytest.mark.parametrize("unbuffered", ["", "1"])  # fails where Python flushes, at the end, or where it prints
@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["demo", "--help"], ["--version"]])
def test_output_that_nobody_reads(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pydeform", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert not done.stderr
    if not (unbuffered and arguments != ["info"]):  # argparse of some Pythons passes over what it cannot print
        assert done.returncode == 1


def test_a_file_gets_few_lines_and_a_terminal_a_bar(monkeypatch, capsys):
    assert list(_progress.progress(range(100), "step")) == list(range(100))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {n}/100" for n in (1, *range(10, 101, 10))]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(_progress.progress(range(100), "step")) == list(range(100))
    assert "\r" in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(_progress, "find_spec", lambda name: None)
    assert list(_progress.progress([3, 5], "step", lambda item: f"item {item}")) == [3, 5]
    assert capsys.readouterr().err == "step 1/2: item 3\nstep 2/2: item 5\n"


def test_bench(monkeypatch, capsys):
    """The round robin itself, in this process, on a shape that takes no time."""
    monkeypatch.setitem(bench.SHAPES, "W5", bench.Shape(2, 4, 6, 5, 2, 2, True))
    monkeypatch.setattr(timing, "BLOCK", 0.0)
    monkeypatch.setattr(bench, "run", lambda threads, shapes, rounds: {"W5": bench.measure("W5", threads, 1)})
    assert cli.main(["bench", "--quick", "--threads", "1"]) == 0
    output = capsys.readouterr().out
    assert "peer/ours" in output
    assert {"forward", "training", "W5", "mean"} <= {line.split()[0] for line in output.splitlines() if line}


def test_bench_compares_before_it_times(monkeypatch):
    calls = {"pydeform": lambda: np.ones(3), "openvino": lambda: np.array([1, 1, 1.1])}
    with pytest.raises(SystemExit, match=r"W1: openvino differs from pydeform by 0\.1"):
        bench.differences(calls, "W1")


def test_bench_products_are_the_products():
    """Each BLAS must compute the same thing, or its time would mean nothing."""
    pairs = [(np.ones((2, 3), np.float32), np.full((3, 4), 2, np.float32))]
    pairs.append((pairs[0][0].T, np.ones((2, 5), np.float32)))
    pairs.append((np.ones((2, 5), np.float32), np.ones((7, 5), np.float32).T))
    for name, call in bench.blas_calls(pairs, images=1, threads=1).items():
        for (a, b), out in zip(pairs, call(), strict=True):
            np.testing.assert_array_equal(out, a @ b, err_msg=name)


def test_demo_gets_its_own_options(monkeypatch):
    from pydeform import demo

    seen = []
    monkeypatch.setattr(demo, "main", lambda argv: seen.append(argv) or 0)
    assert cli.main(["demo", "--quick", "--seeds", "1"]) == 0
    assert seen == [["--quick", "--seeds", "1"]]


@pytest.mark.parametrize("argv", [[], ["nothing"], ["info", "--threads"]])
def test_mistakes(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: pydeform" in capsys.readouterr().err
