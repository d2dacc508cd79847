"""Results of other systems for attention, aggregation, DCNv3 and DCNv4, each within its own tolerances.

The oracle, tests/reference/gather.py, has to give them as well as every backend: it is what all other tests compare
with.

Systems that are pure PyTorch have another gradient where a sample lies at exactly -1: the slope from the right, for
which the oracle has a rule as well. From their gradients the test takes away what the oracle says that this rule adds.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.gather import FEW, OPERATORS, PLACES, expected, make
from tests.cases.gather_tests import stay
from tests.reference import gather as reference
from tests.vectors import Vector, load
from tests.vectors.calls import Call, call_of, outside_api

VECTORS = {vector.name: vector for vector in load("gather")}
SUPPORTED = [name for name, vector in VECTORS.items() if not outside_api(vector)]
SOFTMAX_INSIDE = [name for name in VECTORS if name not in SUPPORTED]

# README.md's tolerances of a float32 run against float64 results, and where rounding may cross a kink.
FLOAT32 = (2e-4, 2e-5)
FLOAT32_LEAVES_OUT = {"kink", "border"}
PLACED = (*PLACES, "offset_mask")

Results = tuple[np.ndarray, dict[str, Any]]


def kink_of(vector: Vector) -> str:
    """Aggregation never gets to -1, and the discrete method has no slopes."""
    if vector.meta["operator"] == "deform_aggregation" or vector.args.get("method") == "discrete":
        return ""
    return vector.meta["semantics"]["kink"]


@functools.cache
def run_oracle(name: str, kink: str) -> Results:
    call, grad_output = call_of(VECTORS[name]), VECTORS[name].grad_outputs["y"]
    forward, backward = getattr(reference, call.operator), getattr(reference, f"{call.operator}_backward")
    options = call.options | ({"kink": kink} if kink else {})
    return forward(**call.arrays, **options), backward(grad_output, **call.arrays, **options)


def run(backend: Any, call: Call, grad_output: np.ndarray, dtype: Any = np.float64) -> Results:
    sent = {n: a if n == "spatial_shapes" else backend.array(a.astype(dtype)) for n, a in call.arrays.items()}
    output = getattr(pydeform, call.operator)(**sent, **call.options)
    backward = getattr(pydeform, f"{call.operator}_backward")
    grads = backward(backend.array(grad_output.astype(dtype)), **sent, **call.options)
    return backend.numpy(output), {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


def of_the_rule(vector: Vector) -> dict[str, np.ndarray]:
    """What the slope at -1 adds to the gradients of a system that has one."""
    grads = call_of(vector).grads
    if kink_of(vector) != "floor":
        return {name: np.zeros_like(grad) for name, grad in grads.items()}
    (_, floor), (_, strict) = (run_oracle(vector.name, kink) for kink in ("floor", "strict"))
    return {name: floor[name] - strict[name] for name in grads}


def compare(vector: Vector, results: Results, rtol: float, atol: float) -> None:
    output, grads = results
    np.testing.assert_allclose(output, vector.outputs["y"], rtol=rtol, atol=atol, err_msg="output")
    wanted, added = call_of(vector).grads, of_the_rule(vector)
    assert wanted.keys() == {name for name, grad in grads.items() if grad is not None}
    for name, want in wanted.items():
        np.testing.assert_allclose(grads[name], want - added[name], rtol=rtol, atol=atol, err_msg=f"gradient of {name}")


def test_set_is_complete():
    """Guards against an archive packed from half a folder, in which the tests below would be silent."""
    kinds = Counter((vector.meta["operator"], vector.meta["kind"]) for vector in VECTORS.values())
    assert kinds == {
        ("dcnv3", "source-run"): 14,
        ("dcnv3", "run"): 13,
        ("dcnv4", "source-run"): 13,
        ("ms_deform_attn", "source-run"): 7,
        ("ms_deform_attn", "run"): 19,
        ("ms_deform_attn_fused", "run"): 18,
        ("ms_deform_attn_fused", "transcription"): 3,
        ("deform_aggregation", "source-run"): 8,
    }
    assert Counter(map(outside_api, VECTORS.values())) == {"": 92, "DCNv4's kernel can take the softmax itself": 3}
    assert Counter(kink_of(VECTORS[name]) for name in SUPPORTED) == {"strict": 31, "floor": 43, "": 18}
    for name in SUPPORTED:  # every gradient there is gets compared
        assert len(call_of(VECTORS[name]).grads) == len(VECTORS[name].grads)


def test_which_gradients_have_a_slope_at_minus_1():
    """The rule takes away from no other file, and from these in the gradients of places alone."""
    found = {}
    for name in SUPPORTED:
        moved = {n for n, added in of_the_rule(VECTORS[name]).items() if added.any()}
        if moved:
            found[name] = moved
    assert found == {
        **{f"dcnv3/internimage-pytorch__{case}": {"offset"} for case in ("border", "integer", "zero")},
        "ms_deform_attn/deformable-detr-pytorch__border_exact2": {"sampling_locations"},
        "ms_deform_attn/transformers-rtdetrv2__ragged_exact": {"sampling_locations"},
        "ms_deform_attn_fused/transformers-deformabledetr__point_exact": {"sampling_offsets", "reference_points"},
        "ms_deform_attn_fused/transformers-dfine__box242_exact": {"sampling_offsets", "reference_points"},
    }


@pytest.mark.parametrize("name", SUPPORTED)
def test_oracle_vector(name):
    """Under the system's own rule, and under ours."""
    vector = VECTORS[name]
    tolerance = {"rtol": vector.meta["rtol"], "atol": vector.meta["atol"]}
    output, grads = run_oracle(name, kink_of(vector))
    np.testing.assert_allclose(output, vector.outputs["y"], **tolerance)
    for n, want in call_of(vector).grads.items():
        np.testing.assert_allclose(grads[n], want, **tolerance, err_msg=f"gradient of {n}")
    compare(vector, run_oracle(name, "strict" if kink_of(vector) else ""), **tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
def test_oracle_by_differences(operator):
    for name in FEW[operator][1:3] if "dcnv" not in operator else FEW[operator][1:2]:
        problem = make(operator, name)
        forward, backward = (getattr(reference, operator + end) for end in ("", "_backward"))
        rest = {**problem.options, **{n: a for n, a in problem.arrays.items() if n == "spatial_shapes"}}
        given = problem.numbers
        wrt = [n for n, grad in expected(operator, name)[1].items() if grad is not None]
        gradcheck(
            lambda forward=forward, rest=rest, **arrays: forward(**arrays, **rest),
            lambda grad, backward=backward, rest=rest, **arrays: backward(grad, **arrays, **rest),
            given,
            wrt=wrt,
            kinks={n: stay for n in wrt if n in PLACED},
            kink_margin=0.002,
            elements=2,
            directions=1,
        )


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
    assert compared == 72  # of 92


# ---------------------------------------------------------------------------------------------------------------------
# DCNv4's kernel has an option, unused by its module, under which it takes the softmax of each group's masks itself.


@pytest.mark.parametrize("name", SOFTMAX_INSIDE)
def test_softmax_inside(backend, name):
    vector = VECTORS[name]
    call, tolerance = call_of(vector), {"rtol": vector.meta["rtol"], "atol": vector.meta["atol"]}
    of_group = {n: call.options[n] for n in ("kernel_size", "groups", "remove_center")}
    groups = of_group["groups"]

    def by_group(mask: np.ndarray) -> np.ndarray:
        return mask.reshape(*mask.shape[:3], groups, -1)

    offset, logits = reference.unpack(call.arrays["offset_mask"], **of_group)
    powers = np.exp(by_group(logits))
    masks = powers / powers.sum(-1, keepdims=True)
    packed = reference.pack(offset, masks.reshape(logits.shape), groups)
    softened = call._replace(arrays={**call.arrays, "offset_mask": packed})
    output, grads = run(backend, softened, vector.grad_outputs["y"])
    np.testing.assert_allclose(output, vector.outputs["y"], **tolerance)
    grad_offset, grad_mask = reference.unpack(grads["offset_mask"], **of_group)
    of_masks = by_group(grad_mask)
    of_logits = masks * (of_masks - (masks * of_masks).sum(-1, keepdims=True))
    got = reference.pack(grad_offset, of_logits.reshape(logits.shape), groups)
    np.testing.assert_allclose(got, call.grads["offset_mask"], **tolerance)
    np.testing.assert_allclose(grads["input"], call.grads["input"], **tolerance)
