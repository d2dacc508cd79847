"""Losses against plain formulas and finite differences."""

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
        (lambda: smooth_l1(np.zeros(3), np.zeros(3), -1), ValueError, "beta must be a finite number >= 0, got -1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
