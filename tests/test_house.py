"""Rules of the house that a machine can check: what must be beside an operator, and what may stand in no file."""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import pydeform
import pydeform.layers
from pydeform import _selfcheck, cli
from tests import mutants
from tests.docstrings import parameters, sections

ROOT = Path(__file__).parents[1]
OPERATORS = _selfcheck.operators()
EXTRAS = {"cuda12", "cuda13", "torch", "jax", "onnx", "dask", "viz", "demo", "test", "dev"}
# Put together here, so that this file does not contain what it looks for.
HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
FOLDERS = ["/" + name + "/" for name in ("root", "work", "tmp", "farm")]
# Operators that are one function under several rules share kernels, oracle, tests, mathematics and benchmark, in files
# of this name. Every other operator is a family of its own.
ROI = (
    "roi_pool",
    "roi_align",
    "roi_align_rotated",
    "prroi_pool",
    "ps_roi_pool",
    "ps_roi_align",
    "deform_roi_pool",
    "deform_psroi_pool",
)
CONV = ("conv1d", "conv2d", "conv3d", "deform_conv1d", "deform_conv2d", "deform_conv3d", "active_conv2d")
GATHER = ("ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation", "dcnv3", "dcnv4")
GRID = ("grid_sample", "warp", "affine_grid")
FAMILY = dict.fromkeys(ROI, "roi") | dict.fromkeys(CONV, "conv") | dict.fromkeys(GATHER, "gather")
FAMILY |= dict.fromkeys(GRID, "grid")
MATHEMATICS = {"conv": "deform_conv"}
# Folders of the CPU's kernels whose functions and modules have a size that a reader can hold.
OF_READABLE_SIZE = ("core", "sampling", "conv", "gather", "grid", "roi")
MOST_LINES, MOST_ARGUMENTS, MOST_LINES_OF_A_MODULE = 60, 9, 400
# Called by convolutions, too: `pixels` is one that they could do without.
HAS_TEN_ARGUMENTS = {"to_channels_last", "block_to_channels_first"}
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = ("README.md", "docs/conventions.md")
TOUR = "docs/how-it-works.md"
NAMED_IN_DOCSTRINGS = {
    *("...", ".npz", ".safetensors", "Axes.quiver", "Figure.subplots", "data.pkl", "jax.ffi.include_dir()"),
    *("jax.ffi.pycapsule", "mask_fc", "math.prod", "no_trans", "numpy.memmap", "offset_fc", "onnx.inliner"),
    *("pydeform.NAME", "pydeform.jax.NAME", "scipy.ndimage.map_coordinates", "threadpoolctl.threadpool_limits"),
    *("of_width", "patience", "previous", "tile_size", "to_dlpack"),
}
MOST_LINES_ON_CUDA = 120  # of a function
BEFORE_NAME = re.compile(  # of a CUDA function, in brackets
    r"__launch_bounds__\(.*?\)(?=\s*\w+\()|\btemplate\s*<.*?>\s*(?=__|PYD|static|const)", re.DOTALL
)


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
    assert {*CONV, *GATHER, *GRID, *ROI} == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_complete(operator):
    family = FAMILY.get(operator, operator)
    for path in (
        f"pydeform/ops/{operator}.py",
        f"pydeform/cuda/{family}/{family}.cu",
        f"tests/reference/{family}.py",
        f"tests/test_{family if family == 'roi' else operator}.py",
        f"docs/math/{MATHEMATICS.get(family, family)}.md",
        f"benchmarks/bench_{family}.py",
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


def cells_of(operator):
    """README's row, by the names of its columns."""
    lines = read("README.md").splitlines()
    header = next(line for line in lines if line.startswith("| operator |"))
    row = next(line for line in lines if line.startswith(f"| `{operator}` |"))
    return dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)), strict=True))


@pytest.mark.parametrize("dtype", _selfcheck.DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_table_of_dtypes_is_true(operator, dtype):
    """README says "yes" for a dtype exactly where the operator is right in it."""
    result = _selfcheck.check(operator, _selfcheck.CPU, dtype)
    assert (cells_of(operator)[dtype] == "yes") == (not result.failure), result.failure


@pytest.mark.parametrize("operator", OPERATORS)
def test_table_of_gradients_is_true(operator):
    grads = _selfcheck.run(operator, _selfcheck.problem(operator), _selfcheck.CPU, np.float64)
    assert cells_of(operator)["gradients"].split(", ") == [
        name.removeprefix("gradient of ") for name in grads if name != "output"
    ]


def test_every_layer_is_in_the_readme():
    layers = {name for name in pydeform.layers.__all__ if name[0].isupper()} - {"Layer"}
    assert layers <= set(re.findall(r"`(\w+)`", read("README.md")))


def test_extras():
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert EXTRAS == set(config["options.extras_require"])
    assert "pydeform-operators[demo,test]" in config["options.extras_require"]["dev"]


def test_compilers_install_beside_the_package_index_own_torch():
    """Its wheel for Linux pins NVRTC. Where a wheel without CUDA lies nearer, pip never finds out."""
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", config["options.extras_require"]["dev"], re.MULTILINE))
    assert (pins["torch"], pins["nvidia-cuda-nvrtc"]) == ("2.13.0", "13.0.88")  # those two go together


def test_package_data_is_there():
    package = Path(pydeform.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "data" / "vectors.npz").is_file()


@pytest.mark.parametrize("area", mutants.AREAS)
def test_mutants_meet_the_tests_of_every_operator(area):
    names = mutants.AREAS[area].tests.split()
    assert len(set(names)) == len(names)
    assert {FAMILY[operator] if operator in ROI else operator for operator in OPERATORS} <= set(names)
    for path in mutants.tests_of(area, None):
        assert (ROOT / path).is_file(), path
    planted = {path.parent.name for pattern in mutants.AREAS[area].places.split() for path in ROOT.glob(pattern)}
    assert planted >= ({"ops", "layers"} if area == "rest" else {"core", "sampling", "conv", "roi"})


def test_no_host_or_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(text in line for text in HOSTS + FOLDERS)
    ]
    assert not found, "\n".join(found)


def blanked(pattern: str, text: str) -> str:
    """`text` with spaces in the place of what matches; lines stay."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.MULTILINE | re.DOTALL)


def cuda_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, lines) of every function, from its template's parameters to the last brace.

    Members of structs count by themselves, lambdas with the function that they are in.
    """
    code = blanked(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'""", text)
    code = blanked(r"^ *#(?:[^\n]*\\\n)*[^\n]*", code)
    start, depth, inside = 0, 0, None
    for mark in re.finditer(r"[{};]", code):
        if inside is not None:
            depth += {"{": 1, "}": -1, ";": 0}[mark[0]]
            if depth > 0:
                continue
            name, begin = inside
            yield name, code.count("\n", 0, begin) + 1, code.count("\n", begin, mark.start()) + 1
            inside = None
        elif mark[0] == "{":
            head = code[start : mark.start()]
            plain = BEFORE_NAME.sub("", head)
            name = re.search(r"(\w+)\s*\(", plain)
            if name and re.search(r"\)\s*(?:const)?\s*(?::[^{]*)?$", head):
                inside, depth = (name[1], start + len(head) - len(head.lstrip())), 1
                continue
        start = mark.end()


def too_long(text: str) -> list[str]:
    found = list(cuda_functions(text))
    return [f"line {line}: {name} has {count} lines" for name, line, count in found if count > MOST_LINES_ON_CUDA]


def test_functions_of_kernels_can_be_read_at_once():
    """A long one is parts with a name each."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "pydeform" / "cuda").rglob("*.cu*")}
    found = {name for text in sources.values() for name, _, _ in cuda_functions(text)}
    assert {"forward", "backward_data", "pool_bins", "walk_points", "issue", "Cursor", "locate"} <= found
    assert len(found) > 150
    assert {path.name: said for path, text in sources.items() if (said := too_long(text))} == {}


@pytest.mark.parametrize(
    "head",
    [
        "__global__ void __launch_bounds__(f(2), 1)\n    long_one(int n)",
        "PYDEFORM_DEVICE void long_one() const",
        "PYDEFORM_DEVICE long_one(int n)\n    : n(n)",
    ],
)
@pytest.mark.parametrize("around", ["{}", "struct Some {{\n  int n;\n{}}};\n"], ids=["alone", "member"])
def test_a_long_function_is_seen(head, around):
    for lines in (MOST_LINES_ON_CUDA, MOST_LINES_ON_CUDA + 1):
        body = "  auto f = [&] {\n    if (n) { n++; }  // a brace: {\n  };\n"
        rest = lines - head.count("\n") - 6  # but the lambda, "template", the head, the last brace
        body += "  n++;\n" * rest
        own = f"int before() {{ return 1; }}\n\n// Of n.\ntemplate <class T>\n{head} {{\n{body}}}\nint after();\n"
        text = around.format(own)
        line = text[: text.index("template")].count("\n") + 1
        said = [f"line {line}: long_one has {lines} lines"]
        assert too_long(text) == (said if lines > MOST_LINES_ON_CUDA else [])


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
    missing = [name for name in ("torch", "jax", "onnx", "onnxruntime") if find_spec(name) is None]
    blocks = [b for b in SNIPPET.findall(read(document)) if not any(name in b for name in missing)]
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


def defined() -> set[str]:
    """Names in our sources: of modules, functions, classes, arguments, fields and constants, of CUDA every word."""
    names = set()
    for path in (ROOT / "pydeform").rglob("*"):
        if path.suffix == ".py":
            names |= {path.stem, path.parent.name}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.arg):
                    names.add(node.arg)
                for statement in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
                    if isinstance(statement, ast.Assign | ast.AnnAssign):
                        stored = [part for part in ast.walk(statement) if isinstance(part, ast.Name)]
                        names |= {part.id for part in stored if isinstance(part.ctx, ast.Store)}
        elif path.suffix in (".cu", ".cuh"):
            names |= set(re.findall(r"\w+", re.sub(r"//.*", "", path.read_text(encoding="utf-8"))))
    return names


def not_there(text: str) -> set[str]:
    """Names and paths in backticks, and names of calls in drawings, that no source defines."""
    drawings = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    spans += [name for drawing in drawings for name in re.findall(r"\w+\(\)", drawing)]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "pydeform").rglob("*")]
    names, missing = defined(), set()
    for span in spans:
        if re.fullmatch(r"[\w./-]+", span) and ("/" in span or re.search(r"\.(py|cuh?|md)$", span)):
            found = any(f"/{file}".endswith(f"/{span.rstrip('/')}") for file in files)
        elif re.fullmatch(r"[\w.]+(\(\))?", span):
            found = all(name in names for name in span.removesuffix("()").split("."))
        else:  # code, or a text
            continue
        if not found:
            missing.add(span)
    return missing


def test_tour_names_what_is_there():
    text = read(TOUR)
    assert len(re.findall(r"`\w+`", text)) > 50
    assert not not_there(text)
    wrong = {"nowhere_to_be_found", "parallel.not_a_name()", "cpu/conv/nowhere.py", "nowhere.cuh"}
    drawn = "```\n  drawn_nowhere()  -> locate_tap()\n```\n"
    known = "`locate_tap` `cpu/conv/plan.py` `conv.cu` `parallel.run()` `x is None`"
    assert not_there(f"{drawn}{known} " + " ".join(f"`{name}`" for name in wrong)) == wrong | {"drawn_nowhere()"}


def test_docstrings_name_what_is_there():
    """Or what others have, or a name that is not written as a definition."""
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "pydeform").rglob("*.py")]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for module in modules for node in ast.walk(module) if isinstance(node, documented)]
    assert not_there("\n".join(ast.get_docstring(node) or "" for node in nodes)) == NAMED_IN_DOCSTRINGS


def public_definitions(package: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes, but those of the kernels."""
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("cpu", "cuda"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{path.relative_to(package)}: {node.name}", node


def test_sections_of_public_docstrings_are_numpydocs():
    for where, node in public_definitions(ROOT / "pydeform"):
        found = sections(ast.get_docstring(node) or "")
        assert ("Examples" in found) == (">>>" in (ast.get_docstring(node) or "")), where
        if "Parameters" in found:
            inits = [child for child in node.body if getattr(child, "name", "") == "__init__"]
            known = ast.unparse((inits[0] if inits else node).args) if inits or hasattr(node, "args") else None
            names = parameters(found["Parameters"])
            assert known is None or set(names) <= set(re.findall(r"\w+", known)), where


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in pydeform.__all__
        if ".ops." in getattr(getattr(pydeform, name), "__module__", "") and name.islower()
    ],
)
def test_an_operators_docstring_has_all_sections_and_arguments(name):
    function = getattr(pydeform, name)
    found = sections(inspect.getdoc(function))
    assert list(found) == ["Parameters", "Returns", "Raises", "Notes", "References", "Examples"]
    assert sorted(parameters(found["Parameters"])) == sorted(inspect.signature(function).parameters)


def test_sections_that_numpydoc_would_not_see_are_found():
    good = "Compute.\n\nParameters\n----------\na, b : numbers\n    Both.\n\nReturns\n-------\nnumber"
    assert sections(good) == {"Parameters": ["a, b : numbers", "    Both."], "Returns": ["number"]}
    assert parameters(sections(good)["Parameters"]) == ["a", "b"]
    inline = good.replace("Returns\n-------\n", "Returns   ")
    short = good.replace("-------\nnumber", "------\nnumber")
    close, empty = good.replace("\n\nReturns", "\nReturns"), good.removesuffix("\nnumber")
    order = "Compute.\n\nReturns\n-------\nnumber\n\nParameters\n----------\na : number"
    for bad in (inline, short, close, empty, order, good + "\n\nExample\n>>> 1\n1"):
        with pytest.raises(AssertionError):
            sections(bad)
    with pytest.raises(AssertionError):
        parameters(["a : number", "", "All of them at once."])


def test_a_wheel_has_every_file_of_the_package():
    """Kernels too, whose folders need not be packages."""
    pytest.importorskip("setuptools", "77")
    program = """
import os, setuptools
build = setuptools.Distribution({"script_name": "setup.py"})
build.parse_config_files()
command = build.get_command_obj("build_py")
command.ensure_finalized()
data = [os.path.join(folder, name) for _, folder, _, names in command.data_files for name in names]
print(*data, *(path for _, _, path in command.find_all_modules()), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    packed = {Path(line) for line in done.stdout.splitlines() if line.startswith("pydeform")}
    files = {path.relative_to(ROOT) for path in tracked(binary=True) if path.relative_to(ROOT).parts[0] == "pydeform"}
    assert {path.suffix for path in files} >= {".cu", ".cuh", ".npz", ".py"}
    assert files == packed


@pytest.mark.parametrize("document", [*DOCUMENTS, TOUR, "CONTRIBUTING.md"])
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
