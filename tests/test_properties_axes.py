"""What must hold for any problem over one and three axes, and between them and two: hypothesis draws the shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.conv import AXES, Case, kind_of, make, make_grad_output, run, run_backward, solve_oracle
from tests.cases.conv_tests import BOUNDARIES, DTYPES, assert_grads
from tests.conftest import assert_close, assert_same_bits
from tests.reference.deform_conv import offset_of_positions

NEW = ("conv1d", "conv3d", "deform_conv1d", "deform_conv3d", "active_conv2d")
each_new = pytest.mark.parametrize("operator", NEW)


@st.composite
def cases(draw, axes, least_batch=1, **fixed):
    """Any geometry with at least one output pixel, small enough for the oracle."""
    most = {1: 3, 2: 3, 3: 2}[axes]

    def one_each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, dilation = one_each(1, most), fixed.get("dilation") or one_each(1, 2)
    padding = draw(st.tuples(*[st.tuples(st.integers(0, most - 1), st.integers(0, most - 1))] * axes))
    # The smallest image that the kernel fits into, and a few pixels more.
    least = [max(1, d * (k - 1) + 1 - sum(p)) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    values = {
        "batch": draw(st.integers(least_batch, 2)),
        "in_channels": math.lcm(groups, offset_groups) * draw(st.integers(1, 2)),
        "in_size": tuple(size + more for size, more in zip(least, one_each(0, most), strict=True)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel": kernel,
        "stride": one_each(1, 3),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
        "bias": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "reach": draw(st.sampled_from([1, 3, 8])),
    }
    return Case(**{**values, **fixed})


def drawn(data: st.DataObject, operator: str, **fixed: Any) -> tuple[Case, dict[str, Any]]:
    """A case, and options under any rule."""
    axes = AXES[operator]
    if kind_of(operator) == "active":
        fixed["dilation"] = (1,) * axes
    case = data.draw(cases(axes, **fixed))
    options = case.options(operator)
    if kind_of(operator) == "deform":
        options["boundary"] = data.draw(st.sampled_from(BOUNDARIES))
    return case, options


def solve(backend: Any, operator: str, grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
    return (
        run(backend, operator, arrays, options),
        run_backward(backend, operator, grad_output, arrays, options),
    )


def widened(results: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """In float64, as what another is compared with."""
    output, grads = results
    return output.astype(float), {name: None if a is None else a.astype(float) for name, a in grads.items()}


@each_new
@given(st.data(), st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_random_problems_against_the_oracle(backend, operator, data, dtype):
    case, options = drawn(data, operator)
    arrays, grad_output = make(operator, case, dtype), make_grad_output(case, dtype)
    output, grads = solve(backend, operator, grad_output, arrays, options)
    want, want_grads = solve_oracle(operator, arrays, options, grad_output)
    assert_close(output, want, dtype)
    assert_grads(grads, want_grads, dtype)


@pytest.mark.parametrize("operator", ["deform_conv1d", "deform_conv3d"])
@given(st.data())
def test_zero_offset_is_a_plain_convolution(backend, operator, data):
    case, options = drawn(data, operator, mask=False)
    arrays, grad_output = make(operator, case), make_grad_output(case)
    arrays["offset"] *= 0
    plain = {name: arrays[name] for name in ("input", "weight", "bias")}
    got = solve(backend, operator, grad_output, arrays, options)
    simple = operator.removeprefix("deform_")
    want, want_grads = widened(solve(backend, simple, grad_output, plain, case.options(simple)))
    assert_close(got[0], want, "float64")
    assert_grads({name: got[1][name] for name in plain}, want_grads, "float64")


def with_axis(arrays: dict[str, Any], axes: int) -> dict[str, Any]:
    """A problem with one axis more, before the others: of one pixel, under a kernel of 1 that no offset moves."""
    found = {name: a if a is None or name == "bias" else a[:, :, None] for name, a in arrays.items()}
    if "offset" in arrays:
        offset = arrays["offset"]
        taps = offset.reshape(len(offset), offset.shape[1] // axes, axes, *offset.shape[2:])
        moved = np.concatenate([np.zeros_like(taps[:, :, :1]), taps], axis=2)
        found["offset"] = moved.reshape(len(offset), -1, 1, *offset.shape[2:])
    return found


@pytest.mark.parametrize(
    ("few", "many"),
    [
        ("deform_conv1d", "deform_conv2d"),
        ("deform_conv2d", "deform_conv3d"),
        ("conv1d", "conv2d"),
        ("conv2d", "conv3d"),
    ],
)
@given(st.data(), st.sampled_from(["float64", "float32"]), st.booleans())
def test_an_axis_of_one_pixel_changes_nothing(backend, few, many, data, dtype, on_pixels):
    """One axis is two with an image of height 1, two are three with a depth of 1; under every rule, on pixels too."""
    case, options = drawn(data, few)
    arrays, grad_output, axes = make(few, case, dtype), make_grad_output(case, dtype), AXES[few]
    if on_pixels and "offset" in arrays:
        arrays["offset"] = np.floor(arrays["offset"])
    one_more = {"stride": 1, "padding": (0, 0), "dilation": 1}
    options_of_many = {name: (one_more[name], *v) if name in one_more else v for name, v in options.items()}
    output, grads = solve(backend, many, grad_output[:, :, None], with_axis(arrays, axes), options_of_many)
    want, want_grads = widened(solve(backend, few, grad_output, arrays, options))
    assert_close(output[:, :, 0], want, dtype)
    if "offset" in grads:
        per_axis = grads["offset"].reshape(case.batch, -1, axes + 1, *case.out_size)
        grads["offset"] = per_axis[:, :, 1:]
    grads = {n: g if g is None else g.reshape(arrays[n].shape) for n, g in grads.items()}
    assert_grads(grads, want_grads, dtype)


@given(st.data(), st.booleans())
def test_active_is_deform_conv2d_with_the_same_offset_everywhere(backend, data, on_pixels):
    """And the gradient of a position is the sum of those of the offsets that it stands for."""
    case, options = drawn(data, "active_conv2d", mask=False)
    arrays, grad_output = make("active_conv2d", case), make_grad_output(case)
    if on_pixels:
        arrays["positions"] = np.floor(arrays["positions"])
    output, grads = solve(backend, "active_conv2d", grad_output, arrays, options)
    others = {n: a for n, a in arrays.items() if n != "positions"}
    others["offset"] = offset_of_positions(arrays["positions"], case.batch, case.out_size, case.kernel)
    want, want_grads = solve(backend, "deform_conv2d", grad_output, others, options)
    want_grads["positions"] = want_grads.pop("offset").sum(axis=(0, 2, 3))
    assert_close(output, want, "float64")
    assert_grads(grads, {name: want_grads[name] for name in grads}, "float64")


@each_new
@given(st.data(), st.sampled_from(["input", "weight", "mask"]))
def test_linear(backend, operator, data, name):
    """f(2a - 3b) = 2 f(a) - 3 f(b) in the input, in the weight and in the mask."""
    name = name if name != "mask" or kind_of(operator) == "deform" else "input"
    case, options = drawn(data, operator, bias=False, **({"mask": True} if name == "mask" else {}))
    arrays, other = make(operator, case), make(operator, case, seed=1)
    parts = [run(backend, operator, {**arrays, name: a}, options) for a in (arrays[name], other[name])]
    whole = run(backend, operator, {**arrays, name: 2 * arrays[name] - 3 * other[name]}, options)
    scale = max(np.abs(part).max() for part in parts)
    np.testing.assert_allclose(whole, 2 * parts[0] - 3 * parts[1], rtol=0, atol=1e-12 * scale + 1e-300)


@each_new
@given(st.data())
def test_backward_is_the_transpose(backend, operator, data):
    """<J v, u> = <v, J^T u>, J v by central differences; exact in all but the places, which stay in their cells."""
    case, options = drawn(data, operator)
    arrays, u = make(operator, case), make_grad_output(case)
    grads = run_backward(backend, operator, u, arrays, options)
    rng = np.random.default_rng(0)
    step = 2.0**-10  # places lie 1/8 or more from an integer
    for name, array in arrays.items():
        if array is None:
            continue
        v = rng.uniform(-1, 1, array.shape)
        ends = [run(backend, operator, {**arrays, name: array + s * v}, options) for s in (step, -step)]
        left, right = float((u * (ends[0] - ends[1])).sum()) / (2 * step), float((v * grads[name]).sum())
        size = float(np.abs(u * ends[0]).sum() + np.abs(v * grads[name]).sum())
        # Along three axes at once a sample is a cubic, of which central differences leave a term in step**2.
        assert abs(left - right) <= (1e-5 if AXES[operator] == 3 and name == "offset" else 1e-10) * size, name


@each_new
@given(st.data(), st.sampled_from(["float64", "float32", "float16"]))
def test_a_batch_is_its_images_bit_for_bit(backend, operator, data, dtype):
    """Promised for the CPU; on CUDA it holds of the output."""
    case, options = drawn(data, operator, batch=2)
    arrays, grad_output = make(operator, case, dtype), make_grad_output(case, dtype)
    output, grads = solve(backend, operator, grad_output, arrays, options)
    own = [n for n in ("input", "offset", "mask") if arrays.get(n) is not None]
    for b in range(2):
        image = slice(b, b + 1)
        alone = {n: a[image] if n in own else a for n, a in arrays.items()}
        output_alone, grads_alone = solve(backend, operator, grad_output[image], alone, options)
        if backend.on_cpu:
            assert_same_bits(output[image], output_alone)
            for name in own:
                assert_same_bits(grads[name][image], grads_alone[name], name)
        else:
            assert_close(output[image], output_alone.astype(float), dtype)


@pytest.mark.parametrize("operator", ["deform_conv1d", "deform_conv3d"])
@given(st.data(), st.sampled_from(["float64", "bfloat16"]))
def test_outputs_far_outside_are_the_bias(backend, operator, data, dtype):
    case, options = drawn(data, operator)
    arrays = make(operator, case, dtype)
    arrays["offset"] = np.full_like(arrays["offset"], 500)
    want = np.zeros((case.batch, case.out_channels, *case.out_size))
    if case.bias:
        want += arrays["bias"].astype(float).reshape(-1, *[1] * case.axes)
    output, grads = solve(backend, operator, np.ones_like(want).astype(arrays["input"].dtype), arrays, options)
    np.testing.assert_array_equal(output.astype(float), want)
    assert not any(grads[name].any() for name in ("input", "offset", "weight"))
