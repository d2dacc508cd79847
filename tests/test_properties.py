"""What must hold for any problem: hypothesis draws the shapes, every draw is the same in each run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pydeform
from tests.cases.deform_conv2d import ARRAYS, Case, dtype_of, make, make_grad_output
from tests.conftest import assert_close, assert_same_bits
from tests.reference import deform_conv2d as reference

BOUNDARIES = ("torchvision", "dcnv2", "dcnv1")


@st.composite
def cases(draw, least_batch=1, **fixed):
    """Any geometry with at least one output pixel, small enough for the oracle."""
    groups = draw(st.integers(1, 3))
    offset_groups = draw(st.integers(1, 3))
    channels = np.lcm(groups, offset_groups)
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = draw(st.tuples(pads, pads))
    # The smallest image that the kernel fits into, and a few pixels more.
    least = [max(1, dilation[axis] * (kernel[axis] - 1) + 1 - sum(padding[axis])) for axis in (0, 1)]
    values = {
        "batch": draw(st.integers(least_batch, 3)),
        "in_channels": int(channels) * draw(st.integers(1, 2)),
        "in_h": least[0] + draw(st.integers(0, 4)),
        "in_w": least[1] + draw(st.integers(0, 4)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
        "bias": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "reach": draw(st.sampled_from([1, 3, 8])),
    }
    return Case(**{**values, **fixed})


def forward(backend: Any, arrays: dict[str, Any], **options: Any) -> np.ndarray:
    return backend.numpy(pydeform.deform_conv2d(**{n: backend.array(a) for n, a in arrays.items()}, **options))


def backward(backend: Any, grad_output: np.ndarray, arrays: dict[str, Any], **options: Any) -> dict[str, Any]:
    sent = {name: backend.array(a) for name, a in arrays.items()}
    grads = pydeform.deform_conv2d_backward(backend.array(grad_output), **sent, **options)
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


@given(cases(), st.sampled_from(BOUNDARIES), st.sampled_from(["float64", "float32", "float16", "bfloat16"]))
@settings(max_examples=40)
def test_random_problems_against_the_oracle(backend, case, boundary, dtype):
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    options = {**case.options, "boundary": boundary}
    assert_close(forward(backend, arrays, **options), reference.forward(*arrays.values(), **options), dtype)
    got = backward(backend, grad_output, arrays, **options)
    want = reference.backward(grad_output, *arrays.values(), **options)
    for name in ARRAYS:
        if want[name] is None:
            assert got[name] is None
        else:
            assert_close(got[name], want[name], dtype, name)


@given(cases(mask=False), st.sampled_from(BOUNDARIES))
def test_zero_offset_is_conv2d(backend, case, boundary):
    arrays, grad_output = make(case), make_grad_output(case)
    arrays["offset"] *= 0
    plain = {name: backend.array(arrays[name]) for name in ("input", "weight", "bias")}
    want = backend.numpy(pydeform.conv2d(**plain, **case.options, groups=case.groups))
    got = forward(backend, arrays, **case.options, boundary=boundary)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
    grads = pydeform.conv2d_backward(backend.array(grad_output), **plain, **case.options, groups=case.groups)
    deformed = backward(backend, grad_output, arrays, **case.options, boundary=boundary)
    for name in plain:
        if plain[name] is not None:
            want = backend.numpy(getattr(grads, name))
            np.testing.assert_allclose(deformed[name], want, rtol=1e-12, atol=1e-12 * np.abs(want).max(), err_msg=name)


@given(cases(mask=False, reach=1), st.integers(-3, 3), st.integers(-3, 3), st.sampled_from(BOUNDARIES))
def test_integer_offset_is_a_shifted_image(backend, case, dy, dx, boundary):
    arrays = make(case)
    taps = arrays["offset"].reshape(case.batch, -1, 2, *case.out_size)
    taps[:, :, 0], taps[:, :, 1] = dy, dx
    # Padding made explicit: pixel (y, x) of the new image is (y - top + dy, x - left + dx) of the old one, or zero.
    (top, bottom), (left, right) = case.padding
    room = 3 + max(top, bottom, left, right)
    frame = np.pad(arrays["input"], ((0, 0), (0, 0), (room, room), (room, room)))
    first_y, first_x = room - top + dy, room - left + dx
    height, width = case.in_h + top + bottom, case.in_w + left + right
    shifted = frame[:, :, first_y : first_y + height, first_x : first_x + width]
    want = backend.numpy(
        pydeform.conv2d(
            backend.array(shifted),
            backend.array(arrays["weight"]),
            backend.array(arrays["bias"]),
            case.stride,
            0,
            case.dilation,
            case.groups,
        )
    )
    got = forward(backend, arrays, **case.options, boundary=boundary)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


@given(cases(bias=False), st.sampled_from(["input", "weight", "mask"]))
def test_linear(backend, case, name):
    """f(2a - 3b) = 2 f(a) - 3 f(b) in the input, in the weight and in the mask."""
    case = case._replace(mask=case.mask or name == "mask")
    arrays, other = make(case), make(case, seed=1)
    assert np.any(arrays[name] != other[name])
    parts = [forward(backend, {**arrays, name: a}, **case.options) for a in (arrays[name], other[name])]
    whole = forward(backend, {**arrays, name: 2 * arrays[name] - 3 * other[name]}, **case.options)
    assert_close(whole, 2 * parts[0] - 3 * parts[1], "float64")


@given(cases(), st.sampled_from(BOUNDARIES))
def test_backward_is_the_transpose(backend, case, boundary):
    """<J v, u> = <v, J^T u>, J v by central differences; exact in all but the offset, which stays in its cell."""
    options = {**case.options, "boundary": boundary}
    arrays, u = make(case), make_grad_output(case)
    grads = backward(backend, u, arrays, **options)
    rng = np.random.default_rng(0)
    step = 2.0**-10  # offsets lie 1/8 or more from an integer
    for name in ARRAYS:
        if arrays[name] is None:
            continue
        v = rng.uniform(-1, 1, arrays[name].shape)
        ends = [forward(backend, {**arrays, name: arrays[name] + s * v}, **options) for s in (step, -step)]
        left, right = float((u * (ends[0] - ends[1])).sum()) / (2 * step), float((v * grads[name]).sum())
        size = float(np.abs(u * ends[0]).sum() + np.abs(v * grads[name]).sum())
        assert abs(left - right) <= 1e-10 * size, name


@given(cases(least_batch=2), st.sampled_from(["float64", "float32", "float16"]))
def test_a_batch_is_its_images_bit_for_bit(backend, case, dtype):
    if not backend.on_cpu:
        pytest.skip("promised for the CPU")
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    output = forward(backend, arrays, **case.options)
    grads = backward(backend, grad_output, arrays, **case.options)
    for b in range(case.batch):
        image = slice(b, b + 1)
        alone = {n: a if a is None or n in ("weight", "bias") else a[image] for n, a in arrays.items()}
        assert_same_bits(output[image], forward(backend, alone, **case.options))
        grads_alone = backward(backend, grad_output[image], alone, **case.options)
        for name in ("input", "offset", "mask"):
            if arrays[name] is not None:
                assert_same_bits(grads[name][image], grads_alone[name], name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_large_batch_is_its_images_bit_for_bit(dtype):
    """Sizes past every tile, where the work of one image may be divided differently than that of many."""
    case = Case(5, 34, 21, 19, 18, (3, 3), padding=((1, 1), (1, 1)), groups=2, offset_groups=2)
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    output = pydeform.deform_conv2d(**arrays, **case.options)
    grads = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)
    for b in (0, 3, 4):
        image = slice(b, b + 1)
        alone = {n: a if n in ("weight", "bias") else a[image] for n, a in arrays.items()}
        assert_same_bits(output[image], pydeform.deform_conv2d(**alone, **case.options))
        grads_alone = pydeform.deform_conv2d_backward(grad_output[image], **alone, **case.options)
        for name in ("input", "offset", "mask"):
            assert_same_bits(getattr(grads, name)[image], getattr(grads_alone, name), name)


@given(cases(bias=False, mask=True), st.sampled_from([-2.0, 0.25, 8.0]))
def test_scaling_the_mask_scales_the_output(backend, case, scale):
    """By powers of two, so without any rounding: the same bits."""
    arrays = make(case, "float32")
    want = forward(backend, arrays, **case.options) * np.float32(scale)
    got = forward(backend, {**arrays, "mask": arrays["mask"] * np.float32(scale)}, **case.options)
    np.testing.assert_array_equal(got, want)


@given(cases(mask=True))
def test_a_mask_of_ones_is_no_mask(backend, case):
    arrays = make(case, "float32")
    without = {**arrays, "mask": None}
    got = forward(backend, {**arrays, "mask": np.ones_like(arrays["mask"])}, **case.options)
    assert_close(got, forward(backend, without, **case.options).astype(np.float64), "float32")


@given(cases(), st.sampled_from(["float64", "bfloat16"]))
def test_outputs_far_outside_are_the_bias(backend, case, dtype):
    arrays = make(case, dtype)
    arrays["offset"] = np.full_like(arrays["offset"], 500)
    want = np.zeros((case.batch, case.out_channels, *case.out_size), dtype_of(dtype))
    if case.bias:
        want += arrays["bias"][:, None, None]
    np.testing.assert_array_equal(forward(backend, arrays, **case.options).astype(float), want.astype(float))
    grads = backward(backend, np.ones_like(want), arrays, **case.options)
    assert not grads["input"].any()
    assert not grads["offset"].any()
    assert not grads["weight"].any()
