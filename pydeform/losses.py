"""Losses: each returns `(loss, grad)`, the mean as a Python float and its gradient by the first argument."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax_cross_entropy(logits: Any, labels: Any) -> tuple[float, Any]:
    """Mean of -log softmax(logits)[label] over the rows.

    Parameters
    ----------
    logits : array (N, classes)
    labels : integer array (N,), each in [0, classes)

    Returns   (loss, grad), grad (N, classes) of the dtype of `logits`; an empty batch has loss 0

    >>> import numpy as np
    >>> loss, grad = softmax_cross_entropy(np.zeros((1, 2)), np.array([1]))
    >>> print(round(loss, 4), grad)
    0.6931 [[ 0.5 -0.5]]
    """
    op = "softmax_cross_entropy"
    if logits.ndim != 2:
        raise ValueError(f"{op}: logits must have shape (N, classes), got {tuple(logits.shape)}")
    rows, classes = logits.shape
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"{op}: labels must have shape (N,) = ({rows},), got {tuple(labels.shape)}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{op}: labels must have an integer dtype, got {labels.dtype}")
    if rows == 0:
        return 0.0, np.zeros_like(logits)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"{op}: labels must be in [0, classes) = [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponential = np.exp(shifted)
    total = exponential.sum(axis=1, keepdims=True)
    chosen = labels[:, None]
    # log of the sum, not of the quotient: a probability that rounds to 0 still has a finite loss
    loss = (np.log(total) - np.take_along_axis(shifted, chosen, axis=1)).mean()
    grad = exponential / total
    np.put_along_axis(grad, chosen, np.take_along_axis(grad, chosen, axis=1) - 1, axis=1)
    grad /= rows
    return float(loss), grad


def smooth_l1(prediction: Any, target: Any, beta: float = 1.0) -> tuple[float, Any]:
    """Mean of d*d / (2*beta) where |d| < beta and |d| - beta/2 elsewhere, d = prediction - target.

    Parameters
    ----------
    prediction, target : arrays of one shape
    beta : where the parabola meets the line; 0 is the absolute difference

    Returns   (loss, grad), grad of the shape and dtype of `prediction`; empty arrays have loss 0

    >>> import numpy as np
    >>> loss, grad = smooth_l1(np.array([0.5, 3.0]), np.zeros(2))
    >>> print(loss, grad)
    1.3125 [0.25 0.5 ]
    """
    if tuple(prediction.shape) != tuple(target.shape):
        raise ValueError(
            f"smooth_l1: target must have the shape of prediction, {tuple(prediction.shape)}, got {tuple(target.shape)}"
        )
    if not beta >= 0:
        raise ValueError(f"smooth_l1: beta must be >= 0, got {beta}")
    difference = prediction - target
    if difference.size == 0:
        return 0.0, np.zeros_like(difference)
    size = abs(difference)
    parabola = size < beta
    scale = beta if beta > 0 else 1.0  # with beta 0 the parabola is used nowhere
    loss = np.where(parabola, size * size / (2 * scale), size - beta / 2).mean()
    grad = np.where(parabola, difference / scale, np.sign(difference)) / difference.size
    return float(loss), grad.astype(prediction.dtype)
