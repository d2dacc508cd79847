"""sampling_locations, effective_dilation and convert_offset against loops over their definitions.

The first and the last against the operators themselves, too.
"""

import re

import ml_dtypes
import numpy as np
import pytest

from pydeform import convert_offset, dcnv3, deform_conv2d, effective_dilation, sampling_locations
from tests.reference import analysis as reference

EPSILON = {np.float64: 1e-13, np.float32: 1e-6, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}
CASES = {  # kernel, stride, padding, dilation, padding before, offset groups, output size
    "square": (3, 1, 1, 1, (1, 1), 1, (4, 5)),
    "nothing equal": ((3, 2), (2, 1), (1, 4), (2, 3), (1, 4), 3, (4, 5)),
    "uneven padding": ((2, 3), 2, ((0, 1), (5, 2)), 1, (0, 5), 2, (3, 1)),
    "same": ((4, 3), 1, "same", (1, 2), (1, 2), 1, (3, 4)),
    "one row": ((1, 3), 1, 0, 2, (0, 0), 1, (2, 3)),
}


def both(value):
    return (value, value) if isinstance(value, int) else value


def offsets(kernel, groups, out, batch=2, seed=0):
    kernel = both(kernel)
    return np.random.default_rng(seed).normal(0, 2, (batch, 2 * groups * kernel[0] * kernel[1], *out))


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("case", CASES)
def test_sampling_locations(case, dtype):
    kernel, stride, padding, dilation, before, groups, out = CASES[case]
    offset = offsets(kernel, groups, out).astype(dtype)
    untouched = offset.copy()
    locations = sampling_locations(offset, kernel, stride, padding, dilation)
    expected = reference.sampling_locations(offset, both(kernel), both(stride), before, both(dilation))
    assert locations.dtype == dtype and locations.shape == expected.shape
    np.testing.assert_allclose(locations.astype(float), expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    assert np.array_equal(offset, untouched) and not np.shares_memory(offset, locations)


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("case", CASES)
def test_effective_dilation(case, dtype):
    kernel, _, _, dilation, _, groups, out = CASES[case]
    offset = offsets(kernel, groups, out).astype(dtype)
    untouched = offset.copy()
    result = effective_dilation(offset, kernel, dilation)
    expected = reference.effective_dilation(offset, both(kernel), both(dilation))
    assert result.dtype == dtype and result.shape == expected.shape
    np.testing.assert_allclose(result.astype(float), expected, rtol=2 * EPSILON[dtype])
    assert np.array_equal(offset, untouched) and not np.shares_memory(offset, result)


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("kernel", [3, (1, 3), (5, 2), 7])
@pytest.mark.parametrize("dilation", [1, 2, 3, 7])
def test_effective_dilation_of_zero_offsets_is_the_dilation(kernel, dilation, dtype):
    offset = (0 * offsets(kernel, 2, (2, 3))).astype(dtype)
    assert np.all(effective_dilation(offset, kernel, dilation) == dilation)


def test_effective_dilation_of_a_scaled_grid_is_its_scale():
    ky, kx = np.mgrid[:3, :3]
    offset = np.stack([ky, kx], -1).reshape(1, 18, 1, 1) * 1.5  # on top of dilation 1
    np.testing.assert_allclose(effective_dilation(offset, 3), 2.5, rtol=1e-14)


@pytest.mark.parametrize("padding", [1, ((2, 0), (1, 3)), "same"])
def test_locations_are_where_deform_conv2d_samples(padding):
    # Sampling an image whose value is its own x (then y) gives the coordinate back, inside the image.
    image = np.stack(np.mgrid[:9, :11]).astype(float)[:, None]
    weight = np.zeros((9, 1, 3, 3))
    weight.reshape(9, 9)[...] = np.eye(9)
    before = 1 if padding in (1, "same") else 2
    out = (9, 11) if padding in (1, "same") else (9, 13)
    offset = np.random.default_rng(1).uniform(-0.9, 0.9, (1, 18, *out))
    locations = sampling_locations(offset, 3, padding=padding)[0, 0]
    coordinates = deform_conv2d(image, np.repeat(offset, 2, 0), weight, padding=padding)
    inside = np.all((locations >= 0) & (locations <= [8, 10]), -1)
    assert inside.mean() > 0.6 and locations[0, 0, 0, 0] - offset[0, 0, 0, 0] == pytest.approx(-before)
    np.testing.assert_allclose(coordinates[0][inside], locations[..., 0][inside], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(coordinates[1][inside], locations[..., 1][inside], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch, out", [(0, (3, 4)), (2, (0, 4))])
def test_empty(batch, out):
    offset = np.zeros((batch, 36, *out), np.float32)
    assert sampling_locations(offset, 3, padding="same").shape == (batch, 2, 9, *out, 2)
    assert effective_dilation(offset, 3).shape == (batch, 2, *out)


def test_any_strides_and_read_only():
    offset = offsets(3, 2, (4, 10)).transpose(0, 1, 3, 2)[:, :, ::-2]
    offset.flags.writeable = False
    copy = np.ascontiguousarray(offset)
    assert np.array_equal(sampling_locations(offset, 3), sampling_locations(copy, 3))
    assert np.array_equal(effective_dilation(offset, 3), effective_dilation(copy, 3))


def test_non_finite_offsets_stay_in_their_place():
    offset = np.zeros((1, 18, 2, 3))
    offset[0, 9, 0, 0], offset[0, 4, 1, 2] = np.nan, np.inf
    locations = sampling_locations(offset, 3)
    assert np.isnan(locations[0, 0, 4, 0, 0, 1]) and np.isnan(locations).sum() == 1
    assert locations[0, 0, 2, 1, 2, 0] == np.inf and np.isinf(locations).sum() == 1
    dilation = effective_dilation(offset, 3)
    assert np.isnan(dilation[0, 0, 0, 0]) and np.isinf(dilation[0, 0, 1, 2]) and np.isfinite(dilation).sum() == 4
    offset[...] = np.inf
    assert np.isnan(effective_dilation(offset, 3)).all()


SHAPE = "(N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w)"
ZEROS = np.zeros((1, 18, 2, 2))


@pytest.mark.parametrize("function", [sampling_locations, effective_dilation], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "offset, kernel, options, error, message",
    [
        (None, 3, {}, TypeError, "offset must be an array, got None"),
        ([0.0], 3, {}, TypeError, "offset must be an array (NumPy, CuPy, or one with __dlpack__), got list"),
        (ZEROS.astype(int), 3, {}, TypeError, "offset must have dtype float64, float32, float16, bfloat16, got int64"),
        (ZEROS[0], 3, {}, ValueError, f"offset must have shape {SHAPE}, got (18, 2, 2)"),
        (ZEROS[:, :17], 3, {}, ValueError, f"offset must have shape {SHAPE} = (1, 18, 2, 2), got (1, 17, 2, 2)"),
        (ZEROS, (2, 4), {}, ValueError, f"offset must have shape {SHAPE} = (1, 16, 2, 2), got (1, 18, 2, 2)"),
        (ZEROS, 0, {}, ValueError, "kernel_size must be an int >= 1 or 2 of them, got 0"),
        (ZEROS, (3, 3, 3), {}, ValueError, "kernel_size must be an int >= 1 or 2 of them, got (3, 3, 3)"),
        (ZEROS, 3, {"dilation": 0}, ValueError, "dilation must be an int >= 1 or 2 of them, got 0"),
    ],
)
def test_errors(function, offset, kernel, options, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {re.escape(message)}$"):
        function(offset, kernel, **options)


def test_errors_of_one_function():
    with pytest.raises(ValueError, match=r"^effective_dilation: kernel_size must have at least two taps, got 1$"):
        effective_dilation(ZEROS[:, :2], 1)
    with pytest.raises(ValueError, match=r"^sampling_locations: stride must be an int >= 1"):
        sampling_locations(ZEROS, 3, stride=0)
    with pytest.raises(ValueError, match=r"^sampling_locations: padding must be an int >= 0"):
        sampling_locations(ZEROS, 3, padding="valid")
    with pytest.raises(ValueError, match=r"^sampling_locations: padding must be given in numbers where stride > 1"):
        sampling_locations(ZEROS, 3, stride=(1, 2), padding="same")


# convert_offset -------------------------------------------------------------------------------------------------------
LAYOUTS = ["torchvision", "mxnet", "mmcv", "onnx", "paddle", "chainer", "dcnv3", "blocked_yx"]


def in_all_layouts(kernel=(3, 2), groups=3, out=(4, 5), dtype=np.float64):
    canonical = np.random.default_rng(0).normal(0, 2, (2, groups, *kernel, 2, *out)).astype(dtype)
    return {layout: reference.offset_in(layout, canonical) for layout in LAYOUTS}


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_convert_offset(source, target):
    for kernel, groups, out in (((3, 2), 3, (4, 5)), ((1, 4), 1, (2, 3)), ((3, 3), 2, (1, 0))):
        offset = in_all_layouts(kernel, groups, out)
        given, untouched = offset[source], offset[source].copy()
        result = convert_offset(given, kernel, source, target)
        assert np.array_equal(result, offset[target]) and result.shape == offset[target].shape
        assert not np.shares_memory(result, given) and np.array_equal(given, untouched)
        assert result.flags.c_contiguous and result.flags.writeable
        assert np.array_equal(convert_offset(result, kernel, target, source), given)


def test_layouts_differ():
    """Or the test above would say nothing."""
    found = in_all_layouts(kernel=(3, 3), groups=2)
    bytes_of = {layout: array.tobytes() for layout, array in found.items()}
    assert len(set(bytes_of.values())) == 4


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: np.dtype(dtype).name)
def test_convert_offset_keeps_dtype_and_takes_any_strides(dtype):
    offset = in_all_layouts(dtype=dtype)
    given = np.repeat(offset["torchvision"], 2, axis=3)[..., ::-2][..., ::-1]
    given.flags.writeable = False
    result = convert_offset(given, (3, 2), "torchvision", "dcnv3")
    assert result.dtype == dtype and result.tobytes() == offset["dcnv3"].tobytes()
    same = convert_offset(given, (3, 2), "mmcv", "onnx")
    assert same.tobytes() == offset["torchvision"].tobytes() and not np.shares_memory(same, given)


def test_dcnv3_samples_where_deform_conv2d_does():
    """The same points in both operators: with weights that let one tap through."""
    rng = np.random.default_rng(3)
    image, groups, kernel = rng.standard_normal((2, 4, 6, 7)), 2, (3, 3)
    offset, mask = rng.normal(0, 1.5, (2, 36, 6, 7)), rng.random((2, 18, 6, 7))
    weight = np.zeros((4, 4, 3, 3))
    weight[range(4), range(4)] = 1  # each channel's own sum over the taps
    want = deform_conv2d(image, offset, weight, padding=1, mask=mask)
    masks = mask.reshape(2, groups, *kernel, 6, 7).transpose(0, 4, 5, 1, 3, 2).reshape(2, 6, 7, 18)
    last = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
    got = dcnv3(last, convert_offset(offset, 3, "torchvision", "dcnv3"), masks, groups=groups)
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, rtol=1e-12, atol=1e-12)


def test_convert_offset_of_other_kinds():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    offset = in_all_layouts(dtype=np.float32)
    result = convert_offset(torch.tensor(offset["chainer"]), (3, 2), "chainer", "dcnv3")
    assert isinstance(result, torch.Tensor) and np.array_equal(result, offset["dcnv3"])


def test_convert_offset_on_a_device(backend):
    offset = in_all_layouts(dtype=np.float32)
    result = convert_offset(backend.array(offset["chainer"]), (3, 2), "chainer", "dcnv3")
    assert np.array_equal(backend.numpy(result), offset["dcnv3"]) and type(result) is type(backend.array(ZEROS))


@pytest.mark.parametrize(
    "offset, options, error, message",
    [
        (None, {}, TypeError, "offset must be an array, got None"),
        (ZEROS.astype(int), {}, TypeError, "offset must have dtype float64, float32, float16, bfloat16, got int64"),
        (ZEROS, {"source": "tensorflow"}, ValueError,
         "source must be one of 'torchvision', 'mxnet', 'mmcv', 'onnx', 'paddle', 'chainer', 'dcnv3', 'blocked_yx', "
         "got 'tensorflow'"),
        (ZEROS, {"target": None}, ValueError,
         "target must be one of 'torchvision', 'mxnet', 'mmcv', 'onnx', 'paddle', 'chainer', 'dcnv3', 'blocked_yx', "
         "got None"),
        (ZEROS[:, :17], {}, ValueError, f"offset must have shape {SHAPE} = (1, 18, 2, 2), got (1, 17, 2, 2)"),
        (ZEROS, {"source": "dcnv3"}, ValueError,
         "offset must have shape (N, out_h, out_w, 2*offset_groups*kernel_h*kernel_w) = (1, 18, 2, 18), "
         "got (1, 18, 2, 2)"),
        (ZEROS[0], {"source": "dcnv3"}, ValueError,
         "offset must have shape (N, out_h, out_w, 2*offset_groups*kernel_h*kernel_w), got (18, 2, 2)"),
        (ZEROS, {"kernel_size": 0}, ValueError, "kernel_size must be an int >= 1 or 2 of them, got 0"),
    ],
)  # fmt: skip
def test_errors_of_convert_offset(offset, options, error, message):
    arguments = {"kernel_size": 3, "source": "torchvision", "target": "chainer", **options}
    with pytest.raises(error, match=f"^convert_offset: {re.escape(message)}$"):
        convert_offset(offset, **arguments)
