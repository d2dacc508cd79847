"""Coordinates keep their precision: offsets, boxes and trans in float32 beside half types, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import pydeform
from tests.cases import deform_conv2d as conv_cases
from tests.cases import roi as roi_cases
from tests.cases.deform_conv2d import dtype_of
from tests.conftest import assert_close, assert_same_bits, needs_emulation
from tests.reference import deform_conv2d as conv_reference
from tests.reference import roi as roi_reference
from tests.test_cuda_convolution import CAPABILITIES, EMULATED, on
from tests.test_roi import boxes_of

HALVES = ("float16", "bfloat16")
COORDINATES = ("offset", "boxes", "trans")
each_half = pytest.mark.parametrize("half", HALVES)


def solve(backend: Any, operator: str, arrays: dict[str, Any], grad_output: Any, options: dict[str, Any]) -> Any:
    """Output and gradients, NumPy to NumPy; those without an array are left out."""
    sent = {name: backend.array(array) for name, array in arrays.items()}
    output = getattr(pydeform, operator)(**sent, **options)
    backward = getattr(pydeform, f"{operator}_backward")
    grads = backward(backend.array(grad_output), **sent, **options, deterministic=True)._asdict()
    results = {"output": output} | {name: grad for name, grad in grads.items() if grad is not None}
    return {name: backend.numpy(array) for name, array in results.items()}


def widened(arrays: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: array.astype(np.float32) if name in names else array for name, array in arrays.items()}


def choices(arrays: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each way to have some of the coordinates in float32, all of them first."""
    names = [name for name in COORDINATES if arrays.get(name) is not None]
    return [c for count in range(len(names), 0, -1) for c in itertools.combinations(names, count)]


def assert_same_numbers(got: dict[str, Any], want: dict[str, Any], half: str, wide: tuple[str, ...]) -> None:
    """`want` has half coordinates. A gradient in float32 rounds to that in half precision."""
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert array.dtype.name == ("float32" if name in wide else half), name
        assert_same_bits(array.astype(dtype_of(half)), want[name], f"{name}, float32 {wide}")


# The numbers that half types hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["every_option", "version_1", "channel_blocks"])
@each_half
def test_deform_conv2d_with_coordinates_that_both_types_hold(backend, name, half):
    """The same bits, one call after the other: nothing that one leaves behind is taken for the other's."""
    case = conv_cases.CASES[name]
    arrays, grad_output = conv_cases.make(case, half), conv_cases.make_grad_output(case, half)
    want = solve(backend, "deform_conv2d", arrays, grad_output, case.options)
    got = solve(backend, "deform_conv2d", widened(arrays, "offset"), grad_output, case.options)
    assert_same_numbers(got, want, half, ("offset",))


ROI_CASES = (
    "roi_pool",
    "roi_align",
    "roi_align_max",
    "ps_roi_pool",
    "ps_roi_align",
    "deform_roi_pool_modulated",
    "deform_roi_pool_channels",
    "deform_psroi_pool_classes",
)


@pytest.mark.parametrize("name", ROI_CASES)
@each_half
def test_roi_operators_with_coordinates_that_both_types_hold(backend, name, half):
    case = roi_cases.CASES[name]
    arrays, grad_output = roi_cases.make(case, half), roi_cases.make_grad_output(case, half)
    want = solve(backend, case.operator, arrays, grad_output, case.options)
    for wide in choices(arrays):
        got = solve(backend, case.operator, widened(arrays, *wide), grad_output, case.options)
        assert_same_numbers(got, want, half, wide)


# Numbers that they do not hold ----------------------------------------------------------------------------------------


def exact(array: np.ndarray) -> np.ndarray:
    return array.astype(float)


def assert_against_oracle(
    backend: Any, operator: str, oracle: Any, arrays: dict[str, Any], half: str, options: dict[str, Any]
) -> None:
    """Right with the coordinates in float32, and those rounded to the half type are another problem."""
    wide = tuple(name for name in COORDINATES if arrays.get(name) is not None)
    data = {name: array if name in wide else array.astype(dtype_of(half)) for name, array in arrays.items()}
    real = {name: exact(array) for name, array in data.items()}
    want = {"output": getattr(oracle, operator)(**real, **options)}
    shape = want["output"].shape
    grad_output = (np.random.default_rng(3).integers(-32, 33, shape) / 16).astype(dtype_of(half))
    grads = getattr(oracle, f"{operator}_backward")(exact(grad_output), **real, **options)
    want |= {name: grad for name, grad in grads.items() if grad is not None}
    rounded = {name: exact(array.astype(dtype_of(half))) for name, array in data.items()}
    largest = np.abs(want["output"]).max()
    assert np.abs(getattr(oracle, operator)(**rounded, **options) - want["output"]).max() > 0.05 * largest
    got = solve(backend, operator, data, grad_output, options)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert_close(got[name], array, "float32" if name in wide else half, name)


class Convolution:
    """The oracle under the names of the RoI operators' one."""

    deform_conv2d = staticmethod(lambda **arguments: conv_reference.forward(**arguments))
    deform_conv2d_backward = staticmethod(lambda grad, **arguments: conv_reference.backward(grad, **arguments))


def far(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Places between pixels 1001 and 1190 in eighths of a pixel, which no half type tells apart."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1001, 1190, shape) + rng.choice([0.125, 0.375, 0.625], shape)).astype(np.float32)


WIDTH = 1200


def image(channels: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(-64, 65, (batch, channels, 6, WIDTH)) / 32


@pytest.mark.parametrize("boundary", ["torchvision", "dcnv2", "dcnv1"])
@each_half
def test_far_offsets(backend, half, boundary):
    rng = np.random.default_rng(2)
    offset = far((2, 2 * 2 * 2, 3, 4), 5)
    offset[:, ::2] = rng.integers(0, 9, offset[:, ::2].shape) / 4 + 0.125
    arrays = {
        "input": image(4),
        "offset": offset,
        "weight": rng.integers(-16, 17, (3, 4, 1, 2)) / 16,
        "bias": rng.integers(-16, 17, 3) / 16,
        "mask": rng.integers(1, 17, (2, 2 * 2, 3, 4)) / 16,
    }
    # Four outputs in a row, 391 pixels apart, sample the same far corner.
    options = {"stride": (2, 391), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "boundary": boundary}
    offset[:, 1::2] -= (391 * np.arange(4)).astype(np.float32)
    assert_against_oracle(backend, "deform_conv2d", Convolution, arrays, half, options)


# Of few digits, so that float32 has every point of 2 x 4 bins exactly. What is rounded to whole pixels is another one
# too: 1100.5 goes up to 1101, and is 1100 in float16.
FAR = np.array([[1, 1001.375, 0.5, 1016.625, 4.25], [0, 1100.5, 1, 1116.25, 4], [1, 1061.625, -1, 1066.125, 5.5]])
POOLED = {"output_size": (2, 4)}
FAR_OPERATORS: dict[str, tuple[int, dict[str, Any]]] = {
    "roi_pool": (3, POOLED),
    "roi_align": (3, {**POOLED, "sampling_ratio": 2}),
    "roi_align max": (3, {**POOLED, "sampling_ratio": 2, "mode": "max"}),
    "roi_align adaptive": (9, {**POOLED, "aligned": True}),
    "ps_roi_pool": (16, POOLED),
    "ps_roi_pool rfcn": (16, {**POOLED, "convention": "rfcn"}),
    "ps_roi_align": (16, {**POOLED, "sampling_ratio": 2}),
    "deform_roi_pool": (9, {**POOLED, "sampling_ratio": 2, "gamma": 0.25}),
    "roi_align_rotated": (9, {**POOLED, "sampling_ratio": 2}),
    "prroi_pool": (9, POOLED),
    "deform_psroi_pool": (
        8,
        {"output_dim": 2, "pooled_size": 4, "group_size": 2, "sample_per_part": 2, "trans_std": 0.25},
    ),
}


@pytest.mark.parametrize("name", FAR_OPERATORS)
@each_half
def test_far_boxes(backend, name, half):
    operator = name.split()[0]
    channels, options = FAR_OPERATORS[name]
    rng = np.random.default_rng(4)
    boxes = boxes_of(operator, FAR[:, :1], FAR[:, 1:])
    boxes[:, 5:] = 0  # angles of which sine and cosine are exact
    arrays = {"input": image(channels), "boxes": boxes.astype(np.float32)}
    if operator.startswith("deform_"):
        name, pooled = ("trans", (4, 4)) if operator == "deform_psroi_pool" else ("offset", (2, 4))
        arrays[name] = (rng.integers(-8, 9, (3, 2, *pooled)) / 8 + 2**-9).astype(np.float32)
        arrays["mask"] = rng.integers(1, 17, (3, 1, *pooled)) / 16
    assert_against_oracle(backend, operator, roi_reference, arrays, half, options)


@needs_emulation
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
@each_half
def test_every_architecture_reads_float32_offsets(emulated, capability, half, deterministic):
    """Of each kind of tile, in the check build: no access is of another size than the array's."""
    case = conv_cases.Case(2, 24, 5, 6, 20, (1, 2), padding=((0, 0), (1, 0)), offset_groups=3)
    arrays, grad_output = conv_cases.make(case, half), conv_cases.make_grad_output(case, half)
    results = []
    for given in (arrays, widened(arrays, "offset")):
        with on(capability=capability, check=True):
            sent = {name: EMULATED.array(array) for name, array in given.items()}
            output = pydeform.deform_conv2d(**sent, **case.options)
            grads = pydeform.deform_conv2d_backward(
                EMULATED.array(grad_output), **sent, **case.options, deterministic=deterministic
            )._asdict()
            results.append({name: EMULATED.numpy(array) for name, array in ({"output": output} | grads).items()})
    assert_same_numbers(results[1], results[0], half, ("offset",))


# At and beside what decides where a point lies, and of every magnitude; most of them are no numbers of a half type.
SPECIAL = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0, -1.0, np.nextafter(np.float32(-1), np.float32(0)))
SPECIAL += (2.0**23, 2.0**24 + 2, 2.0**31, 2.0**31 - 128, -(2.0**31), 2.0**53, 2.0**63)


@pytest.mark.parametrize(
    "operator", ["deform_conv2d", "deform_roi_pool", "deform_psroi_pool", "roi_align_rotated", "prroi_pool"]
)
@each_half
def test_coordinates_that_only_float32_has_give_its_numbers(backend, operator, half):
    """Half data are float32 data once they are read, so the results are those of float32, rounded."""
    rng = np.random.default_rng(8)
    arrays, options, coordinates = special_problem(operator, rng)
    arrays = {n: a if n in coordinates else a.astype(dtype_of(half)) for n, a in arrays.items()}
    output = getattr(pydeform, operator)(**arrays, **options)
    grad_output = rng.integers(-8, 9, output.shape).astype(dtype_of(half))
    got = solve(backend, operator, arrays, grad_output, options)
    wide = {name: array.astype(np.float32) for name, array in arrays.items()}
    want = solve(backend, operator, wide, grad_output.astype(np.float32), options)
    assert np.isnan(want["output"]).any() and np.isfinite(want["output"]).any()
    for name, array in want.items():
        assert_close(got[name], array.astype(float), "float32" if name in coordinates else half, name)


def special_problem(operator: str, rng: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """float32 arrays, options, and which arrays are coordinates: a special one here and there."""
    options: dict[str, Any] = {}
    if operator == "deform_conv2d":
        shapes = {"input": (1, 2, 5, 6), "offset": (1, 2, 5, 6), "weight": (2, 2, 1, 1), "mask": (1, 1, 5, 6)}
    elif operator in ("roi_align_rotated", "prroi_pool"):
        shapes = {"input": (1, 2, 5, 6), "boxes": (24, 6 if operator == "roi_align_rotated" else 5)}
        options = {"output_size": 2}
    else:
        name = "offset" if operator == "deform_roi_pool" else "trans"
        shapes = {"input": (1, 2, 5, 6), "boxes": (24, 5), name: (24, 2, 1, 1), "mask": (24, 1, 1, 1)}
        psroi = {"output_dim": 2, "pooled_size": 1, "sample_per_part": 2, "trans_std": 0.25}
        options = {"output_size": 1, "sampling_ratio": 2} if operator == "deform_roi_pool" else psroi
    arrays = {name: (rng.integers(-24, 25, shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    coordinates = tuple(name for name in COORDINATES if name in arrays)
    for name in coordinates:
        arrays[name].flat[7 : 7 + 3 * len(SPECIAL) : 3] = np.resize(SPECIAL, len(arrays[name].flat[7 : 7 + 48 : 3]))
    if "boxes" in arrays:
        arrays["boxes"][:, 0] = 0
    return arrays, options, coordinates


# Batch indices --------------------------------------------------------------------------------------------------------


def pooling(operator: str, batch: int, half: str, boxes: Any, pixels: Any = 0) -> dict[str, Any]:
    """Images of one number each, and one bin."""
    input = np.zeros((batch, 1, 2, 2), dtype_of(half))
    input[...] = np.reshape(pixels, (-1, 1, 1, 1))
    size = {"output_dim": 1, "pooled_size": 1} if operator == "deform_psroi_pool" else {"output_size": 1}
    boxes = np.asarray(boxes)
    return {"input": input, "boxes": boxes_of(operator, boxes[:, :1], boxes[:, 1:]).astype(boxes.dtype), **size}


def sent(backend: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: backend.array(a) if isinstance(a, np.ndarray) else a for name, a in arguments.items()}


OPERATORS = (
    *("roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align", "deform_roi_pool", "deform_psroi_pool"),
    *("roi_align_rotated", "prroi_pool"),
)
MOST = {"float16": 2048, "bfloat16": 256}


@pytest.mark.parametrize("boxes", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
@each_half
def test_more_images_than_a_half_type_counts(backend, operator, half, boxes):
    most = MOST[half]
    allowed = pooling(operator, most, half, np.zeros((boxes, 5), dtype_of(half)))
    getattr(pydeform, operator)(**sent(backend, allowed))
    arguments = sent(backend, pooling(operator, most + 1, half, np.zeros((boxes, 5), dtype_of(half))))
    grad_output = backend.array(np.zeros((boxes, 1, 1, 1), dtype_of(half)))
    text = (
        f"boxes must have a dtype that counts N = {most + 1} images, got {half}, which counts to {most}: "
        "pass float32 boxes"
    )
    for name, given in ((operator, ()), (f"{operator}_backward", (grad_output,))):
        with pytest.raises(ValueError) as caught:
            getattr(pydeform, name)(*given, **arguments)
        assert str(caught.value) == f"{name}: {text}"


def test_more_images_than_float32_counts():
    """The images of a view that repeats one pixel take no memory; it is refused before anything is computed."""
    input = np.broadcast_to(np.zeros(1, np.float32), (2**24 + 1, 1, 1, 1))
    with pytest.raises(ValueError) as caught:
        pydeform.roi_align(input, np.zeros((1, 5), np.float32), 1)
    assert str(caught.value) == (
        "roi_align: boxes must have a dtype that counts N = 16777217 images, got float32, which counts to 16777216: "
        "pass fewer images"
    )


@pytest.mark.parametrize("half, batch", [("bfloat16", 300), ("float16", 2100)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_images_that_only_float32_counts(backend, operator, half, batch):
    most = MOST[half]
    indices = np.array([0, most - 1, most, most + 1, most + 3, batch - 1])
    corners = np.tile([0, 0, 0, 1, 1], (len(indices), 1)).astype(np.float32)
    corners[:, 0] = indices
    pixels = np.arange(batch) % 251
    got = getattr(pydeform, operator)(**sent(backend, pooling(operator, batch, half, corners, pixels)))
    exactly = pooling(operator, batch, "float64", corners.astype(float), pixels)
    want = getattr(roi_reference, operator)(**exactly)
    assert len(np.unique(want)) == len(indices)
    assert_close(backend.numpy(got), want, half)
    grad_output = np.arange(1, 1 + len(indices)).reshape(-1, 1, 1, 1).astype(dtype_of(half))
    arguments = sent(backend, pooling(operator, batch, half, corners, pixels))
    grad = getattr(pydeform, f"{operator}_backward")(backend.array(grad_output), **arguments).input
    want = getattr(roi_reference, f"{operator}_backward")(grad_output.astype(float), **exactly)["input"]
    assert np.flatnonzero(want.any(axis=(1, 2, 3))).tolist() == indices.tolist()
    assert_close(backend.numpy(grad), want, half)


# What is refused ------------------------------------------------------------------------------------------------------


def deformable(operator: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and options of a good call."""
    shapes: dict[str, tuple[int, ...]]
    if operator == "deform_conv2d":
        shapes = {"input": (1, 2, 3, 3), "offset": (1, 2, 3, 3), "weight": (2, 2, 1, 1), "bias": (2,)}
        shapes |= {"mask": (1, 1, 3, 3)}
        options: dict[str, Any] = {}
    else:
        name = "offset" if operator == "deform_roi_pool" else "trans"
        shapes = {"input": (1, 2, 3, 3), "boxes": (2, 5), name: (2, 2, 1, 1), "mask": (2, 1, 1, 1)}
        psroi = {"output_dim": 2, "pooled_size": 1}
        options = {"output_size": 1} if operator == "deform_roi_pool" else psroi
    return {name: np.zeros(shape, dtype_of(dtype)) for name, shape in shapes.items()}, options


@pytest.mark.parametrize("operator", ["deform_conv2d", "deform_roi_pool", "deform_psroi_pool"])
@pytest.mark.parametrize("data", ["float64", "float32", "float16", "bfloat16"])
def test_which_mixtures_are_refused(backend, operator, data):
    """Every argument in every other dtype, forward and backward."""
    arrays, options = deformable(operator, data)
    grad_output = np.zeros_like(getattr(pydeform, operator)(**arrays, **options))
    kinds = ["float64", "float32", "float16", "bfloat16", "int32", "complex64", ">f4", ">f2"]
    for name, other in itertools.product((*arrays, "grad_output"), kinds):
        dtype = dtype_of(other)
        if name == "input" or other == data:
            continue
        changed = {"grad_output": grad_output, **arrays}
        changed[name] = changed[name].astype(dtype)
        # The stand-in for CuPy takes no arrays of foreign byte order, nor does CuPy.
        native = backend if dtype.isnative else type(backend)("cpu")
        given = {n: native.array(a) for n, a in changed.items()}
        forward = {n: a for n, a in given.items() if n != "grad_output"}
        allowed = name in COORDINATES and other == "float32" and data in HALVES
        calls = [] if name == "grad_output" else [(operator, forward)]
        for function, arguments in (*calls, (f"{operator}_backward", given)):
            if allowed:
                getattr(pydeform, function)(**arguments, **options)
                continue
            with pytest.raises(TypeError) as caught:
                getattr(pydeform, function)(**arguments, **options)
            also = ", or float32" if name in COORDINATES and data in HALVES else ""
            text = f"{name} must have the dtype of input, {data}{also}, got {dtype}"
            assert str(caught.value) == f"{function}: {text}"


# Callers --------------------------------------------------------------------------------------------------------------


def test_tensors():
    """bfloat16 data and float32 coordinates of another library, without a copy of its own."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays, options = deformable("deform_psroi_pool", "bfloat16")
    rng = np.random.default_rng(6)
    arrays = {name: rng.integers(0, 3, array.shape).astype(array.dtype) for name, array in arrays.items()}
    arrays["boxes"][:, 0] = 0
    arrays = widened(arrays, "boxes", "trans")
    grad_output = np.ones((2, 2, 1, 1), dtype_of("bfloat16"))
    want = pydeform.deform_psroi_pool_backward(grad_output, **arrays, **options, trans_std=0.1)

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    theirs = {name: tensor(array) for name, array in arrays.items()}
    output = pydeform.deform_psroi_pool(**theirs, **options, trans_std=0.1)
    grads = pydeform.deform_psroi_pool_backward(tensor(grad_output), **theirs, **options, trans_std=0.1)
    assert output.dtype is grads.input.dtype is grads.mask.dtype is torch.bfloat16
    assert grads.trans.dtype is torch.float32
    assert grads.boxes is None
    assert_same_bits(grads.trans.numpy(), want.trans)
    assert_same_bits(grads.input.view(torch.int16).numpy().view(dtype_of("bfloat16")), want.input)


@each_half
def test_layers_take_float32_boxes(half):
    from pydeform import layers

    dtype = dtype_of(half)
    x = np.random.default_rng(7).integers(-8, 9, (2, 4, 8, 9)).astype(dtype)
    boxes = np.array([[1, 1.1, 0.3, 6.7, 5.9], [0, 2.2, 1.6, 8.1, 7.3]], np.float32)
    made = (
        layers.RoIAlign(2),
        layers.DeformRoIPool(2, 4, hidden=3, modulated=True, rng=0, dtype=dtype),
        layers.DeformPSRoIPool(4, 2, hidden=3, modulated=True, rng=0, dtype=dtype),
    )
    for layer in made:
        y, backprop = layer(x, boxes)
        assert y.dtype == dtype
        assert backprop(np.ones_like(y)).dtype == dtype
        assert all(grad.dtype == dtype for grad in layer.grads.values())
        assert all(np.isfinite(grad.astype(float)).all() for grad in layer.grads.values())
