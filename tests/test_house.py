"""Rules of the house that a machine can check: what must be beside an operator, and what may stand in no file."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck, cli

ROOT = Path(__file__).parents[1]
OPERATORS = _selfcheck.operators()
EXTRAS = {"cuda12", "cuda13", "torch", "jax", "viz", "demo", "test", "dev"}
# Put together here, so that this file does not contain what it looks for.
HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
FOLDERS = ["/" + name + "/" for name in ("root", "work", "tmp", "farm")]
# Operators that are one function under several rules share kernels, oracle, tests, mathematics and benchmark, in files
# of this name. Every other operator is a family of its own.
ROI = ("roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align", "deform_roi_pool", "deform_psroi_pool")
CONV = ("conv1d", "conv2d", "conv3d", "deform_conv1d", "deform_conv2d", "deform_conv3d", "active_conv2d")
FAMILY = dict.fromkeys(ROI, "roi") | dict.fromkeys(CONV, "conv")
MATHEMATICS, BENCHMARK = {"conv": "deform_conv"}, {"conv": "deform_conv2d"}
# Folders of the CPU's kernels whose functions and modules have a size that a reader can hold.
OF_READABLE_SIZE = ("core", "roi")
MOST_LINES, MOST_ARGUMENTS, MOST_LINES_OF_A_MODULE = 60, 9, 400
# Called by convolutions, too: `pixels` is one that they could do without.
HAS_TEN_ARGUMENTS = {"to_channels_last", "block_to_channels_first"}
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = ("README.md", "docs/conventions.md")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def tracked(binary: bool = False) -> list[Path]:
    """Every text file that git knows or would take; with `binary` every file."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    paths = [ROOT / name for name in names if binary or not name.endswith((".npz", ".png", ".jpg"))]
    return [path for path in paths if path.is_file()]


def test_operators_are_found():
    assert {*CONV, *ROI} == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_complete(operator):
    family = FAMILY.get(operator, operator)
    for path in (
        f"pydeform/ops/{operator}.py",
        f"pydeform/cuda/{FAMILY.get(operator, 'conv')}.cu",
        f"tests/reference/{family}.py",
        f"tests/test_{family if family == 'roi' else operator}.py",
        f"docs/math/{MATHEMATICS.get(family, family)}.md",
        f"benchmarks/bench_{BENCHMARK.get(family, family)}.py",
    ):
        assert (ROOT / path).is_file(), path
    assert _selfcheck.problem(operator).arrays
    table = [line for line in read("README.md").splitlines() if line.startswith(f"| `{operator}` |")]
    assert table, "no row in README's table"
    assert f"`{operator}`" in read("CHANGELOG.md")
    assert f"`{operator}_backward`" in read("CHANGELOG.md")


@pytest.mark.parametrize("name", [name for name in pydeform.__all__ if not name.startswith("_")])
def test_public_name_is_in_the_changelog(name):
    if not name.endswith("Grads"):  # they are what `_backward` returns
        assert f"`{name}`" in read("CHANGELOG.md")


@pytest.mark.parametrize("operator", OPERATORS)
def test_table_of_dtypes_is_true(operator):
    """README's row says "yes" for a dtype exactly where the operator runs in it."""
    header = next(line for line in read("README.md").splitlines() if line.startswith("| operator |"))
    row = next(line for line in read("README.md").splitlines() if line.startswith(f"| `{operator}` |"))
    cells = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)), strict=True))
    for dtype in _selfcheck.DTYPES:
        result = _selfcheck.check(operator, _selfcheck.backends()[0], dtype)
        assert (cells[dtype] == "yes") == (not result.failure), f"{dtype}: {result.failure}"
    grads = _selfcheck.run(operator, _selfcheck.problem(operator), _selfcheck.backends()[0], np.float64)
    assert cells["gradients"].split(", ") == [name.removeprefix("gradient of ") for name in grads if name != "output"]


def test_extras():
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert EXTRAS == set(config["options.extras_require"])
    assert "pydeform-operators[demo,test]" in config["options.extras_require"]["dev"]


def test_package_data_is_there():
    package = Path(pydeform.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "data" / "vectors.npz").is_file()


def test_no_host_or_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(text in line for text in HOSTS + FOLDERS)
    ]
    assert not found, "\n".join(found)


def test_install_commands_have_a_path():
    """Another project has our name on the package index."""
    for path in tracked():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"(pip|uv) (install|add) [^#`]*\bpydeform\b(?!/)", line), f"{path}: {line}"


def test_no_text_names_what_is_not_there():
    """Neither an error message nor a document sends its reader to a module, function or extra that does not exist."""
    missing = set()
    for path in (*(ROOT / "pydeform").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"\bpydeform\.([a-z_]\w*)", path.read_text(encoding="utf-8")):
            if not hasattr(pydeform, name) and find_spec(f"pydeform.{name}") is None:
                missing.add(f"{path.relative_to(ROOT)}: pydeform.{name}")
    assert not missing
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = {name for row in cli.EXTRAS for name in row.split(" or ")}
    assert named <= set(config["options.extras_require"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_snippets_run(document, tmp_path):
    """Each document's blocks in one fresh process, one after the other, as a reader would paste them."""
    blocks = [b for b in SNIPPET.findall(read(document)) if "import torch" not in b or find_spec("torch")]
    assert blocks
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_first_snippet_needs_only_what_is_installed_with_us():
    """Not even what the demo brings."""
    first = SNIPPET.findall(read("README.md"))[0]
    foreign = ("torch", "jax", "cupy", "matplotlib", "sklearn", "tqdm", "onnx", "threadpoolctl")
    program = f"import sys; sys.modules.update(dict.fromkeys({foreign}))\n{first}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_source_distribution_has_every_file(tmp_path):
    """What a clone has, it has: so that it can test itself, too."""
    pytest.importorskip("setuptools", "77")
    files = {path.relative_to(ROOT) for path in tracked(binary=True)}
    for file in files:
        (tmp_path / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "source" / file)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "source", check=True, capture_output=True)
    (archive,) = tmp_path.glob("pydeform_operators-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {Path(*Path(member.name).parts[1:]) for member in tar if member.isfile()}
    assert files <= packed
    generated = {path for path in packed - files if "pydeform_operators.egg-info" not in path.parts}
    assert generated == {Path("PKG-INFO")}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)]+)\)", read(document)):
        if not target.startswith("https://"):
            assert (folder / target).exists(), target


def test_each_decision_has_its_three_parts():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        headings = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
        assert headings == ["## Context", "## Choice", "## Price"], page.name


def functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def too_large(source: str) -> list[str]:
    """Functions of a source that have more lines or arguments than they may."""
    found = []
    for function in functions(source):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        most = MOST_ARGUMENTS + (function.name in HAS_TEN_ARGUMENTS)
        if function.end_lineno - function.lineno >= MOST_LINES or len(arguments) > most:
            found.append(function.name)
    return found


def emits_machine_code(source: str) -> bool:
    return bool(re.search(r"^\s*(import|from) llvmlite|\bbuilder\b", source, re.MULTILINE))


@pytest.mark.parametrize("folder", OF_READABLE_SIZE)
def test_functions_and_modules_of_kernels_have_a_readable_size(folder):
    for path in sorted((ROOT / "pydeform" / "cpu" / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert not too_large(source), f"{path.relative_to(ROOT)}: {too_large(source)}"
        assert len(source.splitlines()) <= MOST_LINES_OF_A_MODULE, path.relative_to(ROOT)


def test_machine_code_is_emitted_in_one_folder():
    for path in (ROOT / "pydeform").rglob("*.py"):
        if (ROOT / "pydeform" / "cpu" / "core") not in path.parents:
            assert not emits_machine_code(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_what_is_too_large_is_told():
    body = "    pass\n"
    for lines, arguments, is_told in ((59, 9, False), (60, 9, True), (59, 10, True)):
        names = ", ".join(f"a{n}" for n in range(arguments))
        assert bool(too_large(f"def f({names}):\n{lines * body}")) == is_told
    assert too_large(f"def f():\n    def g(a, *, {', '.join('bcdefgh')}, **i): pass\n    def h(*{'a' * 9}): pass") == []
    assert too_large(f"def f():\n    def g(a, *, {', '.join('bcdefghi')}, **j): pass") == ["g"]
    assert emits_machine_code("    from llvmlite import ir") and emits_machine_code("lambda builder: 0")
    assert not emits_machine_code("from numba import types")


def test_exceptions_from_the_size_are_needed():
    sources = [
        path.read_text("utf-8") for name in OF_READABLE_SIZE for path in (ROOT / "pydeform/cpu" / name).rglob("*.py")
    ]
    longest = {function.name for source in sources for function in functions(source) if len(function.args.args) == 10}
    assert longest == HAS_TEN_ARGUMENTS
