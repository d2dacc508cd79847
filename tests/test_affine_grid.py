"""affine_grid and its backward against the oracle, PyTorch and differences, and on awkward arrays."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.deform_conv2d import dtype_of
from tests.cases.gather_tests import CPU, each_dtype, signature
from tests.conftest import assert_close, assert_same_bits, poison
from tests.reference import grid as reference
from tests.test_deform_conv2d import LAYOUTS, Guard, read_only, unaligned

SIZES = {
    "image": (2, 3, 4, 5),
    "row": (3, 1, 1, 6),
    "column": (2, 2, 7, 1),
    "one_pixel": (2, 1, 1, 1),
    "powers_of_two": (2, 1, 8, 4),
    "volume": (2, 3, 2, 3, 4),
    "flat_volume": (1, 1, 1, 5, 3),
    "many_pixels": (3, 1, 37, 29),
    "batch_0": (0, 3, 4, 5),
    "no_channels": (2, 0, 3, 4),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
each_corner = pytest.mark.parametrize("align_corners", [False, True])


def make(size: tuple[int, ...], dtype: str = "float64", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """theta and a gradient of the output; every image different."""
    rng, axes = np.random.default_rng([seed, *size]), len(size) - 2
    theta = rng.integers(-32, 33, (size[0], axes, axes + 1)) / 16
    grad_output = rng.integers(-16, 17, (size[0], *size[2:], axes)) / 8
    return theta.astype(dtype_of(dtype)), grad_output.astype(dtype_of(dtype))


def run(backend: Any, theta: Any, size: Any, *options: Any) -> np.ndarray:
    with Guard(theta):
        return backend.numpy(pydeform.affine_grid(backend.array(theta), size, *options))


def run_backward(backend: Any, grad_output: Any, theta: Any, size: Any, *options: Any, **only: Any) -> Any:
    with Guard(grad_output, theta):
        sent = backend.array(grad_output), backend.array(theta)
        grads = pydeform.affine_grid_backward(*sent, size, *options, **only)
    assert isinstance(grads, pydeform.AffineGridGrads) and grads._fields == ("theta",)
    return backend.numpy(grads.theta)


@each_size
@each_corner
@each_dtype
def test_against_the_oracle(backend, size, align_corners, dtype):
    theta, grad_output = make(size, dtype)
    want = reference.affine_grid(theta, size, align_corners)
    assert_close(run(backend, theta, size, align_corners), want, dtype)
    want = reference.affine_grid_backward(grad_output, theta, size, align_corners)["theta"]
    assert_close(run_backward(backend, grad_output, theta, size, align_corners), want, dtype)


@each_size
@each_corner
@pytest.mark.filterwarnings("ignore:Since version 1.3.0")  # PyTorch's, on images of one pixel
def test_is_pytorchs(size, align_corners):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if 0 in size:  # PyTorch refuses these
        return
    theta, grad_output = make(size)
    tensor = torch.from_numpy(theta.copy()).requires_grad_()
    want = torch.nn.functional.affine_grid(tensor, size, align_corners=align_corners)
    want.backward(torch.from_numpy(grad_output))
    got = pydeform.affine_grid(tensor.detach(), torch.Size(size), align_corners)
    grads = pydeform.affine_grid_backward(torch.from_numpy(grad_output), tensor.detach(), size, align_corners)
    assert isinstance(got, torch.Tensor) and isinstance(grads.theta, torch.Tensor)
    assert_close(got.numpy(), want.detach().numpy(), "float64")
    assert_close(grads.theta.numpy(), tensor.grad.numpy(), "float64")


def test_by_hand(backend):
    """x first: the corners of two pixels are at -1 and 1, their centres at -1/2 and 1/2."""
    theta = np.array([[[1.0, 10, 100], [0, 2, 1000]]])
    got = run(backend, theta, (1, 1, 2, 2))
    half = [[[94.5, 999], [95.5, 999]], [[104.5, 1001], [105.5, 1001]]]
    np.testing.assert_array_equal(got, [half])
    whole = [[[89, 998], [91, 998]], [[109, 1002], [111, 1002]]]
    np.testing.assert_array_equal(run(backend, theta, (1, 1, 2, 2), True), [whole])
    np.testing.assert_array_equal(run(backend, theta, (1, 1, 1, 1), True), [[[[100, 1000]]]])


@pytest.mark.parametrize("size", [SIZES["image"], SIZES["volume"]])
@each_corner
def test_gradcheck(backend, size, align_corners):
    theta, _ = make(size)
    report = gradcheck(
        lambda theta: run(backend, theta, size, align_corners),
        lambda grad, theta: {"theta": run_backward(backend, grad, theta, size, align_corners)},
        {"theta": theta},
        elements=24,
    )
    assert list(report.checked) == ["theta"]


def test_signature():
    arguments = "theta, size, align_corners=False"
    assert signature(pydeform.affine_grid) == arguments
    assert signature(pydeform.affine_grid_backward) == f"grad_output, {arguments}, *, needs=None"
    assert "deterministic" not in inspect.signature(pydeform.affine_grid_backward).parameters


@pytest.mark.parametrize("of", [list, np.array, lambda s: np.array(s, np.int32)], ids=["list", "array", "int32"])
def test_size_as_any_sequence(backend, of):
    size = SIZES["image"]
    theta, grad_output = make(size)
    assert_same_bits(run(backend, theta, of(size)), run(backend, theta, size))
    assert_same_bits(
        run_backward(backend, grad_output, theta, of(size)), run_backward(backend, grad_output, theta, size)
    )


def test_needs(backend):
    theta, grad_output = make(SIZES["image"])
    want = run_backward(backend, grad_output, theta, SIZES["image"])
    assert_same_bits(run_backward(backend, grad_output, theta, SIZES["image"], needs=("theta",)), want)
    assert run_backward(backend, grad_output, theta, SIZES["image"], needs=()) is None
    with pytest.raises(ValueError, match=r"affine_grid_backward: needs .*'size'"):
        run_backward(backend, grad_output, theta, SIZES["image"], needs=("size",))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["image", "volume"])
def test_layouts_give_the_bits_of_a_copy(backend, name, dtype):
    size, (theta, grad_output) = SIZES[name], make(SIZES[name], dtype)
    want, want_grad = run(backend, theta, size), run_backward(backend, grad_output, theta, size)
    for layout in LAYOUTS if backend.on_cpu else [f for f in LAYOUTS if f not in (unaligned, read_only)]:
        assert_same_bits(run(backend, layout(theta), size), want, layout.__name__)
        got = run_backward(backend, layout(grad_output), layout(theta), size)
        assert_same_bits(got, want_grad, layout.__name__)
    same = np.broadcast_to(grad_output[:1, :1], grad_output.shape)
    assert_same_bits(run_backward(backend, same, theta, size), run_backward(backend, same.copy(), theta, size))


@each_dtype
def test_without_images(backend, dtype):
    theta, grad_output = make(SIZES["batch_0"], dtype)
    got, grad = run(backend, theta, SIZES["batch_0"]), run_backward(backend, grad_output, theta, SIZES["batch_0"])
    assert (got.shape, got.dtype, grad.shape, grad.dtype) == ((0, 4, 5, 2), theta.dtype, (0, 2, 3), theta.dtype)


@each_dtype
def test_an_image_has_the_same_bits_in_any_batch(backend, dtype):
    size = SIZES["many_pixels"]
    theta, grad_output = make(size, dtype)
    whole, grad = run(backend, theta, size), run_backward(backend, grad_output, theta, size)
    for b in range(len(theta)):
        assert_same_bits(run(backend, theta[b : b + 1], (1, *size[1:])), whole[b : b + 1])
        alone = run_backward(backend, grad_output[b : b + 1], theta[b : b + 1], (1, *size[1:]))
        assert_same_bits(alone, grad[b : b + 1])


def test_neither_threads_nor_old_memory_change_a_bit(monkeypatch):
    size = SIZES["many_pixels"]
    theta, grad_output = make(size, "float32")
    want, want_grad = run(CPU, theta, size), run_backward(CPU, grad_output, theta, size)
    poison(monkeypatch)
    for count in (1, 2, 3):
        with pydeform.num_threads(count):
            assert_same_bits(run(CPU, theta, size), want)
            assert_same_bits(run_backward(CPU, grad_output, theta, size), want_grad)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_one_number_that_is_not_finite(backend, value):
    """It reaches its own image and coordinate."""
    size = SIZES["powers_of_two"]
    theta, grad_output = make(size)
    theta[1, 1, 2] = value
    got = run(backend, theta, size)
    bad = np.zeros(got.shape, bool)
    bad[1, ..., 1] = True
    np.testing.assert_array_equal(np.isfinite(got), ~bad)
    assert np.isfinite(run_backward(backend, grad_output, theta, size)).all()  # does not depend on theta


def test_results_are_fresh(backend):
    theta, grad_output = make(SIZES["image"])
    results = [pydeform.affine_grid(backend.array(theta), SIZES["image"]) for _ in range(2)]
    results += pydeform.affine_grid_backward(backend.array(grad_output), backend.array(theta), SIZES["image"])
    assert all(r.flags.c_contiguous for r in results)
    if backend.on_cpu:
        assert all(r.flags.writeable for r in results)
        pairs = itertools.combinations([*results, theta, grad_output], 2)
        assert not any(np.shares_memory(a, b) for a, b in pairs)


THETA = np.zeros((2, 2, 3))
WRONG = [
    ((np.zeros((2, 2, 2)), (2, 3, 4, 5)), {}, ValueError, r"affine_grid: theta .*\(2, 2, 3\), got \(2, 2, 2\)"),
    ((np.zeros((3, 2, 3)), (2, 3, 4, 5)), {}, ValueError, r"affine_grid: theta .*\(2, 2, 3\), got \(3, 2, 3\)"),
    ((THETA, (2, 3, 4, 5, 6)), {}, ValueError, r"affine_grid: theta .*\(2, 3, 4\), got \(2, 2, 3\)"),
    ((np.zeros((2, 6)), (2, 3, 4, 5)), {}, ValueError, r"affine_grid: theta .*got \(2, 6\)"),
    ((THETA, (2, 3, 4)), {}, ValueError, r"affine_grid: size .*\(2, 3, 4\)"),
    ((THETA, (2, 3, 0, 5)), {}, ValueError, r"affine_grid: size .*\(2, 3, 0, 5\)"),
    ((THETA, (2, 3, 4, -5)), {}, ValueError, r"affine_grid: size .*-5"),
    ((THETA, (2, 3, 4, 5.5)), {}, TypeError, r"affine_grid: size .*5\.5"),
    ((THETA, (2.0, 3, 4, 5)), {}, TypeError, r"affine_grid: size must be \(N, C, H, W\) .*, ints >= 0, got \(2\.0"),
    ((THETA, itertools.count(1)), {}, TypeError, r"affine_grid: size .*count\(1\)"),
    ((THETA, {2, 3, 4, 5}), {}, TypeError, r"affine_grid: size .*\{2, 3, 4, 5\}"),
    ((THETA, 4), {}, TypeError, r"affine_grid: size .*4"),
    ((THETA.astype(int), (2, 3, 4, 5)), {}, TypeError, r"affine_grid: theta .*int64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), WRONG)
def test_wrong_arguments(backend, arguments, options, error, text):
    theta, size = backend.array(arguments[0]), arguments[1]
    with pytest.raises(error, match=text):
        pydeform.affine_grid(theta, size, **options)
    with pytest.raises(error, match=text.replace("affine_grid: ", "affine_grid_backward: ")):
        pydeform.affine_grid_backward(backend.array(np.zeros((2, 4, 5, 2))), theta, size, **options)


def test_wrong_gradient_of_the_output(backend):
    theta, grad_output = map(backend.array, make(SIZES["image"]))
    with pytest.raises(ValueError, match=r"affine_grid_backward: grad_output .*\(2, 4, 5, 2\), got \(2, 4, 4, 2\)"):
        pydeform.affine_grid_backward(grad_output[:, :, 1:], theta, SIZES["image"])
    with pytest.raises(TypeError, match=r"affine_grid_backward: grad_output .*float64.*float32"):
        pydeform.affine_grid_backward(grad_output.astype("f4"), theta, SIZES["image"])
