"""Activations: arrays of any shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.layers import _layer


class ReLU(_layer.Layer):
    """max(x, 0); the gradient at 0 is 0.

    >>> import numpy as np
    >>> y, backprop = ReLU()(np.array([-1.0, 2.0]))
    >>> print(y, backprop(np.array([3.0, 4.0])))
    [0. 2.] [0. 4.]
    """

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        y = np.maximum(x, 0)
        if not train:
            return y, _layer.nothing_kept(self)
        positive = x > 0

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, positive.shape)
            return grad_y * positive

        return y, backprop


class Sigmoid(_layer.Layer):
    """1 / (1 + exp(-x)), without overflow.

    >>> import numpy as np
    >>> y, backprop = Sigmoid()(np.array([0.0, -1000.0]))
    >>> print(y, backprop(np.ones(2)))
    [0.5 0. ] [0.25 0.  ]
    """

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        y = sigmoid(x)
        if not train:
            return y, _layer.nothing_kept(self)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, y.shape)
            return grad_y * (y * (1 - y))

        return y, backprop


class Softmax(_layer.Layer):
    """exp(x) / sum of exp(x) along `axis`. To train a classifier use `losses.softmax_cross_entropy` on the logits.

    >>> import numpy as np
    >>> y, backprop = Softmax()(np.zeros((1, 4)))
    >>> print(y)
    [[0.25 0.25 0.25 0.25]]
    """

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        y = np.exp(x - x.max(axis=self.axis, keepdims=True))
        y /= y.sum(axis=self.axis, keepdims=True)
        if not train:
            return y, _layer.nothing_kept(self)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, y.shape)
            return y * (grad_y - (grad_y * y).sum(axis=self.axis, keepdims=True))

        return y, backprop


def sigmoid(x: Any) -> Any:
    # tanh saturates where exp would overflow
    return (0.5 * np.tanh(0.5 * x) + 0.5).astype(x.dtype, copy=False)  # of bfloat16 it would be float32
