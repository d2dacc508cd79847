"""Losses against plain formulas and finite differences."""

import ml_dtypes
import numpy as np
import pytest

from pydeform.losses import smooth_l1, softmax_cross_entropy
from pydeform.testing import gradcheck


def check(loss, name, array, **rest):
    gradcheck(
        lambda **a: np.array(loss(a[name], **rest)[0]),
        lambda g, **a: {name: g * loss(a[name], **rest)[1]},
        {name: array},
    )


def test_softmax_cross_entropy():
    logits = np.random.default_rng(0).standard_normal((5, 4))
    labels = np.array([3, 0, 1, 1, 2])
    loss, grad = softmax_cross_entropy(logits, labels)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[np.arange(5), labels]).mean(), rel=1e-12)
    np.testing.assert_allclose(grad.sum(axis=1), 0, atol=1e-15)
    check(softmax_cross_entropy, "logits", logits, labels=labels)


def test_softmax_cross_entropy_far_out_and_dtype():
    loss, grad = softmax_cross_entropy(np.array([[1000, -1000]], np.float32), np.array([1], np.uint8))
    assert loss == 2000 and grad.dtype == np.float32
    np.testing.assert_array_equal(grad, [[1, -1]])


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 0.0])
def test_smooth_l1(beta):
    rng = np.random.default_rng(0)
    prediction, target = 2 * rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    d = abs(prediction - target)
    expected = [e * e / (2 * beta) if e < beta else e - beta / 2 for e in d.ravel()]
    assert smooth_l1(prediction, target, beta)[0] == pytest.approx(np.mean(expected), rel=1e-12)
    check(smooth_l1, "prediction", prediction, target=target, beta=beta)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_overflows_float32_is_computed_in_float64(dtype):
    """And of float16 what overflows that, in float32. The loss is a Python float, which has room."""
    large = 3e38 if dtype != np.float16 else 60000.0
    logits = np.array([[large, -large, 0]]).astype(dtype)
    exact = float(logits[0, 0])
    loss, grad = softmax_cross_entropy(logits, np.array([1]))
    assert loss == pytest.approx(2 * exact, rel=1e-6) and grad.dtype == dtype
    np.testing.assert_array_equal(grad.astype(float), [[1, -1, 0]])
    prediction, target = logits, -logits
    loss, grad = smooth_l1(prediction, target)
    assert loss == pytest.approx((4 * exact - 1) / 3, rel=1e-6) and grad.dtype == dtype
    np.testing.assert_allclose(grad.astype(float), [[1 / 3, -1 / 3, 0]], 2.0**-8)
    loss, grad = smooth_l1(prediction, np.zeros_like(prediction), beta=1e39)  # all in the parabola
    assert loss == pytest.approx(2 / 3 * exact * (exact / 2e39), rel=1e-6)
    np.testing.assert_allclose(grad.astype(float)[0, 0], exact / 1e39 / 3, 2.0**-8, 2.0**-25)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    rng = np.random.default_rng(0)
    logits, labels = (4 * rng.standard_normal((64, 100))).astype(dtype), rng.integers(0, 100, 64)
    loss, grad = softmax_cross_entropy(logits, labels)
    want, exact = softmax_cross_entropy(logits.astype(float), labels)
    assert loss == pytest.approx(want, rel=1e-6)
    unit = 2.0**-11 if dtype == np.float16 else 2.0**-8
    np.testing.assert_allclose(grad.astype(float), exact, 1.02 * unit, 2.0**-25)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_says_so(value):
    logits = np.array([[value, 1], [2, 3]], np.float32)
    assert np.isnan(softmax_cross_entropy(logits, np.array([0, 1]))[0])
    assert not np.isfinite(smooth_l1(logits, np.zeros_like(logits))[0])


def test_targets_of_other_dtypes():
    """As before: integers, and floats of another precision."""
    prediction = np.array([0.5, 3], np.float32)
    for target in (np.array([0, 1]), np.array([0, 1], np.float64), np.array([0, 1], np.float16)):
        loss, grad = smooth_l1(prediction, target)
        assert loss == pytest.approx((0.125 + 1.5) / 2) and grad.dtype == np.float32


def test_empty_batches_have_no_loss():
    loss, grad = softmax_cross_entropy(np.zeros((0, 3)), np.zeros(0, int))
    assert loss == 0 and grad.shape == (0, 3)
    loss, grad = smooth_l1(np.zeros((0, 4)), np.zeros((0, 4)))
    assert loss == 0 and grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax_cross_entropy(np.zeros(3), np.zeros(3, int)), ValueError, r"logits must have shape \(N, cl"),
        (lambda: softmax_cross_entropy(np.zeros((3, 2)), np.zeros(2, int)), ValueError, r"\(N,\) = \(3,\), got \(2,\)"),
        (lambda: softmax_cross_entropy(np.zeros((3, 2)), np.zeros(3)), TypeError, "labels must have an integer dtype"),
        (lambda: softmax_cross_entropy(np.zeros((1, 2)), np.array([2])), ValueError, r"= \[0, 2\), got 2 to 2"),
        (lambda: smooth_l1(np.zeros(3), np.zeros(2)), ValueError, r"the shape of prediction, \(3,\), got \(2,\)"),
        (
            lambda: softmax_cross_entropy(np.zeros((1, 2), int), np.array([1])),
            TypeError,
            "logits must have dtype float64",
        ),
        (
            lambda: smooth_l1(np.zeros(3, int), np.zeros(3)),
            TypeError,
            "prediction must have dtype .* got int64",
        ),
        (
            lambda: smooth_l1(np.zeros(3), np.zeros(3, complex)),
            TypeError,
            "target must have dtype .* complex128",
        ),
        (lambda: smooth_l1(np.zeros(3), np.zeros(3), None), TypeError, "beta must be a finite number, got None"),
        (lambda: smooth_l1(np.zeros(3), np.zeros(3), np.inf), ValueError, "beta must be a finite number, got inf"),
        (lambda: smooth_l1(np.zeros(3), np.zeros(3), -1), ValueError, "beta must be a finite number >= 0, got -1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
