"""Options: what stands for a number, how large one may be, and that the largest ones give the right result."""

from __future__ import annotations

import inspect
import itertools
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _geometry, _selfcheck
from pydeform.layers import Conv2d, DeformConv2d, RoIAlign
from tests.conftest import Backend, assert_same_bits
from tests.reference import deform_conv2d as reference

RNG = np.random.default_rng(5)
IMAGE, WEIGHT = RNG.normal(size=(1, 2, 9, 8)), RNG.normal(size=(3, 2, 3, 2))
BOXES = np.array([[0, 0.7, 1.2, 5.4, 6.3]])


# What is true or false -------------------------------------------------------------------------------------------
OPTIONS_OF_CALLS = ("aligned", "clockwise", "align_corners", "remove_center", "deterministic", "allow_tf32")


def flags() -> list[tuple[str, str]]:
    """(function, argument) of all operators."""
    return [
        (name, argument)
        for operator in _selfcheck.operators()
        for name in (operator, f"{operator}_backward")
        for argument in OPTIONS_OF_CALLS
        if argument in inspect.signature(getattr(pydeform, name)).parameters
    ]


@pytest.mark.parametrize(("name", "argument"), flags())
def test_a_flag_is_a_bool_and_nothing_else(name, argument):
    """Anything else is true or false as well: "False" is true."""
    given, function = _selfcheck.problem(name.removesuffix("_backward")), getattr(pydeform, name)
    first = (given.grad_output,) if name.endswith("_backward") else ()
    usual = given.options.get(argument, inspect.signature(function).parameters[argument].default)
    for value in (usual, np.bool_(usual)):
        function(*first, **{**given.arrays, **given.options, argument: value})
    for value in ("False", 0, 1.0, None, np.nan, [], np.array([True, False])):
        text = rf"{name}: {argument} must be True or False, got {re.escape(repr(value))}"
        with pytest.raises(TypeError, match=text):
            function(*first, **{**given.arrays, **given.options, argument: value})


# What stands for a number ------------------------------------------------------------------------------------------


def numpy_array(number: Any) -> Any:
    return np.array(number)


def numpy_scalar(number: Any) -> Any:
    return np.array(number)[()]


def torch_tensor(number: Any) -> Any:
    return pytest.importorskip("torch").tensor(number)


def jax_array(number: Any) -> Any:
    return pytest.importorskip("jax").numpy.asarray(number)


KINDS = (numpy_array, numpy_scalar, torch_tensor, jax_array)


def same(backend: Backend, function: Any, arguments: tuple[Any, ...], plain: dict[str, Any], name: str, value: Any):
    arrays = [backend.array(a) for a in arguments]
    want, got = function(*arrays, **plain), function(*arrays, **{**plain, name: value})
    assert_same_bits(backend.numpy(got), backend.numpy(want), f"{function.__name__}: {name}={value!r}")


def test_arrays_without_axes_are_ints(backend):
    offset = np.zeros((1, 12, 7, 7))
    psroi = {"output_dim": 2, "pooled_size": 2, "group_size": 1, "part_size": 2, "sample_per_part": 2}
    for two, one in [(kind(2), kind(1)) for kind in KINDS]:
        for name in ("stride", "padding", "dilation"):
            same(backend, pydeform.conv2d, (IMAGE, WEIGHT), {name: 2}, name, two)
            same(backend, pydeform.conv2d, (IMAGE, WEIGHT), {name: (2, 1)}, name, (two, one))
            same(backend, pydeform.conv2d, (IMAGE, WEIGHT), {name: (2, 1)}, name, [two, one])
        same(
            backend,
            pydeform.conv2d,
            (IMAGE, WEIGHT),
            {"padding": ((2, 1), (1, 2))},
            "padding",
            [(two, one), [one, two]],
        )
        same(backend, pydeform.conv2d, (IMAGE, WEIGHT[:2, :1]), {"groups": 2}, "groups", two)
        same(backend, pydeform.deform_conv2d, (IMAGE, offset, WEIGHT), {"dilation": 1}, "dilation", one)
        for name in ("output_size", "sampling_ratio"):
            same(backend, pydeform.roi_align, (IMAGE, BOXES), {"output_size": 2, name: 2}, name, two)
        for name in psroi:
            same(backend, pydeform.deform_psroi_pool, (IMAGE, BOXES), psroi, name, psroi[name] - 2 + two)


def test_arrays_of_an_int_for_each_axis_are_sequences(backend):
    for kind in (np.array, torch_tensor, jax_array, list, tuple):
        pair, pairs = kind([2, 1]), [[2, 1], [1, 2]] if kind in (list, tuple) else kind([[2, 1], [1, 2]])
        for name in ("stride", "padding", "dilation"):
            same(backend, pydeform.conv2d, (IMAGE, WEIGHT), {name: (2, 1)}, name, pair)
        same(backend, pydeform.conv2d, (IMAGE, WEIGHT), {"padding": ((2, 1), (1, 2))}, "padding", pairs)
        same(backend, pydeform.roi_pool, (IMAGE, BOXES), {"output_size": (2, 1)}, "output_size", pair)
    same(backend, pydeform.conv2d, (IMAGE, WEIGHT), {"stride": (1, 2)}, "stride", range(1, 3))


def test_arrays_without_axes_are_floats(backend):
    offset = np.full((1, 2, 2, 2), 0.5)
    options = {"output_size": 2, "sampling_ratio": 2, "gamma": 0.5, "spatial_scale": 0.5}
    psroi = {"output_dim": 2, "pooled_size": 2, "trans_std": 0.5, "spatial_scale": 0.5}
    for half in (*(kind(0.5) for kind in KINDS), Fraction(1, 2), np.float32(0.5)):
        for name in ("gamma", "spatial_scale"):
            same(backend, pydeform.deform_roi_pool, (IMAGE, BOXES, offset), options, name, half)
        for name in ("trans_std", "spatial_scale"):
            same(backend, pydeform.deform_psroi_pool, (IMAGE, BOXES, offset), psroi, name, half)


def test_arrays_as_options_of_the_analysis():
    offset = RNG.normal(size=(1, 18, 4, 4))
    for kind in KINDS:
        want = pydeform.sampling_locations(offset, 3, 2, 1, 2)
        assert_same_bits(pydeform.sampling_locations(offset, kind(3), kind(2), kind(1), kind(2)), want)
        assert_same_bits(
            pydeform.effective_dilation(offset, kind(3), kind(2)), pydeform.effective_dilation(offset, 3, 2)
        )


def test_a_bool_of_any_library_is_no_number():
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"^conv2d: stride must be an int >= 1 or 2 of them, got .*True"):
            pydeform.conv2d(IMAGE, WEIGHT, stride=kind(True))
        with pytest.raises(ValueError, match=r"^conv2d: stride must be an int >= 1 or 2 of them, got .*True"):
            pydeform.conv2d(IMAGE, WEIGHT, stride=(1, kind(True)))
        with pytest.raises(TypeError, match=r"^roi_align: spatial_scale must be a finite number > 0, got .*True"):
            pydeform.roi_align(IMAGE, BOXES, 2, kind(True))


def test_tensors_whose_value_nobody_knows_are_no_numbers():
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    for function in (
        lambda: pydeform.conv2d(IMAGE, WEIGHT, stride=torch.tensor(2, device="meta")),
        lambda: jax.jit(lambda two: pydeform.conv2d(IMAGE, WEIGHT, stride=two))(2),
    ):
        with pytest.raises(TypeError, match=r"^conv2d: stride must be an int >= 1 or 2 of them, got "):
            function()
    for function in (
        lambda: pydeform.roi_align(IMAGE, BOXES, 2, torch.tensor(2.0, device="meta")),
        lambda: jax.jit(lambda scale: pydeform.roi_align(IMAGE, BOXES, 2, scale))(0.5),
    ):
        with pytest.raises(TypeError, match=r"^roi_align: spatial_scale must be a finite number > 0, got "):
            function()


# Padding "same" ----------------------------------------------------------------------------------------------------

SIZES = ((1, 1), (2, 3), (4, 4), (5, 7), (8, 6))


@pytest.mark.parametrize("stride", [1, 2, 3, 7, (2, 3)])
def test_same_padding_of_one_tap_takes_every_stride_th_pixel(backend, stride):
    """There is nothing to add before the image, however much longer the stride is than the kernel."""
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    for size in SIZES:
        image = RNG.normal(size=(2, 3, *size))
        weight = np.eye(3).reshape(3, 3, 1, 1)
        want = image[:, :, :: steps[0], :: steps[1]]
        out = want.shape[2:]
        arrays = [backend.array(a) for a in (image, weight)]
        offset = backend.array(np.zeros((2, 2, *out)))
        options = {"stride": stride, "padding": "same"}
        assert np.array_equal(backend.numpy(pydeform.conv2d(*arrays, **options)), want)
        assert np.array_equal(backend.numpy(pydeform.deform_conv2d(arrays[0], offset, arrays[1], **options)), want)
        grad, grad_image = RNG.normal(size=want.shape), np.zeros_like(image)
        grad_image[:, :, :: steps[0], :: steps[1]] = grad
        sent = backend.array(grad)
        grads = pydeform.conv2d_backward(sent, *arrays, **options, needs=("input",))
        assert np.array_equal(backend.numpy(grads.input), grad_image)
        grads = pydeform.deform_conv2d_backward(sent, arrays[0], offset, arrays[1], **options, needs=("input",))
        assert np.array_equal(backend.numpy(grads.input), grad_image)
        # The same places by name, for which "same" itself would need the size of the image.
        places = pydeform.sampling_locations(np.zeros(offset.shape), 1, stride=stride, padding=0)
        grid = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(out, steps, strict=True)), indexing="ij"), -1)
        assert np.array_equal(places[1, 0, 0], grid)


@pytest.mark.parametrize("stride", [3, 5, (4, 9)])
@pytest.mark.parametrize("kernel, dilation", [((3, 2), 1), ((2, 3), (2, 1)), ((1, 2), 2)])
def test_same_padding_is_never_negative(backend, kernel, dilation, stride):
    """Where the last window ends before the image does, no padding is needed; elsewhere as much as is missing."""
    steps, apart = (value if isinstance(value, tuple) else (value, value) for value in (stride, dilation))
    for size in SIZES:
        pairs = []
        for n, k, s, d in zip(size, kernel, steps, apart, strict=True):
            end = max(range(0, n, s)) + d * (k - 1) + 1  # of the last window: the next one would begin outside
            missing = end - n if end > n else 0
            pairs.append((missing // 2, missing - missing // 2))
        image, weight = RNG.normal(size=(1, 2, *size)), RNG.normal(size=(3, 2, *kernel))
        out = tuple(len(range(0, n, s)) for n, s in zip(size, steps, strict=True))
        offset = np.zeros((1, 2 * kernel[0] * kernel[1], *out))
        options = {"stride": steps, "padding": tuple(pairs), "dilation": apart}
        want = reference.forward(image, offset, weight, None, None, **options)
        assert want.shape[2:] == out
        options["padding"] = "same"
        sent = [backend.array(a) for a in (image, offset, weight)]
        got = backend.numpy(pydeform.conv2d(sent[0], sent[2], **options))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        got = backend.numpy(pydeform.deform_conv2d(*sent, **options))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


# The largest numbers -----------------------------------------------------------------------------------------------

MOST = 2**31 - 1
FAR = MOST - 3  # three rows of image more are as many as an int counts


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_farthest_padding_of_conv2d(backend, dtype):
    """The first window is in the padding, two thousand million rows away, the second on the first row."""
    image, weight = np.arange(1, 7, dtype=dtype).reshape(1, 1, 3, 2), np.ones((1, 1, 1, 1), dtype)
    sent = [backend.array(a) for a in (image, weight)]
    for options, want in (
        ({"padding": ((FAR, 0), 0), "stride": (FAR, 1)}, [[0, 0], [1, 2]]),
        ({"padding": ((FAR - 1, 0), 0), "stride": (FAR, 1)}, [[0, 0], [3, 4]]),
        ({"padding": ((0, FAR), 0), "stride": (FAR, 1)}, [[1, 2], [0, 0]]),
        ({"stride": (MOST, 1), "dilation": MOST}, [[1, 2]]),
    ):
        assert backend.numpy(pydeform.conv2d(*sent, **options))[0, 0].tolist() == want, options
        grad = np.arange(10, 10 + 2 * len(want), dtype=dtype).reshape(1, 1, len(want), 2)
        grads = pydeform.conv2d_backward(backend.array(grad), *sent, **options)
        grad_image = np.zeros((3, 2))
        for row, values in zip(want, grad[0, 0], strict=True):
            grad_image[image[0, 0, :, 0] == row[0]] = values
        assert np.array_equal(backend.numpy(grads.input)[0, 0], grad_image), options
        assert backend.numpy(grads.weight).item() == (grad[0, 0] * want).sum(), options


def test_the_largest_dilation(backend):
    """Of three taps the middle one reads row 0, the others lie in as much padding as they need."""
    image, weight = np.arange(1.0, 7).reshape(1, 1, 3, 2), np.array([1.0, 10, 100]).reshape(1, 1, 3, 1)
    sent = [backend.array(a) for a in (image, weight)]
    for dilation in (2**30 - 1, 2**30):
        options = {"padding": ((dilation, dilation - 2), 0), "dilation": (dilation, 1)}
        if 2 * dilation + 1 <= MOST:
            assert backend.numpy(pydeform.conv2d(*sent, **options))[0, 0].tolist() == [[10, 20]]
            continue
        text = "conv2d: input must have at most 2147483647 pixels along an axis with padding, got (2147483649, 2)"
        with pytest.raises(ValueError, match=re.escape(text)):
            pydeform.conv2d(*sent, **options)


@pytest.mark.parametrize("dtype, far", [("float64", FAR), ("float32", 2**24), ("float16", 2**24)])
def test_the_farthest_tap_that_an_offset_brings_back(backend, dtype, far):
    """Coordinates are exact as far as taps may be; one further is an error in float32, whose sum would be one off."""
    image, weight = np.arange(1, 7, dtype=dtype).reshape(1, 1, 3, 2), np.ones((1, 1, 1, 1), dtype)
    offset = np.zeros((1, 2, 2, 2), dtype)
    options = {"padding": ((far, 0), 0), "stride": (far, 1)}
    if dtype != "float16":  # which has no such offset
        offset[0, 0, 0] = far + 2
    sent = [backend.array(a) for a in (image, offset, weight)]
    want = [[0, 0] if dtype == "float16" else [5, 6], [1, 2]]
    assert backend.numpy(pydeform.deform_conv2d(*sent, **options))[0, 0].tolist() == want
    if dtype != "float16":  # nor such a location
        places = pydeform.sampling_locations(offset, 1, options["stride"], options["padding"])[0, 0, 0]
        assert places.tolist() == [[[2, 0], [2, 1]], [[0, 0], [0, 1]]]
    if dtype == "float64":
        return
    options["padding"] = ((far + 1, 0), 0)
    text = "taps must be within 16777216 pixels of the first one, as far as float32 coordinates are exact, got y from "
    with pytest.raises(ValueError, match=re.escape(f"deform_conv2d: {text}-16777217 to -1")):
        pydeform.deform_conv2d(*sent, **options)
    with pytest.raises(ValueError, match=re.escape(f"sampling_locations: {text}-16777217 to -1")):
        pydeform.sampling_locations(offset, 1, options["stride"], options["padding"])


def test_locations_are_exact_however_far_the_padding_and_the_stride_are():
    """Each of them may be twice as far as float32 counts."""
    far = 2**24
    offset = np.zeros((1, 2, 2, 1), np.float32)
    places = pydeform.sampling_locations(offset, 1, (2 * far - 1, 1), ((far, 0), 0))
    assert places[0, 0, 0, :, 0, 0].tolist() == [-far, far - 1]


def test_a_result_that_no_memory_holds_is_an_error_before_anything_is_computed(backend):
    image, empty = (backend.array(np.ones((n, 1, 3, 3))) for n in (1, 0))
    weight = backend.array(np.ones((8, 1, 1, 1)))
    for array in (image, empty):  # an axis of length 0 does not count
        for dtype in ("float64", "float16"):  # which is computed in float32
            with pytest.raises(ValueError, match=r"^conv2d: the result must have less than 2\*\*63 bytes, got shape"):
                pydeform.conv2d(array.astype(dtype), weight.astype(dtype), padding=2**29)
    # Less than that, and more than a machine can address. On CUDA already an image has too many pixels.
    with pytest.raises(MemoryError if backend.on_cpu else ValueError):
        pydeform.conv2d(image, weight, padding=2**24)


def test_sizes_that_ints_of_a_struct_cannot_hold_are_refused_on_cuda():
    """Arrays of 4 GB and more, or views of one element that look as large."""
    from pydeform.cuda.conv import plan

    g = _geometry.ConvGeometry(*[1] * 6, *[(1, 1)] * 6)
    plan.check_size("conv2d", g._replace(batch=2**31 - 1, out_channels=2**31 - 1))
    for name in ("batch", "in_channels", "out_channels"):
        text = f"^conv2d: {name} must be at most 2147483647 on CUDA, got 2147483648$"
        with pytest.raises(ValueError, match=text):
            plan.check_size("conv2d", g._replace(**{name: 2**31, "groups": 2 if name == "in_channels" else 1}))
    with pytest.raises(ValueError, match=rf"^conv2d: weight must have .* <= 2147483647 on CUDA, got {2**32}$"):
        plan.check_size("conv2d", g._replace(kernel=(2**16, 2**16)))


# Layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [Conv2d, DeformConv2d])
@pytest.mark.parametrize("option", ["in_channels", "out_channels", "kernel_size", "groups"])
def test_layers_refuse_what_operators_refuse(layer, option):
    options = {"in_channels": 2, "out_channels": 2, "kernel_size": 3}
    text = f"^{layer.__name__}: {option} must be at most 2147483647, got 2147483648$"
    with pytest.raises(ValueError, match=text):
        layer(**{**options, option: 2**31})
    with pytest.raises(TypeError, match=f"^{layer.__name__}: {option} must be an int >= 1"):
        layer(**{**options, option: itertools.count(1)})


def test_layers_take_arrays_without_axes():
    image = IMAGE.astype(np.float32)
    want = Conv2d(2, 3, 3, stride=2, padding=1, rng=0)(image)[0]
    two, one = np.array(2), np.array(1)
    assert_same_bits(Conv2d(two, np.int64(3), np.array(3), stride=two, padding=(one, one), rng=0)(image)[0], want)
    boxes = BOXES.astype(np.float32)
    want = RoIAlign(2, 0.5, 2)(image, boxes)[0]
    assert_same_bits(RoIAlign(two, np.array(0.5), two)(image, boxes)[0], want)


def test_what_was_right_before_says_nothing_about_what_is_equal_to_it():
    """A call like one before is not checked again; 1.0 and True are equal to 1, and no ints."""
    x, weight = np.ones((1, 2, 5, 5)), np.ones((1, 2, 1, 1))
    want = pydeform.conv2d(x, weight, stride=1, padding=(1, 1), dilation=1)
    for same in ([1, 1], (1, 1), np.int64(1), ((1, 1), (1, 1)), np.array([1, 1])):
        np.testing.assert_array_equal(pydeform.conv2d(x, weight, padding=same), want)
    for name in ("stride", "padding", "dilation"):
        for bad in (1.0, True, (1, 1.0), (True, 1), ((1, 1), (1, True)), [1.0, 1], np.float64(1)):
            with pytest.raises((TypeError, ValueError), match=name):
                pydeform.conv2d(x, weight, **{"stride": 1, "padding": (1, 1), "dilation": 1, name: bad})
    offset = np.zeros((1, 2, 5, 5))
    pydeform.deform_conv2d(x, offset, weight, boundary="dcnv1")
    for bad in (["dcnv1"], b"dcnv1", 2, None):
        with pytest.raises(ValueError, match="boundary"):
            pydeform.deform_conv2d(x, offset, weight, boundary=bad)
    for other in (x[:, :1], x[0], np.ones((1, 2, 0, 5))):
        with pytest.raises(ValueError, match=r"input|weight"):
            pydeform.conv2d(other, weight, stride=1, padding=(1, 1), dilation=1)
