"""What must hold for any problem of the operators that gather, and between them: hypothesis draws the sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.gather import (
    DTYPES,
    OPERATORS,
    Aggregation,
    Attention,
    Dcn,
    Problem,
    make,
    run,
    run_backward,
    solve_oracle,
)
from tests.cases.gather_tests import assert_results, both
from tests.conftest import assert_close, assert_same_bits
from tests.reference import gather as reference

CHANNELS = st.sampled_from([1, 2, 3, 8, 17])
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6))
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_attention = pytest.mark.parametrize("operator", ["ms_deform_attn", "ms_deform_attn_fused"])


@st.composite
def attentions(draw, **fixed):
    shapes = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    flat = fixed.get("flat", draw(st.booleans()))
    points = tuple(draw(st.integers(1, 4)) for _ in shapes)
    values = {
        "shapes": shapes,
        "points": points if flat else points[:1] * len(shapes),
        "heads": draw(st.integers(1, 3)),
        "channels": draw(CHANNELS),
        "batch": draw(st.integers(1, 2)),
        "queries": draw(st.integers(1, 5)),
        "flat": flat,
        "method": draw(st.sampled_from(["bilinear", "bilinear", "discrete"])),
        "references": (draw(st.booleans()), draw(st.sampled_from([2, 4]))),
    }
    return Attention(**{**values, **fixed})


@st.composite
def aggregations(draw, cameras=None, scales=None):
    cameras, scales = cameras or draw(st.integers(1, 3)), scales or draw(st.integers(1, 2))
    shapes = tuple(tuple(draw(SIZES) for _ in range(scales)) for _ in range(cameras))
    few = [draw(st.integers(1, 3)) for _ in range(4)]
    return Aggregation(shapes, few[0], draw(CHANNELS), *few[1:])


@st.composite
def dcns(draw, **fixed):
    kernel = fixed.get("kernel") or draw(st.tuples(*[st.integers(1, 3)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 2))
    padding = fixed.get("padding") or draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2))
    least = [max(1, d * (k - 1) + 1 - sum(p)) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    values = {
        "in_size": tuple(size + draw(st.integers(0, 2)) for size in least),
        "groups": draw(st.integers(1, 3)),
        "channels": draw(CHANNELS),
        "kernel": kernel,
        "stride": draw(st.tuples(*[st.integers(1, 2)] * 2)),
        "padding": padding,
        "dilation": dilation,
        "offset_scale": draw(st.sampled_from([1.0, 0.5, 2.0, 0.7])),
        "remove_center": kernel == (3, 3) and draw(st.booleans()),
        "batch": draw(st.integers(1, 2)),
    }
    return Dcn(**{**values, **fixed})


STRATEGIES = {
    "ms_deform_attn": attentions,
    "ms_deform_attn_fused": attentions,
    "deform_aggregation": aggregations,
    "dcnv3": dcns,
    "dcnv4": dcns,
}


def drawn(data: st.DataObject, operator: str, dtype: str = "float64", **fixed: Any) -> Problem:
    return make(operator, data.draw(STRATEGIES[operator](**fixed)), dtype)


def scale_of(*arrays: Any) -> float:
    return max([1e-300, *(float(np.abs(a).max(initial=0)) for a in arrays)])


def assert_near(got: Any, want: Any, *others: Any) -> None:
    """To the rounding of sums whose terms are as large as `others`."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * scale_of(want, *others))


@each_operator
@given(st.data(), st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_random_problems_against_the_oracle(backend, operator, data, dtype):
    problem = drawn(data, operator, dtype)
    assert_results(problem, both(backend, problem), solve_oracle(problem), dtype)


# Of each operator ---------------------------------------------------------------------------------------------------

LINEAR = [
    *(("ms_deform_attn", name) for name in ("value", "attention_weights")),
    ("ms_deform_attn_fused", "value"),
    *(("deform_aggregation", name) for name in ("features", "weights")),
    *(("dcnv3", name) for name in ("input", "mask")),
    ("dcnv4", "input"),
]


@pytest.mark.parametrize(("operator", "name"), LINEAR)
@given(st.data())
@settings(max_examples=10)
def test_linear(backend, operator, name, data):
    """f(2a - 3b) = 2 f(a) - 3 f(b) in what is sampled and in the weights."""
    problem = drawn(data, operator)
    a = problem.arrays[name]
    b = np.random.default_rng(1).integers(-16, 17, a.shape) / 8
    parts = [run(backend, problem.replaced(**{name: array})) for array in (a, b)]
    whole = run(backend, problem.replaced(**{name: 2 * a - 3 * b}))
    assert_near(whole, 2 * parts[0] - 3 * parts[1], *parts)


@pytest.mark.parametrize(("operator", "name"), LINEAR)
@given(st.data())
@settings(max_examples=10)
def test_backward_is_the_transpose(backend, operator, name, data):
    """<u, f(a)> = <f^T u, a>: exact, since f is linear in a."""
    problem = drawn(data, operator)
    output, grads = both(backend, problem)
    left, right = problem.grad_output * output, grads[name] * problem.arrays[name]
    assert abs(left.sum() - right.sum()) <= 1e-12 * (np.abs(left).sum() + np.abs(right).sum())


@pytest.mark.parametrize("operator", ["ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation"])
@given(st.data(), st.sampled_from(["float64", "float32", "float16"]))
@settings(max_examples=10)
def test_order_of_queries(backend, operator, data, dtype):
    """In another order they give the same bits in that order; the gradient of what is sampled sums them all."""
    problem = drawn(data, operator, dtype)
    own = [name for name in problem.numbers if name != problem.data]
    order = np.random.default_rng(3).permutation(problem.grad_output.shape[1])
    moved = problem.replaced(**{name: problem.arrays[name][:, order] for name in own})
    moved = moved._replace(grad_output=problem.grad_output[:, order])
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, moved)
    assert_same_bits(got, output[:, order])
    for name in own:
        if grads[name] is not None:
            assert_same_bits(got_grads[name], grads[name][:, order], name)
    assert_close(got_grads[problem.data], grads[problem.data].astype(float), dtype)


def of_groups(problem: Problem, groups: Any) -> Problem:
    """Some of its heads or groups, in the order given."""
    arrays, options, count = dict(problem.arrays), dict(problem.options), group_count(problem)
    for name, axis in GROUP_AXES[problem.operator].items():
        array = arrays[name]
        if axis < 0:  # groups and what each has share an axis
            apart = array.reshape(*array.shape[:-1], count, -1)[..., groups, :]
            arrays[name] = apart.reshape(*array.shape[:-1], -1)
        else:
            arrays[name] = np.take(array, groups, axis)
    if "groups" in options:
        options["groups"] = len(groups)
    return problem._replace(arrays=arrays, options=options)


GROUP_AXES = {
    "ms_deform_attn": {"value": 2, "sampling_locations": 2, "attention_weights": 2},
    "ms_deform_attn_fused": {"value": 2, "sampling_offsets": 2, "attention_logits": 2},
    "deform_aggregation": {"features": -1, "weights": 5},
    "dcnv3": {"input": -1, "offset": -1, "mask": -1},
}


def group_count(problem: Problem) -> int:
    if "value" in problem.arrays:
        return problem.arrays["value"].shape[2]
    return problem.options["groups"] if "groups" in problem.options else problem.arrays["weights"].shape[5]


@pytest.mark.parametrize("operator", GROUP_AXES)
@given(st.data(), st.sampled_from(["float64", "float32"]))
@settings(max_examples=10)
def test_heads_and_groups_are_apart(backend, operator, data, dtype):
    """Turned round, or each alone."""
    problem = drawn(data, operator, dtype)
    count = group_count(problem)
    output = run(backend, problem).astype(float)
    by_group = output.reshape(*output.shape[:-1], count, -1)
    turned = run(backend, of_groups(problem, np.arange(count)[::-1]))
    assert_close(turned, by_group[..., ::-1, :].reshape(output.shape), dtype)
    for g in range(count):
        alone = run(backend, of_groups(problem, np.array([g]))).astype(float)
        np.testing.assert_allclose(alone, by_group[..., g, :], rtol=1e-5, atol=1e-5)


@each_operator
@given(st.data(), st.sampled_from(["float64", "float32", "bfloat16"]))
@settings(max_examples=10)
def test_a_batch_is_its_images_bit_for_bit(backend, operator, data, dtype):
    """Promised for the CPU; on CUDA it holds of the output."""
    problem = drawn(data, operator, dtype)
    output, grads = both(backend, problem)
    for b in range(len(output)):
        alone, own = both(backend, problem.of_image(b))
        assert_same_bits(alone, output[b : b + 1])
        for name, grad in grads.items() if backend.on_cpu else ():
            if grad is not None:
                assert_same_bits(own[name], grad[b : b + 1], name)


@each_operator
@given(st.data(), st.sampled_from(["float64", "float32"]), st.sampled_from([4.0, -0.5]))
@settings(max_examples=6)
def test_scaling_what_is_sampled_scales_the_output(backend, operator, data, dtype, factor):
    """By powers of two, so without any rounding. Its own gradient does not change, all others scale with it."""
    problem = drawn(data, operator, dtype)
    scaled = problem.replaced(**{problem.data: problem.arrays[problem.data] * np.dtype(dtype).type(factor)})
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, scaled)
    np.testing.assert_array_equal(got, output * np.dtype(dtype).type(factor))
    for name, grad in grads.items():
        if grad is not None:
            want = grad if name == problem.data else grad * np.dtype(dtype).type(factor)
            np.testing.assert_array_equal(got_grads[name], want, err_msg=name)


@each_operator
@given(st.data())
@settings(max_examples=6)
def test_the_backward_is_linear_in_what_comes_back(backend, operator, data):
    problem = drawn(data, operator)
    u = problem.grad_output
    v = np.random.default_rng(2).integers(-16, 17, u.shape) / 8
    of_u, of_v, of_both = (run_backward(backend, problem._replace(grad_output=g)) for g in (u, v, 2 * u - 3 * v))
    for name, grad in of_both.items():
        if grad is not None:
            assert_near(grad, 2 * of_u[name] - 3 * of_v[name], of_u[name], of_v[name])


def by_group(array: np.ndarray, count: int) -> np.ndarray:
    """The last axis as groups, or heads, and the channels of each."""
    return array.reshape(*array.shape[:-1], count, -1)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_channels_are_apart(backend, operator, data):
    """Every second one alone and the others: gradients of places and weights are sums over all."""
    problem = drawn(data, operator)
    count, sampled = group_count(problem), problem.arrays[problem.data]
    output, grads = both(backend, problem)
    apart = sampled if problem.data == "value" else by_group(sampled, count)
    totals = {name: 0.0 for name, grad in grads.items() if grad is not None and name != problem.data}
    for some in (np.s_[..., ::2], np.s_[..., 1::2]):
        if not apart[some].size:
            continue
        flat = apart[some] if problem.data == "value" else apart[some].reshape(*sampled.shape[:-1], -1)
        grad_output = by_group(problem.grad_output, count)[some].reshape(*output.shape[:-1], -1)
        alone, own = both(backend, problem.replaced(**{problem.data: flat})._replace(grad_output=grad_output))
        assert_near(by_group(alone, count), by_group(output, count)[some], 1)
        grad, own_grad = grads[problem.data], own[problem.data]
        if problem.data != "value":
            grad, own_grad = by_group(grad, count), by_group(own_grad, count)
        assert_near(own_grad, grad[some], 1)
        totals = {name: total + own[name] for name, total in totals.items()}
    for name, total in totals.items():
        assert_near(total, grads[name], 1)


def inside(rng: np.random.Generator, lengths: Any, shape: Any) -> np.ndarray:
    """Places from the first pixel to the last."""
    return rng.integers(0, 16 * (np.asarray(lengths) - 1) + 1, shape) / 16


def sums_of_weights(problem: Problem) -> np.ndarray:
    """Of each query, or output pixel, and each head or group."""
    a, count = problem.arrays, group_count(problem)
    if problem.operator == "ms_deform_attn_fused":
        return np.ones((*a["attention_logits"].shape[:2], count))
    if problem.operator == "ms_deform_attn":
        return a["attention_weights"].reshape(*a["attention_weights"].shape[:3], -1).sum(-1)
    if problem.operator == "deform_aggregation":
        return a["weights"].sum((2, 3, 4))
    mask = a["mask"] if "mask" in a else reference.unpack(a["offset_mask"], **problem.options)[1]
    return by_group(mask, count).sum(-1)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_constant_maps_give_the_sum_of_weights(backend, operator, data):
    """Of places inside: of one scale, on which aggregation's places are, of taps at rest without padding."""
    fixed: dict[str, Any] = {"scales": 1} if operator == "deform_aggregation" else {}
    if operator.startswith("dcn"):
        fixed = {"padding": ((0, 0), (0, 0)), "offset_scale": 1.0}
    case = data.draw(STRATEGIES[operator](**fixed))
    problem = make(operator, case, draw=inside)
    if operator == "dcnv3":
        problem = problem.replaced(offset=np.zeros_like(problem.arrays["offset"]))
    if operator == "dcnv4":
        offset, mask = reference.unpack(problem.arrays["offset_mask"], **problem.options)
        problem = problem.replaced(offset_mask=reference.pack(0 * offset, mask, case.groups))
    count, sampled = group_count(problem), problem.arrays[problem.data]
    constants = np.random.default_rng(7).integers(-16, 17, (count, case.channels)) / 4
    maps = constants if problem.data == "value" else constants.reshape(-1)
    output = run(backend, problem.replaced(**{problem.data: np.broadcast_to(maps, sampled.shape)}))
    sums = sums_of_weights(problem)
    assert_near(by_group(output, count), sums[..., None] * constants, sums, constants, 1)


@pytest.mark.parametrize(
    ("operator", "name"),
    [("ms_deform_attn", "attention_weights"), ("deform_aggregation", "weights"), ("dcnv3", "mask")],
)
@given(st.data())
@settings(max_examples=8)
def test_weights_of_zero(backend, operator, name, data):
    """Nothing comes out or back, but the gradient of the weights, which is of no use of them."""
    problem = drawn(data, operator)
    output, grads = both(backend, problem.replaced(**{name: np.zeros_like(problem.arrays[name])}))
    want = run_backward(backend, problem)
    assert not output.any()
    for n, grad in grads.items():
        if n == name:
            assert_near(grad, want[n])
        else:
            assert grad is None or not grad.any(), n


# Of maps --------------------------------------------------------------------------------------------------------------


def shapes_of(problem: Problem) -> list[Any]:
    """(height, width) of each block of rows of what is sampled."""
    shapes = problem.arrays["spatial_shapes"]
    return list(shapes) if problem.data == "value" else [shape for scales in shapes for shape in scales]


def of_maps(array: np.ndarray, shapes: Any, change: Any) -> np.ndarray:
    """Every map of (batch, all pixels, ...) changed by a function of (batch, height, width, ...)."""
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    maps = [array[:, a:b].reshape(len(array), *shape, *array.shape[2:]) for a, b, shape in _spans(starts, shapes)]
    return np.concatenate([change(m).reshape(len(array), -1, *array.shape[2:]) for m in maps], axis=1)


def _spans(starts: Any, shapes: Any) -> Any:
    return [(a, b, tuple(shape)) for (a, b), shape in zip(itertools.pairwise(starts), shapes, strict=True)]


def mirror(array: np.ndarray, sign: float = -1.0) -> np.ndarray:
    """(x, y) and, of references, sizes after them: x the other way."""
    return array * np.array([sign, 1, 1, 1][: array.shape[-1]])


def swap(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:-1], -1, 2)[..., ::-1].reshape(array.shape)


def turned(problem: Problem, way: str) -> tuple[Problem, Any]:
    """The problem in a mirror, or with rows for columns, and what its gradients become."""
    shapes = shapes_of(problem)
    change = (lambda m: m[:, :, ::-1]) if way == "mirror" else (lambda m: m.swapaxes(1, 2))
    move = mirror if way == "mirror" else swap
    moved = {problem.data: of_maps(problem.arrays[problem.data], shapes, change)}
    for name in {"sampling_locations", "reference_points", "sampling_offsets"} & set(problem.arrays):
        moved[name] = move(problem.arrays[name])
        if way == "mirror" and name != "sampling_offsets":  # from the other border
            moved[name][..., 0] += 1
    if way == "swap":
        moved["spatial_shapes"] = np.array(problem.arrays["spatial_shapes"])[..., ::-1]

    def of_grad(name: str, grad: np.ndarray) -> np.ndarray:
        if name == problem.data:
            return of_maps(grad, shapes, change)
        return move(grad) if name in moved else grad

    return problem.replaced(**moved), of_grad


@pytest.mark.parametrize("operator", ["ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation"])
@pytest.mark.parametrize("way", ["mirror", "swap"])
@given(st.data())
@settings(max_examples=6)
def test_maps_and_places_turned_together(backend, operator, way, data):
    """Left for right, or x for y: the same output, and gradients that are turned as well."""
    problem = drawn(data, operator, **({} if operator == "deform_aggregation" else {"method": "bilinear"}))
    other, of_grad = turned(problem, way)
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, other)
    assert_near(got, output, 1)
    for name, grad in grads.items():
        assert_near(got_grads[name], of_grad(name, grad), 1)


# Of attention -------------------------------------------------------------------------------------------------------


@each_attention
@given(st.data())
@settings(max_examples=10)
def test_order_of_points(backend, operator, data):
    """Within a level they are a sum."""
    case = data.draw(attentions(flat=True))
    problem, starts = make(operator, case), np.cumsum([0, *case.points])
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in itertools.pairwise(starts)])
    _, places, weights = list(problem.numbers)[-3:]
    moved = problem.replaced(**{name: problem.arrays[name][:, :, :, order] for name in (places, weights)})
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, moved)
    assert_near(got, output)
    for name in (places, weights):
        if grads[name] is not None:
            assert_near(got_grads[name], grads[name][:, :, :, order])
    assert_near(got_grads["value"], grads["value"])


@given(st.data())
@settings(max_examples=10)
def test_levels_add_up(backend, data):
    """Attention over all levels is the sum of one over each: so are gradients of values, locations and weights."""
    case = data.draw(attentions(flat=True))
    problem = make("ms_deform_attn", case)
    output, grads = both(backend, problem)
    total, pixel, point = np.zeros_like(output), 0, 0
    for shape, count in zip(case.shapes, case.points, strict=True):
        pixels, points = slice(pixel, pixel + shape[0] * shape[1]), slice(point, point + count)
        level = problem.replaced(
            value=problem.arrays["value"][:, pixels],
            spatial_shapes=(shape,),
            sampling_locations=problem.arrays["sampling_locations"][:, :, :, points],
            attention_weights=problem.arrays["attention_weights"][:, :, :, points],
        )
        alone, own = both(backend, level._replace(options={**problem.options, "points": (count,)}))
        total += alone
        assert_near(own["value"], grads["value"][:, pixels])
        assert_near(own["attention_weights"], grads["attention_weights"][:, :, :, points])
        if own["sampling_locations"] is not None:
            assert_near(own["sampling_locations"], grads["sampling_locations"][:, :, :, points])
        pixel, point = pixels.stop, points.stop
    assert_near(total, output)


@given(st.data())
@settings(max_examples=10)
def test_ragged_points_are_equal_ones_with_weights_of_zero(backend, data):
    case = data.draw(attentions(flat=True))
    problem, most = make("ms_deform_attn", case), max(case.points)
    lead, levels = case.leading, len(case.shapes)
    locations, weights = np.full((*lead, levels, most, 2), 0.375), np.zeros((*lead, levels, most))
    kept = np.arange(most) < np.array(case.points)[:, None]
    locations[:, :, :, kept], weights[:, :, :, kept] = (
        problem.arrays[name] for name in ("sampling_locations", "attention_weights")
    )
    padded = problem.replaced(sampling_locations=locations, attention_weights=weights)
    padded = padded._replace(options={**problem.options, "points": None})
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, padded)
    assert_near(got, output)
    assert_near(got_grads["value"], grads["value"])
    assert_near(got_grads["attention_weights"][:, :, :, kept], grads["attention_weights"])
    if grads["sampling_locations"] is not None:
        assert_near(got_grads["sampling_locations"][:, :, :, kept], grads["sampling_locations"])


@given(st.data(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=15)
def test_zeros_around_a_map_change_nothing(backend, data, top, bottom, left, right):
    """Locations that move with the map read the same: what is outside is 0."""
    case = data.draw(attentions(flat=True, method="bilinear"))
    case = case._replace(shapes=case.shapes[:1], points=case.points[:1])
    problem, ((height, width),) = make("ms_deform_attn", case), case.shapes
    around = ((0, 0), (top, bottom), (left, right), (0, 0), (0, 0))
    maps = problem.arrays["value"].reshape(case.batch, height, width, case.heads, case.channels)
    size = np.array([width + left + right, height + top + bottom])
    pixels = problem.arrays["sampling_locations"] * (width, height) + (left, top)
    larger = problem.replaced(
        value=np.pad(maps, around).reshape(case.batch, -1, case.heads, case.channels),
        spatial_shapes=(tuple(map(int, size[::-1])),),
        sampling_locations=pixels / size,
    )
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, larger)
    assert_near(got, output, 1)
    grad = got_grads["value"].reshape(case.batch, *size[::-1], case.heads, case.channels)
    assert_near(grad[:, top : top + height, left : left + width].reshape(grads["value"].shape), grads["value"], 1)
    assert_near(got_grads["sampling_locations"] / size, grads["sampling_locations"] / (width, height), 1)
    assert_near(got_grads["attention_weights"], grads["attention_weights"], 1)


@given(st.data(), st.sampled_from(["float64", "float32"]))
@settings(max_examples=20)
def test_fused_is_softmax_and_attention(backend, data, dtype):
    """With all gradients by the chain rule, in NumPy."""
    case = data.draw(attentions())
    fused = make("ms_deform_attn_fused", case, dtype)
    a, sizes = fused.arrays, np.array([case.shapes[level][::-1] for level in case.levels])
    lead, (per_level, numbers) = case.leading, case.references
    offsets, logits = a["sampling_offsets"].reshape(*lead, -1, 2), a["attention_logits"].reshape(*lead, -1)
    of_point = np.array(case.levels) if per_level else np.zeros(len(sizes), int)
    points = a["reference_points"][:, :, None, of_point].astype(float)
    counts = np.array([case.points[level] for level in case.levels])[:, None]
    unit = points[..., 2:] * case.offset_scale / counts if numbers == 4 else 1 / sizes
    powers = np.exp(logits.astype(float))
    weights = powers / powers.sum(-1, keepdims=True)
    plain = Problem(
        "ms_deform_attn",
        {
            "value": a["value"].astype(float),
            "spatial_shapes": case.shapes,
            "sampling_locations": points[..., :2] + offsets * unit,
            "attention_weights": weights,
        },
        {"points": case.points, "method": case.method},
        fused.grad_output.astype(float),
    )
    want, of_plain = both(backend, plain)
    of_weights, moved = of_plain["attention_weights"], of_plain["sampling_locations"]
    wanted: dict[str, Any] = {"value": of_plain["value"], "reference_points": None, "sampling_offsets": None}
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    wanted["attention_logits"] = of_logits.reshape(a["attention_logits"].shape)
    if moved is not None:
        wanted["sampling_offsets"] = (moved * unit).reshape(a["sampling_offsets"].shape)
        parts = [moved, moved * offsets * case.offset_scale / counts][: numbers // 2]
        of_points = np.concatenate(parts, -1).sum(2)
        wanted["reference_points"] = np.zeros(a["reference_points"].shape)
        for point, level in enumerate(of_point):
            wanted["reference_points"][:, :, level] += of_points[:, :, point]
    output, grads = both(backend, fused)
    # Terms of a difference or of a sum over heads and points may cancel.
    assert_close(output, want, dtype)
    for name, grad in wanted.items():
        if grad is None:
            assert grads[name] is None, name
        else:
            np.testing.assert_allclose(grads[name], grad, rtol=0, atol=TERMS[dtype] * scale_of(grad, 1), err_msg=name)


TERMS = {"float64": 1e-12, "float32": 1e-4}


@given(st.data(), st.sampled_from([-2.0, 0.5, 100.0]))
@settings(max_examples=10)
def test_a_softmax_does_not_see_what_all_logits_share(backend, data, more):
    problem = drawn(data, "ms_deform_attn_fused")
    raised = problem.replaced(attention_logits=problem.arrays["attention_logits"] + more)
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, raised)
    assert_near(got, output, 1)
    for name, grad in grads.items():
        if grad is not None:
            assert_near(got_grads[name], grad, 1)
    of_head = grads["attention_logits"].reshape(*grads["attention_logits"].shape[:3], -1)
    assert_near(of_head.sum(-1), 0, of_head, 1)


@given(st.data())
@settings(max_examples=8)
def test_references_and_offsets_are_one_place(backend, data):
    """A reference further to the right by a quarter, and all its offsets to the left by as much."""
    case = data.draw(attentions(references=(data.draw(st.booleans()), 2)))
    problem = make("ms_deform_attn_fused", case)
    sizes = np.array([case.shapes[level][::-1] for level in case.levels])
    offsets = problem.arrays["sampling_offsets"].reshape(*case.leading, -1, 2) - 0.25 * sizes
    moved = problem.replaced(
        reference_points=problem.arrays["reference_points"] + 0.25,
        sampling_offsets=offsets.reshape(problem.arrays["sampling_offsets"].shape),
    )
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, moved)
    assert_near(got, output, 1)
    for name, grad in grads.items():
        if grad is not None:
            assert_near(got_grads[name], grad, 1)


@given(st.data())
@settings(max_examples=8)
def test_offset_scale_is_a_factor_of_offsets(backend, data):
    """Of references with a size: half of it and offsets twice as long, whose gradient is half."""
    case = data.draw(attentions(references=(data.draw(st.booleans()), 4)))
    problem = make("ms_deform_attn_fused", case)
    longer = problem.replaced(sampling_offsets=2 * problem.arrays["sampling_offsets"])
    longer = longer._replace(options={**longer.options, "offset_scale": case.offset_scale / 2})
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, longer)
    assert_near(got, output, 1)
    for name, grad in grads.items():
        if grad is not None:
            assert_near(got_grads[name] * (2 if name == "sampling_offsets" else 1), grad, 1)


# Of aggregation -----------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=8)
def test_order_of_points_and_cameras(backend, data):
    """They are a sum: both turned round, with what belongs to them."""
    case = data.draw(aggregations())
    problem = make("deform_aggregation", case)
    starts = np.cumsum([0, *(sum(height * width for height, width in scales) for scales in case.shapes)])
    pixels = np.concatenate([np.arange(a, b) for a, b in list(itertools.pairwise(starts))[::-1]])
    ways = {
        "features": np.s_[:, pixels],
        "sampling_locations": np.s_[:, :, ::-1, ::-1],
        "weights": np.s_[:, :, ::-1, ::-1],
    }
    moved = problem.replaced(
        spatial_shapes=case.shapes[::-1], **{name: problem.arrays[name][way] for name, way in ways.items()}
    )
    (output, grads), (got, got_grads) = both(backend, problem), both(backend, moved)
    assert_near(got, output, 1)
    for name, way in ways.items():
        assert_near(got_grads[name], grads[name][way], 1)


@given(st.data())
@settings(max_examples=8)
def test_scales_add_up(backend, data):
    """So do gradients of locations, which all scales share; those of weights and features are a scale's own."""
    case = data.draw(aggregations())
    problem = make("deform_aggregation", case)
    output, grads = both(backend, problem)
    sizes = [[height * width for height, width in scales] for scales in case.shapes]
    starts = np.cumsum([0, *itertools.chain(*sizes)])[:-1].reshape(np.shape(sizes))
    total, of_locations = np.zeros_like(output), np.zeros_like(grads["sampling_locations"])
    for scale in range(len(case.shapes[0])):
        pixels = np.concatenate(
            [start + np.arange(size) for start, size in zip(starts[:, scale], np.array(sizes)[:, scale], strict=True)]
        )
        alone, own = both(
            backend,
            problem.replaced(
                features=problem.arrays["features"][:, pixels],
                spatial_shapes=tuple((scales[scale],) for scales in case.shapes),
                weights=problem.arrays["weights"][:, :, :, :, [scale]],
            ),
        )
        total, of_locations = total + alone, of_locations + own["sampling_locations"]
        assert_near(own["features"], grads["features"][:, pixels], 1)
        assert_near(own["weights"], grads["weights"][:, :, :, :, [scale]], 1)
    assert_near(total, output, 1)
    assert_near(of_locations, grads["sampling_locations"], 1)


# Between operators --------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=15)
def test_one_camera_is_attention(backend, data):
    """Of one head a group, over the camera's scales, with the weight of what is outside the picture taken away."""
    case = data.draw(aggregations(cameras=1))
    problem = make("deform_aggregation", case)
    a, scales = problem.arrays, len(case.shapes[0])
    places = a["sampling_locations"][:, :, :, 0]  # (B, anchors, points, 2)
    inside = ((places > 0) & (places < 1)).all(-1)
    lead = case.batch, case.anchors, case.groups
    # (B, anchors, points, scales, groups) -> (B, anchors, groups, scales, points)
    weights = (a["weights"][:, :, :, 0] * inside[..., None, None]).transpose(0, 1, 4, 3, 2)
    locations = np.broadcast_to(places[:, :, None, None], (*lead, scales, case.points, 2))
    attention = Problem(
        "ms_deform_attn",
        {
            "value": a["features"].reshape(case.batch, -1, case.groups, case.channels),
            "spatial_shapes": case.shapes[0],
            "sampling_locations": locations,
            "attention_weights": weights,
        },
        {},
        problem.grad_output,
    )
    (output, grads), (want, of_attention) = both(backend, problem), both(backend, attention)
    assert_near(output, want, 1)
    assert_near(grads["features"], of_attention["value"].reshape(a["features"].shape), 1)
    of_places = of_attention["sampling_locations"].sum((2, 3))
    assert_near(grads["sampling_locations"][:, :, :, 0], of_places * inside[..., None], 1)
    of_weights = of_attention["attention_weights"].transpose(0, 1, 4, 3, 2) * inside[..., None, None]
    assert_near(grads["weights"][:, :, :, 0], of_weights, 1)


@given(st.data())
@settings(max_examples=10)
def test_cameras_add_up(backend, data):
    case = data.draw(aggregations())
    problem = make("deform_aggregation", case)
    total, start = np.zeros(problem.grad_output.shape), 0
    for camera, shapes in enumerate(case.shapes):
        stop = start + sum(height * width for height, width in shapes)
        alone = problem.replaced(
            features=problem.arrays["features"][:, start:stop],
            spatial_shapes=(shapes,),
            sampling_locations=problem.arrays["sampling_locations"][:, :, :, [camera]],
            weights=problem.arrays["weights"][:, :, :, [camera]],
        )
        total, start = total + run(backend, alone), stop
    assert_near(run(backend, problem), total, 1)


@given(st.data())
@settings(max_examples=15)
def test_dcnv3_is_attention_to_its_image(backend, data):
    """Every output pixel asks at the places of its taps, written out here."""
    case = data.draw(dcns())
    problem = make("dcnv3", case)
    batch, (height, width), (out_h, out_w) = case.batch, case.in_size, case.out_size
    taps = [(ky, kx) for kx in range(case.kernel[1]) for ky in range(case.kernel[0])]
    if case.remove_center:
        del taps[4]
    offset = problem.arrays["offset"].reshape(batch, out_h, out_w, case.groups, case.points, 2)
    pixels = np.empty_like(offset)
    for axis, out in ((0, np.arange(out_h)[:, None]), (1, np.arange(out_w)[None])):
        middle = case.dilation[axis] * (case.kernel[axis] - 1) // 2
        for point, tap in enumerate(taps):
            first = (out * case.stride[axis] - case.padding[axis][0] + middle)[..., None]
            moved = tap[axis] * case.dilation[axis] - middle + offset[..., point, 1 - axis]
            pixels[..., point, 1 - axis] = first + moved * case.offset_scale
    attention = Problem(
        "ms_deform_attn",
        {
            "value": problem.arrays["input"].reshape(batch, -1, case.groups, case.channels),
            "spatial_shapes": ((height, width),),
            "sampling_locations": ((pixels + 0.5) / (width, height)).reshape(batch, -1, case.groups, case.points, 2),
            "attention_weights": problem.arrays["mask"].reshape(batch, -1, case.groups, case.points),
        },
        {"points": (case.points,)},
        problem.grad_output.reshape(batch, out_h * out_w, -1),
    )
    (output, grads), (want, of_attention) = both(backend, problem), both(backend, attention)
    assert_near(output, want.reshape(output.shape), 1)
    assert_near(grads["input"], of_attention["value"].reshape(grads["input"].shape), 1)
    assert_near(grads["mask"], of_attention["attention_weights"].reshape(grads["mask"].shape), 1)
    of_offset = of_attention["sampling_locations"] / (width, height) * case.offset_scale
    assert_near(grads["offset"], of_offset.reshape(grads["offset"].shape), 1)
