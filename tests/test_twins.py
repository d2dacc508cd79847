"""The backends keep in step: every operator's CPU and CUDA twins have the same functions with the same parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import pydeform
from pydeform import _geometry, _roi_geometry
from pydeform.cuda.core.source import Code, source

PACKAGE = Path(pydeform.__file__).parent
# Backends have one twin for all of a family, whose operators differ in which arrays there are and in their geometry.
FAMILIES = {
    "conv": ("conv1d", "conv2d", "conv3d", "deform_conv1d", "deform_conv2d", "deform_conv3d", "active_conv2d"),
    "roi": ("roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align", "deform_roi_pool", "deform_psroi_pool"),
}


def public_functions(path: Path) -> dict[str, str]:
    """Name -> parameters, annotations and defaults, as written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {f.name: ast.unparse(f.args) + " -> " + ast.unparse(f.returns or ast.Constant(None)) for f in functions}


def test_operators_are_known():
    assert set(FAMILIES) == {path.stem for path in (PACKAGE / "cuda").rglob("*.cu")}
    for members in FAMILIES.values():
        assert set(members) <= set(pydeform.__all__)


def test_kernels_name_whose_they_are():
    """So that who looks for an operator finds them."""
    head = (PACKAGE / "cuda" / "conv" / "conv.cu").read_text(encoding="utf-8").partition("#include")[0]
    assert set(FAMILIES["conv"]) <= set(re.findall(r"\w+", head))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_all_that_call_its_twins(family):
    files = {path.stem: path.read_text(encoding="utf-8") for path in (PACKAGE / "ops").glob("*.py")}
    assert [name for name, text in files.items() if "backend_for(" in text] == ["_call"]
    asked = re.compile(rf'_call\.(?:forward|backward)\(op, "{family}"')
    callers = {name for name, text in files.items() if asked.search(text)}
    through = f"_{family}"  # what a family's operators share
    used = re.compile(rf"^ +return .*\b{through}\.(?:forward|backward)\(", re.MULTILINE)
    users = {name for name, text in files.items() if used.search(text)}
    assert callers - {through} | users == set(FAMILIES[family])


def twins(family: str) -> list[Path]:
    """The file of a family's twin on each backend."""
    places = [PACKAGE / backend / family for backend in ("cpu", "cuda")]
    return [place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_functions(family):
    cpu, cuda = map(public_functions, twins(family))
    assert {"forward", "backward"} == set(cpu)
    assert cuda == cpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_every_folder(family):
    for path in (*twins(family), *(PACKAGE / "ops" / f"{member}.py" for member in FAMILIES[family])):
        assert path.is_file(), path


@pytest.mark.parametrize(
    ("code", "name", "geometry"),
    [
        *((Code("conv", axes), "Geometry", _geometry.ConvGeometry) for axes in (1, 2, 3)),
        (Code("roi"), "RoiGeometry", _roi_geometry.RoiGeometry),
    ],
    ids=str,
)
def test_same_geometry(code, name, geometry):
    """Kernels take the struct that is made from the fields of the geometry, in their order."""
    declaration = source(code).partition(f"struct {name} {{\n")[2].partition("};")[0]
    array, fields = f"[{code.axes}]", {}
    for line in declaration.splitlines():
        kind, _, names = line.strip().rstrip(";").partition(" ")
        number = {"int": int, "double": float}[kind]
        for field in names.split(", "):
            fields[field.removesuffix(array)] = tuple[number, ...] if field.endswith(array) else number
    assert list(fields.items()) == list(get_type_hints(geometry).items())


def test_same_border_rules():
    """The kernels number them as the geometry does."""
    text = (PACKAGE / "cuda" / "sampling" / "corners.cuh").read_text(encoding="utf-8")
    for rule in ("dcnv2", "dcnv1"):
        assert f"{rule.upper()} = {_geometry.BOUNDARIES.index(rule)}" in text
    assert _geometry.BOUNDARIES[0] == "torchvision"


def test_same_rounding_rules():
    """The kernels number them as the geometry does."""
    text = (PACKAGE / "cuda" / "roi" / "bins.cuh").read_text(encoding="utf-8")
    rules = ("EXACT", "AFTER_SCALE", "BEFORE_SCALE")
    assert ", ".join(f"{rule} = {getattr(_roi_geometry, rule)}" for rule in rules) in text


def test_every_rule_is_a_line_of_the_kernels():
    text = (PACKAGE / "cuda" / "roi" / "bins.cuh").read_text(encoding="utf-8")
    for rule in _roi_geometry.Rules._fields:
        if rule != "is_max":  # which chooses the kernel
            lines = [line for line in text.splitlines() if f"g.{rule}" in line and f"// {rule}" in line]
            assert lines, rule


def test_same_numbers_of_roi_kernels():
    """What launches and kernels of RoI pooling must agree on."""
    from pydeform.cuda.roi import gradients as roi

    folder = PACKAGE / "cuda" / "roi"
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("forward.cuh", "backward.cuh"))
    height, width = roi.TILE
    for constants in (
        f"TILE_H = {height}, TILE_W = {width};",
        f"BOUNDS = {roi.BOUNDS};",
        f"MEAN = {roi.MEAN}, LARGEST_PIXEL = {roi.LARGEST_PIXEL}, LARGEST_POINT = {roi.LARGEST_POINT};",
        f"ROI_THREADS = {roi.THREADS}",
    ):
        assert f"constexpr int {constants}" in text, constants
