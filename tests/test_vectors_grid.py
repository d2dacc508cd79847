"""Results of other systems for grid_sample, affine_grid and what is made of them, each within its own tolerances.

The oracle, tests/reference/grid.py, has to give them as well as every backend: it is what all other tests compare with.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.gather import between_pixels, halves, make
from tests.cases.gather_tests import stay
from tests.cases.grid import every_mode, normalised
from tests.onnx_cases import node_cases
from tests.reference import grid as reference
from tests.vectors import Vector, load
from tests.vectors.calls import call_of, channels_last, outside_api

VECTORS = {vector.name: vector for vector in load("grid")}
SUPPORTED = [name for name, vector in VECTORS.items() if not outside_api(vector)]
TRANSFORMERS = [name for name, vector in VECTORS.items() if vector.meta["operator"] == "spatial_transformer"]

# README.md's tolerances of a float32 run against float64 results, and where rounding may cross a kink.
FLOAT32 = (2e-4, 2e-5)
FLOAT32_LEAVES_OUT = {"kink", "border"}

ORACLE = SimpleNamespace(array=lambda a: a, numpy=lambda a: a)  # as a backend


def results(backend: Any, operator: str, arrays: Any, options: Any, grad_output: Any, dtype: Any = np.float64) -> Any:
    """Output, and the gradients if there is one of the output."""
    module = reference if backend is ORACLE else pydeform
    sent = {name: backend.array(a.astype(dtype)) for name, a in arrays.items()}
    output = backend.numpy(getattr(module, operator)(**sent, **options))
    if grad_output is None:
        return output, {}
    grads = getattr(module, f"{operator}_backward")(backend.array(grad_output.astype(dtype)), **sent, **options)
    grads = grads if backend is ORACLE else grads._asdict()
    return output, {name: backend.numpy(grad) for name, grad in grads.items()}


def run(backend: Any, vector: Vector, dtype: Any = np.float64) -> Any:
    call = call_of(vector)
    grad_output = next((channels_last(vector, grad) for grad in vector.grad_outputs.values()), None)
    return results(backend, call.operator, call.arrays, call.options, grad_output, dtype)


def compare(vector: Vector, found: Any, rtol: float, atol: float) -> None:
    output, grads = found
    (want,) = vector.outputs.values()
    np.testing.assert_allclose(output, channels_last(vector, want), rtol=rtol, atol=atol, err_msg="output")
    wanted = call_of(vector).grads
    assert wanted.keys() == grads.keys()
    for name, grad in wanted.items():
        np.testing.assert_allclose(grads[name], grad, rtol=rtol, atol=atol, err_msg=f"gradient of {name}")


def test_set_is_complete():
    """Guards against an archive packed from half a folder, in which the tests below would be silent."""
    systems = Counter((v.meta["operator"], v.meta["system"].split("-")[0]) for v in VECTORS.values())
    assert systems == {
        ("grid_sample", "mxnet1.9.1"): 3,
        ("grid_sample", "onnx"): 13,
        ("grid_sample", "torch2.13.0"): 14,
        ("affine_grid", "mxnet1.9.1"): 3,
        ("affine_grid", "onnx"): 3,
        ("affine_grid", "torch2.13.0"): 5,
        ("spatial_transformer", "mxnet1.9.1"): 2,
        ("spatial_transformer", "torch2.13.0"): 2,
    }
    assert (len(SUPPORTED), len(TRANSFORMERS)) == (40, 4)
    for name in SUPPORTED:  # every gradient there is gets compared
        assert len(call_of(VECTORS[name]).grads) == len(VECTORS[name].grads)


@pytest.mark.parametrize("name", SUPPORTED)
def test_oracle_vector(name):
    vector = VECTORS[name]
    compare(vector, run(ORACLE, vector), vector.meta["rtol"], vector.meta["atol"])


@pytest.mark.parametrize("name", SUPPORTED)
def test_vector(backend, name):
    vector = VECTORS[name]
    compare(vector, run(backend, vector), vector.meta["rtol"], vector.meta["atol"])


def test_vectors_in_float32(backend):
    """One test for all, since what is left out shows in the count."""
    compared = 0
    for name in SUPPORTED:
        vector = VECTORS[name]
        if FLOAT32_LEAVES_OUT.isdisjoint(vector.meta["tags"]):
            found = run(backend, vector, np.float32)
            assert found[0].dtype == np.float32
            try:
                compare(vector, found, max(FLOAT32[0], vector.meta["rtol"]), max(FLOAT32[1], vector.meta["atol"]))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            compared += 1
    assert compared == 33  # of 40


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_spatial_transformer(backend, name):
    """A grid made of matrices, and its samples: outputs, and gradients of both inputs through the two of them."""
    vector, (rtol, atol) = VECTORS[name], (VECTORS[name].meta["rtol"], VECTORS[name].meta["atol"])
    (of_theta,) = vector.inputs.keys() - {"data"}
    data, theta = vector.inputs["data"], vector.inputs[of_theta].reshape(-1, 2, 3)
    align_corners = vector.args.get("align_corners", True)
    affine = {"size": (*data.shape[:2], *vector.args["target_shape"]), "align_corners": align_corners}
    for place in (ORACLE, backend):
        grid, _ = results(place, "affine_grid", {"theta": theta}, affine, None)
        arrays, options = {"input": data, "grid": grid}, {"align_corners": align_corners}
        output, grads = results(place, "grid_sample", arrays, options, vector.grad_outputs["y"])
        _, of_grid = results(place, "affine_grid", {"theta": theta}, affine, grads["grid"])
        np.testing.assert_allclose(output, vector.outputs["y"], rtol, atol)
        np.testing.assert_allclose(grads["input"], vector.grads["data"], rtol, atol)
        np.testing.assert_allclose(of_grid["theta"].ravel(), vector.grads[of_theta].ravel(), rtol, atol)


def test_grid_of_a_flow(backend):
    """MXNet's grid for a flow (x, y) in pixels takes grid_sample where warp goes by itself."""
    (vector,) = (v for v in VECTORS.values() if v.args.get("transform_type") == "warp")
    flow, grid = vector.inputs["flow"], vector.outputs["grid"]
    image = np.random.default_rng(0).standard_normal((len(flow), 3, *flow.shape[2:]))
    want = reference.grid_sample(image, np.moveaxis(grid, 1, -1), align_corners=True)
    assert 0 < (want == 0).sum() < want.size / 2
    displacement = np.ascontiguousarray(flow[:, ::-1])
    for got in (
        reference.warp(image, displacement),
        backend.numpy(pydeform.warp(backend.array(image), backend.array(displacement))),
    ):
        np.testing.assert_allclose(got, want, vector.meta["rtol"], 10 * vector.meta["atol"])


# The oracle by itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        *[("grid_sample", name) for name in ("zeros", "reflection", "bicubic_border", "bicubic", "volume_reflection")],
        *[("warp", name) for name in ("zeros", "reflection", "bicubic", "volume")],
    ],
)
def test_oracle_by_differences(operator, name):
    problem = make(operator, name)
    forward, backward = (getattr(reference, operator + end) for end in ("", "_backward"))
    report = gradcheck(
        lambda **arrays: forward(**arrays, **problem.options),
        lambda grad, **arrays: backward(grad, **arrays, **problem.options),
        problem.arrays,
        kinks={problem.place: stay},
        kink_margin=0.002,
        elements=6,
        directions=1,
    )
    assert list(report.checked) == list(problem.arrays)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("draw", [between_pixels, halves], ids=["between", "halves"])
def test_oracle_is_pytorchs(axes, draw):
    """Every mode, on kinks and off them, images of one pixel and far positions too. Kinks lie on exact numbers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(axes)
    for options in every_mode(axes):
        for size in ((4, 8, 2), (2, 2, 16), (1, 4, 1), (5, 7, 3), (1, 1, 1)):
            lengths = np.array(size[:axes]) + (options["align_corners"] and 1 not in size)
            if draw is halves and size == (5, 7, 3):
                continue
            positions = draw(rng, lengths, (2, *(2, 3, 4)[:axes], axes))
            positions.flat[rng.integers(0, positions.size, 5)] *= 64
            arrays = [rng.standard_normal((2, 3, *lengths)), normalised(positions, lengths, options["align_corners"])]
            tensors = [torch.from_numpy(np.ascontiguousarray(a)).requires_grad_() for a in arrays]
            want = torch.nn.functional.grid_sample(*tensors, **options)
            grad = rng.standard_normal(want.shape)
            want.backward(torch.from_numpy(grad))
            got = reference.grid_sample_backward(grad, *arrays, **options)
            what = f"{options}, {size}"
            np.testing.assert_allclose(
                reference.grid_sample(*arrays, **options), want.detach(), 1e-9, 1e-9, err_msg=what
            )
            for tensor, name in zip(tensors, ("input", "grid"), strict=True):
                np.testing.assert_allclose(got[name], tensor.grad, 1e-9, 1e-9, err_msg=f"{name} of {what}")


# ONNX's own cases -----------------------------------------------------------------------------------------------------

ONNX_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def attributes_of(case: Any) -> dict[str, Any]:
    import onnx

    (node,) = case.model.graph.node
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def test_onnx_grid_sample(backend, monkeypatch):
    cases = node_cases(monkeypatch, "GridSample")
    assert len(cases) == 18, [case.name for case in cases]
    for case in cases:
        attributes, (((image, grid), (want,)),) = attributes_of(case), case.data_sets
        assert attributes.keys() <= {"mode", "padding_mode", "align_corners"}
        mode = attributes.get("mode", "linear")
        got = pydeform.grid_sample(
            backend.array(image),
            backend.array(grid),
            ONNX_MODES.get(mode, mode),
            attributes.get("padding_mode", "zeros"),
            bool(attributes.get("align_corners", 0)),
        )
        np.testing.assert_allclose(backend.numpy(got), want, rtol=1e-3, atol=1e-4, err_msg=case.name)


def test_onnx_affine_grid(backend, monkeypatch):
    cases = node_cases(monkeypatch, "AffineGrid")
    assert len(cases) == 4, [case.name for case in cases]
    for case in cases:
        attributes, (((theta, size), (want,)),) = attributes_of(case), case.data_sets
        size, align_corners = tuple(map(int, size)), bool(attributes.get("align_corners", 0))
        got = pydeform.affine_grid(backend.array(theta), size, align_corners)
        np.testing.assert_allclose(backend.numpy(got), want, rtol=1e-3, atol=1e-4, err_msg=case.name)
