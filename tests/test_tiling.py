"""Operators tile by tile: what they give is what the whole gives, and no tile reads more than it needs."""

import functools
import itertools

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import _geometry, _selfcheck, tiling
from pydeform._operators import operators
from tests.conftest import assert_close, assert_same_bits, tolerance_of

FAR = 4  # no problem moves samples further
NAMES = sorted(tiling.TILED)


def moved(name, far=FAR):
    return {"max_offset": far} if tiling.moved_by(operators()[name]) else {}


def assert_tiles_equal_the_whole(name, arrays, options, tile_size, far=FAR):
    more = {**moved(name, far), "tile_size": tile_size}
    whole = getattr(pydeform, name)(**arrays, **options)
    assert_close(getattr(tiling, name)(**arrays, **options, **more), whole, "float64")
    grad_output = np.random.default_rng(3).standard_normal(whole.shape)
    grads = getattr(pydeform, f"{name}_backward")(grad_output, **arrays, **options)
    tiled = getattr(tiling, f"{name}_backward")(grad_output, **arrays, **options, **more)
    assert type(tiled) is type(grads)
    for key, want in grads._asdict().items():
        if want is None:
            assert getattr(tiled, key) is None
        else:
            assert_close(getattr(tiled, key), want, "float64", key)


def test_all_convolutions_and_warp_are_tiled():
    assert {name for name in operators() if "conv" in name} | {"warp"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_equal_the_whole(name):
    for problem, tile_size in itertools.product(_selfcheck.problems(name), (2, 5)):
        assert_tiles_equal_the_whole(name, problem.arrays, problem.options, tile_size)


def in_quarters(rng, far, shape):
    """Offsets up to `far`, which is among them, on pixels and between."""
    return rng.integers(-4 * far, 4 * far + 1, shape) / 4


@pytest.mark.parametrize("seed", range(24))
def test_any_sizes_and_options(seed):
    """Also tiles in the padding, which see no pixel at all, and borders of each kind."""
    rng = np.random.default_rng(seed)
    kernel, stride, dilation, size = (rng.integers(1, most, 2) for most in (4, 4, 3, 24))
    padding = rng.integers(0, 9, (2, 2))
    padding[:, 1] += np.maximum(dilation * (kernel - 1) + 1 - size - padding.sum(1), 0)  # there are results
    options = {"stride": tuple(stride.tolist()), "dilation": tuple(dilation.tolist())}
    options["padding"] = "same" if seed % 6 == 0 else tuple(map(tuple, padding.tolist()))
    input, weight, far = rng.standard_normal((2, 2, *size)), rng.standard_normal((2, 2, *kernel)), int(rng.integers(4))
    out = pydeform.conv2d(input, weight, **options).shape[2:]
    taps = 2 * int(np.prod(kernel))
    offset = in_quarters(rng, far, (2, taps, *out))
    options["boundary"] = _geometry.BOUNDARIES[seed % 3]
    arrays = {"input": input, "offset": offset, "weight": weight}
    assert_tiles_equal_the_whole("deform_conv2d", arrays, options, tuple(rng.integers(1, 9, 2).tolist()), far)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_warp_by_any_rule(mode, padding_mode):
    rng = np.random.default_rng(5)
    arrays = {"input": rng.standard_normal((1, 2, 20, 9)), "displacement": in_quarters(rng, 3, (1, 2, 20, 9))}
    assert_tiles_equal_the_whole("warp", arrays, {"mode": mode, "padding_mode": padding_mode}, (5, 3), 3)


def problem_of(far=2, size=(40, 30), dtype=np.float64, coordinates=None):
    rng = np.random.default_rng(0)
    arrays = {
        "input": rng.integers(-8, 9, (2, 3, *size)) / 8,
        "weight": rng.integers(-8, 9, (4, 3, 3, 3)) / 8,
        "mask": rng.integers(0, 9, (2, 9, *size)) / 8,
    }
    arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    return arrays | {"offset": in_quarters(rng, far, (2, 18, *size)).astype(coordinates or dtype), "padding": 1}


@pytest.mark.parametrize("coordinates", ["float32", "same"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype, coordinates, monkeypatch):
    monkeypatch.setattr("tests.conftest._tolerance", tolerance_of("cpu", True))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    given = problem_of(dtype=kind, coordinates="float32" if coordinates == "float32" else kind)
    y = tiling.deform_conv2d(**given, tile_size=16, max_offset=2)
    assert_close(y, pydeform.deform_conv2d(**problem_of()), dtype)
    grads = tiling.deform_conv2d_backward(np.ones_like(y), **given, tile_size=16, max_offset=2)
    want = pydeform.deform_conv2d_backward(np.ones(y.shape), **problem_of())
    assert_close(grads.mask, want.mask, dtype)
    assert grads.offset.dtype == given["offset"].dtype
    for key in ("input", "weight"):  # what 2 x 3 x 2 tiles add is rounded, each
        grad, exact = getattr(grads, key), getattr(want, key)
        assert grad.dtype == kind
        assert np.abs(grad.astype(np.float64) - exact).max() < 4 * float(ml_dtypes.finfo(kind).eps) * abs(exact).max()


def test_numbers_that_are_not_finite():
    given = problem_of()
    for place, value in zip(((0, 0, 0, 0), (1, 5, 17, 20), (0, 3, 39, 29)), (np.nan, np.inf, -np.inf), strict=True):
        given["offset"][place] = value
    given["input"][0, 0, 20, 20] = np.nan
    y = tiling.deform_conv2d(**given, tile_size=8, max_offset=2)
    np.testing.assert_allclose(y, pydeform.deform_conv2d(**given), rtol=1e-12, atol=1e-12)
    assert np.isnan(y).any() and np.isfinite(y).any()
    grads = tiling.deform_conv2d_backward(np.ones_like(y), **given, tile_size=8, max_offset=2)
    want = pydeform.deform_conv2d_backward(np.ones_like(y), **given)
    for key in ("input", "offset", "mask", "weight"):
        np.testing.assert_allclose(getattr(grads, key), getattr(want, key), rtol=1e-12, atol=1e-12)


def test_pixels_that_only_dropped_results_would_read():
    """All samples move two pixels to the right, so that none reads the first column, which is not a number."""
    input, offset = np.ones((1, 1, 6, 12)), np.zeros((1, 2, 6, 12))
    input[..., 0], offset[:, 1] = np.nan, 2
    given = {"input": input, "offset": offset, "weight": np.ones((1, 1, 1, 1))}
    grads = tiling.deform_conv2d_backward(np.ones((1, 1, 6, 12)), **given, tile_size=2, max_offset=2)
    for key, want in pydeform.deform_conv2d_backward(np.ones((1, 1, 6, 12)), **given)._asdict().items():
        if want is not None:
            assert np.isfinite(want).all()
            assert_same_bits(getattr(grads, key), want)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("function", ["deform_conv2d", "deform_conv2d_backward"])
def test_a_longer_offset_is_an_error_that_names_its_block(function, sign):
    given = problem_of()
    given["offset"][1, 7, 33, 12] = sign * 2.5
    before = [np.ones((2, 4, 40, 30))] if "backward" in function else []
    message = rf"{function}: offset must be at most max_offset = 2 pixels, got 2\.5 in the block \[32:40, 8:16\] of"
    with pytest.raises(ValueError, match=message):
        getattr(tiling, function)(*before, **given, tile_size=8, max_offset=2)


class Counted:
    """An array that can only be sliced, and remembers how much was asked for."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.asked = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        part = self.array[index]
        self.asked.append(part.size)
        return part


def test_a_tile_reads_what_it_needs():
    """8 x 8 results of 3 x 3 taps, that move by 2, read 10 + 2 + 3 pixels an axis, of 3 channels of an image."""
    given = problem_of()
    arrays = {key: Counted(array) for key, array in given.items() if key != "padding"}
    assert_same_bits(
        tiling.deform_conv2d(**arrays, padding=1, tile_size=8, max_offset=2),
        tiling.deform_conv2d(**given, tile_size=8, max_offset=2),
    )
    tiles = 2 * 5 * 4
    assert max(arrays["input"].asked) == 3 * 15 * 15
    assert len(arrays["input"].asked) == len(arrays["offset"].asked) == tiles
    assert sum(arrays["offset"].asked) == given["offset"].size and max(arrays["offset"].asked) == 18 * 8 * 8
    assert arrays["weight"].asked == [given["weight"].size]
    assert sum(arrays["input"].asked) < 15**2 / 8**2 * given["input"].size * tiles * 64 / (2 * 40 * 30)


def test_from_and_into_stores(tmp_path):
    zarr = pytest.importorskip("zarr")
    given = problem_of()
    want = tiling.deform_conv2d(**given, tile_size=16, max_offset=2)
    stores = {key: zarr.array(array) for key, array in given.items() if key != "padding"}
    mapped = np.memmap(tmp_path / "y", np.float64, "w+", shape=want.shape)
    for out in (mapped, zarr.zeros(shape=want.shape, chunks=(1, 4, 16, 16), dtype="float64")):
        assert tiling.deform_conv2d(**stores, padding=1, tile_size=16, max_offset=2, out=out) is out
        assert_same_bits(np.asarray(out[...]), want)
    out = {"input": zarr.full(shape=given["input"].shape, fill_value=7.0, dtype="float64")}
    grads = tiling.deform_conv2d_backward(want, **stores, padding=1, tile_size=16, max_offset=2, out=out)
    assert grads.input is out["input"] and isinstance(grads.weight, np.ndarray)
    for key, grad in tiling.deform_conv2d_backward(want, **given, tile_size=16, max_offset=2)._asdict().items():
        if grad is not None:
            assert_same_bits(np.asarray(getattr(grads, key)[...]), grad)


def test_needs_empty_batch_and_inputs_that_stay():
    given = problem_of()
    before = {key: np.copy(array) for key, array in given.items()}
    y = tiling.deform_conv2d(**given, tile_size=(16, 32), max_offset=2)
    grads = tiling.deform_conv2d_backward(y, **given, tile_size=16, max_offset=2, needs=("weight", "input"))
    assert grads.offset is None and grads.mask is None
    want = pydeform.deform_conv2d_backward(y, **given)
    assert_close(grads.input, want.input, "float64")
    assert_close(grads.weight, want.weight, "float64")
    assert all(np.array_equal(given[key], before[key]) for key in given)
    none = {key: array if key in ("weight", "padding") else array[:0] for key, array in given.items()}
    assert tiling.deform_conv2d(**none, tile_size=16, max_offset=2).shape == (0, 4, 40, 30)
    assert not tiling.deform_conv2d_backward(y[:0], **none, tile_size=16, max_offset=2).weight.any()


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"tile_size": 0}, ValueError, "deform_conv2d: tile_size must be an int >= 1 or 2 of them, got 0"),
        ({"tile_size": (8, 8, 8)}, ValueError, "deform_conv2d: tile_size must be"),
        ({"max_offset": -1}, ValueError, "deform_conv2d: max_offset must be a number >= 0, got -1"),
        ({"max_offset": np.inf}, ValueError, "deform_conv2d: max_offset must be a finite number, got inf"),
        ({"max_offset": "2"}, TypeError, "deform_conv2d: max_offset must be a finite number, got '2'"),
        ({"input": [[1.0]]}, TypeError, "deform_conv2d: input must be an array with a shape and a dtype, got list"),
        ({"input": np.ones((3, 3, 40, 30))}, ValueError, r"deform_conv2d: offset must have the first axis of input, 3"),
        ({"offset": np.ones((2, 17, 40, 30))}, ValueError, r"deform_conv2d: offset must have shape .*17, 40, 30\)"),
        ({"weight": np.ones((4, 3, 3, 3), "f")}, TypeError, "deform_conv2d: weight must have the dtype of input"),
        ({"padding": "valid"}, ValueError, "deform_conv2d: padding must be"),
        ({"out": np.ones((2, 4, 40, 31))}, ValueError, r"deform_conv2d: out must have shape \(2, 4, 40, 30\), got"),
        ({"out": np.ones((2, 4, 40, 30), "f")}, TypeError, "deform_conv2d: out must have dtype float64, got float32"),
    ],
    ids=str,
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=message):
        tiling.deform_conv2d(**{**problem_of(), "tile_size": 8, "max_offset": 2, **change})


def test_what_must_be_stated():
    with pytest.raises(TypeError, match="max_offset"):
        tiling.deform_conv2d(**problem_of(), tile_size=8)
    with pytest.raises(TypeError, match="max_offset"):  # where nothing moves there is none
        tiling.conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)), tile_size=8, max_offset=2)


@pytest.mark.parametrize("field", ["below", "above"])
def test_what_is_read_is_no_less_than_is_needed(field, monkeypatch):
    """With one pixel less at either side, results are wrong: this is what these tests would see."""
    plan = tiling.plan

    def too_little(*arguments):
        made = plan(*arguments)
        return made._replace(**{field: getattr(made, field) - 1})

    monkeypatch.setattr(tiling, "plan", too_little)
    compute = functools.partial(assert_tiles_equal_the_whole, "deform_conv2d")
    given = problem_of()
    padding = given.pop("padding")
    with pytest.raises(AssertionError):
        compute(given, {"padding": padding}, 8, 2)
