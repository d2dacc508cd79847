"""Fully connected layer, and what goes before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform import _arrays
from pydeform.layers import _layer


class Linear(_layer.Layer):
    """x @ weight.T + bias.

    Parameters
    ----------
    in_features, out_features : sizes
    bias : whether to add a bias
    rng : numpy.random.Generator or seed for the weight: He normal, variance 2 / in_features; the bias starts at 0
    dtype : of the parameters, and of the input it takes; half types are multiplied and summed in float32

    Attributes
    ----------
    params : dict of arrays
        "weight" (out_features, in_features), "bias" (out_features,).

    Methods
    -------
    __call__(x, train=True)
        x (N, in_features) -> y (N, out_features).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Linear(4, 3, rng=0)(np.ones((2, 4), np.float32))
    >>> y.shape, backprop(y).shape
    ((2, 3), (2, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        inputs, outputs = _layer.positive(self, in_features=in_features, out_features=out_features)
        bias, dtype = _layer.flag(self, "bias", bias), _layer.float_dtype(self, dtype)
        weight = _layer.he_normal(self, rng, (outputs, inputs), inputs, dtype)
        super().__init__(
            {"weight": weight} | ({"bias": np.zeros(outputs, dtype)} if bias else {}),
            settings={"in_features": inputs, "out_features": outputs, "bias": bias, "dtype": dtype},
        )

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        param = self.params["weight"]
        _layer.check_input(self, x, ("N", "in_features"), {"in_features": param.shape[1]}, param)
        wide, weight, bias = _arrays.wide(x), _arrays.wide(param), self.params.get("bias")
        y = wide @ weight.T
        if bias is not None:
            y += _arrays.wide(bias)
        y = _arrays.rounded(y, x.dtype)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            # forward: [N, in] [out, in] -> [N, out]
            _layer.check_grad(self, grad_y, like)
            grad = _arrays.wide(grad_y)
            _layer.add_grads(self, weight=grad.T @ wide, **({} if bias is None else {"bias": grad.sum(axis=0)}))
            return _arrays.rounded(grad @ weight, like.dtype)

        return y, backprop


class Flatten(_layer.Layer):
    """(N, ...) -> (N, product of the rest).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Flatten()(np.ones((2, 3, 4, 5)))
    >>> y.shape, backprop(y).shape
    ((2, 60), (2, 3, 4, 5))
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        _layer.check_input(self, x, None)
        if x.ndim < 1:
            raise ValueError(f"{self.name}: x must have shape (N, ...), got {tuple(x.shape)}")
        shape = x.shape
        y = x.reshape(shape[0], math.prod(shape[1:]))
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            return grad_y.reshape(shape)

        return y, backprop
