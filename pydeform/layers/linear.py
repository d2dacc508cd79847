"""Fully connected layer, and what goes before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform.layers import _layer


class Linear(_layer.Layer):
    """x @ weight.T + bias.

    Parameters
    ----------
    in_features, out_features : sizes
    bias : whether to add a bias
    rng : numpy.random.Generator or seed for the weight: He normal, variance 2 / in_features; the bias starts at 0
    dtype : of the parameters, and of the input it takes

    Call      x (N, in_features) -> y (N, out_features)
    params    "weight" (out_features, in_features), "bias" (out_features,)

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
        _layer.positive(self, in_features=in_features, out_features=out_features)
        weight = _layer.he_normal(rng, (out_features, in_features), in_features, dtype)
        super().__init__({"weight": weight} | ({"bias": np.zeros(out_features, dtype)} if bias else {}))

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        weight, bias = self.params["weight"], self.params.get("bias")
        _layer.check_input(self, x, ("N", "in_features"), {"in_features": weight.shape[1]}, weight.dtype)
        y = (x @ weight.T).astype(x.dtype, copy=False)  # of bfloat16 the product is float32
        if bias is not None:
            y += bias
        if not train:
            return y, _layer.nothing_kept(self)

        def backprop(grad_y: Any) -> Any:
            # forward: [N, in] [out, in] -> [N, out]
            _layer.check_grad(self, grad_y, y.shape)
            self.grads["weight"] += grad_y.T @ x
            if bias is not None:
                self.grads["bias"] += grad_y.sum(axis=0)
            return (grad_y @ weight).astype(x.dtype, copy=False)

        return y, backprop


class Flatten(_layer.Layer):
    """(N, ...) -> (N, product of the rest).

    >>> import numpy as np
    >>> y, backprop = Flatten()(np.ones((2, 3, 4, 5)))
    >>> y.shape, backprop(y).shape
    ((2, 60), (2, 3, 4, 5))
    """

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        if x.ndim < 1:
            raise ValueError(f"{self.name}: x must have shape (N, ...), got {tuple(x.shape)}")
        shape = x.shape
        y = x.reshape(shape[0], math.prod(shape[1:]))
        if not train:
            return y, _layer.nothing_kept(self)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, (shape[0], math.prod(shape[1:])))
            return grad_y.reshape(shape)

        return y, backprop
