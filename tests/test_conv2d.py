"""conv2d and its backward against the oracle, differences and PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.deform_conv2d import dtype_of
from tests.conftest import assert_close, assert_same_bits
from tests.reference import conv2d as reference

NAMES = ("input", "weight", "bias")


class Case(NamedTuple):
    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True

    def arrays(self, dtype: str = "float64") -> dict[str, Any]:
        rng = np.random.default_rng(sum(self.input))

        def values(*shape: int) -> np.ndarray:
            return (rng.integers(-128, 129, shape) / 64).astype(dtype_of(dtype))  # exact in every dtype

        bias = values(self.weight[0]) if self.bias else None
        return {"input": values(*self.input), "weight": values(*self.weight), "bias": bias}


CASES = {
    "every_option": Case((2, 6, 9, 7), (4, 3, 3, 2), (2, 1), ((1, 0), (2, 3)), (2, 1), 2),
    "plain": Case((3, 2, 5, 6), (7, 2, 2, 3), bias=False),
    "pointwise": Case((1, 5, 4, 6), (3, 5, 1, 1)),
    "depthwise": Case((2, 6, 5, 7), (12, 1, 3, 3), padding=((1, 1), (1, 1)), groups=6),
    "mostly_padding": Case((1, 3, 2, 1), (4, 3, 3, 2), padding=((5, 4), (3, 6))),
    "past_tiles": Case((1, 17, 11, 23), (35, 17, 1, 2)),
    "batch_0": Case((0, 3, 5, 6), (4, 3, 2, 3)),
}


def options_of(case: Case) -> dict[str, Any]:
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}


def grad_output_for(output: np.ndarray, dtype: str = "float64") -> np.ndarray:
    return (np.random.default_rng(7).integers(-64, 65, output.shape) / 32).astype(dtype_of(dtype))


def run(backend, arrays, options):
    return backend.numpy(pydeform.conv2d(**{n: backend.array(a) for n, a in arrays.items()}, **options))


def run_backward(backend, grad_output, arrays, options):
    sent = {name: backend.array(a) for name, a in arrays.items()}
    grads = pydeform.conv2d_backward(backend.array(grad_output), **sent, **options)
    assert isinstance(grads, pydeform.Conv2dGrads)
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(backend, name, dtype):
    case = CASES[name]
    arrays, options = case.arrays(dtype), options_of(case)
    copies = {n: None if a is None else a.copy() for n, a in arrays.items()}
    want = reference.forward(**arrays, **options)
    assert_close(run(backend, arrays, options), want, dtype)
    grad_output = grad_output_for(want, dtype)
    want_grads = reference.backward(grad_output, **arrays, **options)
    grads = run_backward(backend, grad_output, arrays, options)
    assert tuple(grads) == NAMES
    for gradient in NAMES:
        if want_grads[gradient] is None:
            assert grads[gradient] is None
        else:
            assert_close(grads[gradient], want_grads[gradient], dtype, gradient)
            assert_same_bits(arrays[gradient], copies[gradient], f"{gradient} was written to")


def test_gradcheck(backend):
    case = CASES["every_option"]
    options = options_of(case)
    report = gradcheck(
        lambda **arrays: run(backend, arrays, options),
        lambda grad_output, **arrays: run_backward(backend, grad_output, arrays, options),
        case.arrays(),
        wrt=NAMES,
    )
    assert set(report.checked) == set(NAMES)
    assert not any(report.kinked.values())


def test_needs(backend):
    case = CASES["every_option"]
    arrays, options = case.arrays(), options_of(case)
    grad_output = grad_output_for(run(backend, arrays, options))
    every = run_backward(backend, grad_output, arrays, options)
    for needs in (("input",), ("weight",), ("bias",), ("bias", "weight"), ()):
        got = run_backward(backend, grad_output, arrays, {**options, "needs": needs})
        for gradient in NAMES:
            if gradient in needs:
                assert_same_bits(got[gradient], every[gradient], gradient)
            else:
                assert got[gradient] is None


def test_layouts_give_the_bits_of_a_copy(backend):
    case = CASES["every_option"]
    arrays, options = case.arrays("float32"), options_of(case)
    want = run(backend, arrays, options)
    grad_output = grad_output_for(want, "float32")
    want_grads = run_backward(backend, grad_output, arrays, options)
    reverse = (slice(None, None, -1),) * 4
    for odd in (lambda a: a[reverse[: a.ndim]].copy()[reverse[: a.ndim]], lambda a: np.repeat(a, 2, axis=-1)[..., ::2]):
        layout = {name: odd(a) for name, a in arrays.items()}
        assert_same_bits(run(backend, layout, options), want)
        grads = run_backward(backend, odd(grad_output), layout, options)
        for name in NAMES:
            assert_same_bits(grads[name], want_grads[name], name)


def test_bad_pixels_stay_where_they_are_used(backend):
    """A NaN in one corner reaches the outputs whose window covers it, and padding never multiplies it by zero."""
    case = Case((1, 1, 4, 5), (2, 1, 3, 2), padding=((3, 3), (2, 2)))
    arrays, options = case.arrays(), options_of(case)
    arrays["input"][0, 0, 0, 0] = np.nan
    want = reference.forward(**arrays, **options)
    assert np.isnan(want).sum() == 2 * 3 * 2
    assert_close(run(backend, arrays, options), want, "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pytorch(backend, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    case = CASES["every_option"]._replace(padding=((2, 2), (1, 1)))
    arrays, options = case.arrays(dtype), options_of(case)
    tensors = {name: torch.from_numpy(a).requires_grad_() for name, a in arrays.items()}
    output = torch.nn.functional.conv2d(**tensors, **{**options, "padding": (2, 1)})
    want = output.detach().numpy().astype(np.float64)
    assert_close(run(backend, arrays, options), want, dtype)
    grad_output = grad_output_for(want, dtype)
    output.backward(torch.from_numpy(grad_output))
    grads = run_backward(backend, grad_output, arrays, options)
    for name in NAMES:
        assert_close(grads[name], tensors[name].grad.numpy().astype(np.float64), dtype, name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pytorch_is_deform_conv2d_at_zero_offset(backend, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    case = CASES["every_option"]._replace(padding=((2, 2), (1, 1)))
    arrays, options = case.arrays(dtype), {**options_of(case), "padding": (2, 1)}
    tensors = {name: torch.from_numpy(a).requires_grad_() for name, a in arrays.items()}
    output = torch.nn.functional.conv2d(**tensors, **options)
    del options["groups"]  # inferred
    sent = {name: backend.array(a) for name, a in arrays.items()}
    sent["offset"] = backend.array(np.zeros((2, 3 * 2 * 2, *output.shape[2:]), dtype))
    got = backend.numpy(pydeform.deform_conv2d(**sent, **options))
    assert_close(got, output.detach().numpy().astype(np.float64), dtype)
    grad_output = grad_output_for(got, dtype)
    output.backward(torch.from_numpy(grad_output))
    grads = pydeform.deform_conv2d_backward(backend.array(grad_output), **sent, **options)
    for name in NAMES:
        want = tensors[name].grad.numpy().astype(np.float64)
        assert_close(backend.numpy(getattr(grads, name)), want, dtype, name)
