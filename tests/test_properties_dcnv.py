"""What must hold for any problem of DCNv3 and of DCNv4, which differ in how offsets and masks are packed.

Problems are DCNv3's; `solve` hands them to either operator. test_properties_gather.py has what they share with others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases.gather import Dcn, Problem, make
from tests.cases.gather_tests import both
from tests.conftest import assert_close
from tests.reference import gather as reference
from tests.test_properties_gather import assert_near, dcns, of_groups

each_operator = pytest.mark.parametrize("operator", ["dcnv3", "dcnv4"])
STILL: dict[str, Any] = {"offset_scale": 1.0, "remove_center": False}


def packed(problem: Problem) -> Problem:
    a, groups = problem.arrays, problem.options["groups"]
    arrays = {"input": a["input"], "offset_mask": reference.pack(a["offset"], a["mask"], groups)}
    return problem._replace(operator="dcnv4", arrays=arrays)


def solve(backend: Any, operator: str, problem: Problem) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output and the gradients that DCNv3 has."""
    if operator == "dcnv3":
        return both(backend, problem)
    output, grads = both(backend, packed(problem))
    offset, mask = reference.unpack(grads["offset_mask"], **problem.options)
    return output, {"input": grads["input"], "offset": offset, "mask": mask}


def with_options(problem: Problem, **options: Any) -> Problem:
    return problem._replace(options={**problem.options, **options})


def by_tap(array: np.ndarray, case: Dcn) -> np.ndarray:
    """(batch, out_h, out_w, groups, kernel_w, kernel_h, numbers of a tap)."""
    kernel_h, kernel_w = case.kernel
    return array.reshape(case.batch, *case.out_size, case.groups, kernel_w, kernel_h, -1)


def assert_all_near(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    for name, grad in want.items():
        assert_near(got[name].reshape(grad.shape), grad, 1)


@given(st.data(), st.sampled_from(["float64", "float32", "float16"]))
@settings(max_examples=10)
def test_dcnv4_is_dcnv3(backend, data, dtype):
    """With offsets and masks packed: all gradients, too."""
    problem = make("dcnv3", data.draw(dcns()), dtype)
    (output, grads), (got, got_grads) = (solve(backend, operator, problem) for operator in ("dcnv3", "dcnv4"))
    assert_close(got, output.astype(float), dtype)
    for name, grad in grads.items():
        assert_close(got_grads[name], grad.astype(float), dtype, name)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_order_of_groups(backend, operator, data):
    case = data.draw(dcns())
    problem, order = make("dcnv3", case), np.arange(case.groups)[::-1]
    moved = of_groups(problem, order)
    moved = moved._replace(grad_output=of_groups_of(problem.grad_output, case, order))
    (output, grads), (got, got_grads) = solve(backend, operator, problem), solve(backend, operator, moved)
    assert_near(got, of_groups_of(output, case, order), 1)
    assert_all_near(got_grads, {name: of_groups_of(grad, case, order) for name, grad in grads.items()})


def of_groups_of(array: np.ndarray, case: Dcn, order: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:-1], case.groups, -1)[..., order, :].reshape(array.shape)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_zeros_around_the_image_are_padding(backend, operator, data):
    case = data.draw(dcns())
    problem = make("dcnv3", case)
    around = [tuple(data.draw(st.integers(0, most)) for most in pads) for pads in case.padding]
    left = tuple(
        tuple(most - taken for most, taken in zip(pads, ends, strict=True))
        for pads, ends in zip(case.padding, around, strict=True)
    )
    larger = problem.replaced(input=np.pad(problem.arrays["input"], ((0, 0), *around, (0, 0))))
    (output, grads), (got, got_grads) = (
        solve(backend, operator, p) for p in (problem, with_options(larger, padding=left))
    )
    assert_near(got, output, 1)
    rows, columns = (slice(ends[0], ends[0] + size) for ends, size in zip(around, case.in_size, strict=True))
    assert_all_near({**got_grads, "input": got_grads["input"][:, rows, columns]}, grads)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_padding_before_the_image_is_an_offset(backend, operator, data):
    """A row and column more before it and less behind: as if all taps went up and left by a pixel."""
    case = data.draw(dcns(padding=((1, 2), (1, 1)), offset_scale=data.draw(st.sampled_from([1.0, 0.5, 2.0]))))
    problem = make("dcnv3", case)
    moved = problem.replaced(offset=problem.arrays["offset"] - 1 / case.offset_scale)
    (output, grads), (got, got_grads) = (
        solve(backend, operator, p) for p in (moved, with_options(problem, padding=((2, 1), (2, 0))))
    )
    assert_near(got, output, 1)
    assert_all_near(got_grads, grads)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_offset_scale_is_part_of_the_offset(backend, operator, data):
    """It scales the tap's own distance from the middle of the kernel as well."""
    case = data.draw(dcns(remove_center=False))
    problem, scale = make("dcnv3", case), case.offset_scale
    offset = by_tap(problem.arrays["offset"], case)
    ys, xs = (np.arange(k) * d - d * (k - 1) // 2 for k, d in zip(case.kernel, case.dilation, strict=True))
    own = np.stack(np.broadcast_arrays(xs[:, None], ys), axis=-1)
    unscaled = with_options(
        problem.replaced(offset=((own + offset) * scale - own).reshape(problem.arrays["offset"].shape)),
        offset_scale=1.0,
    )
    (output, grads), (got, got_grads) = (solve(backend, operator, p) for p in (problem, unscaled))
    assert_near(got, output, 1)
    assert_all_near({**got_grads, "offset": got_grads["offset"] * scale}, grads)


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_no_centre_is_a_centre_without_weight(backend, operator, data):
    case = data.draw(dcns(kernel=(3, 3), remove_center=True))
    problem = make("dcnv3", case)
    kept = np.arange(9) != 4
    arrays, lead = {}, (case.batch, *case.out_size, case.groups)
    for name, last, absent in (("offset", (2,), 0.375), ("mask", (), 0.0)):
        full = np.full((*lead, 9, *last), absent)
        full[:, :, :, :, kept] = problem.arrays[name].reshape(*lead, 8, *last)
        arrays[name] = full.reshape(*lead[:3], -1)
    full = with_options(problem.replaced(**arrays), remove_center=False)
    (output, grads), (got, got_grads) = (solve(backend, operator, p) for p in (problem, full))
    assert_near(got, output, 1)
    for name in arrays:
        got_grads[name] = got_grads[name].reshape(*lead, 9, -1)[:, :, :, :, kept]
    assert_all_near(got_grads, grads)


@each_operator
@given(st.data(), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=8)
def test_strides_leave_pixels_out(backend, operator, data, sy, sx):
    case = data.draw(dcns(stride=(1, 1)))
    problem, some = make("dcnv3", case), np.s_[:, ::sy, ::sx]
    grad_output = np.zeros_like(problem.grad_output)
    grad_output[some] = problem.grad_output[some]
    fewer = problem.replaced(**{name: problem.arrays[name][some] for name in ("offset", "mask")})
    fewer = with_options(fewer._replace(grad_output=problem.grad_output[some]), stride=(sy, sx))
    output, grads = solve(backend, operator, problem._replace(grad_output=grad_output))
    got, got_grads = solve(backend, operator, fewer)
    assert_near(got, output[some], 1)
    assert_all_near(got_grads, {name: grad if name == "input" else grad[some] for name, grad in grads.items()})


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_one_hot_masks_shift_the_image(backend, operator, data):
    """At zero offset and scale 1: a tap alone is a slice of the padded image, as a convolution has it."""
    case = data.draw(dcns(**STILL))
    problem = make("dcnv3", case)
    ky, kx = (data.draw(st.integers(0, k - 1)) for k in case.kernel)
    mask = np.zeros(problem.arrays["mask"].shape)
    by_tap(mask, case)[..., kx, ky, :] = 1
    still = problem.replaced(mask=mask, offset=np.zeros_like(problem.arrays["offset"]))
    padded = np.pad(problem.arrays["input"], ((0, 0), *case.padding, (0, 0)))
    starts = [tap * d for tap, d in zip((ky, kx), case.dilation, strict=True)]
    rows, columns = (
        start + stride * np.arange(out) for start, stride, out in zip(starts, case.stride, case.out_size, strict=True)
    )
    assert_near(solve(backend, operator, still)[0], padded[:, rows[:, None], columns])


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_in_a_mirror(backend, operator, data):
    """Image, offsets and output turned round along x: taps of an odd kernel trade places."""
    case = data.draw(dcns(kernel=(2, 3), stride=(1, 1), **STILL))
    case = case._replace(padding=(case.padding[0], (2, 2)))
    problem = make("dcnv3", case)

    def turned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        offset, mask = (by_tap(arrays[name], case)[:, :, ::-1, :, ::-1] for name in ("offset", "mask"))
        found = {"offset": offset * (-1, 1), "mask": mask, "input": arrays["input"][:, :, ::-1]}
        return {name: array.reshape(arrays[name].shape) for name, array in found.items()}

    other = problem.replaced(**turned(problem.arrays))._replace(grad_output=problem.grad_output[:, :, ::-1])
    (output, grads), (got, got_grads) = (solve(backend, operator, p) for p in (problem, other))
    assert_near(got, output[:, :, ::-1], 1)
    assert_all_near(got_grads, turned(grads))


@each_operator
@given(st.data())
@settings(max_examples=8)
def test_rows_for_columns(backend, operator, data):
    """Image, kernel, offsets and output transposed; points still run down the columns of the kernel first."""
    case = data.draw(dcns(remove_center=False))
    problem = make("dcnv3", case)

    def turned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        offset, mask = (by_tap(arrays[name], case).swapaxes(1, 2).swapaxes(4, 5) for name in ("offset", "mask"))
        lead = (case.batch, *case.out_size[::-1], -1)
        return {
            "offset": offset[..., ::-1].reshape(lead),
            "mask": mask.reshape(lead),
            "input": arrays["input"].swapaxes(1, 2),
        }

    options = {name: problem.options[name][::-1] for name in ("kernel_size", "stride", "padding", "dilation")}
    other = problem.replaced(**turned(problem.arrays))._replace(grad_output=problem.grad_output.swapaxes(1, 2))
    (output, grads), (got, got_grads) = (solve(backend, operator, p) for p in (problem, with_options(other, **options)))
    assert_near(got, output.swapaxes(1, 2), 1)
    assert_all_near(got_grads, turned(grads))
