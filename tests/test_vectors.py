"""Results of other systems, each within its own tolerances and under the boundary rule of that system."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from tests.vectors import Vector, load
from tests.vectors.bundle import BUNDLED, in_our_terms
from tests.vectors.calls import boundary_of, call_of, deform_conv_options

VECTORS = {vector.name: vector for vector in load("deform_conv2d")}
ROI = {vector.name: vector for vector in load("roi")}

# README.md's tolerances of a float32 run against float64 results, and where rounding may cross a kink.
FLOAT32 = (2e-4, 2e-5)
FLOAT32_LEAVES_OUT = {"kink", "border", "composite"}


def run(backend: Any, vector: Vector, dtype: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output and, where the vector has some, gradients under the vector's names."""
    sent = {name: backend.array(a.astype(dtype)) for name, a in vector.inputs.items()}
    grad_output = vector.grad_outputs.get("y")
    if grad_output is not None:
        grad_output = backend.array(grad_output.astype(dtype))
    options = deform_conv_options(vector)
    if "composite" in vector.args:
        output, grads = run_with_offset_branch(sent, grad_output, options)
    else:
        sent["input"] = sent.pop("x")
        output = pydeform.deform_conv2d(**sent, **options)
        grads = {}
        if grad_output is not None:
            grads = pydeform.deform_conv2d_backward(grad_output, **sent, **options)._asdict()
            grads["x"] = grads.pop("input")
    return backend.numpy(output), {name: backend.numpy(grad) for name, grad in grads.items()}


def run_with_offset_branch(sent: dict[str, Any], grad_output: Any, options: dict[str, Any]) -> Any:
    """mmcv's layer: a convolution of the same input makes the offset, so the input's gradient has two parts."""
    assert (options["stride"], options["padding"], options["dilation"]) == ([1, 1], [0, 0], [1, 1])
    branch = (sent["x"], sent["offset_weight"], sent["offset_bias"])
    offset = pydeform.conv2d(*branch)
    output = pydeform.deform_conv2d(sent["x"], offset, sent["weight"], **options)
    main = pydeform.deform_conv2d_backward(grad_output, sent["x"], offset, sent["weight"], **options)
    side = pydeform.conv2d_backward(main.offset, *branch)
    grads = {
        "x": main.input + side.input,
        "offset_weight": side.weight,
        "offset_bias": side.bias,
        "weight": main.weight,
    }
    return output, grads


def compare(vector: Vector, output: np.ndarray, grads: dict[str, np.ndarray], rtol: float, atol: float) -> int:
    """The number of arrays compared."""
    np.testing.assert_allclose(output, vector.outputs["y"], rtol=rtol, atol=atol, err_msg="output")
    for name, want in vector.grads.items():
        np.testing.assert_allclose(grads[name], want, rtol=rtol, atol=atol, err_msg=f"gradient of {name}")
    return 1 + len(vector.grads)


def test_set_is_complete():
    """Guards against an archive packed from half a folder, in which the tests below would be silent."""
    kinds: dict[str, int] = {}
    for vector in VECTORS.values():
        assert set(vector.outputs) == {"y"}
        kinds[vector.meta["kind"]] = kinds.get(vector.meta["kind"], 0) + 1
    with_grads = sum(bool(vector.grads) for vector in VECTORS.values())
    rules = [boundary_of(vector) for vector in VECTORS.values()]
    counts = {rule: rules.count(rule) for rule in ("torchvision", "dcnv2", "dcnv1")}
    assert len(VECTORS) == 94
    assert kinds == {"source-run": 20, "published": 4, "run": 70}
    assert with_grads == 66
    assert counts == {"torchvision": 43, "dcnv2": 33, "dcnv1": 18}


@pytest.mark.parametrize("name", VECTORS)
def test_vector(backend, name):
    """In float64, even where the system ran in float32: the inputs are exact in both."""
    vector = VECTORS[name]
    output, grads = run(backend, vector, np.float64)
    compared = compare(vector, output, grads, vector.meta["rtol"], vector.meta["atol"])
    assert compared == 1 + sum(name != "offset_derived" for name in vector.inputs) * bool(vector.grad_outputs)


def test_vectors_in_float32(backend):
    """One test for all, since what is left out shows in the count."""
    compared = 0
    for vector in VECTORS.values():
        if FLOAT32_LEAVES_OUT.isdisjoint(vector.meta["tags"]):
            output, grads = run(backend, vector, np.float32)
            assert output.dtype == np.float32
            rtol, atol = max(FLOAT32[0], vector.meta["rtol"]), max(FLOAT32[1], vector.meta["atol"])
            try:
                compare(vector, output, grads, rtol, atol)
            except AssertionError as error:
                raise AssertionError(f"{vector.name}: {error}") from error
            compared += 1
    assert compared == 54  # of 94


def test_derived_offset_of_the_composite_case(backend):
    """The offsets that the branch should produce are in the file, too."""
    vector = VECTORS["mmcv-published__unit_pack_v1"]
    inputs = {name: backend.array(a) for name, a in vector.inputs.items()}
    offset = pydeform.conv2d(inputs["x"], inputs["offset_weight"], inputs["offset_bias"])
    np.testing.assert_allclose(backend.numpy(offset), vector.inputs["offset_derived"], rtol=1e-9, atol=1e-9)


def test_bundled_vectors_are_some_of_these():
    """`pydeform check` uses them: every operator, and of deform_conv2d every boundary rule and both versions."""
    originals = {name: VECTORS[name] for name in BUNDLED["deform_conv2d"]}
    for archive in ("deform_conv", "gather", "grid", "roi"):
        originals |= {vector.name: vector for vector in load(archive) if vector.name in BUNDLED[archive]}
    calls = {}
    for name, vector in originals.items():
        call = call_of(vector)
        calls[f"{call.operator}/{name.rpartition('/')[2]}"] = call, vector
    found = {}
    for operator in {call.operator for call, _ in calls.values()}:
        found |= {name: (problem, expected, meta) for name, problem, expected, meta in _selfcheck.vectors(operator)}
    assert found.keys() == calls.keys() and len(found) == 45
    for name, (problem, expected, meta) in found.items():
        call, vector = calls[name]
        arrays, options = in_our_terms(call)
        assert json.dumps(problem.options) == json.dumps(options)
        assert meta == {key: vector.meta[key] for key in meta}
        output = vector.outputs["grid" if call.operator == "affine_grid" else "y"]
        want = {"output": output} | {f"gradient of {n}": grad for n, grad in call.grads.items()}
        for got, original in ((problem.arrays, arrays), (expected, want)):
            assert got.keys() == original.keys()
            for key, array in original.items():
                np.testing.assert_array_equal(got[key], array)
        assert (problem.grad_output is None) == (not vector.grad_outputs)
    operators = Counter(call.operator for call, _ in calls.values())
    without = {*_selfcheck.SPECIAL, "warp"}  # which has none of its own, but those of the grid that it stands for
    assert set(operators) == set(_selfcheck.operators()) - without
    of_conv = [call for call, _ in calls.values() if call.operator == "deform_conv2d"]
    assert {call.options["boundary"] for call in of_conv} == {"torchvision", "dcnv2", "dcnv1"}
    assert {"mask" in call.arrays for call in of_conv} == {True, False}
    assert (Path(pydeform.__file__).parent / "data" / "vectors.npz").stat().st_size < 300_000
