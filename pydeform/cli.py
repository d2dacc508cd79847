"""The command line: `pydeform info | check | bench | warmup | demo`, also `python -m pydeform`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pydeform
from pydeform._checks import FLOAT_DTYPES
from pydeform._program import count, without_traceback

if TYPE_CHECKING:
    from pydeform._selfcheck import Backend

# extra -> the modules that it brings
EXTRAS = {
    "cuda12 or cuda13": ("cupy",),
    "torch": ("torch",),
    "jax": ("jax",),
    "onnx": ("onnx",),
    "dask": ("dask", "distributed", "zarr"),
    "viz": ("matplotlib",),
    "demo": ("matplotlib", "sklearn", "tqdm"),
    "test": (
        "dask",
        "distributed",
        "hypothesis",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "pytest",
        "safetensors",
        "sklearn",
        "threadpoolctl",
        "tqdm",
        "zarr",
    ),
}
VECTOR_FEATURES = "sse2 avx avx2 fma f16c avx512f avx512bf16 avx512fp16 amx-bf16 neon sve".split()
WARMUP_DTYPES = ("float32", "float64")  # those that kernels on the CPU compute in


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    return without_traceback(" ".join(("pydeform", *arguments[:1])), lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["demo"]:  # has options of its own
        return demo(arguments[1:])
    parser = argparse.ArgumentParser(prog="pydeform", description="Deformable operators on NumPy and CuPy arrays.")
    parser.add_argument("--version", action="version", version=pydeform.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check | bench | warmup | demo")
    commands.add_parser("info", help="versions, processor, threads, devices, cache, extras").set_defaults(run=info)
    parser_check = commands.add_parser("check", help="every operator on this machine against known results")
    parser_check.set_defaults(run=check)
    parser_bench = commands.add_parser("bench", help="speed on this machine, beside the peers that are installed")
    parser_bench.add_argument("--quick", action="store_true", help="three small shapes only")
    parser_bench.add_argument("--threads", type=count, default=pydeform.get_num_threads())
    parser_bench.set_defaults(run=bench)
    parser_warmup = commands.add_parser("warmup", help="compile kernels now, so that no first call has to")
    parser_warmup.add_argument("names", nargs="*", type=operator, metavar="OPERATOR", help="say deform_conv2d; all")
    parser_warmup.add_argument(
        "--dtype",
        action="append",
        choices=FLOAT_DTYPES,
        dest="dtypes",
        help="may be given several times; without it float32 and float64 on the CPU, all four on a GPU",
    )
    parser_warmup.set_defaults(run=warmup)
    commands.add_parser("demo", help="train deformable networks on real digits; `pydeform demo --help`")
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def info(_options: argparse.Namespace) -> int:
    from pydeform.bench import timing

    installed = timing.versions(("numpy", "numba", "llvmlite", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x"))
    threads = pydeform.get_num_threads()
    rows = [
        ("python", f"{platform.python_version()} {platform.python_implementation()}, {platform.platform()}"),
        *installed.items(),
        ("processor", f"{timing.cpu_name()}, {os.cpu_count()} cores, {' '.join(vector_features())}"),
        ("threads", f"{threads} (change it with pydeform.set_num_threads or OMP_NUM_THREADS)"),
        ("devices", ", ".join(devices())),
        ("cache", cache()),
        *((f"extra {name}", extra_state(modules)) for name, modules in EXTRAS.items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        stranger = importlib.metadata.version("pydeform")  # this distribution is pydeform-operators
        print(
            f"\nA distribution named pydeform, {stranger}, is installed as well: on the package index that is another "
            "project.\nBoth write the folder pydeform: run `pip uninstall pydeform pydeform-operators`, "
            "then install this one again."
        )
    return 0


def vector_features() -> list[str]:
    """The processor's vector instructions, as LLVM reports them."""
    features = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    return [name for name in VECTOR_FEATURES if features.get(name)]


def devices() -> list[str]:
    """The CPU, and the name of each GPU or the reason why there is none."""
    if find_spec("cupy") is None:
        return ["cpu", "no cuda (cupy is not installed)"]
    cupy = importlib.import_module("cupy")
    if not cupy.is_available():
        return ["cpu", "no cuda (cupy finds no device)"]
    count = cupy.cuda.runtime.getDeviceCount()
    names = [cupy.cuda.runtime.getDeviceProperties(number)["name"].decode() for number in range(count)]
    return ["cpu", *(f"cuda:{number} {name}" for number, name in enumerate(names))]


def cache() -> str:
    """Folder and size of the compiled kernels."""
    folder: Path | None = importlib.import_module("pydeform.cpu.core.jit").cache_directory()
    if folder is None:
        return "none: its folder is not writable, so every process compiles again"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{folder}, {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def extra_state(modules: Sequence[str]) -> str:
    missing = [name for name in modules if find_spec(name) is None]
    return f"no, without {', '.join(missing)}" if missing else "yes"


def check(_options: argparse.Namespace) -> int:
    from pydeform import _selfcheck
    from pydeform._progress import progress
    from pydeform.bench import timing

    jobs = [
        (operator, backend, dtype)
        for operator in _selfcheck.operators()
        for backend in _selfcheck.backends()
        for dtype in _selfcheck.DTYPES
    ]
    shown = progress(jobs, "check", lambda job: f"{job[0]} {job[1].name} {job[2]}")
    results = [_selfcheck.check(*job) for job in shown]
    rows = [(r.operator, r.backend, r.dtype, r.evidence, "FAILED" if r.failure else "ok") for r in results]
    print(timing.table(("operator", "backend", "dtype", "compared with", "result"), rows))
    failures = [r for r in results if r.failure]
    for r in failures:
        print(f"{r.operator} {r.backend} {r.dtype}: {r.failure}")
    print(f"{len(results) - len(failures)} ok, {len(failures)} failed")
    return 1 if failures else 0


def bench(options: argparse.Namespace) -> int:
    from pydeform.bench import deform_conv2d, timing

    shapes = ["W1", "W2", "W5"] if options.quick else list(deform_conv2d.SHAPES)
    print(", ".join(f"{name} {version}" for name, version in timing.versions().items()))
    print(f"{timing.cpu_name()}, {options.threads} threads, float32, milliseconds, median/minimum")
    results = deform_conv2d.run(options.threads, shapes, rounds=3)
    for what in ("forward", "training"):
        print(f"\n{deform_conv2d.report(results, what)}")
    return 0


def operator(text: str) -> str:
    """An argument that names an operator; argparse prints the message."""
    from pydeform import _selfcheck

    if text not in _selfcheck.operators():
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_selfcheck.operators())}, got {text!r}")
    return text


def warmup(options: argparse.Namespace) -> int:
    from pydeform import _selfcheck

    start = time.perf_counter()
    names = options.names or _selfcheck.operators()
    cpu, *gpus = _selfcheck.backends()
    compiled, loaded = warm_cpu(cpu, names, options.dtypes or WARMUP_DTYPES)
    print(
        f"cpu: {compiled} kernels compiled, {loaded} loaded, in {time.perf_counter() - start:.1f} s; cache: {cache()}"
    )
    for gpu in gpus:
        start = time.perf_counter()
        warm(gpu, names, options.dtypes or FLOAT_DTYPES)
        print(f"{gpu.name}: kernels ready in {time.perf_counter() - start:.1f} s; CuPy keeps them")
    return 0


def warm_cpu(cpu: Backend, names: Sequence[str], dtypes: Sequence[str]) -> tuple[int, int]:
    """Compile, or load from the cache, each kernel that these operators call; how many of either kind."""
    from pydeform import _selfcheck
    from pydeform._progress import progress

    jit = importlib.import_module("pydeform.cpu.core.jit")
    kernels: dict[Any, Any] = {}
    labels: dict[Any, str] = {}
    for name in names:
        for dtype in dtypes:
            with jit.listing() as listed, np.errstate(all="ignore"):  # results are whatever was in their memory
                for problem in _selfcheck.problems(name):
                    _selfcheck.run(name, problem, cpu, _selfcheck.DTYPES[dtype])
            for key, (kernel, *_) in listed.items():
                labels.setdefault(key, f"{name} {dtype} {kernel.call.__name__.strip('_')}")
            kernels |= listed
    compiled = 0
    for key in progress(list(kernels), "warmup", labels.__getitem__):
        kernel, *rest = kernels[key]
        before = kernel.count_of_compiled()
        kernel.prepare(*rest)
        compiled += kernel.count_of_compiled() - before
    return compiled, len(kernels) - compiled


def warm(gpu: Backend, names: Sequence[str], dtypes: Sequence[str]) -> None:
    from pydeform import _selfcheck
    from pydeform._progress import progress

    jobs = [(name, dtype) for name in names for dtype in dtypes]
    for name, dtype in progress(jobs, f"warmup {gpu.name}", " ".join):
        for problem in _selfcheck.problems(name):
            _selfcheck.run(name, problem, gpu, _selfcheck.DTYPES[dtype])


def demo(argv: Sequence[str]) -> int:
    status: int = importlib.import_module("pydeform.demo").main(argv)
    return status
