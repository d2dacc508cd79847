"""Activations: arrays of any shape."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from pydeform import _arrays
from pydeform.layers import _layer


class ReLU(_layer.Layer):
    """max(x, 0); the gradient at 0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = ReLU()(np.array([-1.0, 2.0]))
    >>> print(y, backprop(np.array([3.0, 4.0])))
    [0. 2.] [0. 4.]
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        xp = _layer.check_input(self, x, None)
        wide = _arrays.wide(x)
        y = _arrays.rounded(xp.maximum(wide, 0), x.dtype)
        if not train:
            return y, _layer.nothing_kept(self)
        positive, like = wide > 0, _layer.like(self, x)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            # what x <= 0 stops is 0, also where grad_y is infinite or NaN
            return _arrays.rounded(_arrays.masked(_arrays.wide(grad_y), positive), like.dtype)

        return y, backprop


class Sigmoid(_layer.Layer):
    """1 / (1 + exp(-x)), without overflow.

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Sigmoid()(np.array([0.0, -1000.0]))
    >>> print(y, backprop(np.ones(2)))
    [0.5 0. ] [0.25 0.  ]
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        wide = sigmoid(_layer.check_input(self, x, None), x)
        y = _arrays.rounded(wide, x.dtype)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, x)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            return _arrays.rounded(_arrays.wide(grad_y) * (wide * (1 - wide)), like.dtype)

        return y, backprop


class Softmax(_layer.Layer):
    """exp(x) / sum of exp(x) along `axis`. To train a classifier use `losses.softmax_cross_entropy` on the logits.

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Softmax()(np.zeros((1, 4)))
    >>> print(y)
    [[0.25 0.25 0.25 0.25]]
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = _layer.integer(self, "axis", axis)
        super().__init__(settings={"axis": self.axis})

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        xp = _layer.check_input(self, x, None)
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] == 0:
            raise ValueError(f"{self.name}: x must have values along axis = {self.axis}, got shape {tuple(x.shape)}")
        wide = _arrays.wide(x)
        wide = xp.exp(wide - wide.max(axis=self.axis, keepdims=True))
        wide /= wide.sum(axis=self.axis, keepdims=True)
        y = _arrays.rounded(wide, x.dtype)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, x)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grad = _arrays.wide(grad_y)
            return _arrays.rounded(wide * (grad - (grad * wide).sum(axis=self.axis, keepdims=True)), like.dtype)

        return y, backprop


def sigmoid(xp: ModuleType, x: Any) -> Any:
    """In float32 of a half type."""
    # tanh saturates where exp would overflow
    return 0.5 * xp.tanh(0.5 * _arrays.wide(x)) + 0.5
