"""Every name of CuPy that pydeform/cuda uses exists in the real CuPy, with the keywords it is called with.

The emulation stands in for CuPy where there is no GPU, so nothing else would notice a name that only the stand-in has.
CuPy imports without a driver, and its classes tell what their instances have.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

cupy = pytest.importorskip("cupy")

CUDA = Path(__file__).parents[1] / "pydeform" / "cuda"
UNKNOWN = object()  # something whose names cannot be told without a GPU, such as an array's


def instance(function):
    """What a call of `function` returns, as far as a machine without a GPU can tell."""
    if function is cupy.cuda.Device:
        return cupy.cuda.Device(0)
    streams = (cupy.cuda.Stream, cupy.cuda.ExternalStream, cupy.cuda.get_current_stream, cupy.cuda.Stream.from_external)
    if any(function == maker for maker in streams):
        return cupy.cuda.Stream.null
    if function is cupy.RawModule:
        return cupy.RawModule(code="")
    return cupy.ndarray if function is cupy.ndarray else UNKNOWN


class Reader(ast.NodeVisitor):
    """Follows names that begin at `cupy`, also through variables that hold what a call returned."""

    def __init__(self, path):
        self.path, self.known, self.problems, self.seen = path, {"cupy": cupy}, [], []
        self.visit(ast.parse(path.read_text("utf-8")))

    def problem(self, node, text):
        line = f"{self.path.name}:{node.lineno}: {text}"
        if line not in self.problems:  # a part of a name is read again with the whole
            self.problems.append(line)

    def value(self, node):
        """The object that an expression stands for, or UNKNOWN."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if owner is UNKNOWN:
                return UNKNOWN
            if node.attr not in dir(owner):  # asking an instance for it would ask the driver
                self.problem(node, f"{ast.unparse(node)}: {owner!r} has no {node.attr}")
                return UNKNOWN
            self.seen.append(ast.unparse(node))
            by_class = inspect.isclass(owner) or inspect.ismodule(owner)
            return getattr(owner, node.attr) if by_class or owner is cupy.cuda.Stream.null else UNKNOWN
        if isinstance(node, ast.Call):
            function = self.value(node.func)
            return UNKNOWN if function is UNKNOWN else instance(function)
        return UNKNOWN

    def bind(self, target, value):
        if isinstance(target, ast.Name):
            self.known[target.id] = self.value(value)

    def visit_Assign(self, node):
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_With(self, node):
        for item in node.items:
            if item.optional_vars is not None:
                self.bind(item.optional_vars, item.context_expr)
        self.generic_visit(node)

    def visit_ImportFrom(self, node):
        if node.module and node.module.partition(".")[0] == "cupy":
            self.problem(node, "names of CuPy are written in full, so that this test sees them")

    def visit_Attribute(self, node):
        self.value(node)
        self.generic_visit(node)

    def visit_Call(self, node):
        function = self.value(node.func)
        if function is not UNKNOWN:
            accepted = parameters(function)
            for keyword in node.keywords:
                if keyword.arg not in accepted:
                    self.problem(node, f"{ast.unparse(node.func)} takes no {keyword.arg}, but {accepted}")
        self.generic_visit(node)


def parameters(function):
    """Compiled functions have no signature; the first lines of their documentation have."""
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:
        text = (function.__doc__ or "").partition("\n\n")[0]
        return re.findall(r"(\w+)(?=\s*[=,)])", text)


FILES = sorted(CUDA.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CUDA).as_posix())
def test_names_exist_in_cupy(path):
    problems = Reader(path).problems
    assert not problems, "\n".join(problems)


def test_something_is_read():
    seen = {name for path in FILES for name in Reader(path).seen}
    assert {"cupy.RawModule", "cupy.cuda.Device"} <= seen


def test_a_module_takes_what_we_give_and_compiles_late():
    """Else it could not be made here, without a driver."""
    module = cupy.RawModule(code="", options=("-std=c++17",), name_expressions=("f<int>",))
    assert "get_function" in dir(module)
    assert {"grid", "block", "args", "shared_mem"} <= set(re.findall(r"\w+", cupy.RawKernel.__call__.__doc__))
    assert "max_dynamic_shared_size_bytes" in dir(cupy.RawKernel)


def test_the_reader_sees_mistakes(tmp_path):
    path = tmp_path / "mistakes.py"
    path.write_text("""
import cupy
from cupy import zeros
module = cupy.RawModule(code="", name_expression=("f",))
with cupy.cuda.Device(0) as device, cupy.cuda.ExternalStream(0) as stream:
    cupy.emptyy(3, dtype=float)
    device.compute_capabilities
    stream.wait_evnt(stream.record())
    cupy.cuda.Device().attributes
    cupy.empty(3, dtipe=float).whatever
""")
    assert [problem.split(" ")[:2] for problem in Reader(path).problems] == [
        ["mistakes.py:3:", "names"],
        ["mistakes.py:4:", "cupy.RawModule"],
        ["mistakes.py:6:", "cupy.emptyy:"],
        ["mistakes.py:7:", "device.compute_capabilities:"],
        ["mistakes.py:8:", "stream.wait_evnt:"],
        ["mistakes.py:10:", "cupy.empty"],
    ]
