"""Who may import whom, read from the source, and what `import pydeform` loads, seen in a fresh interpreter."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import HOLDERS_OF_CUPY

ROOT = Path(__file__).resolve().parent.parent
# Programs around the library: they report on whatever is installed, so they may load it, by import_module, when run.
TOOLS = ("pydeform/cli.py", "pydeform/_selfcheck.py", "pydeform/bench/", "pydeform/demo/")
HOMES = {  # where a package may be imported; a path ending in "/" is a folder
    "numba": ("pydeform/cpu/",),
    "llvmlite": ("pydeform/cpu/",),
    "cupy": ("pydeform/cuda/",),
    "torch": ("pydeform/torch.py", "pydeform/torch/"),
    "jax": ("pydeform/jax.py", "pydeform/jax/"),
    "dask": ("pydeform/dask.py", "pydeform/dask/"),
    "distributed": ("pydeform/dask.py", "pydeform/dask/"),
    "zarr": (),
    "onnx": ("pydeform/onnx.py", "pydeform/onnx/"),
    "matplotlib": ("pydeform/viz.py", "pydeform/demo/"),
    "sklearn": ("pydeform/demo/",),
    "tensorflow": (),
    "paddle": (),
}


class Import(NamedTuple):
    path: str  # of the file that imports, from the root
    line: int
    module: str  # in full: `from pydeform import viz` imports pydeform.viz
    dynamic: bool  # through importlib.import_module

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"

    def of(self, *modules: str) -> bool:
        return any(self.module == module or self.module.startswith(module + ".") for module in modules)

    def lies_in(self, *places: str) -> bool:
        return any(self.path.startswith(place) if place.endswith("/") else self.path == place for place in places)


def imports(source: str, path: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, False)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full here"
            for alias in node.names:
                yield Import(path, node.lineno, f"{node.module}.{alias.name}", False)
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0] if node.args else None
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield Import(path, node.lineno, str(argument.value), True)


def all_imports(folder: str) -> list[Import]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return [i for file in files for i in imports(file.read_text("utf-8"), file.relative_to(ROOT).as_posix())]


LIBRARY = all_imports("pydeform")


def assert_none(offences: list[Import]) -> None:
    assert not offences, "\n".join(map(str, offences))


def test_the_reader_sees_every_kind_of_import():
    source = """
import numba.core as n, os
def f():
    from pydeform import viz, cpu as c
    importlib.import_module("cupy"); import_module(f"pydeform.{x}")
"""
    found = [(i.line, i.module, i.dynamic) for i in imports(source, "x.py")]
    assert sorted(found) == [
        (2, "numba.core", False),
        (2, "os", False),
        (4, "pydeform.cpu", False),
        (4, "pydeform.viz", False),
        (5, "cupy", True),
    ]
    assert Import("pydeform/cpu/a.py", 1, "numba.core", False).lies_in("pydeform/cpu/")
    assert not Import("x.py", 1, "numba_extra", False).of("numba")


@pytest.mark.parametrize("package", HOMES)
def test_a_package_is_imported_only_in_its_home(package):
    assert_none(
        [
            i
            for i in LIBRARY
            if i.of(package) and not i.lies_in(*HOMES[package]) and not (i.dynamic and i.lies_in(*TOOLS))
        ]
    )


def test_a_backend_is_reached_only_through_the_dispatcher():
    """`_interop` loads one function of cuda/ when a CUDA tensor comes in; `_backend` loads everything else."""
    backends = [i for i in LIBRARY if i.of("pydeform.cpu", "pydeform.cuda")]
    inside = ("pydeform/cpu/", "pydeform/cuda/")
    late = (*TOOLS, "pydeform/_interop.py")
    assert_none([i for i in backends if not i.lies_in(*inside) and not (i.dynamic and i.lies_in(*late))])


def test_backends_know_neither_each_other_nor_what_is_above_them():
    above = (
        "pydeform.ops",
        "pydeform.layers",
        "pydeform._backend",
        "pydeform._interop",
        "pydeform.viz",
        "pydeform.demo",
    )
    for own, other in (("cpu", "cuda"), ("cuda", "cpu")):
        assert_none([i for i in LIBRARY if i.lies_in(f"pydeform/{own}/") and i.of(f"pydeform.{other}", *above)])


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_what_families_stand_on_knows_no_family(folder):
    families = (f"pydeform.{folder}.conv", f"pydeform.{folder}.roi")
    above = (f"pydeform.{folder}.sampling", *families)
    assert_none([i for i in LIBRARY if i.lies_in(f"pydeform/{folder}/core/") and i.of(*above)])
    assert_none([i for i in LIBRARY if i.lies_in(f"pydeform/{folder}/sampling/") and i.of(*families)])
    for own, other in (families, families[::-1]):
        assert_none([i for i in LIBRARY if i.lies_in(own.replace(".", "/") + "/") and i.of(other)])


def test_headers_include_only_the_parts_below_them():
    """What each folder of kernels may include; the emulation's header stands in for instructions."""
    below = {"core": {"core"}, "sampling": {"core", "sampling"}}
    folder = ROOT / "pydeform" / "cuda"
    for path in sorted(folder.rglob("*.cu*")):
        own = path.relative_to(folder).parts[0]
        included = re.findall(r'^ *#include "(.+)"$', path.read_text("utf-8"), re.MULTILINE)
        for name in included:
            allowed = below.get(own, {"core", "sampling", own})
            assert name == "primitives_emulated.h" or name.partition("/")[0] in allowed, f"{path.name}: {name}"
            assert name == "primitives_emulated.h" or (folder / name).is_file(), f"{path.name}: {name}"


def test_operators_import_only_the_parts_below_them():
    below = tuple(
        f"pydeform.{name}"
        for name in (
            "ops",
            "_arrays",
            "_backend",
            "_checks",
            "_gather_geometry",
            "_geometry",
            "_grid_geometry",
            "_interop",
            "_roi_geometry",
            "_types",
        )
    )
    assert_none([i for i in LIBRARY if i.lies_in("pydeform/ops/") and i.of("pydeform") and not i.of(*below)])


def test_layers_import_only_operators_and_layers():
    # _checks: the wording of every error; _geometry and its kin: the names of options, sizes of levels; _arrays: what
    # is computed between operators
    parts = ("ops", "layers", "_checks", "_geometry", "_gather_geometry", "_grid_geometry", "_arrays")
    allowed = tuple(f"pydeform.{name}" for name in parts)
    ours = [i for i in LIBRARY if i.lies_in("pydeform/layers/") and i.of("pydeform")]
    assert_none([i for i in ours if not i.of(*allowed)])
    private = [i for i in ours if i.of("pydeform.ops") and any(part.startswith("_") for part in i.module.split("."))]
    assert_none(private)


def test_nothing_but_the_programs_imports_viz_or_demo():
    assert_none(
        [i for i in LIBRARY if i.of("pydeform.viz", "pydeform.demo", "pydeform.bench") and not i.lies_in(*TOOLS)]
    )


def test_reference_imports_numpy_only():
    standard = tuple(sys.stdlib_module_names)
    assert_none([i for i in all_imports("tests/reference") if not i.of("numpy", "tests.reference", *standard)])


def test_the_library_imports_no_tests_and_tests_import_no_benchmarks():
    assert_none([i for i in LIBRARY if i.of("tests", "benchmarks")])
    assert_none([i for i in all_imports("tests") if i.of("benchmarks")])


@pytest.mark.parametrize("use", ["", "; pydeform.sampling_locations(numpy.zeros((1, 18, 2, 2)), 3)"])
def test_importing_loads_no_backend_and_no_framework(use):
    """Nor does the first call of a function that needs no kernel."""
    heavy = ("numba", "llvmlite", "cupy", "torch", "jax", "jaxlib", "matplotlib", "scipy", "onnx", "dask", "sklearn")
    program = f"import sys, numpy, pydeform{use}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_convolution_loads_numba_and_nothing_foreign():
    heavy = ("cupy", "torch", "jax", "jaxlib", "matplotlib", "onnx", "dask", "sklearn")
    program = (
        "import sys, numpy as np, pydeform\n"
        "pydeform.conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)))\n"
        f"print(*[name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_collecting_tests_gives_no_module_the_real_cupy(request):
    assert request.config.stash[HOLDERS_OF_CUPY] == []
