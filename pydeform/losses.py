"""Losses: each returns `(loss, grad)`, the mean as a Python float and its gradient by the first argument."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _arrays
from pydeform.layers import _layer


def softmax_cross_entropy(logits: Any, labels: Any) -> tuple[float, Any]:
    """Mean of -log softmax(logits)[label] over the rows.

    Parameters
    ----------
    logits : NumPy or CuPy array (N, classes), float64, float32, float16 or bfloat16
    labels : integer array (N,) of the same kind, each in [0, classes)

    Returns
    -------
    (loss, grad)
        grad (N, classes) of the kind and dtype of `logits`; an empty batch has loss 0. Half types are computed in
        float32, and what overflows there in float64.

    Examples
    --------
    >>> import numpy as np
    >>> loss, grad = softmax_cross_entropy(np.zeros((1, 2)), np.array([1]))
    >>> print(round(loss, 4), grad)
    0.6931 [[ 0.5 -0.5]]
    """
    op = "softmax_cross_entropy"
    xp = _arrays.check_floats(op, "logits", logits)
    _arrays.check_like(op, "labels", labels, "logits", _arrays.place(op, "logits", logits))
    if logits.ndim != 2:
        raise ValueError(f"{op}: logits must have shape (N, classes), got {tuple(logits.shape)}")
    rows, classes = logits.shape
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"{op}: labels must have shape (N,) = ({rows},), got {tuple(labels.shape)}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{op}: labels must have an integer dtype, got {labels.dtype}")
    if rows == 0:
        return 0.0, xp.zeros(logits.shape, logits.dtype)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"{op}: labels must be in [0, classes) = [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    chosen = xp.arange(rows)[:, None], labels.astype(np.int64)[:, None]
    loss, grad = _softmax_cross_entropy(xp, _arrays.wide(logits), chosen)
    if not math.isfinite(loss) and logits.dtype != np.float64:
        loss, grad = _softmax_cross_entropy(xp, logits.astype(np.float64), chosen)
    return loss, _arrays.rounded(grad, logits.dtype)


def _softmax_cross_entropy(xp: ModuleType, logits: Any, chosen: Any) -> tuple[float, Any]:
    with np.errstate(over="ignore", invalid="ignore"):  # the loss says so
        shifted = logits - logits.max(axis=1, keepdims=True)
    exponential = xp.exp(shifted)
    total = exponential.sum(axis=1, keepdims=True)
    # log of the sum, not of the quotient: a probability that rounds to 0 still has a finite loss
    loss = (xp.log(total) - shifted[chosen]).mean()
    grad = exponential / total
    grad[chosen] = grad[chosen] - 1
    grad /= len(logits)
    return float(loss), grad


def smooth_l1(prediction: Any, target: Any, beta: float = 1.0) -> tuple[float, Any]:
    """Mean of d*d / (2*beta) where |d| < beta and |d| - beta/2 elsewhere, d = prediction - target.

    Parameters
    ----------
    prediction, target : NumPy or CuPy arrays of one shape; the prediction float64, float32, float16 or bfloat16
    beta : where the parabola meets the line; 0 is the absolute difference

    Returns
    -------
    (loss, grad)
        grad of the kind, shape and dtype of `prediction`; empty arrays have loss 0. Half types are computed in float32,
        and what overflows there in float64.

    Examples
    --------
    >>> import numpy as np
    >>> loss, grad = smooth_l1(np.array([0.5, 3.0]), np.zeros(2))
    >>> print(loss, grad)
    1.3125 [0.25 0.5 ]
    """
    op = "smooth_l1"
    xp = _arrays.check_floats(op, "prediction", prediction)
    _arrays.check_like(op, "target", target, "prediction", _arrays.place(op, "prediction", prediction))
    if target.dtype.kind not in "iu":
        _arrays.check_floats(op, "target", target)
    if tuple(prediction.shape) != tuple(target.shape):
        raise ValueError(
            f"{op}: target must have the shape of prediction, {tuple(prediction.shape)}, got {tuple(target.shape)}"
        )
    beta = _layer.number(op, "beta", beta, 0)
    if prediction.size == 0:
        return 0.0, xp.zeros(prediction.shape, prediction.dtype)
    with np.errstate(over="ignore"):
        difference = _arrays.wide(prediction) - _arrays.wide(target)
    loss, grad = _smooth_l1(xp, difference, beta)
    if not math.isfinite(loss) and prediction.dtype != np.float64:
        loss, grad = _smooth_l1(xp, prediction.astype(np.float64) - target.astype(np.float64), beta)
    return loss, _arrays.rounded(grad, prediction.dtype)


def _smooth_l1(xp: ModuleType, difference: Any, beta: float) -> tuple[float, Any]:
    size = abs(difference)
    scale = beta if beta > 0 else 1.0  # with beta 0 the parabola is used nowhere
    with np.errstate(over="ignore", invalid="ignore"):  # of what is not chosen, or computed again in float64
        parabola = size < beta
        loss = xp.where(parabola, size * size / (2 * scale), size - beta / 2).mean()
        grad = xp.where(parabola, difference / scale, xp.sign(difference)) / difference.size
    return float(loss), grad
