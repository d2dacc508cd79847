"""The six RoI operators against the oracle, against differences, and on awkward boxes and arrays."""

from __future__ import annotations

import inspect
import itertools
import math
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest

import pydeform
from pydeform.cpu.roi import plan as roi_plan
from pydeform.testing import gradcheck
from tests.cases.deform_conv2d import dtype_of
from tests.cases.roi import CASES, DTYPE_CASES, expected, make, make_grad_output
from tests.conftest import assert_close, assert_same_bits
from tests.reference import roi as reference
from tests.test_deform_conv2d import LAYOUTS, Guard, read_only, unaligned

# Operator -> its arrays in the order of its Grads.
OPERATORS = {
    "roi_pool": ("input", "boxes"),
    "roi_align": ("input", "boxes"),
    "ps_roi_pool": ("input", "boxes"),
    "ps_roi_align": ("input", "boxes"),
    "deform_roi_pool": ("input", "boxes", "offset", "mask"),
    "deform_psroi_pool": ("input", "boxes", "trans", "mask"),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")


def run(backend: Any, operator: str, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
    """Forward on a backend, NumPy to NumPy."""
    sent = {name: backend.array(a) for name, a in arrays.items()}
    return backend.numpy(getattr(pydeform, operator)(**sent, **options))


def run_backward(
    backend: Any, operator: str, grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    sent = {name: backend.array(a) for name, a in arrays.items()}
    grads = getattr(pydeform, f"{operator}_backward")(backend.array(grad_output), **sent, **options)
    assert isinstance(grads, getattr(pydeform, "".join(map(str.capitalize, operator.split("_"))) + "Grads"))
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


def assert_grads(operator: str, got: dict[str, Any], want: dict[str, Any], dtype: str) -> None:
    assert tuple(got) == OPERATORS[operator]
    for name in OPERATORS[operator]:
        if want[name] is None:
            assert got[name] is None, name
        else:
            assert_close(got[name], want[name], dtype, f"grad of {name}")


def assert_same_grads(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None:
            assert got[name] is None, name
        else:
            assert_same_bits(got[name], want[name], name)


def oracle(operator: str, arrays: dict[str, Any], options: dict[str, Any]) -> np.ndarray:
    return getattr(reference, operator)(**arrays, **options)


def oracle_backward(
    operator: str, grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]
) -> dict[str, np.ndarray]:
    return getattr(reference, f"{operator}_backward")(grad_output, **arrays, **options)


# Problems made here -------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """An operator and options that take one of its ways. The sizes of its arrays follow from these."""

    operator: str
    options: dict[str, Any]
    out_channels: int = 3
    classes: int = 1
    offset: bool = True  # if the operator has one
    mask: bool = True

    @property
    def pooled(self) -> tuple[int, int]:
        size = self.options.get("pooled_size", self.options.get("output_size"))
        return (size, size) if isinstance(size, int) else size

    @property
    def in_channels(self) -> int:
        if self.operator.startswith("ps_roi"):
            return self.out_channels * math.prod(self.pooled)
        return self.out_channels * self.options.get("group_size", 1) ** 2

    @property
    def offset_name(self) -> str | None:
        """Of the offset argument, if the operator has one."""
        return OPERATORS[self.operator][2] if len(OPERATORS[self.operator]) > 2 else None

    @property
    def offset_shape(self) -> tuple[int, ...]:
        """Without the boxes."""
        part = self.options.get("part_size")
        return 2 * self.classes, *((part, part) if part else self.pooled)

    @property
    def is_max(self) -> bool:
        return self.operator == "roi_pool" or self.options.get("mode") == "max"

    @property
    def is_adaptive(self) -> bool:
        """Whether a box says how many points there are."""
        return self.operator in ("roi_align", "ps_roi_align", "deform_roi_pool") and (
            self.options.get("sampling_ratio", 0) < 1
        )


# Points of deform_psroi_pool may lie on pixels, so all that they are computed from is exact in every dtype.
PSROI = {"output_dim": 8, "pooled_size": 4, "group_size": 2, "part_size": 3, "sample_per_part": 2}
# Channels of a class: fewer than 4 and more, which go different ways on the CPU.
VARIANTS = {
    "roi_pool": Variant("roi_pool", {"output_size": (3, 2), "spatial_scale": 0.5}),
    "roi_align": Variant("roi_align", {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2}, 6),
    "roi_align_aligned": Variant("roi_align", {"output_size": (3, 2), "spatial_scale": 0.5, "aligned": True}),
    "roi_align_max": Variant("roi_align", {"output_size": 2, "sampling_ratio": 2, "mode": "max"}),
    "roi_align_max_adaptive": Variant("roi_align", {"output_size": (1, 2), "aligned": True, "mode": "max"}),
    "ps_roi_pool": Variant("ps_roi_pool", {"output_size": (2, 3), "spatial_scale": 0.5}, 2),
    "ps_roi_pool_rfcn": Variant("ps_roi_pool", {"output_size": (3, 2), "spatial_scale": 0.5, "convention": "rfcn"}, 5),
    "ps_roi_align": Variant("ps_roi_align", {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2}, 2),
    "ps_roi_align_adaptive": Variant("ps_roi_align", {"output_size": (3, 2), "spatial_scale": 0.5}, 2),
    "deform_roi_pool": Variant("deform_roi_pool", {"output_size": (2, 3), "sampling_ratio": 2, "gamma": 0.25}, 5),
    "deform_roi_pool_adaptive": Variant(
        "deform_roi_pool", {"output_size": (3, 2), "spatial_scale": 0.5, "gamma": 0.125}, mask=False
    ),
    "deform_roi_pool_no_offset": Variant("deform_roi_pool", {"output_size": (1, 2), "gamma": 0.5}, offset=False),
    "deform_psroi_pool": Variant("deform_psroi_pool", {**PSROI, "trans_std": 0.25, "spatial_scale": 0.5}, 8, classes=2),
    # More cells than bins, so that there are cells which move no bin.
    "deform_psroi_pool_parts": Variant(
        "deform_psroi_pool",
        {"output_dim": 3, "pooled_size": 2, "part_size": 3, "sample_per_part": 4, "trans_std": 0.125},
        mask=False,
    ),
    "deform_psroi_pool_no_trans": Variant("deform_psroi_pool", {**PSROI, "spatial_scale": 0.5}, 8, offset=False),
}


def wide(variant: Variant) -> Variant:
    """The same with eight times as many channels."""
    channels = 8 * variant.out_channels
    options = {**variant.options, **({"output_dim": channels} if "output_dim" in variant.options else {})}
    return variant._replace(out_channels=channels, options=options)


MAXIMA = [name for name, variant in VARIANTS.items() if variant.is_max]
DEFORMABLE = [name for name, variant in VARIANTS.items() if variant.offset_name and variant.offset]
MASKED = [name for name, variant in VARIANTS.items() if variant.offset_name and variant.mask]
WITHOUT_OFFSET = [name for name, variant in VARIANTS.items() if not (variant.offset_name and variant.offset)]
each_variant = pytest.mark.parametrize("name", VARIANTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

IN_SIZE = (6, 7)
# [x1, y1, x2, y2] in pixels of the input: inside; across each border; whole; upside down; without area; outside.
CORNERS = (
    (0.625, 1.375, 4.875, 4.125),
    (-1.75, 2.25, 3.125, 7.375),
    (2.375, -2.625, 9.25, 2.125),
    (-0.5, -0.5, 6.5, 5.5),
    (5.125, 4.875, 1.375, 0.625),
    (3.375, 2.625, 3.375, 2.625),
    (40.125, 1.625, 44.375, 3.875),
)


def problem(
    variant: Variant,
    dtype: str = "float64",
    corners: Any = CORNERS,
    batch: int = 2,
    size: tuple[int, int] = IN_SIZE,
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """Arrays and grad_output. Boxes take the images in turn; corners are in pixels of the input.

    Values are small fractions of powers of two, exact in every dtype, and no two pixels of an image are equal.
    """
    rng = np.random.default_rng(seed)
    count = len(corners)

    def values(*shape: int) -> np.ndarray:
        return rng.integers(-64, 65, shape) / 32

    corners = np.array(corners, float).reshape(count, 4) / variant.options.get("spatial_scale", 1.0)
    pixels = np.stack([rng.permutation(math.prod(size)) for _ in range(batch * variant.in_channels)] or [[]])
    arrays = {
        "input": (pixels.reshape(batch, variant.in_channels, *size) - math.prod(size) // 2) / 16,
        "boxes": np.concatenate([np.arange(count).reshape(-1, 1) % max(batch, 1), corners], 1),
    }
    if variant.offset_name:
        arrays[variant.offset_name] = values(count, *variant.offset_shape) if variant.offset else None
        arrays["mask"] = values(count, 1, *variant.pooled) if variant.mask else None
    arrays = {name: None if a is None else a.astype(dtype_of(dtype)) for name, a in arrays.items()}
    return arrays, values(count, variant.out_channels, *variant.pooled).astype(dtype_of(dtype))


def solve(backend: Any, variant: Variant, arrays: dict[str, Any], grad_output: Any) -> tuple[Any, dict[str, Any]]:
    output = run(backend, variant.operator, arrays, variant.options)
    return output, run_backward(backend, variant.operator, grad_output, arrays, variant.options)


def assert_equals_oracle(backend: Any, variant: Variant, arrays: dict[str, Any], grad_output: Any, dtype: str) -> Any:
    """Output and gradients, which are returned."""
    output, grads = solve(backend, variant, arrays, grad_output)
    assert_close(output, oracle(variant.operator, arrays, variant.options), dtype)
    want = oracle_backward(variant.operator, grad_output, arrays, variant.options)
    assert_grads(variant.operator, grads, want, dtype)
    return output, grads


# Against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_forward(backend, name):
    case, arrays = CASES[name], make(CASES[name])
    with Guard(*arrays.values()):
        got = run(backend, case.operator, arrays, case.options)
    assert_close(got, expected(name)[0], "float64")


@pytest.mark.parametrize("name", CASES)
def test_backward(backend, name):
    case, arrays, grad_output = CASES[name], make(CASES[name]), make_grad_output(CASES[name])
    with Guard(grad_output, *arrays.values()):
        got = run_backward(backend, case.operator, grad_output, arrays, case.options)
    assert_grads(case.operator, got, expected(name)[1], "float64")


@pytest.mark.parametrize("name", DTYPE_CASES)
@each_dtype
def test_dtypes(backend, name, dtype):
    case = CASES[name]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    with Guard(grad_output, *arrays.values()):
        output = run(backend, case.operator, arrays, case.options)
        grads = run_backward(backend, case.operator, grad_output, arrays, case.options)
    assert_close(output, expected(name)[0], dtype)
    assert_grads(case.operator, grads, expected(name)[1], dtype)


def test_cases_cover_every_operator():
    assert {case.operator for case in CASES.values()} == set(OPERATORS)
    assert {CASES[name].operator for name in DTYPE_CASES} == set(OPERATORS)
    assert {variant.operator for variant in VARIANTS.values()} == set(OPERATORS)


@each_variant
@each_dtype
def test_boxes_of_every_kind(backend, name, dtype):
    """Inside, across each border, upside down, without area, outside: what the other tests build on."""
    arrays, grad_output = problem(VARIANTS[name], dtype)
    with Guard(grad_output, *arrays.values()):
        output, grads = assert_equals_oracle(backend, VARIANTS[name], arrays, grad_output, dtype)
    assert np.count_nonzero(output[0]) > output[0].size / 2
    assert grads["input"].any()


# Numbers that MXNet's and torchvision's operators give for the box [0, 0, 0, 3, 3] on 0 ... 63 as 8x8 pixels.
MEASURED = {
    "ROIPooling": ("roi_pool", {"output_size": 2}, [9, 11, 25, 27]),
    "PSROIPooling": ("ps_roi_pool", {"output_size": 2, "convention": "rfcn"}, [4.5, 6.5, 20.5, 22.5]),
    "ROIAlign": ("roi_align", {"output_size": 2, "sampling_ratio": 2}, [6.75, 8.25, 18.75, 20.25]),
    "ROIAlign aligned": (
        "roi_align",
        {"output_size": 2, "sampling_ratio": 2, "aligned": True},
        [2.8125, 4.25, 14.3125, 15.75],
    ),
    "DeformablePSROIPooling": (
        "deform_psroi_pool",
        {"output_dim": 1, "pooled_size": 2, "sample_per_part": 2},
        [2.25, 4, 16.25, 18],
    ),
}


@pytest.mark.parametrize("name", MEASURED)
@each_dtype
def test_measured_values(backend, name, dtype):
    operator, options, want = MEASURED[name]
    channels = 4 if operator == "ps_roi_pool" else 1  # of the same pixels: every bin reads its own
    image = np.broadcast_to(np.arange(64.0).reshape(8, 8), (1, channels, 8, 8))
    arrays = {"input": image.astype(dtype_of(dtype)), "boxes": np.array([[0, 0, 0, 3, 3]]).astype(dtype_of(dtype))}
    assert_close(run(backend, operator, arrays, options).ravel(), np.array(want, float), dtype)


@pytest.mark.parametrize(
    ("operator", "options", "aligned"),
    [
        ("deform_roi_pool", {"output_size": (2, 3)}, True),
        ("deform_roi_pool", {"output_size": (2, 3), "sampling_ratio": 2}, True),
    ],
)
@each_dtype
def test_deform_roi_pool_without_offset_is_roi_align(backend, operator, options, aligned, dtype):
    variant = Variant(operator, options, offset=False, mask=False)
    arrays, grad_output = problem(variant, dtype)
    plain = {name: arrays[name] for name in ("input", "boxes")}
    output, grads = solve(backend, variant, arrays, grad_output)
    assert_same_bits(output, run(backend, "roi_align", plain, {**options, "aligned": aligned}))
    want = run_backward(backend, "roi_align", grad_output, plain, {**options, "aligned": aligned})
    assert_same_bits(grads["input"], want["input"])


# Arguments --------------------------------------------------------------------------------------------------------

# The contract: names in this order, with these defaults; those after "*" by name only.
SIGNATURES = {
    "roi_pool": "input, boxes, output_size, spatial_scale=1.0",
    "roi_align": "input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False, *, mode='avg'",
    "ps_roi_pool": "input, boxes, output_size, spatial_scale=1.0, *, convention='torchvision'",
    "ps_roi_align": "input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1",
    "deform_roi_pool": "input, boxes, offset=None, output_size=7, spatial_scale=1.0, sampling_ratio=0, gamma=0.1, "
    "mask=None",
    "deform_psroi_pool": "input, boxes, trans=None, *, output_dim, pooled_size, group_size=1, part_size=None, "
    "sample_per_part=1, trans_std=0.0, spatial_scale=1.0, mask=None",
}


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare)).strip("()")


@pytest.mark.parametrize("operator", OPERATORS)
def test_signatures(operator):
    forward, backward = getattr(pydeform, operator), getattr(pydeform, f"{operator}_backward")
    assert signature(forward) == SIGNATURES[operator]
    by_name = "" if "*" in SIGNATURES[operator] else ", *"
    only_backward = f"{by_name}, needs=None, deterministic=False"
    assert signature(backward) == f"grad_output, {SIGNATURES[operator]}{only_backward}"


@each_variant
def test_options_by_position(backend, name):
    """As many as the operator takes: a call written for torchvision or mmcv means the same."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant)
    function = getattr(pydeform, variant.operator)
    positional, by_name = [], {**arrays, **variant.options}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(by_name.pop(parameter.name, parameter.default))
    sent = [backend.array(a) if isinstance(a, np.ndarray) else a for a in positional]
    by_name = {key: backend.array(a) if isinstance(a, np.ndarray) else a for key, a in by_name.items()}
    output, grads = solve(backend, variant, arrays, grad_output)
    assert_same_bits(backend.numpy(function(*sent, **by_name)), output)
    back = getattr(pydeform, f"{variant.operator}_backward")(backend.array(grad_output), *sent, **by_name)
    assert_same_bits(backend.numpy(back.input), grads["input"])


def test_an_int_stands_for_both_axes(backend):
    for name in ("roi_pool", "ps_roi_align", "deform_roi_pool"):
        variant = VARIANTS[name]._replace(options={**VARIANTS[name].options, "output_size": (2, 2)})
        arrays, _ = problem(variant)
        want = run(backend, variant.operator, arrays, variant.options)
        for size in (2, [2, 2], np.array([2, 2]), np.int64(2)):
            got = run(backend, variant.operator, arrays, {**variant.options, "output_size": size})
            assert_same_bits(got, want)


@pytest.mark.parametrize("name", ["roi_align_aligned", "ps_roi_align_adaptive", "deform_roi_pool_adaptive"])
def test_sampling_ratio_0_and_minus_1_are_adaptive(backend, name):
    variant = VARIANTS[name]
    arrays, _ = problem(variant)
    want = run(backend, variant.operator, arrays, variant.options)
    for ratio in (0, -1):
        assert_same_bits(run(backend, variant.operator, arrays, {**variant.options, "sampling_ratio": ratio}), want)


@each_variant
def test_needs(backend, name):
    """Each subset leaves the others None and changes no bit of what it computes."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32")
    every = run_backward(backend, variant.operator, grad_output, arrays, variant.options)
    assert every["boxes"] is None
    names = [n for n in OPERATORS[variant.operator] if n != "boxes"]
    assert all((every[n] is None) == (arrays[n] is None) for n in names)
    for needs in itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names) + 1)):
        options = {**variant.options, "needs": needs}
        got = run_backward(backend, variant.operator, grad_output, arrays, options)
        assert_same_grads(got, {n: every[n] if n in needs else None for n in every})


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in ("roi_align", "prroi_pool")])
def test_boxes_have_no_gradient_to_need(backend, operator):
    variant = VARIANTS[operator]
    arrays, grad_output = problem(variant)
    with pytest.raises(ValueError, match=rf"^{operator}_backward: needs must name .*, got 'boxes'$"):
        run_backward(backend, operator, grad_output, arrays, {**variant.options, "needs": ("input", "boxes")})


@each_variant
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_layouts_give_the_bits_of_a_copy(backend, name, dtype):
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, dtype)
    output, grads = solve(backend, variant, arrays, grad_output)
    # Strides are a matter of the backend; there are no such CuPy arrays as the other two make.
    for layout in LAYOUTS if backend.on_cpu else [f for f in LAYOUTS if f not in (unaligned, read_only)]:
        odd = {n: a if a is None else layout(a) for n, a in arrays.items()}
        odd_grad = layout(grad_output)
        with Guard(odd_grad, *odd.values()):
            odd_output, odd_grads = solve(backend, variant, odd, odd_grad)
        assert_same_bits(odd_output, output, layout.__name__)
        assert_same_grads(odd_grads, grads)


@each_variant
def test_zero_strides(backend, name):
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, "float32", corners=[CORNERS[1]] * 4)
    arrays["boxes"][:, 0] = 1
    odd = {n: a if a is None else np.broadcast_to(a[:1], a.shape) for n, a in arrays.items()}
    flat = {n: a if a is None else np.ascontiguousarray(a) for n, a in odd.items()}
    odd_grad = np.broadcast_to(grad_output[:1, :1], grad_output.shape)
    assert odd["boxes"].strides[0] == odd["input"].strides[0] == odd_grad.strides[1] == 0
    output, grads = solve(backend, variant, odd, odd_grad)
    want, want_grads = solve(backend, variant, flat, np.ascontiguousarray(odd_grad))
    assert_same_bits(output, want)
    assert_same_grads(grads, want_grads)


@each_variant
@each_dtype
def test_no_boxes(backend, name, dtype):
    """Empty results of the right shape; the input's gradient is zeros, not absent."""
    variant = VARIANTS[name]
    for batch in (2, 0):
        arrays, grad_output = problem(variant, dtype, corners=(), batch=batch)
        output, grads = solve(backend, variant, arrays, grad_output)
        assert (output.shape, output.dtype.name) == ((0, variant.out_channels, *variant.pooled), dtype)
        for n, grad in grads.items():
            if n == "boxes" or arrays[n] is None:
                assert grad is None, n
            else:
                assert (grad.shape, grad.dtype.name) == (arrays[n].shape, dtype)
                assert not grad.any()


@each_variant
def test_results_are_fresh_and_contiguous(backend, name):
    """The caller may write to a result without touching an argument or the next result."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant)
    sent = {n: backend.array(a) for n, a in arrays.items()}
    forward, backward = getattr(pydeform, variant.operator), getattr(pydeform, f"{variant.operator}_backward")
    results = [forward(**sent, **variant.options) for _ in range(2)]
    results += [g for g in backward(backend.array(grad_output), **sent, **variant.options) if g is not None]
    assert all(r.flags.c_contiguous for r in results)
    if backend.on_cpu:
        assert all(r.flags.writeable for r in results)
        everything = [*results, *(a for a in arrays.values() if a is not None)]
        assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(everything, 2))


# Batch index --------------------------------------------------------------------------------------------------------

BAD_INDICES = {"negative": -1.0, "fractional": 0.5, "N": 2.0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@each_variant
@pytest.mark.parametrize("index", BAD_INDICES.values(), ids=BAD_INDICES)
def test_batch_index_outside_the_batch(backend, name, index):
    """The CPU names the row. CUDA, where looking would wait for the device, gives NaN and leaves the others alone."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant)
    output, grads = solve(backend, variant, arrays, grad_output)
    sound = {n: a if a is None or n == "input" else np.delete(a, 3, axis=0) for n, a in arrays.items()}
    _, grads_of_sound = solve(backend, variant, sound, np.delete(grad_output, 3, axis=0))
    arrays["boxes"][3, 0] = index
    if backend.on_cpu:
        said = f"boxes must have .* < N = 2 in column 0, the batch index, got {index:g} in row 3$"
        with pytest.raises(ValueError, match=rf"^{variant.operator}: {said}"):
            run(backend, variant.operator, arrays, variant.options)
        with pytest.raises(ValueError, match=rf"^{variant.operator}_backward: {said}"):
            run_backward(backend, variant.operator, grad_output, arrays, variant.options)
        return
    got, got_grads = solve(backend, variant, arrays, grad_output)
    assert np.isnan(got[3]).all()
    assert_same_bits(np.delete(got, 3, axis=0), np.delete(output, 3, axis=0))
    assert_same_bits(got_grads["input"], grads_of_sound["input"], "the box gives nothing to the input")
    for n in OPERATORS[variant.operator][2:]:
        if arrays[n] is not None:
            assert (np.isnan(got_grads[n][3]) == reached(variant, n)).all()
            assert_same_bits(np.delete(got_grads[n], 3, axis=0), np.delete(grads[n], 3, axis=0), n)


def reached(variant: Variant, name: str) -> np.ndarray:
    """Which elements of a box's offset or mask any bin uses: not all cells of an offset need move one."""
    if name == "mask":
        return np.ones((1, *variant.pooled), bool)
    used = np.zeros(variant.offset_shape, bool)
    height, width = variant.offset_shape[1:]
    for py, px in np.ndindex(*variant.pooled):
        used[:, py * height // variant.pooled[0], px * width // variant.pooled[1]] = True
    return used


@each_variant
def test_boxes_without_a_batch(backend, name):
    """Every index is outside a batch of 0."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, batch=0)
    if backend.on_cpu:
        with pytest.raises(ValueError, match=rf"^{variant.operator}: boxes .* < N = 0 .*, got 0 in row 0$"):
            run(backend, variant.operator, arrays, variant.options)
        return
    output, grads = solve(backend, variant, arrays, grad_output)
    assert np.isnan(output).all()
    assert grads["input"].shape == arrays["input"].shape


# What is not finite -------------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
# Column of boxes -> value; the rest of the box is sound.
BOXES_WITH_NAN = ({1: NAN}, {2: NAN}, {3: NAN}, {4: NAN}, {1: NAN, 3: INF}, {2: -INF, 4: NAN})
BOXES_AT_INFINITY = ({1: -INF}, {2: INF}, {3: INF}, {4: -INF}, {1: -INF, 3: INF}, {1: INF, 2: INF, 3: INF, 4: INF})


@each_variant
@each_dtype
def test_boxes_that_are_not_finite(backend, name, dtype):
    """NaN is all of that box's outputs and none of the input's gradient; an infinite box reads nothing."""
    variant = VARIANTS[name]
    spoilt = (*BOXES_WITH_NAN, *BOXES_AT_INFINITY)
    arrays, grad_output = problem(variant, dtype, corners=[CORNERS[0]] * (1 + len(spoilt)))
    sound = {n: a if a is None or n == "input" else a[:1].copy() for n, a in arrays.items()}
    for row, changes in enumerate(spoilt, 1):
        for column, value in changes.items():
            arrays["boxes"][row, column] = value
    output, grads = assert_equals_oracle(backend, variant, arrays, grad_output, dtype)
    want, want_grads = solve(backend, variant, sound, grad_output[:1])
    last = 1 + len(BOXES_WITH_NAN)
    assert_same_bits(output[:1], want)
    assert np.isnan(output[1:last].astype(float)).all()
    assert not output[last:].any()
    assert_same_bits(grads["input"], want_grads["input"])
    for n in OPERATORS[variant.operator][2:]:
        if arrays[n] is None:
            continue
        assert_same_bits(grads[n][:1], want_grads[n])
        assert (np.isnan(grads[n][1:last].astype(float)) == reached(variant, n)).all()
        assert not grads[n][last:].any()


@each_variant
@each_dtype
def test_coordinates_that_overflow(backend, name, dtype):
    """Finite in the array, infinite once scaled, in float32 for half types. A least size does not hide it."""
    largest, scale = {"float16": (60000.0, 2.0**120), "float64": (1.7e308, 4.0)}.get(dtype, (3e38, 4.0))
    variant = VARIANTS[name]._replace(options={**VARIANTS[name].options, "spatial_scale": scale})
    arrays, grad_output = problem(variant, dtype, corners=[CORNERS[0]] * 5)
    arrays["boxes"][0, 1:] = largest
    arrays["boxes"][1, 3] = largest
    arrays["boxes"][3:, 1:] = 0
    arrays["boxes"][3, 3] = arrays["boxes"][4, 4] = -largest
    arrays["boxes"][2, 1:] = np.array([-largest, 0, largest, 0])
    output, grads = solve(backend, variant, arrays, grad_output)
    assert not output.any()
    assert not any(grad.any() for grad in grads.values() if grad is not None)


@pytest.mark.parametrize("name", DEFORMABLE)
@each_dtype
def test_offsets_that_are_not_finite(backend, name, dtype):
    """Only the bins of that cell and the channels of that class; both of its coordinates' gradients are NaN."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, dtype, corners=[CORNERS[0]] * 7)
    offset = arrays[variant.offset_name]
    clean, clean_grads = solve(backend, variant, arrays, grad_output)
    last = 2 * variant.classes - 2  # channel of x in the last class
    spoilt = {
        (1, last, 0, 0): NAN,
        (2, last + 1, 1, 1) if offset.shape[2] > 1 else (2, last + 1, 0, 1): NAN,
        (3, 0, 0, 1): INF,
        (4, 1, 0, 0): -INF,
        (5, 0, 0, 0): NAN,
        (5, 1, 0, 0): INF,
    }
    for place, value in spoilt.items():
        offset[place] = value
    output, grads = assert_equals_oracle(backend, variant, arrays, grad_output, dtype)
    per_class = variant.out_channels // variant.classes
    touched = np.zeros(output.shape, bool)
    nan_output, nan_offset = touched.copy(), np.zeros(offset.shape, bool)
    for (r, channel, ty, tx), value in spoilt.items():
        label = channel // 2
        outputs = np.s_[label * per_class : (label + 1) * per_class]
        for py, px in np.ndindex(*variant.pooled):
            if (py * offset.shape[2] // variant.pooled[0], px * offset.shape[3] // variant.pooled[1]) == (ty, tx):
                touched[r, outputs, py, px] = True
                nan_output[r, outputs, py, px] |= math.isnan(value)
        nan_offset[r, 2 * label : 2 * label + 2, ty, tx] |= math.isnan(value)
    assert touched.any()
    numbers = output.astype(float)
    assert (np.isnan(numbers) == nan_output).all()
    assert not numbers[touched & ~nan_output].any()
    assert_same_bits(output[~touched], clean[~touched])
    assert (np.isnan(grads[variant.offset_name].astype(float)) == nan_offset).all()
    assert np.isfinite(grads["input"].astype(float)).all()
    if arrays["mask"] is not None:
        assert (np.isnan(grads["mask"].astype(float)) == nan_output.any(1, keepdims=True)).all()
    for n in OPERATORS[variant.operator][2:]:
        if arrays[n] is not None:
            assert_same_bits(grads[n][[0, 6]], clean_grads[n][[0, 6]])


@pytest.mark.parametrize("name", DEFORMABLE)
def test_infinite_offsets_are_outside_whatever_they_are_multiplied_by(backend, name):
    """Also by 0: a gamma of 0 or a box without size."""
    variant = VARIANTS[name]
    scale = "gamma" if variant.operator == "deform_roi_pool" else "trans_std"
    variant = variant._replace(options={**variant.options, scale: 0.0})
    arrays, grad_output = problem(variant, corners=[CORNERS[0], CORNERS[0]])
    arrays[variant.offset_name][0] = INF
    output, grads = assert_equals_oracle(backend, variant, arrays, grad_output, "float64")
    assert not output[0].any() and output[1].all()
    assert not grads[variant.offset_name].any()


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.offset_name and variant.mask])
def test_nan_in_a_box_is_nan_whatever_the_mask(backend, name):
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, corners=CORNERS[:2])
    arrays["mask"][...] = 0
    arrays["boxes"][0, 3] = NAN
    output, _ = assert_equals_oracle(backend, variant, arrays, grad_output, "float64")
    assert np.isnan(output[0]).all() and not output[1].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the oracle's inf - inf and inf * 0
@each_variant
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_bad_pixels_stay_where_they_are_read(backend, name, dtype):
    """NaN and infinities, at corners too, where a clamped index would land. Bins that read none keep their bits."""
    variant = VARIANTS[name]
    corners = (CORNERS[0], CORNERS[1], CORNERS[2], CORNERS[6], (-9.5, -7.25, -4.5, -3.125), (1.125, 1.125, 3.25, 2.875))
    arrays, grad_output = problem(variant, dtype, corners=[c for c in corners for _ in range(2)])
    arrays["boxes"][:, 0] = [0, 1] * len(corners)
    clean, clean_grads = solve(backend, variant, arrays, grad_output)
    bad_outputs = 0
    for channels, places in ((np.s_[::2], [(0, 0), (-1, -1), (3, 4)]), (np.s_[:], [(2, 2), (0, -1), (-1, 0)])):
        for bad in (NAN, INF, -INF):
            spoilt = {**arrays, "input": arrays["input"].copy()}
            for y, x in places:
                spoilt["input"][0, channels, y, x] = bad
            want = oracle(variant.operator, spoilt, variant.options)
            if math.isnan(bad):
                output, grads = assert_equals_oracle(backend, variant, spoilt, grad_output, dtype)
                bad_outputs += np.isnan(want).sum()
            else:  # inf * 0 is NaN where a weight is a sum of one term, and may be inf where it is one of more
                output, grads = solve(backend, variant, spoilt, grad_output)
                np.testing.assert_array_equal(np.isfinite(output), np.isfinite(want))
            same = output.astype(float) == clean.astype(float)
            assert (same | ~np.isfinite(want) | variant.is_max).all()
            assert_same_bits(output[1::2], clean[1::2], "the other image's boxes")
            assert_same_bits(output[6:10], clean[6:10], "boxes outside")
            assert np.isfinite(grads["input"].astype(float)).all()
            if not variant.is_max:  # does not depend on the input
                assert_same_bits(grads["input"], clean_grads["input"])
    assert bad_outputs


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the oracle's inf * 0
@pytest.mark.parametrize("channels", ["few", "many"])
@pytest.mark.parametrize(
    ("name", "argument"), [*((name, "grad_output") for name in VARIANTS), *((name, "mask") for name in MASKED)]
)
def test_one_factor_that_is_not_finite(backend, name, channels, argument):
    """Inside, across a border and outside, where the mask multiplies 0."""
    variant = VARIANTS[name] if channels == "few" else wide(VARIANTS[name])
    arrays, grad_output = problem(variant)
    for value, box in ((NAN, 0), (INF, 1), (-INF, 0), (INF, 6), (NAN, 6)):
        spoilt, spoilt_grad = dict(arrays), grad_output.copy()
        if argument == "mask":
            spoilt["mask"] = arrays["mask"].copy()
            spoilt["mask"][box, 0, -1, 0] = value
        else:
            spoilt_grad[box, variant.out_channels // 2, -1, 0] = value
        output, grads = solve(backend, variant, spoilt, spoilt_grad)
        assert_close(output, oracle(variant.operator, spoilt, variant.options), "float64", f"{value} for box {box}")
        want = oracle_backward(variant.operator, spoilt_grad, spoilt, variant.options)
        for n in want:
            if want[n] is not None:  # a sum of infinite terms may be NaN where they are added up in another order
                finite = np.isfinite(want[n])
                what = f"{value} for box {box}: grad of {n}"
                np.testing.assert_array_equal(np.isfinite(grads[n]), finite, err_msg=what)
                assert_close(np.where(finite, grads[n], 0), np.where(finite, want[n], 0), "float64", what)


# The largest ----------------------------------------------------------------------------------------------------------


@each_dtype
def test_of_equal_pixels_the_first_gets_the_gradient(backend, dtype):
    """Whole image equal: the first pixel of each bin, y slowest."""
    arrays = {"input": np.full((1, 1, 5, 6), 2.0), "boxes": np.array([[0, 0, 0, 3, 3.0], [0, 2, 1, 5, 4]])}
    arrays = {n: a.astype(dtype_of(dtype)) for n, a in arrays.items()}
    grad_output = np.array([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]]).astype(dtype_of(dtype))
    output = run(backend, "roi_pool", arrays, {"output_size": 2})
    assert (output == 2).all()
    want = np.zeros((5, 6))
    want[0, 0], want[0, 2], want[2, 0], want[2, 2] = 1, 2, 3, 4
    want[1, 2] += 5
    want[1, 4] += 6
    want[3, 2] += 7
    want[3, 4] += 8
    got = run_backward(backend, "roi_pool", grad_output, arrays, {"output_size": 2})
    assert_close(got["input"][0, 0], want, dtype)


@each_dtype
def test_of_equal_points_the_first_gets_the_gradient(backend, dtype):
    """Points at .5, 1.5, 2.5 and so on of a constant image: a quarter to each pixel around the first of each bin."""
    arrays = {"input": np.full((1, 1, 5, 6), -2.0), "boxes": np.array([[0, 0, 0, 4, 4.0]])}
    arrays = {n: a.astype(dtype_of(dtype)) for n, a in arrays.items()}
    grad_output = np.array([[[[1, 2], [3, 4]]]]).astype(dtype_of(dtype))
    options = {"output_size": 2, "mode": "max"}
    assert (run(backend, "roi_align", arrays, options) == -2).all()
    want = np.zeros((5, 6))
    for (y, x), g in {(0, 0): 1, (0, 2): 2, (2, 0): 3, (2, 2): 4}.items():
        want[y : y + 2, x : x + 2] += g / 4
    got = run_backward(backend, "roi_align", grad_output, arrays, options)
    assert_close(got["input"][0, 0], want, dtype)


@each_dtype
def test_nan_wins_and_the_first_nan_gets_the_gradient(backend, dtype):
    image = np.arange(30.0).reshape(1, 1, 5, 6)
    image[0, 0, 1, 2] = image[0, 0, 2, 1] = NAN
    image[0, 0, 0, 3] = INF
    arrays = {"input": image, "boxes": np.array([[0, 0, 0, 3, 3.0], [0, 4, 3, 5, 4]])}
    arrays = {n: a.astype(dtype_of(dtype)) for n, a in arrays.items()}
    output = run(backend, "roi_pool", arrays, {"output_size": 1})
    assert np.isnan(output[0]).all() and float(output[1, 0, 0, 0]) == 29
    grad_output = np.array([3, 5]).reshape(2, 1, 1, 1).astype(dtype_of(dtype))
    got = run_backward(backend, "roi_pool", grad_output, arrays, {"output_size": 1})
    want = np.zeros((5, 6))
    want[1, 2], want[4, 5] = 3, 5
    assert_close(got["input"][0, 0], want, dtype)


def test_a_point_outside_counts_as_zero_for_the_maximum(backend):
    """On a negative image it is the largest, and no pixel gets its gradient; bins without such a point are negative."""
    arrays = {"input": np.full((1, 1, 5, 6), -2.0), "boxes": np.array([[0, -4, 0.5, 4, 4.5]])}
    options = {"output_size": (1, 4), "mode": "max", "sampling_ratio": 2}
    output = run(backend, "roi_align", arrays, options)
    assert output.ravel().tolist() == [0, 0, -2, -2]
    got = run_backward(backend, "roi_align", np.ones_like(output), arrays, options)
    assert got["input"].sum() == 2


@pytest.mark.parametrize("name", MAXIMA)
@each_dtype
def test_an_empty_maximum_is_zero(backend, name, dtype):
    """A box far outside, and, where its own size says how many points there are, one without area."""
    variant = VARIANTS[name]
    corners = [(40.125, 1.625, 44.375, 3.875), (-30, -20, -25, -18)]
    if variant.is_adaptive and variant.options.get("aligned"):
        corners += [(2.5, 2.5, 2.5, 2.5), (4.5, 3.5, 1.5, 0.5)]
    arrays, grad_output = problem(variant, dtype, corners)
    output, grads = assert_equals_oracle(backend, variant, arrays, grad_output, dtype)
    assert not output.any() and not grads["input"].any()


def test_a_mean_over_no_points(backend):
    """0, but 0/0 for ps_roi_align, as in torchvision; upside down it divides by a negative or positive number."""
    corners = [(2.5, 2.5, 2.5, 2.5), (1.5, 2.5, 4.5, 2.5), (4.5, 3.5, 1.5, 0.5), (4.5, 1.5, 1.5, 4.5)]
    for name in ("roi_align_aligned", "deform_roi_pool_adaptive", "ps_roi_align_adaptive"):
        arrays, grad_output = problem(VARIANTS[name], corners=corners)
        output, grads = assert_equals_oracle(backend, VARIANTS[name], arrays, grad_output, "float64")
        assert not output[2:].any()
        assert np.isnan(output[:2]).all() if name == "ps_roi_align_adaptive" else not output[:2].any()
        assert not any(grad.any() for grad in grads.values() if grad is not None)


# Differences ----------------------------------------------------------------------------------------------------------


def checked(backend: Any, operator: str, options: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """Forward and backward for gradcheck, which makes arrays in NumPy, as functions of those that are not `fixed`."""

    def forward(**arrays):
        return run(backend, operator, {**fixed, **arrays}, options)

    def backward(grad_output, **arrays):
        return run_backward(backend, operator, grad_output, {**fixed, **arrays}, options)

    return forward, backward


@each_variant
def test_gradcheck(backend, name):
    variant = VARIANTS[name]
    arrays, _ = problem(variant, corners=CORNERS[:5], size=(5, 4))
    rng = np.random.default_rng(6)
    for n in ("mask", variant.offset_name):
        if arrays.get(n) is not None:
            arrays[n] = rng.normal(0, 1, arrays[n].shape)  # nowhere near a point of the grid
    fixed = {"boxes": arrays.pop("boxes"), **{n: None for n, a in arrays.items() if a is None}}
    arrays = {n: a for n, a in arrays.items() if a is not None}
    forward, backward = checked(backend, variant.operator, variant.options, fixed)
    report = gradcheck(forward, backward, arrays, wrt=tuple(arrays), elements=16, directions=1)
    assert list(report.checked) == list(arrays)
    assert all(len(indices) == min(16, arrays[n].size) for n, indices in report.checked.items())
    assert not any(report.kinked.values())


def one_point_each(operator: str, positions: np.ndarray, image: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and options of a box with one bin with one point for each (y, x) of `positions`.

    Boxes are one pixel long and points of zero offset lie at (1/2, 1/2) or (-1/2, -1/2), so that an offset of 1 is one
    pixel and all numbers are exact.
    """
    count = len(positions)
    if operator == "deform_roi_pool":
        boxes = np.tile([0, 0.5, 0.5, 1.5, 1.5], (count, 1))
        options = {"output_size": 1, "sampling_ratio": 1, "gamma": 1.0}
        offset = positions[:, ::-1] - 0.5
    else:
        boxes = np.tile([0.0, 0, 0, 0, 0], (count, 1))
        options = {"output_dim": 1, "pooled_size": 1, "trans_std": 1.0}
        offset = positions[:, ::-1] + 0.5
    name = OPERATORS[operator][2]
    return {"input": image[None, None], "boxes": boxes, name: offset.reshape(count, 2, 1, 1)}, options


def value_and_slopes(operator: str, image: np.ndarray, y: float, x: float) -> tuple[float, float, float]:
    """Value, d/dy and d/dx at a point, by hand."""
    height, width = image.shape
    reach = 1 if operator == "deform_roi_pool" else 0.5
    if not (-reach <= y <= height - 1 + reach and -reach <= x <= width - 1 + reach):
        return 0.0, 0.0, 0.0

    def along(values: np.ndarray, at: float) -> tuple[Any, Any]:
        """Value and slope of linear interpolation along the first axis."""
        last = len(values) - 1
        inside = min(max(at, 0.0), float(last))
        low = math.floor(inside)
        high = min(low + 1, last)
        step = values[high] - values[low]
        flat = at <= 0 or at >= last or (operator == "deform_psroi_pool" and at == low)
        return values[low] + (inside - low) * step, 0 * step if flat else step

    rows, slopes = along(image, y)
    value, slope_x = along(rows, x)
    return float(value), float(along(slopes, x)[0]), float(slope_x)


@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
@each_dtype
def test_every_lattice_and_half_point(backend, operator, dtype):
    """Values and derivatives at every multiple of 1/2 from two pixels before the image to two past it.

    On a pixel the derivative is the one from the right (deform_roi_pool) or 0 (deform_psroi_pool). It is 0 wherever the
    point reads the nearest pixel or nothing, which on the first pixel counts as well.
    """
    rng = np.random.default_rng(5)
    image = rng.integers(-32, 33, (3, 4)) / 8
    positions = np.array(list(itertools.product(np.arange(-2, 5.5, 0.5), np.arange(-2, 6.5, 0.5))))
    arrays, options = one_point_each(operator, positions, image)
    arrays = {n: a.astype(dtype_of(dtype)) for n, a in arrays.items()}
    value, dy, dx = np.array([value_and_slopes(operator, image, y, x) for y, x in positions]).T
    assert min(np.count_nonzero(dy), np.count_nonzero(dx)) > 10
    output = run(backend, operator, arrays, options)
    assert_close(output.ravel(), value, dtype)
    ones = np.ones(output.shape).astype(dtype_of(dtype))
    grads = run_backward(backend, operator, ones, arrays, options)
    assert_close(grads[OPERATORS[operator][2]].reshape(-1, 2), np.stack([dx, dy], -1), dtype)
    want = oracle_backward(operator, ones, arrays, options)
    assert_grads(operator, grads, want, dtype)


@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
@each_dtype
def test_on_a_pixel_the_next_one_is_read_with_weight_0(backend, operator, dtype):
    """So its NaN arrives, but not in deform_psroi_pool, which interpolates between floor and ceiling: one pixel."""
    image = np.ones((3, 4))
    image[1, 2] = NAN
    positions = np.array([(1, 1), (0, 2), (0, 1), (1, 0.5), (2, 2), (1, 3), (0.5, 1), (0, 1.5), (0.5, 2)])
    arrays, options = one_point_each(operator, positions, image)
    arrays = {n: a.astype(dtype_of(dtype)) for n, a in arrays.items()}
    read = [True, True, True, False, False, False, True, True, True]
    if operator == "deform_psroi_pool":
        read = [False] * 8 + [True]
    output = run(backend, operator, arrays, options).astype(float).ravel()
    np.testing.assert_array_equal(output, np.where(read, NAN, 1.0))


def test_deform_roi_pool_has_the_right_hand_derivative(backend):
    """By differences, on every pixel but the first and on the border at -1; the value jumps to the right of H and W."""
    rng = np.random.default_rng(12)
    image = rng.uniform(1, 2, (4, 5))
    positions = np.array(list(itertools.product((-2, -1, 1, 2, 3), (-2, -1, 1, 2, 3, 4))), float)
    arrays, options = one_point_each("deform_roi_pool", positions, image)
    offset = arrays.pop("offset")
    forward, backward = checked(backend, "deform_roi_pool", options, {**arrays, "mask": None})
    gradcheck(forward, backward, {"offset": offset}, wrt=("offset",), side="right", elements=offset.size)
    with pytest.raises(AssertionError, match="offset"):
        gradcheck(forward, backward, {"offset": offset}, wrt=("offset",), side="left", elements=offset.size)


def test_deform_roi_pool_is_flat_where_it_reads_the_nearest_pixel(backend):
    """Between -1 and 0, and between H - 1 and H; the derivative along the other axis is what it was.

    On the first pixel itself it is 0 as well, the derivative from the left.
    """
    image = np.random.default_rng(13).uniform(1, 2, (3, 4))
    positions = np.array([(-0.5, 1.25), (0, 2.5), (2.5, 0.25), (2.25, 1.5), (1.25, -0.5), (0.5, 3.75), (0.5, 0)])
    arrays, options = one_point_each("deform_roi_pool", positions, image)
    offset = arrays.pop("offset")
    forward, backward = checked(backend, "deform_roi_pool", options, {**arrays, "mask": None})
    gradcheck(forward, backward, {"offset": offset}, wrt=("offset",), side="left", elements=offset.size)
    dx, dy = backward(np.ones((7, 1, 1, 1)), offset=offset)["offset"].reshape(7, 2).T
    assert not dy[:4].any() and not dx[4:].any()
    assert dx[:4].all() and dy[4:].all()


@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
def test_whole_pixels_of_several_points_and_bins(backend, operator):
    """A box of 4x4 pixels in 2x2 bins of 2x2 points, all of them on pixels or half way, where an offset is a pixel."""
    rng = np.random.default_rng(14)
    image = rng.integers(-16, 17, (2, 3, 6, 7)) / 4
    rows, shape = 6, (6, 2, 2, 2)
    offset = rng.integers(-6, 7, shape) / 2
    if operator == "deform_roi_pool":
        boxes = np.concatenate([np.arange(rows)[:, None] % 2, np.tile([1.0, 1, 5, 5], (rows, 1))], 1)
        options = {"output_size": 2, "sampling_ratio": 2, "gamma": 0.25}
        arrays = {"input": image, "boxes": boxes, "offset": offset, "mask": None}
    else:
        boxes = np.concatenate([np.arange(rows)[:, None] % 2, np.tile([1.0, 1, 4, 4], (rows, 1))], 1)
        options = {"output_dim": 3, "pooled_size": 2, "sample_per_part": 2, "trans_std": 0.25}
        arrays = {"input": image, "boxes": boxes, "trans": offset, "mask": None}
    variant = Variant(operator, options)
    assert_equals_oracle(backend, variant, arrays, rng.integers(-4, 5, (rows, 3, 2, 2)) / 4, "float64")


# Large boxes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2.0**30, 1e9, 1e30])
@pytest.mark.parametrize("operator", ["roi_align", "roi_align aligned", "ps_roi_align", "deform_roi_pool"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adaptive_boxes_of_any_size(backend, operator, length, dtype):
    """As many points as pixels, up to 1e60: looking at each would take for ever.

    They lie one pixel apart, the first between 0 and 1, so that 5 of each axis read an image of 5x5 pixels. The short
    side of 2 pixels has 2 points, both inside.
    """
    operator, _, aligned = operator.partition(" ")
    options: dict[str, Any] = {"output_size": 1} | ({"aligned": True} if aligned else {})
    boxes = np.array([[0, 0.25, 0.25, length, length], [0, 0.25, 1, length, 3], [0, 1, 0.25, 3, length]])
    arrays = {"input": np.full((1, 1, 5, 5), 3.0).astype(dtype), "boxes": boxes.astype(dtype)}
    n = float(arrays["boxes"][0, 3])
    want = np.array([3 * (5 / n) ** 2, 3 * 5 / n, 3 * 5 / n]).astype(dtype).astype(np.float64)  # 1e-59 is 0 in float32
    output = run(backend, operator, arrays, options).ravel()
    assert_close(output[1:], want[1:], dtype)
    assert_close(output[:1], want[:1], dtype)
    grad_output = np.array([n, n, 0]).reshape(3, 1, 1, 1).astype(dtype)
    got = run_backward(backend, operator, grad_output, arrays, options)["input"][0, 0]
    rows = [0, 0.5, 1, 0.5, 0] if (operator, aligned) == ("roi_align", "") else [0, 1, 1, 0, 0]  # half a pixel less
    np.testing.assert_allclose(got.sum(axis=1), 5 / 2 * np.array(rows), rtol=1e-5, atol=100 / n)


@pytest.mark.parametrize("far", [2.0**22, 2.0**23, 1e8, 2.0**53, 2.0**59])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_a_huge_box_around_the_image(backend, mode, dtype, far):
    """From far before it to far past it, with a point every pixel."""
    arrays = {"input": np.full((1, 2, 4, 4), 2.0), "boxes": np.array([[0, -far, -far, far, far]])}
    arrays = {n: a.astype(dtype) for n, a in arrays.items()}
    options = {"output_size": 1, "mode": mode}
    output = run(backend, "roi_align", arrays, options)
    want = 2.0 if mode == "max" else 2 * (5 / (2 * far)) ** 2  # points at -0.5, 0.5 ... 3.5 read the image
    assert_close(output.ravel(), np.full(2, want), dtype)
    grad = run_backward(backend, "roi_align", np.ones_like(output), arrays, options)["input"]
    assert abs(float(grad[0, 0].sum()) - want / 2) <= 1e-6 * want


@pytest.mark.parametrize("length", [1e9, 1e30, 1e300])
@pytest.mark.parametrize("name", ["roi_pool", "ps_roi_pool", "ps_roi_pool_rfcn", "deform_psroi_pool_no_trans"])
def test_other_boxes_of_any_size(backend, name, length):
    """Pixels stay in the image, whatever their box; of a fixed number of points, those that count are few or none."""
    variant = VARIANTS[name]
    corners = [(-length, -length, length, length), (0, 0, length, length), (-length, 0, 3, 3), (length, 0, length, 4)]
    arrays, grad_output = problem(variant, corners=corners)
    arrays["input"][...] = 3
    output, grads = solve(backend, variant, arrays, grad_output)
    assert np.isin(output[:, 0] if arrays.get("mask") is None else output[:, 0] / arrays["mask"][:, 0], [0, 3]).all()
    assert output.any()
    assert np.isfinite(grads["input"]).all()


# The same bits --------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_order_of_boxes(backend, name, dtype):
    """Whatever comes before and after a box, its results are the same bits; the input's gradient sums them all."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, dtype, corners=CORNERS * 2)
    output, grads = solve(backend, variant, arrays, grad_output)
    order = np.random.default_rng(3).permutation(len(grad_output))
    moved = {n: a if a is None or n == "input" else a[order] for n, a in arrays.items()}
    got, got_grads = solve(backend, variant, moved, grad_output[order])
    assert_same_bits(got, output[order])
    for n in OPERATORS[variant.operator][2:]:
        if arrays[n] is not None:
            assert_same_bits(got_grads[n], grads[n][order], n)
    assert_close(got_grads["input"], grads["input"].astype(np.float64), dtype)


@pytest.mark.parametrize("make_variant", [lambda v: v, wide], ids=["few channels", "many channels"])
@pytest.mark.parametrize("size", [IN_SIZE, (19, 14)], ids=str)
@each_variant
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_image_has_the_same_bits_in_any_batch(name, dtype, size, make_variant):
    """On the CPU: outputs and gradients of its boxes, and its own gradient. Images with many boxes, few and one."""
    variant = make_variant(VARIANTS[name])
    arrays, grad_output = problem(variant, dtype, corners=CORNERS * 2, batch=3, size=size)
    arrays["boxes"][:, 0] = [0, 0, 2, 0, 1, 0, 2, 0, 0, 0, 2, 0, 0, 0]
    forward, backward = getattr(pydeform, variant.operator), getattr(pydeform, f"{variant.operator}_backward")
    output, grads = forward(**arrays, **variant.options), backward(grad_output, **arrays, **variant.options)
    for image in range(3):
        own = arrays["boxes"][:, 0] == image
        alone = {n: a if a is None else a[[image]] if n == "input" else a[own] for n, a in arrays.items()}
        alone["boxes"][:, 0] = 0
        assert_same_bits(forward(**alone, **variant.options), output[own])
        grads_alone = backward(grad_output[own], **alone, **variant.options)
        assert_same_bits(grads_alone.input, grads.input[[image]])
        for n in OPERATORS[variant.operator][2:]:
            if arrays[n] is not None:
                assert_same_bits(getattr(grads_alone, n), getattr(grads, n)[own], n)


@each_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_run_has_the_same_bits(backend, name, dtype):
    """deterministic or not: the backward has no float atomics. Many boxes on one image, all over each other."""
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, dtype, corners=CORNERS[:4] * 3, batch=1)
    output, grads = solve(backend, variant, arrays, grad_output)
    asked = variant._replace(options={**variant.options, "deterministic": True})
    for _ in range(2):
        assert_same_bits(run(backend, variant.operator, arrays, variant.options), output)
        assert_same_grads(run_backward(backend, variant.operator, grad_output, arrays, variant.options), grads)
        assert_same_grads(run_backward(backend, variant.operator, grad_output, arrays, asked.options), grads)


def solve_here(variant: Variant, dtype: str) -> dict[str, Any]:
    """On the CPU, with few channels and with several blocks of them."""
    results = {}
    for name, v in ("few", variant), ("many", wide(wide(variant))):
        arrays, grad_output = problem(v, dtype, corners=CORNERS * 3, batch=3, size=(13, 12))
        output = getattr(pydeform, v.operator)(**arrays, **v.options)
        grads = getattr(pydeform, f"{v.operator}_backward")(grad_output, **arrays, **v.options)
        results |= {f"{name} {key}": value for key, value in {"output": output, **grads._asdict()}.items()}
    return results


@each_variant
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_number_of_threads_changes_no_bit(threads, name, dtype):
    threads(1)
    want = solve_here(VARIANTS[name], dtype)
    for count in (2, 3, 7):  # more than there are processors, too
        threads(count)
        assert_same_grads(solve_here(VARIANTS[name], dtype), want)


@each_variant
def test_slices_of_channels_change_no_bit(threads, monkeypatch, name):
    """A large image is read a slice after the other, all in the same memory, which no thread overwrites too early."""
    variant = wide(wide(VARIANTS[name]))
    arrays, _ = problem(variant, "float32", corners=CORNERS * 9, batch=3, size=(13, 12))
    forward = getattr(pydeform, variant.operator)
    threads(1)
    want = forward(**arrays, **variant.options)
    monkeypatch.setattr(roi_plan, "SLICE_CHANNELS", 8)
    monkeypatch.setattr(roi_plan, "SLICE_BYTES", 1)
    roi_plan._kept.cache_clear()
    try:
        assert len(roi_plan.slices_of_class(variant.out_channels, 8, 1)[0]) == -(-variant.out_channels // 8)
        for count in (1, 3):
            threads(count)
            assert_same_bits(forward(**arrays, **variant.options), want)
    finally:
        roi_plan._kept.cache_clear()


def test_threads_at_once(threads):
    """Each Python thread has its own problem and solves it several times, starting together."""
    threads.together = False
    threads(1)
    want = [solve_here(variant, "float32") for variant in VARIANTS.values()]
    threads(2)
    barrier, failures = threading.Barrier(len(VARIANTS)), []

    def work(number: int, variant: Variant) -> None:
        try:
            barrier.wait(60)
            for _ in range(3):
                assert_same_grads(solve_here(variant, "float32"), want[number])
        except BaseException as error:
            failures.append((number, error))

    workers = [threading.Thread(target=work, args=pair) for pair in enumerate(VARIANTS.values())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive(), "still running: the threads wait for each other"
    assert not failures, failures


# Peers ----------------------------------------------------------------------------------------------------------------


@each_variant
@each_dtype
def test_tensors_give_the_numbers_of_arrays(name, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    variant = VARIANTS[name]
    arrays, grad_output = problem(variant, dtype)

    def tensor(a: Any) -> Any:
        if a is None or a.dtype.kind == "f":
            return None if a is None else torch.from_numpy(a)
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)

    def same(got: Any, want: Any) -> None:
        if want is None:
            assert got is None
            return
        assert type(got) is torch.Tensor and str(got.dtype) == f"torch.{dtype}"
        numbers = got.view(torch.int16).numpy().view(want.dtype) if got.dtype is torch.bfloat16 else got.numpy()
        assert_same_bits(numbers, want)

    theirs = {n: tensor(a) for n, a in arrays.items()}
    forward, backward = getattr(pydeform, variant.operator), getattr(pydeform, f"{variant.operator}_backward")
    same(forward(**theirs, **variant.options), forward(**arrays, **variant.options))
    grads = backward(tensor(grad_output), **theirs, **variant.options)
    for got, want in zip(grads, backward(grad_output, **arrays, **variant.options), strict=True):
        same(got, want)


def onnxruntime_result(node: str, inputs: dict[str, np.ndarray], version: int, **attributes: Any) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in inputs.items()}
    values = [onnx.helper.make_tensor_value_info(name, kinds[name], a.shape) for name, a in inputs.items()]
    result = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)
    made = onnx.helper.make_node(node, list(inputs), ["Y"], **attributes)
    graph = onnx.helper.make_graph([made], "one", values, [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["Y"], inputs)[0]


@pytest.mark.parametrize("sampling_ratio", [0, 3])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_equals_onnxruntime(backend, aligned, sampling_ratio):
    options = {"output_size": (3, 2), "spatial_scale": 0.5, "sampling_ratio": sampling_ratio, "aligned": aligned}
    arrays, _ = problem(Variant("roi_align", options), "float32")
    want = onnxruntime_result(
        "RoiAlign",
        {
            "X": arrays["input"],
            "rois": arrays["boxes"][:, 1:].copy(),
            "batch_indices": arrays["boxes"][:, 0].astype(np.int64),
        },
        16,
        output_height=3,
        output_width=2,
        spatial_scale=0.5,
        sampling_ratio=sampling_ratio,
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
    )
    assert_close(run(backend, "roi_align", arrays, options), want.astype(np.float64), "float32")


def test_roi_pool_equals_onnxruntime(backend):
    variant = VARIANTS["roi_pool"]
    arrays, _ = problem(variant, "float32")
    inputs = {"X": arrays["input"], "rois": arrays["boxes"]}
    want = onnxruntime_result("MaxRoiPool", inputs, 1, pooled_shape=variant.pooled, spatial_scale=0.5)
    assert_close(run(backend, "roi_pool", arrays, variant.options), want.astype(np.float64), "float32")
