"""The backends keep in step: every operator's CPU and CUDA twins have the same functions with the same parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pydeform
from pydeform import _geometry

PACKAGE = Path(pydeform.__file__).parent
OPERATORS = sorted(path.stem for path in (PACKAGE / "cuda").glob("*.cu"))


def public_functions(path: Path) -> dict[str, str]:
    """Name -> parameters, annotations and defaults, as written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {f.name: ast.unparse(f.args) + " -> " + ast.unparse(f.returns or ast.Constant(None)) for f in functions}


def test_operators_are_known():
    assert {"conv2d", "deform_conv2d"} <= set(OPERATORS)
    assert set(OPERATORS) <= set(pydeform.__all__)


@pytest.mark.parametrize("operator", OPERATORS)
def test_same_functions(operator):
    cpu, cuda = (public_functions(PACKAGE / backend / f"{operator}.py") for backend in ("cpu", "cuda"))
    assert {"forward", "backward"} <= set(cpu)
    assert cuda == cpu


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_file_in_every_folder(operator):
    for folder in ("ops", "cpu", "cuda"):
        assert (PACKAGE / folder / f"{operator}.py").is_file(), folder


def test_same_geometry():
    """Kernels take the struct that is made from the fields of the geometry, in their order."""
    from pydeform.cuda import _source

    declaration = _source.source("deform_conv2d").partition("};")[0]
    fields = declaration.partition("int ")[2].rstrip(";\n").split(", ")
    assert tuple(fields) == _geometry.Conv2dGeometry._fields


def test_same_border_rules():
    """The kernels number them as the geometry does."""
    text = (PACKAGE / "cuda" / "sampling.cuh").read_text(encoding="utf-8")
    for rule in ("dcnv2", "dcnv1"):
        assert f"{rule.upper()} = {_geometry.BOUNDARIES.index(rule)}" in text
    assert _geometry.BOUNDARIES[0] == "torchvision"
