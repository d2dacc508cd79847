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


def test_all_convolutions_dcn_and_warp_are_tiled():
    assert {name for name in operators() if "conv" in name or "dcn" in name} | {"warp"} == set(NAMES)


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


def dcn_problem(name, far, size=(40, 30), scale=1, groups=2, **options):
    """Offsets that move samples up to `far` pixels. Masks are larger numbers, and so is what fills a row."""
    rng = np.random.default_rng(7)
    options = {"groups": groups, "offset_scale": scale, **options}
    input, kernel = rng.standard_normal((2, *size, 2 * groups)), options.get("kernel_size", (3, 3))
    of_conv = {key: options.get(key, default) for key, default in (("stride", 1), ("padding", 1), ("dilation", 1))}
    out = pydeform.conv2d(np.moveaxis(input, 3, 1), np.ones((1, 2 * groups, *kernel)), **of_conv).shape[2:]
    points = int(np.prod(kernel)) - options.get("remove_center", False)
    moves = in_quarters(rng, far, (2, *out, groups, points * 2)) * (1 if scale in (0, 1, 2, -1) else 0.9375)
    mask = rng.uniform(-99, 99, (2, *out, groups, points))
    arrays = {"input": input, "offset": moves / (scale or 1), "mask": mask}
    if name == "dcnv4":
        packed = np.concatenate([arrays.pop("offset"), arrays.pop("mask")], -1).reshape(2, *out, -1)
        filled = ((0, 0), (0, 0), (0, 0), (0, -packed.shape[-1] % 8))
        return {"input": input, "offset_mask": np.pad(packed, filled, constant_values=99)}, options
    return {key: a if key == "input" else a.reshape(2, *out, -1) for key, a in arrays.items()}, options


DCN = ("dcnv3", "dcnv4")
SCALES = (1, 2, 0.3, -1, 1.7, 0)


@pytest.mark.parametrize("name", DCN)
@pytest.mark.parametrize("seed", range(18))
def test_dcn_of_any_sizes_and_options(seed, name):
    """A scale spreads the kernel around its middle, turns it, or draws it together; offsets count as it makes them."""
    rng = np.random.default_rng(seed)
    kernel, stride, dilation, size = (rng.integers(1, most, 2) for most in (5, 4, 4, 24))
    remove_center = seed % 3 == 1
    kernel = np.array([3, 3]) if remove_center else kernel
    padding = rng.integers(0, 6, (2, 2))
    padding[:, 1] += np.maximum(dilation * (kernel - 1) + 1 - size - padding.sum(1), 0)
    far, tile_size = int(rng.integers(1, 4)), tuple(rng.integers(2, 9, 2).tolist())
    arrays, options = dcn_problem(
        name,
        far,
        tuple(size.tolist()),
        SCALES[seed % 6],
        kernel_size=tuple(kernel.tolist()),
        stride=tuple(stride.tolist()),
        dilation=tuple(dilation.tolist()),
        padding="same" if seed % 4 == 0 else tuple(map(tuple, padding.tolist())),
        remove_center=remove_center,
    )
    assert_tiles_equal_the_whole(name, arrays, options, tile_size, far)


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


@pytest.mark.parametrize("name", DCN)
@pytest.mark.parametrize("scale", [1, 0.5, 0])
def test_numbers_of_dcn_that_are_not_finite(name, scale):
    arrays, options = dcn_problem(name, 2, scale=scale)
    for place, value in zip(((0, 0, 0, 0), (1, 17, 20, 5), (0, 39, 29, 3)), (np.nan, np.inf, -np.inf), strict=True):
        arrays["offset" if name == "dcnv3" else "offset_mask"][place] = value
    arrays["input"][0, 20, 20, 0] = np.nan
    whole = getattr(pydeform, name)(**arrays, **options)
    y = getattr(tiling, name)(**arrays, **options, tile_size=8, max_offset=2)
    np.testing.assert_allclose(y, whole, rtol=1e-10, atol=1e-10)
    assert np.isnan(whole).any() and np.isfinite(whole).any()
    want = getattr(pydeform, f"{name}_backward")(np.ones_like(y), **arrays, **options)
    grads = getattr(tiling, f"{name}_backward")(np.ones_like(y), **arrays, **options, tile_size=8, max_offset=2)
    for grad, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("coordinates", ["float32", "float16"])
def test_dcn_in_float16(coordinates, monkeypatch):
    monkeypatch.setattr("tests.conftest._tolerance", tolerance_of("cpu", True))
    arrays, options = dcn_problem("dcnv3", 2)
    arrays["mask"] /= 99
    halves = {key: a.astype(coordinates if key == "offset" else "float16") for key, a in arrays.items()}
    exact = {key: a.astype(np.float64) for key, a in halves.items()}
    y = tiling.dcnv3(**halves, **options, tile_size=16, max_offset=2)
    assert_close(y, pydeform.dcnv3(**exact, **options), "float16")
    grads = tiling.dcnv3_backward(np.ones_like(y), **halves, **options, tile_size=16, max_offset=2)
    want = pydeform.dcnv3_backward(np.ones(y.shape), **exact, **options)
    for key in ("offset", "mask"):
        assert_close(getattr(grads, key), getattr(want, key), halves[key].dtype.name)
    error = np.abs(grads.input.astype(np.float64) - want.input).max()
    assert error < 4 * float(np.finfo("float16").eps) * abs(want.input).max()


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


@pytest.mark.parametrize("name", DCN)
def test_pixels_that_only_dropped_results_of_dcn_would_read(name):
    """The same, along axes that begin earlier."""
    input, offset, mask = np.ones((1, 6, 12, 1)), np.zeros((1, 6, 12, 2)), np.ones((1, 6, 12, 1))
    input[:, :, 0], offset[..., 0] = np.nan, 2
    arrays = {"input": input, "offset": offset, "mask": mask}
    if name == "dcnv4":
        arrays = {"input": input, "offset_mask": np.concatenate([offset, mask, np.full((1, 6, 12, 5), np.nan)], -1)}
    given = {"kernel_size": 1, "padding": 0, **arrays}
    want = getattr(pydeform, f"{name}_backward")(np.ones((1, 6, 12, 1)), **given)
    grads = getattr(tiling, f"{name}_backward")(np.ones((1, 6, 12, 1)), **given, tile_size=2, max_offset=2)
    for grad, expected in zip(grads, want, strict=True):
        assert np.isfinite(expected).all()
        assert_same_bits(grad, expected)


@pytest.mark.parametrize("name", DCN)
@pytest.mark.parametrize("scale", [1, 0])
def test_what_dcn_computes_and_drops_is_finite(name, scale, monkeypatch):
    """So that nothing of it can spoil what is kept."""
    inner, whole = tiling._inner, []

    def recorded(operator, tile, array):
        whole.append(array)
        return inner(operator, tile, array)

    monkeypatch.setattr(tiling, "_inner", recorded)
    arrays, options = dcn_problem(name, 2, scale=scale)
    y = getattr(tiling, name)(**arrays, **options, tile_size=8, max_offset=2)
    getattr(tiling, f"{name}_backward")(y, **arrays, **options, tile_size=8, max_offset=2)
    assert max(array.shape[1] for array in whole) > 8 and all(np.isfinite(array).all() for array in whole)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("function", ["deform_conv2d", "deform_conv2d_backward"])
def test_a_longer_offset_is_an_error_that_names_its_block(function, sign):
    given = problem_of()
    given["offset"][1, 7, 33, 12] = sign * 2.5
    before = [np.ones((2, 4, 40, 30))] if "backward" in function else []
    message = rf"{function}: offset must be at most max_offset = 2 pixels, got 2\.5 in the block \[32:40, 8:16\] of"
    with pytest.raises(ValueError, match=message):
        getattr(tiling, function)(*before, **given, tile_size=8, max_offset=2)


@pytest.mark.parametrize("function", ["dcnv3", "dcnv4", "dcnv3_backward", "dcnv4_backward"])
def test_offsets_of_dcn_count_as_they_are_scaled_and_masks_do_not(function):
    name = function.removesuffix("_backward")
    arrays, options = dcn_problem(name, 2, scale=-0.5)
    before = [np.ones((2, 40, 30, 4))] if "backward" in function else []
    call = functools.partial(getattr(tiling, function), *before, **arrays, **options, tile_size=8, max_offset=2)
    call()
    key = "offset" if name == "dcnv3" else "offset_mask"
    arrays[key][1, 33, 12, {"dcnv3": 18 + 5, "dcnv4": 27 + 5}[name]] = 5
    message = rf"{function}: {key} must be at most max_offset = 2 pixels, got 2\.5 in the block \[32:40, 8:16\] of"
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1, 0.1, 0.3, 3])
def test_offsets_may_be_clipped_to_what_is_stated(scale, dtype):
    """As dtypes round the bound, and its quotient: 0.1 in float32 is more than 0.1, and 0.7 / 0.3 * 0.3 than 0.7."""
    rng = np.random.default_rng(0)
    input, mask = rng.standard_normal((1, 9, 9, 1)).astype(dtype), np.ones((1, 9, 9, 9), dtype)
    for most in (0.1, 0.7, 2, 3):
        offset = np.clip(rng.uniform(-99, 99, (1, 9, 9, 18)).astype(dtype), -most / scale, most / scale)
        given = {"input": input, "offset": offset, "mask": mask, "offset_scale": scale}
        tiled = tiling.dcnv3(**given, tile_size=4, max_offset=most)
        assert_close(tiled, pydeform.dcnv3(**given).astype(np.float64), dtype)
        given["offset"] = offset * offset.dtype.type(1 + 1e-5)
        with pytest.raises(ValueError, match="dcnv3: offset must be at most max_offset"):
            tiling.dcnv3(**given, tile_size=4, max_offset=most)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_offset_of_dcn_passes_a_whole_bound(dtype):
    """Its sample would lie between pixels of which a tile has not read the further one."""
    given = {"input": np.ones((1, 9, 9, 1), dtype), "mask": np.ones((1, 9, 9, 9), dtype)}
    for most in (1, 2, 3):
        offset = np.full((1, 9, 9, 18), np.nextafter(np.array(most, dtype), np.array(9, dtype)))
        with pytest.raises(ValueError, match="dcnv3: offset must be at most max_offset"):
            tiling.dcnv3(**given, offset=offset, tile_size=4, max_offset=most)


def test_a_scale_that_takes_samples_beyond_all_numbers():
    given = {"input": np.ones((1, 9, 9, 1)), "offset": np.zeros((1, 9, 9, 50)), "mask": np.ones((1, 9, 9, 25))}
    given |= {"kernel_size": 5, "padding": 2, "offset_scale": 1.5e308}
    tiled = tiling.dcnv3(**given, tile_size=4, max_offset=1e308)
    np.testing.assert_array_equal(tiled, pydeform.dcnv3(**given))


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


@pytest.mark.parametrize("scale, pixels", [(1, 15), (2, 19), (0.25, 17)])
def test_a_tile_of_dcn_reads_what_it_needs(scale, pixels):
    """The same. Where there is a scale, a tile has one pixel to spare at either end; beyond the nominal kernel samples
    reach 1 + 2 pixels, or 1/4 less than 2, which is rounded up."""
    arrays, options = dcn_problem("dcnv4", 2, scale=scale)
    counted = {key: Counted(array) for key, array in arrays.items()}
    tiling.dcnv4(**counted, **options, tile_size=8, max_offset=2)
    assert max(counted["input"].asked) == 4 * pixels**2
    assert sum(counted["offset_mask"].asked) == arrays["offset_mask"].size


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


@pytest.mark.parametrize("name, scale, less", [("deform_conv2d", 1, 1), ("dcnv3", 1, 1), ("dcnv4", 2, 2)])
@pytest.mark.parametrize("field", ["below", "above"])
def test_what_is_read_is_no_less_than_is_needed(field, name, scale, less, monkeypatch):
    """With one pixel less at either side, and without what a scale has to spare, results are wrong: this is what these
    tests would see."""
    plan = tiling.plan

    def too_little(*arguments):
        made = plan(*arguments)
        return made._replace(**{field: tuple(n - less for n in getattr(made, field))})

    monkeypatch.setattr(tiling, "plan", too_little)
    arrays, options = dcn_problem(name, 2, scale=scale) if name in DCN else (problem_of(), {})
    with pytest.raises(AssertionError):
        assert_tiles_equal_the_whole(name, arrays, options, 8, 2)
