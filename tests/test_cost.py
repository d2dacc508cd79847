"""What a call costs follows what is asked for: neither memory nor tables grow with an image of which little is read.

Bytes, places and rows are counted, never seconds.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import sys
import tracemalloc
from typing import Any, NamedTuple

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from pydeform._geometry import ConvGeometry
from pydeform.cpu.conv import backward_kernel
from pydeform.cpu.conv import backward_plan as conv_backward
from pydeform.cpu.conv import forward_plan as conv_forward
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.roi import plan as roi_plan
from tests.cases.deform_conv2d import CASES, dtype_of, make, make_grad_output
from tests.conftest import assert_same_bits
from tests.docstrings import sections
from tests.test_cpu_memory import _run_fenced
from tests.test_roi import CORNERS, OPERATORS, VARIANTS, Variant, problem, wide

CONVOLUTIONS = dict.fromkeys(("conv1d", "conv2d", "conv3d"), ("input", "weight", "bias"))
CONVOLUTIONS |= dict.fromkeys(
    ("deform_conv1d", "deform_conv2d", "deform_conv3d"), ("input", "offset", "weight", "bias", "mask")
)
CONVOLUTIONS["active_conv2d"] = ("input", "positions", "weight", "bias")
GATHER = {name: tuple(_selfcheck.problem(name).arrays) for name in _selfcheck.GATHER}
GRID = {name: tuple(_selfcheck.problem(name).arrays) for name in ("grid_sample", "warp")}  # affine_grid has no image
NAMES = {**CONVOLUTIONS, **GATHER, **GRID, **OPERATORS}
IMAGES = ("input", "value", "features")
SMALL, LARGE = (96, 100), (160, 200)  # both so large that a copy for a few results would be a waste
DTYPES = ("float32", "float16", "bfloat16", "float64")


class Work(NamedTuple):
    """A few results of an operator. Some channels are few, for kernels that read planes, and some are many."""

    operator: str
    channels: int  # of the output
    options: dict[str, Any] | None = None


def _psroi(channels: int) -> dict[str, Any]:
    return {"output_dim": channels, "pooled_size": 2, "group_size": 2, "sample_per_part": 2, "trans_std": 0.125}


WORK = {
    **{name: Work(name, 4) for name in CONVOLUTIONS},
    **{name: Work(name, 8) for name in GATHER},
    "grid_sample": Work("grid_sample", 8),
    "grid_sample bicubic": Work("grid_sample", 8, {"mode": "bicubic"}),
    "warp": Work("warp", 1),
    "roi_pool": Work("roi_pool", 32, {"output_size": 2}),
    "roi_pool 1": Work("roi_pool", 1, {"output_size": 2}),
    "roi_align": Work("roi_align", 32, {"output_size": 2}),
    "roi_align 1": Work("roi_align", 1, {"output_size": 2, "sampling_ratio": 2}),
    "roi_align max": Work("roi_align", 32, {"output_size": 2, "mode": "max"}),
    "roi_align max 1": Work("roi_align", 1, {"output_size": 2, "mode": "max", "sampling_ratio": 2}),
    "roi_align_rotated": Work("roi_align_rotated", 32, {"output_size": 2}),
    "roi_align_rotated 1": Work("roi_align_rotated", 1, {"output_size": 2, "sampling_ratio": 2}),
    "prroi_pool": Work("prroi_pool", 32, {"output_size": 2}),
    "prroi_pool 1": Work("prroi_pool", 1, {"output_size": 2}),
    "ps_roi_pool": Work("ps_roi_pool", 9, {"output_size": 2}),
    "ps_roi_pool 1": Work("ps_roi_pool", 1, {"output_size": 2}),
    "ps_roi_align": Work("ps_roi_align", 9, {"output_size": 2}),
    "ps_roi_align 1": Work("ps_roi_align", 1, {"output_size": 2}),
    "deform_roi_pool": Work("deform_roi_pool", 32, {"output_size": 2, "gamma": 0.125}),
    "deform_roi_pool 1": Work("deform_roi_pool", 1, {"output_size": 2, "gamma": 0.125}),
    "deform_psroi_pool": Work("deform_psroi_pool", 9, _psroi(9)),
    "deform_psroi_pool 1": Work("deform_psroi_pool", 1, _psroi(1)),
}


def _numbers(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape) % 7 / 8


def _make(work: Work, size: tuple[int, ...], dtype: str) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """Arrays, grad_output and options; what is read lies in two corners of the image."""
    height, width = size
    if work.operator in CONVOLUTIONS:
        axes = int(work.operator[-2])
        size = {1: (height * width,), 2: size, 3: (height // 8, width, 8)}[axes]
        options = {"stride": tuple(length - 3 for length in size)}
        out, taps = (2,) * axes, 3**axes
        arrays = {"input": _numbers(1, 32, *size), "weight": _numbers(4, 32, *(3,) * axes), "bias": _numbers(4)}
        arrays |= {"offset": _numbers(1, axes * taps, *out), "mask": _numbers(1, taps, *out)}
        arrays["positions"] = _numbers(axes * taps)
        arrays = {name: arrays[name] for name in CONVOLUTIONS[work.operator]}
        grad_output = _numbers(1, 4, *out)
    elif work.operator in GATHER:
        arrays, grad_output, options = _gathered(work.operator, size)
    elif work.operator in GRID:
        shape = (1, work.channels, *size)
        moved = work.operator == "warp"
        where = {"displacement": _numbers(1, 2, *size)} if moved else {"grid": _numbers(1, 2, 3, 2)}
        arrays, options = {"input": _numbers(*shape), **where}, work.options or {}
        grad_output = _numbers(*shape) if moved else _numbers(1, work.channels, 2, 3)
    else:
        per_output = 4 if "ps" in work.operator else 1
        boxes = np.array([[0, 1, 2, 7, 6], [1, width - 9, height - 8, width - 2, height - 3]], float)
        if work.operator == "roi_align_rotated":
            first, last = boxes[:, 1:3], boxes[:, 3:]
            boxes = np.concatenate([boxes[:, :1], (first + last) / 2, last - first, [[0.25], [0.25]]], axis=1)
        if dtype == "bfloat16":
            boxes = np.floor(boxes / 2) * 2  # there is no 199
        arrays = {"input": _numbers(2, work.channels * per_output, height, width), "boxes": boxes}
        if len(OPERATORS[work.operator]) > 2:
            arrays |= {OPERATORS[work.operator][2]: _numbers(2, 2, 2, 2), "mask": _numbers(2, 1, 2, 2)}
        grad_output, options = _numbers(2, work.channels, 2, 2), work.options or {}
    return {name: a.astype(dtype_of(dtype)) for name, a in arrays.items()}, grad_output.astype(dtype_of(dtype)), options


def _gathered(operator: str, size: tuple[int, int]) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """A few queries of one map."""
    if operator.startswith("dcn"):
        moves = {"offset": _numbers(1, 2, 2, 18), "mask": _numbers(1, 2, 2, 9)}
        if operator == "dcnv4":
            moves = {"offset_mask": _numbers(1, 2, 2, 32)}
        options = {"stride": tuple(length - 3 for length in size), "padding": 0}
        return {"input": _numbers(1, *size, 8), **moves}, _numbers(1, 2, 2, 8), options
    if operator == "deform_aggregation":
        arrays = {"features": _numbers(1, math.prod(size), 8), "sampling_locations": _numbers(1, 3, 2, 1, 2)}
        arrays["weights"] = _numbers(1, 3, 2, 1, 1, 2)
        return arrays, _numbers(1, 3, 8), {"spatial_shapes": ((size,),)}
    where, names = (1, 3, 2, 1, 2), GATHER[operator][1:]
    shapes = [where if name.startswith("attention") else (*where, 2) for name in names]
    shapes = [(1, 3, 1, 4) if name == "reference_points" else s for name, s in zip(names, shapes, strict=True)]
    arrays = {"value": _numbers(1, math.prod(size), 2, 4)}
    arrays |= {name: _numbers(*shape) for name, shape in zip(names, shapes, strict=True)}
    return arrays, _numbers(1, 3, 8), {"spatial_shapes": (size,)}


def _calls(work: Work, size: tuple[int, int], dtype: str, send: Any = lambda a: a) -> Any:
    """(what, function without arguments) for the forward and for each gradient by itself, and all of them."""
    arrays, grad_output, options = _make(work, size, dtype)
    arrays, grad_output = {name: send(a) for name, a in arrays.items()}, send(grad_output)
    forward, backward = getattr(pydeform, work.operator), getattr(pydeform, f"{work.operator}_backward")
    yield "forward", lambda: (forward(**arrays, **options),)
    fixed = () if work.operator in ("prroi_pool", "roi_align") else ("boxes",)
    names = [name for name in NAMES[work.operator] if name not in fixed]
    for needs in [*((name,) for name in names), tuple(names)]:
        yield f"backward {needs}", lambda needs=needs: backward(grad_output, **arrays, **options, needs=needs)


def _peak(call: Any) -> tuple[int, Any]:
    """Bytes that NumPy and Python had at most during a call, and its results, which are among them."""
    call()  # compiles, and fills what is kept
    tracemalloc.start()
    try:
        results = call()
        return tracemalloc.get_traced_memory()[1], results
    finally:
        tracemalloc.stop()


def _beyond(taken: int, results: Any, fields: Any) -> int:
    """Without the results, and without the gradient of the input in float32 beside one of half precision."""
    for field, result in zip(fields, results, strict=True):
        if result is not None:
            taken -= result.nbytes
            if field in IMAGES and result.dtype.itemsize == 2 and len(results) > 1:
                taken -= 2 * result.nbytes
    return taken


def test_every_operator_has_its_cost():
    operators = {name for name in pydeform.__all__ if f"{name}_backward" in pydeform.__all__} - {"affine_grid"}
    assert operators == set(NAMES) == {work.operator for work in WORK.values()}
    for name in itertools.chain(operators, (f"{name}_backward" for name in operators)):
        notes = " ".join(sections(inspect.getdoc(getattr(pydeform, name)))["Notes"])
        assert re.search(r"Memory beyond the (result|gradients): .* whatever the size of the (image|maps)", notes)


@pytest.fixture
def one_thread():
    before = pydeform.get_num_threads()
    pydeform.set_num_threads(1)
    yield
    pydeform.set_num_threads(before)


def _count_device_memory(monkeypatch: Any) -> list[int]:
    """Bytes of each array that CuPy makes from now on."""
    cupy = sys.modules["cupy"]
    taken: list[int] = []

    def counted(make: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            array = make(*args, **kwargs)
            if not any(array is a for a in args):
                taken.append(array.nbytes)
            return array

        return count

    for function in ("empty", "empty_like", "zeros", "zeros_like", "ascontiguousarray", "cumsum"):
        monkeypatch.setattr(cupy, function, counted(getattr(cupy, function)))
    return taken


def _assert_no_growth(work: Work, dtype: str, send: Any, measure: Any, copies: bool = False) -> None:
    """`copies`: maps that are gathered may have a copy in float32."""
    copied = copies and work.operator in {**GATHER, **GRID}
    room = 4096 + copied * 4 * 8 * (math.prod(LARGE) - math.prod(SMALL))
    small, large = (dict(_calls(work, size, dtype, send)) for size in (SMALL, LARGE))
    for what, call in small.items():
        fields = ("output",) if what == "forward" else NAMES[work.operator]
        before, after = (_beyond(*measure(one), fields) for one in (call, large[what]))
        assert after < before + room, f"{what}: {before} bytes beside the results, {after} for a larger image"


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory(backend, one_thread, monkeypatch, name, dtype):
    if backend.on_cpu:
        monkeypatch.setattr(roi_plan, "LIST_BYTES", 4096)  # else lists of a side of the image fit
        _assert_no_growth(WORK[name], dtype, backend.array, _peak, copies=dtype == "float16")
        return
    monkeypatch.setattr("pydeform.cuda.core.sizes.SMALL_COPY", 0)  # else the smaller image may be copied
    taken = _count_device_memory(monkeypatch)

    def measure(call: Any) -> tuple[int, Any]:
        taken.clear()
        results = call()
        return sum(taken), results

    _assert_no_growth(WORK[name], dtype, backend.array, measure)


@pytest.mark.parametrize("name", WORK)
def test_memory_for_strided_images(one_thread, monkeypatch, name):
    """And no copy of an image that kernels cannot read as it is. CUDA has to copy it."""
    monkeypatch.setattr(roi_plan, "LIST_BYTES", 4096)
    for dtype in ("float32", "bfloat16"):
        _assert_no_growth(WORK[name], dtype, lambda a: np.asfortranarray(a) if a.size > 5000 else a, _peak, copies=True)


@pytest.mark.parametrize("count", [0, 1, 100, 5000, 6000])
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("channels", [1, 4])
def test_memory_for_many_boxes(one_thread, count, mode, channels):
    """From some number of boxes on the image is copied, a vector of channels for each pixel: within the bound."""
    image = np.zeros((1, channels, 512, 512), np.float32)
    corners = np.arange(count)[:, None] % 400 + np.array([0, 0, 9, 9])
    boxes = np.concatenate([np.zeros((count, 1)), corners], 1).astype(np.float32)
    options = {"output_size": 7, "mode": mode}
    taken, (output,) = _peak(lambda: (pydeform.roi_align(image, boxes, **options),))
    room = 128 * output.nbytes + (2 << 20)
    assert taken < room
    grad_output = np.ones_like(output)
    taken, results = _peak(lambda: pydeform.roi_align_backward(grad_output, image, boxes, **options))
    assert taken - results.input.nbytes < room


# --- the same bits from a copy and from pixels that were gathered


def _strided(a: np.ndarray) -> np.ndarray:
    """The same numbers, columns apart and backwards."""
    return np.asfortranarray(a[..., ::-1])[..., ::-1]


def _everything(operator: str, arrays: dict[str, Any], grad_output: Any, options: dict[str, Any]) -> Any:
    names = [name for name, a in arrays.items() if a is not None and name != "boxes"]
    yield "output", getattr(pydeform, operator)(**arrays, **options)
    for needs in itertools.chain([()], *(itertools.combinations(names, k) for k in (1, 2, len(names)))):
        grads = getattr(pydeform, f"{operator}_backward")(grad_output, **arrays, **options, needs=needs)
        yield from ((f"{name} of {needs}", grad) for name, grad in grads._asdict().items())


def _assert_both_ways(
    monkeypatch: Any, operator: str, arrays: dict[str, Any], grad_output: Any, options: dict[str, Any]
) -> None:
    found = []
    for gathered in (False, True):
        for module in (roi_plan, conv_forward, conv_backward, backward_kernel):
            monkeypatch.setattr(module, "prefers_planes", lambda *_, gathered=gathered: gathered)
        of_way = {**arrays, "input": _strided(arrays["input"]) if gathered else arrays["input"]}
        with np.errstate(all="ignore"):
            found.append(list(_everything(operator, of_way, grad_output, options)))
    for (what, want), (_, got) in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_same_bits(got, want, what)


def _with_bad_pixels(input: np.ndarray) -> np.ndarray:
    input = input.copy()
    flat = input.reshape(-1)
    flat[::17], flat[3::31], flat[5::37], flat[1::5] = np.nan, np.inf, -0.0, 3e-8
    return input


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_variant", [lambda v: v, wide], ids=["few", "wide"])
def test_gathered_pixels_of_boxes_give_the_same_bits(monkeypatch, name, dtype, make_variant):
    variant = make_variant(VARIANTS[name])
    arrays, grad_output = problem(variant, dtype, corners=CORNERS * 2)
    for bad in (False, True):
        if bad:
            arrays["input"] = _with_bad_pixels(arrays["input"])
        _assert_both_ways(monkeypatch, variant.operator, arrays, grad_output, variant.options)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.batch])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_corners_of_samples_give_the_same_bits(monkeypatch, name, dtype):
    case = CASES[name]
    arrays = make(case, dtype)
    for bad in (False, True):
        if bad:
            arrays["input"] = _with_bad_pixels(arrays["input"])
        _assert_both_ways(monkeypatch, "deform_conv2d", arrays, make_grad_output(case, dtype), case.options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_number_is_widened_exactly(dtype):
    """One pixel each; the sum of one pixel times 1 is that pixel."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(dtype))
    image = numbers.reshape(1, 1, 256, 256)
    boxes = np.array([[0, x, y, x, y] for y in range(0, 256, 16) for x in range(0, 256, 16)], dtype_of(dtype))
    got = []
    for dy, dx in itertools.product(range(16), range(16)):
        part = np.asfortranarray(np.pad(image, ((0, 0), (0, 0), (0, 160), (0, 160)))[:, :, dy:, dx:])
        got.append(pydeform.roi_pool(part, boxes, 1).reshape(16, 16))
    got = np.array(got).reshape(16, 16, 16, 16).transpose(2, 0, 3, 1).reshape(256, 256)
    np.testing.assert_array_equal(got.astype(np.float32), image[0, 0].astype(np.float32))


# --- lists


def _long(variant: Variant, pooled: tuple[int, int]) -> Variant:
    if "pooled_size" in variant.options:
        options = {**variant.options, "pooled_size": pooled[0]}
        return variant._replace(options={**options, "part_size": variant.options.get("part_size", 2)})
    return variant._replace(options={**variant.options, "output_size": pooled})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pooled", [(11, 19), (19, 9)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_bins_in_bands_give_the_same_bits(monkeypatch, name, pooled, dtype):
    """Where the lists of all bins are too long, some bins are listed at a time, in lists as long as the bins."""
    variant = _long(VARIANTS[name], pooled)
    corners = (*CORNERS, (-3, -2.5, 60, 40), (0.25, 0, 6, 500))
    arrays, grad_output = problem(variant, dtype, corners=corners, size=(60, 75))
    names = [n for n in OPERATORS[variant.operator] if n != "boxes"]
    assert names[0] == "input"
    want = list(_everything(variant.operator, arrays, grad_output, variant.options))
    monkeypatch.setattr(roi_plan, "LIST_BYTES", 1)
    sizes = []
    whole = roi_plan.size_of_lists

    def watched(*args: Any) -> Any:
        sizes.append(whole(*args))
        return sizes[-1]

    monkeypatch.setattr(pydeform.cpu.roi, "size_of_lists", watched)
    with monkeypatch.context() as patch:
        patch.setattr("pydeform.cpu.core.parallel.run", _run_fenced(sys.modules["pydeform.cpu.core.parallel"].run))
        got = list(_everything(variant.operator, arrays, grad_output, variant.options))
    assert sizes and all(slots == 8 for slots, _ in sizes)
    for (what, g), (_, w) in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert_same_bits(g, w, what)


@pytest.mark.parametrize("output_size", [7, 3000])
@pytest.mark.parametrize(("mode", "sampling_ratio"), [("avg", -1), ("max", -1), ("avg", 4), ("max", 4)])
def test_lists_of_small_boxes_do_not_grow_with_the_image(output_size, mode, sampling_ratio):
    boxes = np.array([[0, 10, 10, 40, 30]], np.float32)
    taken = []
    for side in (100, 1_000_000):
        image = np.broadcast_to(np.float32(0), (1, 1, side, side))
        g = pydeform.ops.roi_align._geometry_of(
            "roi_align", {"input": image, "boxes": boxes}, output_size, 1.0, sampling_ratio, False, mode
        )
        kind = roi_plan.Kind(g, boxes.dtype, *roi_plan.size_of_lists(g, boxes), True, False, False)
        taken.append(sum(array.nbytes for array in roi_plan.scratch_of(kind, 1, 8).take()))
    assert taken[1] < 2 * roi_plan.LIST_BYTES


# --- tables


@pytest.mark.parametrize("pooled", [(1, 1), (3, 2), (7, 7), (5, 11)])
@pytest.mark.parametrize("group", [(1, 1), (2, 3), (7, 7)])
@pytest.mark.parametrize("part", [(1, 1), (3, 4), (7, 7), (9, 2)])
def test_table_of_bins(pooled, group, part):
    table = roi_plan.bins_table(pooled, group, part)
    assert len(table) == sum(pooled)  # not their product
    for y, x in itertools.product(*map(range, pooled)):
        for name, (height, width) in ("cell", group), ("part", part):
            want = y * height // pooled[0] * width + x * width // pooled[1]
            assert table[name][y] + table[name][pooled[0] + x] == want


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if "output_size" in v.options and v.operator[:3] != "ps_"]
)
def test_no_boxes_take_nothing(variant):
    """However many bins they would have."""
    options = {**variant.options, "output_size": 46_340}
    columns = 6 if variant.operator == "roi_align_rotated" else 5
    image, boxes = np.zeros((1, 3, 8, 8), np.float32), np.zeros((0, columns), np.float32)
    taken, (output,) = _peak(lambda: (getattr(pydeform, variant.operator)(image, boxes, **options),))
    assert output.shape == (0, 3, 46_340, 46_340) and taken < 1 << 16
    grad_output = np.zeros((0, 3, 46_340, 46_340), np.float32)
    backward = getattr(pydeform, f"{variant.operator}_backward")
    taken, grads = _peak(lambda: backward(grad_output, image, boxes, **options))
    assert not grads.input.any() and taken < 1 << 16


def test_many_bins_take_little_beside_them(one_thread):
    image, box = np.ones((1, 1, 8, 8), np.float32), np.array([[0, 0, 0, 7, 7]], np.float32)
    for forward in (pydeform.roi_align, pydeform.roi_pool):
        taken, (output,) = _peak(lambda forward=forward: (forward(image, box, 1000),))
        assert (output == 1).all() and taken < output.nbytes + (3 << 20)


@pytest.mark.parametrize("inputs, outputs, size", [(1, 1, 300), (1, 20_000, 1), (16, 16, 40)])
def test_large_kernels_and_many_outputs_keep_to_the_bound(one_thread, inputs, outputs, size):
    """One position, so that there are as many products as weights."""
    x = np.ones((1, inputs, size, size), np.float32)
    weight, grad_output = np.ones((outputs, inputs, size, size), np.float32), np.ones((1, outputs, 1, 1), np.float32)
    taken, (output,) = _peak(lambda: (pydeform.conv2d(x, weight),))
    assert output[0, 0] == inputs * size**2 and taken < 4 * (64 + 64) * weight.size + (4 << 20)
    taken, grads = _peak(lambda: pydeform.conv2d_backward(grad_output, x, weight, needs=("weight",)))
    beyond = taken - grads.weight.nbytes
    assert (grads.weight == 1).all() and beyond < 4 * ((64 + 256) * weight.size + 256 * outputs) + (20 << 20)


def _geometry(groups: int, offset_groups: int, ins: int, outs: int) -> ConvGeometry:
    return ConvGeometry(
        1, groups * ins, groups * outs, groups, offset_groups, 0, (8, 8), (8, 8), *((n, n) for n in (3, 1, 1, 1))
    )


@pytest.mark.parametrize(
    ("groups", "offset_groups", "ins", "outs"),
    [
        (1, 1, 5, 3),
        (6, 1, 5, 3),
        (6, 2, 70, 3),
        (2, 6, 66, 3),
        (2, 3, 150, 1),
        (4, 6, 3, 2),
        (12, 1, 1, 1),
        (300, 3, 1, 1),
    ],
)
def test_tables_of_groups_are_those_of_one_repeated(groups, offset_groups, ins, outs):
    g = _geometry(groups, offset_groups, ins, outs)
    depthwise = conv_plan.is_depthwise(g)
    for has_pairs in (False, True):
        want = conv_forward._steps_of_period(g, 32, depthwise, has_pairs)
        for got, whole in zip(conv_forward._steps(g, 32, has_pairs), want, strict=True):
            np.testing.assert_array_equal(got, whole)
    blocks, *sizes = conv_backward._blocks(g, 32, 8, outs, False)
    largest = int(max(blocks["channels"]))
    whole, *want_sizes = conv_backward._blocks_of_period(g, 32, largest, depthwise, 8, outs)
    latest: dict[int, int] = {}
    for number, row in enumerate(blocks):
        assert row["previous"] == latest.get(row["og"], -1)
        latest[row["og"]] = number
    for number, row in enumerate(blocks):
        assert row["is_last"] == (latest[row["og"]] == number)
    columns = [name for name in blocks.dtype.names if name not in ("previous", "is_last")]
    np.testing.assert_array_equal(blocks[columns], whole[columns])
    assert sizes == want_sizes


def test_tables_of_many_groups(monkeypatch):
    """Made for one group, and not kept."""
    g = _geometry(30_000, 1, 2, 2)
    assert conv_plan.period_of(g)[0].groups == 1
    seen = []
    for module, name in ((conv_forward, "_steps_of_period"), (conv_backward, "_blocks_of_period")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda one, *rest, make=make: (seen.append(one.groups), make(one, *rest))[1])
    kept = conv_forward._kept.cache_info().currsize, conv_backward._kept.cache_info().currsize
    single = np.dtype(np.float32)
    prepared = conv_forward.prepared(g, single, single, 1, True, True, False)
    assert len(prepared.tables[1]) == 9 * 30_000
    needs = frozenset({"input", "weight"})
    assert len(conv_backward.prepared(g, single, single, 1, True, True, False, needs).tables.blocks) == 30_000
    assert seen == [1, 1]
    assert kept == (conv_forward._kept.cache_info().currsize, conv_backward._kept.cache_info().currsize)
    kept_bins = roi_plan.bins_table.cache_info().currsize
    variant = Variant("roi_align", {"output_size": (5000, 1)}, 1)
    arrays, _ = problem(variant, "float32", corners=CORNERS[:1])
    pydeform.roi_align(**arrays, **variant.options)
    assert roi_plan.bins_table.cache_info().currsize == kept_bins
