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
    solve_oracle,
)
from tests.cases.gather_tests import assert_results, both
from tests.conftest import assert_close, assert_same_bits

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
    padding = draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2))
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


@given(st.data())
@settings(max_examples=10)
def test_one_hot_masks_shift_the_image(backend, data):
    """At zero offset and scale 1: a tap alone is a slice of the padded image, as a convolution has it."""
    case = data.draw(dcns(offset_scale=1.0, remove_center=False))
    problem = make("dcnv3", case)
    ky, kx = (data.draw(st.integers(0, k - 1)) for k in case.kernel)
    mask = np.zeros(problem.arrays["mask"].shape).reshape(case.batch, *case.out_size, case.groups, case.points)
    mask[..., kx * case.kernel[0] + ky] = 1
    arrays = {"mask": mask.reshape(problem.arrays["mask"].shape), "offset": np.zeros_like(problem.arrays["offset"])}
    padded = np.pad(problem.arrays["input"], ((0, 0), *case.padding, (0, 0)))
    starts = [tap * d for tap, d in zip((ky, kx), case.dilation, strict=True)]
    rows, columns = (
        start + stride * np.arange(out) for start, stride, out in zip(starts, case.stride, case.out_size, strict=True)
    )
    assert_near(run(backend, problem.replaced(**arrays)), padded[:, rows[:, None], columns])


@given(st.data())
@settings(max_examples=10)
def test_dcnv3_in_a_mirror(backend, data):
    """Image, offsets and output turned round along x: taps of an odd kernel trade places."""
    case = data.draw(dcns(kernel=(2, 3), offset_scale=1.0, stride=(1, 1), remove_center=False))
    case = case._replace(padding=(case.padding[0], (2, 2)))
    problem = make("dcnv3", case)
    lead = (case.batch, *case.out_size, case.groups, 3, 2)

    def mirrored(array: np.ndarray, *last: int) -> np.ndarray:
        return array.reshape(*lead, *last)[:, :, ::-1, :, ::-1].copy()

    offset = mirrored(problem.arrays["offset"], 2) * (-1, 1)
    turned = problem.replaced(
        input=problem.arrays["input"][:, :, ::-1],
        offset=offset.reshape(problem.arrays["offset"].shape),
        mask=mirrored(problem.arrays["mask"]).reshape(problem.arrays["mask"].shape),
    )
    assert_near(run(backend, turned), run(backend, problem)[:, :, ::-1], 1)
