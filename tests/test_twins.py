"""The backends keep in step: every operator's CPU and CUDA twins have the same functions with the same parameters."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pytest

import pydeform
from pydeform import _gather_geometry, _geometry, _grid_geometry, _roi_geometry
from pydeform.cpu.core import jit, memory
from pydeform.cpu.core.simd import at
from pydeform.cpu.sampling.corners import Samples, locate_tap, sample_tables, samples_of, tile_origins
from pydeform.cuda.core.source import Code, source
from tests.conftest import needs_emulation

PACKAGE = Path(pydeform.__file__).parent
# Backends have one twin for all of a family, whose operators differ in which arrays there are and in their geometry.
FAMILIES = {
    "conv": ("conv1d", "conv2d", "conv3d", "deform_conv1d", "deform_conv2d", "deform_conv3d", "active_conv2d"),
    "roi": (
        *("roi_pool", "roi_align", "roi_align_rotated", "prroi_pool", "ps_roi_pool", "ps_roi_align"),
        *("deform_roi_pool", "deform_psroi_pool"),
    ),
    "gather": ("ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation", "dcnv3", "dcnv4"),
    "grid": ("grid_sample", "warp"),
}


def public_functions(path: Path) -> dict[str, str]:
    """Name -> parameters, annotations, defaults, as written; without options, which only CUDA heeds."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for f in functions:
        f.args.kwonlyargs, f.args.kw_defaults, f.args.kwarg = [], [], None
    return {f.name: ast.unparse(f.args) + " -> " + ast.unparse(f.returns or ast.Constant(None)) for f in functions}


def test_operators_are_known():
    assert set(FAMILIES) == {path.stem for path in (PACKAGE / "cuda").rglob("*.cu")}
    for members in FAMILIES.values():
        assert set(members) <= set(pydeform.__all__)


def test_kernels_name_whose_they_are():
    """So that who looks for an operator finds them."""
    for family, members in FAMILIES.items():
        head = (PACKAGE / "cuda" / family / f"{family}.cu").read_text(encoding="utf-8").partition("#include")[0]
        assert set(members) <= set(re.findall(r"\w+", head))


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
        (Code("gather"), "GatherGeometry", _gather_geometry.GatherGeometry),
        *((Code("grid", axes), "GridGeometry", _grid_geometry.GridGeometry) for axes in (2, 3)),
    ],
    ids=str,
)
def test_same_geometry(code, name, geometry):
    """Kernels take the struct that is made from the fields of the geometry, in their order."""
    declaration = source(code).partition(f"struct {name} {{\n")[2].partition("};")[0]
    fields = []
    for line in declaration.splitlines():
        kind, _, names = line.strip().rstrip(";").partition(" ")
        fields += [(kind, *re.fullmatch(r"(\w+)(?:\[(\d)\])?", name).groups()) for name in names.split(", ")]
    kinds, wanted = {int: "int", float: "double"}, []
    for name, hint in get_type_hints(geometry).items():
        numbers = get_args(hint) or (hint,)
        length = code.axes if ... in numbers else len(numbers)
        assert len(set(numbers) - {...}) == 1
        wanted.append((kinds[numbers[0]], name, str(length) if get_args(hint) else None))
    assert fields == wanted


def test_same_border_rules():
    """The kernels number them as the geometry does."""
    text = (PACKAGE / "cuda" / "sampling" / "axes.cuh").read_text(encoding="utf-8")
    for number, rule in enumerate(_geometry.BOUNDARIES):
        assert f"{rule.upper()} = {number}" in text


# The rules of an axis ------------------------------------------------------------------------------------------------
SIZES = (1, 2, 5, 2**24 + 1)  # the last one is no float32
# An outside pixel is the one behind the last, as on the CPU.
AXIS_KERNEL = """
PYDEFORM_DEVICE int in_image(int pixel, int size) { return pixel < size ? pixel : -1; }
template <class A>
__global__ void name_pixels(const A* at, int* pixels, A* shares, int* corners, A* within, A* weights, int count,
                            Geometry g) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, size = g.in_size[0];
  if (i >= count) return;
  const A low = lowest_coordinate<A>(g.boundary);
  const bool inside = in_range(at[i], low, size);
  const AxisCorners<A> axis = axis_corners(inside ? at[i] : low, size, g.boundary);
  for (int k = 0; k < 2; k++) pixels[k * count + i] = inside && axis.exists[k] ? in_image(axis.pixel[k], size) : size;
  shares[i] = 1 - axis.place;
  shares[count + i] = axis.place;
  const A place[1] = {at[i]};
  const Sample<A> sample = locate(place, g);
  A w[CORNERS];
  corner_weights(w, sample.within, (A)1);
  for (int k = 0; k < 2; k++) {
    corners[k * count + i] = sample.corner[k] < 0 ? size : in_image(sample.corner[k], size);
    weights[k * count + i] = w[k];
  }
  within[i] = sample.within[0];
}
"""


class Tables(NamedTuple):
    """Of `Samples`, in their order."""

    bases: Any
    corners: Any
    weights: Any
    cells: Any
    dots: Any


def axis_of(size: int, boundary: str, count: int) -> _geometry.ConvGeometry:
    """A tap of one axis that reads at its offset from 0, for `count` positions."""
    rule = _geometry.BOUNDARIES.index(boundary)
    return _geometry.ConvGeometry(1, 1, 1, 1, 1, rule, (size,), (count,), (1,), (0,), (0,), (1,))


def hard_coordinates(size: int, dtype: str) -> np.ndarray:
    """Every quarter from -2 to size + 1, or the ends of it, with the numbers beside each; and what is far away or none.

    No number is subnormal: a device takes these for 0.
    """
    kind = np.dtype(dtype).type
    ends = [np.arange(-8, min(4 * size, 40) + 5) / 4, np.arange(max(4 * size - 40, -8), 4 * size + 5) / 4]
    exact = np.concatenate([*ends, [-(2.0**53), -(2.0**31), -3, 2.0**31, 2.0**53, 1e30]]).astype(kind)
    beside = [np.nextafter(exact, kind(towards)) for towards in (-np.inf, np.inf)]
    tiny, huge = np.finfo(kind).tiny, np.finfo(kind).max
    special = np.array([np.nan, np.inf, -np.inf, huge, -huge, tiny, -tiny], kind)
    found = np.concatenate([exact, *beside, special])
    found = found[~((found != 0) & (abs(found) < tiny))]
    return np.concatenate([found, np.full(-len(found) % 64, np.nan, kind)])  # whole vectors


@functools.cache
def locator() -> jit.Kernel:
    def locate(offset: Any, mask: Any, scratch: Any, g: Any) -> None:
        samples, count = samples_of(0, scratch), offset.shape[4]
        tile_origins(0, count, samples, g)
        locate_tap(offset, (0, 0, 0, 0, 0), at(mask, (0, 0, 0, 0)), 0, count, samples, g)

    return jit.Kernel(locate)


def cpu_axis(coordinates: np.ndarray, g: _geometry.ConvGeometry) -> dict[str, np.ndarray]:
    count, dtype = len(coordinates), coordinates.dtype
    assert Samples._fields[1:] == Tables._fields
    tables = sample_tables(1, 1, count, np.dtype(np.int32), dtype, has_dots=False)
    scratch = Tables(*memory.Workspace(own=tables).take())
    offset, mask = coordinates.reshape(1, 1, 1, 1, -1), np.ones((1, 1, 1, count), dtype)
    arguments = offset, mask, scratch, g
    locator().prepare(dtype.name, arguments)(*arguments)
    return {"corners": scratch.corners[0, :2], "within": scratch.cells[0, 0], "weights": scratch.weights[0]}


def cuda_axis(coordinates: np.ndarray, g: _geometry.ConvGeometry, code: str) -> dict[str, np.ndarray]:
    """Also "pixels" and "shares", of the functions of one axis."""
    from tests.cuda_emulation.device import cupy

    count, dtype = len(coordinates), coordinates.dtype
    expression = f"name_pixels<{'float' if dtype == np.float32 else 'double'}>"
    kernel = cupy.RawModule(code=code, options=("-std=c++17",), name_expressions=(expression,)).get_function(expression)
    kinds = {"pixels": (2, np.int32), "shares": (2, dtype)}
    kinds |= {"corners": (2, np.int32), "within": (1, dtype), "weights": (2, dtype)}
    found = {name: cupy.zeros((rows, count), kind) for name, (rows, kind) in kinds.items()}
    fields = [(name, np.int32, (1,) if isinstance(value, tuple) else ()) for name, value in g._asdict().items()]
    struct = np.array([tuple(g)], np.dtype(fields))
    kernel((-(-count // 64),), (64,), (cupy.asarray(coordinates), *found.values(), np.int32(count), struct))
    got = {name: array.get() for name, array in found.items()}
    return {**got, "within": got["within"][0]}


def differences(size: int, boundary: str, dtype: str, code: str) -> list[str]:
    coordinates = hard_coordinates(size, dtype)
    g = axis_of(size, boundary, len(coordinates))
    cpu, cuda = cpu_axis(coordinates, g), cuda_axis(coordinates, g, code)
    every, numbers = slice(None), coordinates == coordinates  # of NaN, only a whole sample tells
    pairs = {name: (cpu[name], cuda[name], every) for name in cpu}
    pairs |= {"pixels": (cpu["corners"], cuda["pixels"], every), "shares": (cpu["weights"], cuda["shares"], numbers)}
    found = []
    for name, (want, got, some) in pairs.items():
        want, got = want[..., some], got[..., some]
        bits = f"u{want.itemsize}"
        same = (want.view(bits) == got.view(bits)) | ((want != want) & (got != got))
        where = np.argwhere(~same)
        for i in map(tuple, where):
            found.append(f"{name} of {coordinates[some][i[-1]]!r}: {want[i]!r} on the CPU, {got[i]!r} on CUDA")
    return found


AXIS_CODE = source(Code("conv", 1)) + AXIS_KERNEL


@needs_emulation
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("boundary", _geometry.BOUNDARIES)
def test_same_rules_of_an_axis(boundary, dtype):
    """Both backends name the same pixels for every coordinate, with the same bits of their shares."""
    for size in SIZES:
        found = differences(size, boundary, dtype, AXIS_CODE)
        assert not found, f"{size} pixels: " + "\n".join(found[:20])


@needs_emulation
@pytest.mark.parametrize(
    "boundary, right, wrong",
    [
        ("dcnv2", "? -0x1.fffffep-1f :", "? -1.f :"),
        ("torchvision", ": -2.f;", ": -1.f;"),
        ("dcnv1", "DCNV1 ? 0.f", "DCNV1 ? -0.5f"),
        ("dcnv1", "size - (boundary == DCNV1)", "size"),
        ("dcnv2", "coordinate < (A)size", "coordinate <= (A)size"),
        ("torchvision", "broken ? sum : c.place", "c.place"),
        ("dcnv2", "near >= 0, far >= 0", "near >= 0, far > 0"),
    ],
)
def test_another_rule_of_an_axis_is_seen(boundary, right, wrong):
    assert right in AXIS_CODE
    assert differences(5, boundary, "float32", AXIS_CODE.replace(right, wrong))


def test_same_rounding_rules():
    """The kernels number them as the geometry does."""
    text = (PACKAGE / "cuda" / "roi" / "bins.cuh").read_text(encoding="utf-8")
    rules = ("EXACT", "AFTER_SCALE", "BEFORE_SCALE")
    assert ", ".join(f"{rule} = {getattr(_roi_geometry, rule)}" for rule in rules) in text


def test_every_rule_is_a_line_of_the_kernels():
    folder = PACKAGE / "cuda" / "roi"
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("bins.cuh", "turned.cuh"))
    for rule in _roi_geometry.Rules._fields:
        if rule != "is_max":  # which chooses the kernel
            lines = [line for line in text.splitlines() if f"g.{rule}" in line and f"// {rule}" in line]
            assert lines, rule


@needs_emulation
def test_same_numbers_of_roi_kernels(emulated):  # else what is imported here would hold the real CuPy ever after
    """What launches and kernels of RoI pooling must agree on."""
    from pydeform.cuda.roi import gradients as roi
    from pydeform.cuda.roi import rotated

    folder = PACKAGE / "cuda" / "roi"
    names = ("forward.cuh", "turned.cuh", "backward.cuh")
    text = "".join((folder / name).read_text(encoding="utf-8") for name in names)
    height, width = roi.TILE
    for constants in (
        f"TILE_H = {height}, TILE_W = {width};",
        f"BOUNDS = {roi.BOUNDS};",
        f"MEAN = {roi.MEAN}, LARGEST_PIXEL = {roi.LARGEST_PIXEL}, LARGEST_POINT = {roi.LARGEST_POINT}, "
        f"TURNED_MEAN = {roi.TURNED_MEAN};",
        f"TURNED_NUMBERS = {rotated.NUMBERS};",
        f"ROI_THREADS = {roi.THREADS}",
    ):
        assert f"constexpr int {constants}" in text, constants


@needs_emulation
def test_same_numbers_of_gather_kernels(emulated):
    """What launches and kernels of the operators that gather must agree on."""
    from pydeform.cuda.gather import plan

    text = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "cuda" / "gather").glob("*.cuh"))
    rules = ("BILINEAR", "BILINEAR_INSIDE", "DISCRETE")
    assert ", ".join(f"{rule} = {getattr(_gather_geometry, rule)}" for rule in rules) in text
    for constant in (f"constexpr int GATHER_THREADS = {plan.THREADS};", f"unsigned w[{plan.WORDS}];"):
        assert constant in text, constant


@needs_emulation
def test_same_numbers_of_grid_kernels(emulated):
    """What launches and kernels of grid sampling must agree on."""
    from pydeform.cuda.grid import plan

    text = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "cuda" / "grid").glob("*.cuh"))
    for constants in (
        *(
            ", ".join(f"{name.upper()} = {n}" for name, n in names.items())
            for names in (_grid_geometry.MODES, _grid_geometry.PADDINGS)
        ),
        f"GRID_THREADS = {plan.THREADS}",
        f"GATHERED_CHANNELS = {plan.GATHERED_CHANNELS}",
    ):
        assert f"constexpr int {constants};" in text, constants
