"""Kernels of the RoI operators on the emulated device: what the tests of the operators do not ask of them.

Those run the same kernels against the oracle on many more problems. Here: races and bad reads, schedules, wide indices,
ranges of images, problems larger than a block, boxes that have no image, and what memory the kernels ask for.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _roi_geometry
from tests import conftest
from tests.conftest import assert_close, assert_same_bits
from tests.cuda_emulation import device
from tests.test_roi import CORNERS, DTYPES, VARIANTS, Variant, oracle, oracle_backward, problem

SCHEDULES = (0, 1, 5, 23)
WAYS = {"direct": 1 << 30, "warps": 1}
each_way = pytest.mark.parametrize("way", WAYS)
each_variant = pytest.mark.parametrize("name", VARIANTS)
PSROI = {"output_dim": 40, "pooled_size": 3, "group_size": 3, "part_size": 2, "sample_per_part": 2, "trans_std": 0.25}
# Past what a warp or a block takes at once: 16-byte chunks of 32 lanes, 32 rows or columns, the bins of a block, the
# channels of a block of the gradient, the classes of such a run.
LARGE = {
    "channels": (Variant("roi_align", {"output_size": 2, "sampling_ratio": 2}, 300), (6, 7), CORNERS[:3]),
    "image": (Variant("deform_roi_pool", {"output_size": (1, 2), "gamma": 0.125}, 17), (37, 70), None),
    "pixels": (Variant("ps_roi_pool", {"output_size": (1, 2)}, 9), (36, 67), None),
    "bins": (Variant("roi_align", {"output_size": (9, 8), "sampling_ratio": 2}, 9), (10, 12), CORNERS[:2]),
    "classes": (Variant("deform_psroi_pool", PSROI, 40, classes=5), (5, 4), CORNERS[:3]),
    "points": (Variant("roi_align", {"output_size": 1, "sampling_ratio": 7, "aligned": True}, 3), (6, 7), CORNERS),
    "boxes": (Variant("roi_pool", {"output_size": 1}, 2), (6, 7), CORNERS * 40),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    if "emulated" not in conftest._kinds():
        pytest.skip("the tests of this session do not run on the emulated device")
    for module in device.stand_ins.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every problem go one of the two WAYS."""
    return lambda way: monkeypatch.setattr("pydeform.cuda.core.sizes.DIRECT_CHANNELS", WAYS[way])


def solve(variant: Variant, arrays: dict[str, Any], grad_output: Any, **how: Any) -> dict[str, Any]:
    """The output and every gradient."""
    sent = {name: None if a is None else device.cupy.asarray(a) for name, a in arrays.items()}
    output = getattr(pydeform, variant.operator)(**sent, **variant.options)
    backward = getattr(pydeform, f"{variant.operator}_backward")
    grads = backward(device.cupy.asarray(grad_output), **sent, **variant.options, **how)
    results = {"output": output, **grads._asdict()}
    return {name: None if a is None else a.get() for name, a in results.items()}


def large(name: str, dtype: str = "float32") -> tuple[Variant, dict[str, Any], Any]:
    variant, size, corners = LARGE[name]
    height, width = size
    corners = corners or [(-0.375, -0.875, width - 0.125, height + 0.375), (3.25, 1.125, 3.875, 2.375)]
    scale = variant.options.get("spatial_scale", 1.0)
    return variant, *problem(variant, dtype, corners=np.array(corners) * scale, size=size)


def assert_is_the_oracles(variant: Variant, got: dict[str, Any], arrays: Any, grad_output: Any, dtype: str) -> None:
    want = oracle_backward(variant.operator, grad_output, arrays, variant.options)
    for name, array in (("output", oracle(variant.operator, arrays, variant.options)), *want.items()):
        if array is None:
            assert got[name] is None, name
        else:
            assert_close(got[name], array, dtype, name)


def assert_same(got: dict[str, Any], want: dict[str, Any], what: str = "") -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        if array is None:
            assert got[name] is None, name
        else:
            assert_same_bits(got[name], array, f"{what} {name}")


# Every access ---------------------------------------------------------------------------------------------------------


@each_way
@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_in_the_check_build(take, way, name, dtype):
    take(way)
    arrays, grad_output = problem(VARIANTS[name], dtype)
    with device.settings(check=True):
        got = solve(VARIANTS[name], arrays, grad_output)
    assert_same(got, solve(VARIANTS[name], arrays, grad_output))


@each_way
@pytest.mark.parametrize("name", LARGE)
def test_large_problems_in_the_check_build(take, way, name):
    take(way)
    variant, arrays, grad_output = large(name)
    with device.settings(check=True):
        got = solve(variant, arrays, grad_output)
    assert_is_the_oracles(variant, got, arrays, grad_output, "float32")


@each_way
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_large_problems(take, way, name, dtype):
    take(way)
    variant, arrays, grad_output = large(name, dtype)
    assert_is_the_oracles(variant, solve(variant, arrays, grad_output), arrays, grad_output, dtype)


# The same bits --------------------------------------------------------------------------------------------------------


@each_way
@each_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_schedule_shows(take, way, name, dtype):
    take(way)
    arrays, grad_output = problem(VARIANTS[name], dtype, corners=CORNERS * 2)
    results = []
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            results.append(solve(VARIANTS[name], arrays, grad_output))
    for result in results[1:]:
        assert_same(result, results[0])


@each_way
@each_variant
def test_wide_indices_change_no_bit(take, monkeypatch, way, name):
    take(way)
    arrays, grad_output = problem(VARIANTS[name], "float32")
    want = solve(VARIANTS[name], arrays, grad_output)
    for module in ("roi.launches", "roi.gradients", "core.copies"):
        monkeypatch.setattr(f"pydeform.cuda.{module}.index_type", lambda *sizes: "long long")
    # The launches of copies are kept by the sizes of their arrays.
    from pydeform.cuda.core import copies

    copies._turn.cache_clear()
    try:
        assert_same(solve(VARIANTS[name], arrays, grad_output), want)
    finally:
        copies._turn.cache_clear()


@each_variant
@pytest.mark.parametrize("images", [1, 2])
def test_ranges_of_images_change_no_bit(take, monkeypatch, name, images):
    """Copies are made of so many images at a time."""
    from pydeform.cuda import roi
    from pydeform.cuda.roi import launches

    take("warps")
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32", batch=5)
    want = solve(variant, arrays, grad_output)
    channels = 4 * variant.in_channels // variant.out_channels * variant.classes  # a chunk of 16 bytes for each class
    monkeypatch.setattr(launches, "COPIES", images * 42 * channels * 4)
    counts = []
    copy = roi.to_channels_last
    for module in (roi, launches):
        monkeypatch.setattr(
            module, "to_channels_last", lambda *a, **k: counts.append(a[1].shape[0]) or copy(*a, **k), raising=True
        )
    assert_same(solve(variant, arrays, grad_output), want)
    assert all(count <= max(images, len(grad_output)) for count in counts)
    if not variant.is_max:
        assert len(counts) > 5 // images


@each_way
@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_psroi_pool", "deform_psroi_pool_parts"])
def test_needs_change_no_bit(take, way, name):
    take(way)
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32")
    every = solve(variant, arrays, grad_output)
    present = [name for name in arrays if name != "boxes" and arrays[name] is not None]
    for needs in (*([name] for name in present), []):
        got = solve(variant, arrays, grad_output, needs=needs)
        for name in arrays:
            if name in needs:
                assert_same_bits(got[name], every[name], name)
            else:
                assert got[name] is None


# Boxes without an image -----------------------------------------------------------------------------------------------


@each_way
@each_variant
@pytest.mark.parametrize("index", [-1.0, 2.0, 0.5, -0.5, np.nan, np.inf, -np.inf, 3e9, 1e30])
def test_a_batch_index_that_is_none_gives_nan(take, way, name, index):
    """And nothing to any pixel; all other boxes are as they are without that one."""
    take(way)
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32")
    others = np.arange(len(grad_output)) != 1
    alone = {n: a if n == "input" or a is None else a[others] for n, a in arrays.items()}
    want = solve(variant, alone, grad_output[others])
    arrays["boxes"][1, 0] = index
    got = solve(variant, arrays, grad_output)
    assert_same_bits(got["input"], want["input"])
    for n in ("output", variant.offset_name, "mask"):
        if n is not None and got.get(n) is not None:
            assert_same_bits(got[n][others], want[n], n)
            # Cells of the offset that no bin asks keep the gradient 0.
            nan = np.isnan(got[n][1])
            assert nan.all() or (n == variant.offset_name and name == "deform_psroi_pool_parts" and nan.any()), n


@each_way
@each_variant
def test_no_boxes(take, way, name):
    take(way)
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32", corners=np.zeros((0, 4)))
    got = solve(variant, arrays, grad_output)
    assert got["output"].shape == grad_output.shape
    assert not got["input"].any()


@each_way
@each_variant
def test_no_images(take, way, name):
    """Then no box has one."""
    take(way)
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32", batch=0)
    arrays["input"] = np.zeros((0, variant.in_channels, 6, 7), np.float32)
    got = solve(variant, arrays, grad_output)
    assert np.isnan(got["output"]).all()
    assert got["input"].shape == arrays["input"].shape


@each_way
@pytest.mark.parametrize("length", [1e6, 1e9, 1e18, 1e30, 3e38])
@pytest.mark.parametrize(
    "name", ["roi_align", "roi_align_aligned", "roi_align_max_adaptive", "deform_roi_pool_adaptive"]
)
def test_huge_boxes_end_quickly(take, way, name, length):
    """Points are as many as pixels, also where float32 can no longer tell them apart."""
    take(way)
    variant = VARIANTS[name]
    options = {key: value for key, value in variant.options.items() if key != "sampling_ratio"}
    variant = variant._replace(options={**options, "spatial_scale": 1.0})
    corners = [(-length, -length, length, length), (0, 0, length, length), (-length, 1, 3, 4), (2, -length, 5, 3)]
    arrays, grad_output = problem(variant, "float32", corners=corners)
    got = solve(variant, arrays, grad_output)
    assert np.isfinite(got["output"]).all()
    assert np.isfinite(got["input"]).all()


# What the kernels are given and what they read ------------------------------------------------------------------------


def test_layout_of_the_geometry():
    """Every field arrives, whatever padding the struct has."""
    from pydeform.cuda.core import launch, source

    fields = _roi_geometry.RoiGeometry._fields
    values = [
        i + 2 if c.kind == "int" else i + 0.125
        for i, c in enumerate(source.c_fields(_roi_geometry.RoiGeometry).values())
    ]
    body = " ".join(f"p[{i}] = g.{field};" for i, field in enumerate(fields))
    struct = source.struct("RoiGeometry", _roi_geometry.RoiGeometry)
    head = f"{struct}\ntemplate <class T> __global__ void fields(T* p, RoiGeometry g)"
    code = f"{head} {{ {body} p[{len(fields)}] = sizeof(g); }}"
    function = device.cupy.RawModule(code=code, name_expressions=("fields<double>",)).get_function("fields<double>")
    found = device.cupy.zeros((len(fields) + 1,), np.float64)
    geometry = launch.geometry(_roi_geometry.RoiGeometry(*values))
    function((1,), (1,), (found, geometry))
    assert found.get().tolist() == [*values, geometry.dtype.itemsize]
    assert {"int", "double"} == {field.kind for field in source.c_fields(_roi_geometry.RoiGeometry).values()}


def test_an_image_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("pydeform.cuda.core.sizes.MOST_CELLS", 55)
    arrays, _ = problem(VARIANTS["roi_align"])
    sent = {name: device.cupy.asarray(a) for name, a in arrays.items()}
    with pytest.raises(ValueError, match=r"\(height \+ 1\) \* \(width \+ 1\) <= 55 on CUDA, got 7 \* 8 = 56"):
        pydeform.roi_align(**sent, **VARIANTS["roi_align"].options)


def test_memory_is_read_and_written_in_whole_sectors(take):
    """Of 32 bytes: a pixel's channels, the results of a block, and the rows of the input's gradient."""
    from pydeform.cuda.core import source

    take("warps")
    variant = Variant("deform_roi_pool", {"output_size": 8, "sampling_ratio": 2, "gamma": 0.125}, 64)
    arrays, grad_output = problem(variant, "float32", corners=CORNERS[:2], size=(16, 16))
    with device.settings(check=True, profile=True) as run:
        solve(variant, arrays, grad_output)
    requests = {"read": 0, "write": 0}
    sums = source.FOLDER.joinpath("roi/backward.cuh").read_text().partition("// Eq. 9: sums")[0].count("\n")
    for (line, kind, memory), count in run.counters().items():
        file, _, number = line.partition(":")
        if file == "roi/backward.cuh" and int(number) > sums:
            continue  # little of it, and not worth another layout
        if memory == "global" and line.startswith("roi/") and count.bytes >= 64 * count.requests:
            assert count.sectors <= 1.2 * count.least_sectors, (line, kind, count)
            requests[kind] += count.requests
    assert min(requests.values()) > 1000
