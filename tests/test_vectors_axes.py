"""Results of other systems for deformable convolution over one and three axes, each within its own tolerances.

The oracle, tests/reference/deform_conv.py, has to give them as well as every backend: it is what all other tests
compare with. It also has to agree with the oracle of two axes, which is written out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest

import pydeform
from tests.cases import deform_conv2d as two_axes
from tests.reference import conv2d, deform_conv, deform_conv2d
from tests.vectors import Vector, load
from tests.vectors.calls import Call, boundary_of, call_of, outside_api

VECTORS = {vector.name: vector for vector in load("deform_conv")}
SUPPORTED = [name for name, vector in VECTORS.items() if not outside_api(vector)]
CLAMPED = [name for name in VECTORS if name not in SUPPORTED]

# README.md's tolerances of a float32 run against float64 results, and where rounding may cross a kink.
FLOAT32 = (2e-4, 2e-5)
FLOAT32_LEAVES_OUT = {"kink", "border"}

Results = tuple[np.ndarray, dict[str, np.ndarray]]


def with_every_option(call: Call) -> dict[str, Any]:
    """What the oracle wants: each padding in full, None for what is absent."""
    pads = tuple((pad, pad) for pad in call.options["padding"])
    return {"bias": None, "mask": None, **call.arrays, **call.options, "padding": pads}


def run_oracle(call: Call, grad_output: np.ndarray) -> Results:
    arguments = with_every_option(call)
    return deform_conv.forward(**arguments), deform_conv.backward(grad_output, **arguments)


def run(backend: Any, call: Call, grad_output: np.ndarray, dtype: Any = np.float64) -> Results:
    sent = {name: backend.array(a.astype(dtype)) for name, a in call.arrays.items()}
    output = getattr(pydeform, call.operator)(**sent, **call.options)
    backward = getattr(pydeform, f"{call.operator}_backward")
    grads = backward(backend.array(grad_output.astype(dtype)), **sent, **call.options)
    return backend.numpy(output), {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


def compare(vector: Vector, results: Results, rtol: float, atol: float) -> None:
    output, grads = results
    np.testing.assert_allclose(output, vector.outputs["y"], rtol=rtol, atol=atol, err_msg="output")
    wanted = call_of(vector).grads
    assert wanted.keys() == call_of(vector).arrays.keys()
    for name, want in wanted.items():
        np.testing.assert_allclose(grads[name], want, rtol=rtol, atol=atol, err_msg=f"gradient of {name}")


def test_set_is_complete():
    """Guards against an archive packed from half a folder, in which the tests below would be silent."""
    kinds = Counter((vector.meta["operator"], vector.meta["kind"]) for vector in VECTORS.values())
    assert kinds == {
        ("deform_conv1d", "run"): 16,
        ("deform_conv3d", "source-run"): 7,
        ("deform_conv3d", "transcription"): 7,
    }
    rules = Counter((call_of(VECTORS[n]).operator, boundary_of(VECTORS[n])) for n in SUPPORTED)
    assert rules == {("deform_conv1d", "torchvision"): 7, ("deform_conv3d", "dcnv2"): 14}
    assert len(CLAMPED) == 9
    assert sum("mask" in VECTORS[name].inputs for name in SUPPORTED) == 10


@pytest.mark.parametrize("name", SUPPORTED)
def test_oracle_vector(name):
    vector = VECTORS[name]
    results = run_oracle(call_of(vector), vector.grad_outputs["y"])
    compare(vector, results, vector.meta["rtol"], vector.meta["atol"])


@pytest.mark.parametrize("name", SUPPORTED)
def test_vector(backend, name):
    vector = VECTORS[name]
    results = run(backend, call_of(vector), vector.grad_outputs["y"])
    compare(vector, results, vector.meta["rtol"], vector.meta["atol"])


def test_vectors_in_float32(backend):
    """One test for all, since what is left out shows in the count."""
    compared = 0
    for name in SUPPORTED:
        vector = VECTORS[name]
        if FLOAT32_LEAVES_OUT.isdisjoint(vector.meta["tags"]):
            results = run(backend, call_of(vector), vector.grad_outputs["y"], np.float32)
            assert results[0].dtype == np.float32
            try:
                compare(vector, results, *FLOAT32)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            compared += 1
    assert compared == 12  # of 21


# ---------------------------------------------------------------------------------------------------------------------
# dc1d pads with zeros, then moves a sample that is outside to the nearest end: of the padded signal, or of the taps of
# its own output ("constrained"). So written, it is deform_conv1d on the padded signal, with offsets to the place moved
# to and the rule that has no slope on the last pixel. Its gradient of the offset is that one's, and 0 where a sample
# was moved.


class Clamped(NamedTuple):
    """A vector of dc1d in pydeform's terms."""

    call: Call
    moved: np.ndarray  # which samples are beyond an end


def in_layout(array: np.ndarray) -> np.ndarray:
    """dc1d's (N, offset_groups, out, K) as (N, offset_groups*K, out)."""
    return array.transpose(0, 1, 3, 2).reshape(len(array), -1, array.shape[2])


def clamped(vector: Vector) -> Clamped:
    args, inputs = vector.args, vector.inputs
    (stride,), (pad,), (dilation,), (kernel,) = (args[n] for n in ("stride", "padding", "dilation", "kernel"))
    padded = np.pad(inputs["x"], ((0, 0), (0, 0), (pad, pad)))
    first = stride * np.arange(inputs["offset"].shape[2])[:, None]  # of the taps, for each output
    taps = first + dilation * np.arange(kernel)
    place = taps + inputs["offset"]
    low, high = (0, padded.shape[2] - 1) if args["unconstrained"] else (first, first + dilation * (kernel - 1))
    inside = np.clip(place, low, high)
    arrays = {"input": padded, "offset": in_layout(inside - taps), "weight": inputs["weight"], "bias": inputs["bias"]}
    if "mask" in inputs:
        arrays["mask"] = in_layout(inputs["mask"])
    options = {"stride": (stride,), "padding": (0,), "dilation": (dilation,), "boundary": "dcnv1"}
    call = Call("deform_conv1d", arrays, options, {})
    return Clamped(call, in_layout(inside != place))


def compare_clamped(vector: Vector, problem: Clamped, results: Results) -> None:
    output, grads = results
    (pad,) = vector.args["padding"]
    want = {
        "input": np.pad(vector.grads["x"], ((0, 0), (0, 0), (pad, pad))),
        "offset": in_layout(vector.grads["offset"]),
        "weight": vector.grads["weight"],
        "bias": vector.grads["bias"],
    }
    if "mask" in vector.grads:
        want["mask"] = in_layout(vector.grads["mask"])
    assert len(want) == len(vector.grads)
    grads["offset"] = np.where(problem.moved, 0, grads["offset"])
    grads["input"] = grads["input"].copy()
    grads["input"][..., :pad] = grads["input"][..., -pad:] = 0  # of what was padded, which dc1d does not return
    tolerance = {"rtol": vector.meta["rtol"], "atol": vector.meta["atol"]}
    np.testing.assert_allclose(output, vector.outputs["y"], **tolerance, err_msg="output")
    for name, grad in want.items():
        np.testing.assert_allclose(grads[name], grad, **tolerance, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("name", CLAMPED)
def test_oracle_gives_dc1d_by_clamped_offsets(name):
    problem = clamped(VECTORS[name])
    compare_clamped(VECTORS[name], problem, run_oracle(problem.call, VECTORS[name].grad_outputs["y"]))


@pytest.mark.parametrize("name", CLAMPED)
def test_dc1d_by_clamped_offsets(backend, name):
    problem = clamped(VECTORS[name])
    compare_clamped(VECTORS[name], problem, run(backend, problem.call, VECTORS[name].grad_outputs["y"]))


# ---------------------------------------------------------------------------------------------------------------------
# The oracle of any number of axes beside that of two, and beside itself with one axis more.


@pytest.mark.parametrize("boundary", ["torchvision", "dcnv2", "dcnv1"])
@pytest.mark.parametrize("name", ["every_option", "groups_across_offset_groups", "row_image", "mostly_outside"])
def test_both_oracles_agree_on_two_axes(name, boundary):
    case = two_axes.CASES[name]
    for on_pixels in (False, True):
        arrays, grad_output = two_axes.make(case), two_axes.make_grad_output(case)
        if on_pixels:
            arrays["offset"] = np.floor(arrays["offset"])
        arrays["offset"].flat[:3] = np.nan, np.inf, -np.inf
        arguments = {**arrays, **case.options, "boundary": boundary}
        want = deform_conv2d.forward(**arguments)
        np.testing.assert_allclose(deform_conv.forward(**arguments), want, rtol=1e-14, atol=1e-14)
        got = deform_conv.backward(grad_output, **arguments)
        for argument, grad in deform_conv2d.backward(grad_output, **arguments).items():
            if grad is None:
                assert got[argument] is None
            else:
                np.testing.assert_allclose(got[argument], grad, rtol=1e-13, atol=1e-13, err_msg=argument)


@pytest.mark.parametrize("boundary", ["torchvision", "dcnv2"])
def test_an_axis_of_one_pixel_changes_nothing(boundary):
    """With a kernel of 1 and offset 0 along it: weight 1 there, and a gradient of that axis from the pixel alone."""
    case = two_axes.CASES["every_option"]
    arrays, grad_output = two_axes.make(case), two_axes.make_grad_output(case)
    want = deform_conv2d.forward(**arrays, **case.options, boundary=boundary)
    grads = deform_conv2d.backward(grad_output, **arrays, **case.options, boundary=boundary)
    deep = dict(arrays, input=arrays["input"][:, :, None], weight=arrays["weight"][:, :, None])
    flat = arrays["offset"].reshape(case.batch, -1, 2, *case.out_size)
    with_depth = np.concatenate([np.zeros_like(flat[:, :, :1]), flat], axis=2)
    deep["offset"] = with_depth.reshape(case.batch, -1, 1, *case.out_size)
    deep["mask"] = arrays["mask"][:, :, None]
    options = {name: (((0, 0) if name == "padding" else 1), *value) for name, value in case.options.items()}
    got = deform_conv.forward(**deep, **options, boundary=boundary)
    np.testing.assert_allclose(got[:, :, 0], want, rtol=1e-13, atol=1e-13)
    got_grads = deform_conv.backward(grad_output[:, :, None], **deep, **options, boundary=boundary)
    offset = got_grads.pop("offset").reshape(with_depth.shape)[:, :, 1:].reshape(grads["offset"].shape)
    np.testing.assert_allclose(offset, grads.pop("offset"), rtol=1e-13, atol=1e-13)
    for name, grad in grads.items():
        np.testing.assert_allclose(got_grads[name].reshape(grad.shape), grad, rtol=1e-13, atol=1e-13, err_msg=name)


def test_active_oracle_is_a_plain_convolution_at_zero():
    rng = np.random.default_rng(2)
    input, weight = rng.standard_normal((2, 4, 5, 6)), rng.standard_normal((3, 4, 3, 2))
    options: dict[str, Any] = {"stride": (2, 1), "padding": ((1, 0), (0, 2))}
    want = conv2d.forward(input, weight, None, **options, dilation=(1, 1), groups=1)
    got = deform_conv.active_forward(input, np.zeros(2 * 2 * 6), weight, None, **options)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)
