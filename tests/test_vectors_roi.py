"""Results of other systems for the eight RoI operators, each within its own tolerances.

The oracle, tests/reference/roi.py, has to give them as well as every backend: it is what all other tests compare with.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.roi import CASES, DTYPE_CASES, margin
from tests.onnx_cases import node_cases
from tests.reference import roi as reference
from tests.vectors import Vector, load
from tests.vectors.calls import Call, call_of, onnx_arrays, outside_api

VECTORS = {vector.name: vector for vector in load("roi")}

# README.md's tolerances of a float32 run against float64 results, and where rounding may move a point or a bin's edge
# to the other side of where something changes.
FLOAT32 = (2e-4, 2e-5)
FLOAT32_LEAVES_OUT = {"kink", "border", "malformed rois"}
# Where a gradient is a difference divided by the area of a tiny bin.
FLOAT32_CANCELS = "prroi_pool/mmcv-cudasrc__tiny"

SUPPORTED = [name for name, vector in VECTORS.items() if not outside_api(vector)]


def of_data(call: Call, vector: Vector, grad_input: np.ndarray) -> np.ndarray:
    """The gradient of the vector's data: copies of a channel add up."""
    if call.channels is None:
        return grad_input
    grad = np.zeros(vector.inputs["data"].shape, grad_input.dtype)
    np.add.at(grad, (slice(None), call.channels), grad_input)
    return grad


def run_oracle(vector: Vector) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    call = call_of(vector)
    output = getattr(reference, call.operator)(**call.arrays, **call.options)
    grads = {}
    if "y" in vector.grad_outputs:
        grads = gradients(vector, oracle_grads)
    return output, grads


def gradients(vector: Vector, of: Callable[[Call, np.ndarray], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """As the system has them: of its own data, and for torchvision's ps_roi_pool of the rows that its backward uses."""
    call = call_of(vector)
    if vector.name in NOT_ITS_TRANSPOSE:
        return {"input": without_last(of(with_one_more(call), vector.grad_outputs["y"])["input"])}
    grads = of(call, vector.grad_outputs["y"])
    return grads | {"input": of_data(call, vector, grads["input"])}


def oracle_grads(call: Call, grad_output: np.ndarray) -> dict[str, np.ndarray]:
    return getattr(reference, f"{call.operator}_backward")(grad_output, **call.arrays, **call.options)


def run(backend: Any, vector: Vector, dtype: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output and, where the vector has some, gradients under pydeform's names."""
    call = call_of(vector)
    sent = {name: backend.array(a.astype(dtype)) for name, a in call.arrays.items()}
    output = getattr(pydeform, call.operator)(**sent, **call.options)
    grads = {}
    if "y" in vector.grad_outputs:
        grads = gradients(vector, functools.partial(backend_grads, backend, dtype))
    return backend.numpy(output), grads


def backend_grads(backend: Any, dtype: Any, call: Call, grad_output: np.ndarray) -> dict[str, np.ndarray]:
    sent = {name: backend.array(a.astype(dtype)) for name, a in call.arrays.items()}
    operator = getattr(pydeform, f"{call.operator}_backward")
    grads = operator(backend.array(grad_output.astype(dtype)), **sent, **call.options)
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


def compare(vector: Vector, output: np.ndarray, grads: dict[str, np.ndarray], rtol: float, atol: float) -> int:
    """The number of arrays compared."""
    np.testing.assert_allclose(output, vector.outputs["y"], rtol=rtol, atol=atol, equal_nan=True, err_msg="output")
    expected = call_of(vector).grads
    for name, want in expected.items():
        np.testing.assert_allclose(grads[name], want, rtol=rtol, atol=atol, err_msg=f"gradient of {name}")
    return 1 + len(expected)


def test_set_is_complete():
    """Guards against an archive packed from half a folder, in which the tests below would be silent."""
    kinds = Counter((vector.meta["operator"], vector.meta["kind"]) for vector in VECTORS.values())
    assert kinds == {
        ("roi_pool", "run"): 14,
        ("roi_pool", "published"): 2,
        ("roi_align", "run"): 23,
        ("roi_align", "source-run"): 12,
        ("roi_align", "published"): 4,
        ("ps_roi_align", "run"): 23,
        ("psroi_pooling", "run"): 23,
        ("deform_roi_pool", "source-run"): 11,
        ("deform_roi_pool", "published"): 2,
        ("deformable_psroi_pooling", "run"): 22,
        ("deformable_psroi_pooling", "source-run"): 4,
        ("prroi_pool", "source-run"): 9,
        ("prroi_pool", "published"): 2,
        ("roi_align_rotated", "source-run"): 14,
        ("roi_align_rotated", "published"): 3,
    }
    assert sum(kinds.values()) == 168
    assert Counter(map(outside_api, VECTORS.values())) == {
        "": 161,
        "MXNet's ROIAlign can be position-sensitive without the half pixel": 6,
        "ONNX's largest of single weighted pixels": 1,
    }
    with_grads = [name for name in SUPPORTED if VECTORS[name].grads]
    assert len(with_grads) == 156
    for name in with_grads:  # every gradient there is gets compared, but for mmcv's own of the offset
        assert len(call_of(VECTORS[name]).grads) == len(VECTORS[name].grads.keys() - {"offset"})


@pytest.mark.parametrize("name", SUPPORTED)
def test_oracle_vector(name):
    vector = VECTORS[name]
    output, grads = run_oracle(vector)
    compare(vector, output, grads, vector.meta["rtol"], vector.meta["atol"])


DIFFERENCES = {
    "roi_align": {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2},
    "roi_align aligned": {"output_size": (3, 2), "spatial_scale": 0.75, "aligned": True},
    "roi_align largest": {"output_size": 2, "sampling_ratio": 2, "mode": "max"},
    "prroi_pool": {"output_size": (2, 3), "spatial_scale": 0.5},
    "roi_align_rotated": {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 2},
    "roi_align_rotated clockwise": {"output_size": (3, 2), "aligned": False, "clockwise": True},
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_oracle_by_differences(name):
    """Where no system has a gradient of the boxes, and where it is the true one. One box is thinner than a pixel."""
    operator, options = name.partition(" ")[0], DIFFERENCES[name]
    rng = np.random.default_rng(3)
    corners = np.array([(0.3, 1.1, 4.9, 4.2), (-2.3, 2.4, 3.1, 7.6), (2.2, 1.7, 2.6, 6.1), (-0.9, -0.7, 6.4, 5.2)])
    corners /= options.get("spatial_scale", 1)
    rest, wrt = {"needs": ("input", "boxes")} if operator == "roi_align" else {}, ("input", "boxes")
    boxes = np.concatenate([np.arange(4.0)[:, None] % 2, corners], axis=1)
    if operator == "roi_align_rotated":
        sizes, middles = corners[:, 2:] - corners[:, :2], (corners[:, 2:] + corners[:, :2]) / 2
        boxes = np.concatenate([boxes[:, :1], middles, sizes, [[0.4], [-2.2], [1.3], [9.0]]], axis=1)
        wrt = ("input",)
    image = rng.normal(size=(2, 3, 6, 7))
    forward, backward = getattr(reference, operator), getattr(reference, f"{operator}_backward")

    def sound(boxes: np.ndarray) -> np.ndarray:
        """The batch index is none that moves."""
        return np.concatenate([np.arange(4.0)[:, None] % 2, boxes[:, 1:]], axis=1)

    gradcheck(
        lambda input, boxes: forward(input, sound(boxes), **options),
        lambda grad, input, boxes: backward(grad, input, sound(boxes), **options, **rest),
        {"input": image, "boxes": boxes},
        wrt=wrt,
        elements=20,
    )


@pytest.mark.parametrize("name", SUPPORTED)
def test_vector(backend, name):
    """In float64, even where the system ran in float32: the inputs are exact in both."""
    vector = VECTORS[name]
    output, grads = run(backend, vector, np.float64)
    compare(vector, output, grads, vector.meta["rtol"], vector.meta["atol"])


def test_vectors_in_float32(backend):
    """One test for all, since what is left out shows in the count."""
    compared = 0
    for name in SUPPORTED:
        vector = VECTORS[name]
        if FLOAT32_LEAVES_OUT.isdisjoint(vector.meta["tags"]) and name != FLOAT32_CANCELS:
            output, grads = run(backend, vector, np.float32)
            assert output.dtype == np.float32
            rtol, atol = max(FLOAT32[0], vector.meta["rtol"]), max(FLOAT32[1], vector.meta["atol"])
            try:
                compare(vector, output, grads, rtol, atol)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            compared += 1
    assert compared == 113  # of 161


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's ps_roi_pool: its forward never reads the last row and column, its backward writes to them, so that its
# gradient is not the transpose of its forward where a box comes so far. Ours is, always.

NOT_ITS_TRANSPOSE = {
    f"psroi_pooling/torchvision0.19csrc-ps_roi_pool__{case}"
    for case in ("cross", "half_rounding", "ra_cross_sr1", "ra_tiny", "tiny2")
}


def with_one_more(call: Call) -> Call:
    """One row and column more, which are not used; so the true last ones are, as in torchvision's backward."""
    image = np.pad(call.arrays["input"], ((0, 0), (0, 0), (0, 1), (0, 1)))
    return call._replace(arrays={**call.arrays, "input": image})


def without_last(grad_input: np.ndarray) -> np.ndarray:
    assert not grad_input[:, :, -1].any() and not grad_input[:, :, :, -1].any()
    return grad_input[:, :, :-1, :-1]


@pytest.mark.parametrize("name", sorted(NOT_ITS_TRANSPOSE))
def test_transpose(backend, name):
    """The operator is linear, so <grad_output, output> = <gradient, input>: not so with torchvision's gradient."""
    vector = VECTORS[name]
    call, grad_output = call_of(vector), vector.grad_outputs["y"]
    got = backend_grads(backend, np.float64, call, grad_output)["input"]
    np.testing.assert_allclose(got, oracle_grads(call, grad_output)["input"], rtol=1e-12, atol=1e-12)
    want = np.vdot(grad_output, vector.outputs["y"])
    np.testing.assert_allclose(np.vdot(got, vector.inputs["data"]), want, rtol=1e-9)
    assert abs(np.vdot(vector.grads["data"], vector.inputs["data"]) - want) > 1e-3


def test_which_gradients_are_not_transposes():
    """All others of torchvision's are, so the list above is not longer than it must be."""
    found = set()
    for name in SUPPORTED:
        if "ps_roi_pool__" in name:
            vector = VECTORS[name]
            got = oracle_grads(call_of(vector), vector.grad_outputs["y"])["input"]
            if not np.allclose(got, vector.grads["data"], rtol=1e-9, atol=1e-9):
                found.add(name)
    assert found == NOT_ITS_TRANSPOSE
    assert sum("ps_roi_pool__" in name for name in SUPPORTED) == 12


def test_cases_keep_away_from_kinks():
    """So that a case means the same in every dtype, or else at least in whatever order a formula is computed.

    Pixels are the exception: where a box is no multiple of its bins, the last edge is one integer times another's part.
    """
    for name, case in CASES.items():
        if name in DTYPE_CASES:
            assert margin(case) > 1e-3, name
        elif case.operator not in ("roi_pool", "ps_roi_pool"):
            assert margin(case) > 1e-6, name


def test_points_counted():
    """Some systems return how many points of each bin are within the image."""
    compared = 0
    for name in SUPPORTED:
        vector = VECTORS[name]
        if "count" in vector.outputs:
            call = call_of(vector)
            op = reference.operator_of_deform_psroi_pool(**call.arrays, **call.options)
            for r, py, px, _, channels, bin in op.bins():
                want = vector.outputs["count"][r, channels, py, px]
                assert (want == bin.rows.count * bin.columns.count).all(), name
            compared += 1
    assert compared == 8


# ---------------------------------------------------------------------------------------------------------------------
# The node tests that the onnx package generates.


def onnx_case(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Arrays and options in pydeform's terms, and the expected output."""
    (case,) = (case for case in node_cases(monkeypatch, "RoiAlign") if case.name == name)
    from onnx.helper import get_attribute_value

    (node,) = case.model.graph.node
    attributes = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
    ((inputs, (output,)),) = case.data_sets
    options = {
        "output_size": (attributes["output_height"], attributes["output_width"]),
        "spatial_scale": attributes["spatial_scale"],
        "sampling_ratio": attributes["sampling_ratio"],
        "aligned": {b"half_pixel": True, b"output_half_pixel": False}[attributes["coordinate_transformation_mode"]],
    }
    return onnx_arrays(*inputs), options, output


def run_onnx_case(backend: Any, arrays: dict[str, np.ndarray], options: dict[str, Any]) -> np.ndarray:
    sent = {name: backend.array(array) for name, array in arrays.items()}
    return backend.numpy(pydeform.roi_align(**sent, **options))


@pytest.mark.parametrize("aligned", [False, True])
def test_onnx_node(backend, aligned, monkeypatch):
    arrays, options, want = onnx_case(f"test_roialign_aligned_{str(aligned).lower()}", monkeypatch)
    assert options["aligned"] is aligned
    tolerance = {"rtol": 0, "atol": 1e-4}  # one unit of the fourth decimal, where the expected values end
    np.testing.assert_allclose(reference.roi_align(**arrays, **options), want, **tolerance)
    np.testing.assert_allclose(run_onnx_case(backend, arrays, options), want, **tolerance)


def test_onnx_node_of_the_maximum(backend, monkeypatch):
    """ONNX takes the largest of single pixels times their weights, an operator that pydeform does not have.

    mode="max" is mmcv's: the largest of the interpolated values, each of which is a sum of four such products. On this
    image, which has no negative pixels, it is therefore nowhere smaller, and larger wherever pixels share the weight.
    """
    arrays, options, of_onnx = onnx_case("test_roialign_mode_max", monkeypatch)
    plane = arrays["input"][0, 0].astype(np.float64)
    assert (plane >= 0).all()
    of_pixels, of_points = np.zeros_like(of_onnx), np.zeros_like(of_onnx)
    for r, py, px, _, _, bin in reference.operator_of_roi_align(**arrays, **options).bins():
        products = [[weight * plane[row, column] for row, column, weight, *_ in pixels] for pixels in bin.points()]
        of_pixels[r, 0, py, px] = max(map(max, products))
        of_points[r, 0, py, px] = max(map(sum, products))
    np.testing.assert_allclose(of_pixels, of_onnx, rtol=1e-5)
    np.testing.assert_allclose(reference.roi_align(**arrays, **options, mode="max"), of_points, rtol=1e-6)
    got = run_onnx_case(backend, arrays, options | {"mode": "max"})
    np.testing.assert_allclose(got, of_points, rtol=1e-5)
    assert (got > 0.9999 * of_onnx).all()
    assert (got > 1.01 * of_onnx).sum() == 71  # of 75; the other four points lie on pixels
