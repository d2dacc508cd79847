"""Batch normalisation."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _arrays
from pydeform.layers import _layer


class BatchNorm2d(_layer.Layer):
    """Normalise each channel over batch and image, then scale and shift.

    y = weight * (x - mean) / sqrt(variance + eps) + bias. With train=True mean and (biased) variance are those of the
    batch, and the running statistics move towards them by `momentum` (the variance unbiased, as in PyTorch); with
    train=False the running statistics are used. Of half types all this is computed, and the statistics kept, in
    float32. A channel whose variance is infinite gives NaN, not the 0 of a division by it.

    Parameters
    ----------
    channels : of x
    eps : added to the variance, at least 0
    momentum : from 0 to 1
    dtype : of the parameters, and of the input it takes

    Attributes
    ----------
    params : dict of arrays
        "weight", "bias" (channels,), starting at 1 and 0.
    state : dict of arrays
        "running_mean", "running_var" (channels,), starting at 0 and 1; saved, not learned.

    Methods
    -------
    __call__(x, train=True)
        x (N, channels, H, W) -> y of the same shape.

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = BatchNorm2d(3)(np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2))
    >>> y.shape, bool(abs(y.mean()) < 1e-6), backprop(y).shape
    ((2, 3, 2, 2), True, (2, 3, 2, 2))
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, *, dtype: Any = np.float32) -> None:
        (self.channels,) = _layer.positive(self, channels=channels)
        self.eps = _layer.number(self.name, "eps", eps, 0)
        self.momentum = _layer.number(self.name, "momentum", momentum, 0, 1)
        dtype = _layer.float_dtype(self, dtype)
        wide = _arrays.wide_dtype(dtype)
        super().__init__(
            {"weight": np.ones(self.channels, dtype), "bias": np.zeros(self.channels, dtype)},
            {"running_mean": np.zeros(self.channels, wide), "running_var": np.ones(self.channels, wide)},
            settings={"channels": self.channels, "eps": self.eps, "momentum": self.momentum, "dtype": dtype},
        )

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        param = self.params["weight"]
        xp = _layer.check_input(self, x, ("N", "channels", "H", "W"), {"channels": self.channels}, param)
        weight, bias, wide = _arrays.wide(param), _arrays.wide(self.params["bias"]), _arrays.wide(x)
        if not train:
            # one multiplication and one addition a value
            scale = weight / self._root(xp, self.state["running_var"])
            shift = bias - self.state["running_mean"] * scale
            y = wide * scale[:, None, None] + shift[:, None, None]
            return _arrays.rounded(y, x.dtype), _layer.nothing_kept(self)
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count < 2:
            raise ValueError(
                f"{self.name}: x must have at least 2 values per channel when train=True, got shape {tuple(x.shape)}"
            )
        centred = wide - wide.mean(axis=(0, 2, 3), keepdims=True)
        variance = (centred * centred).mean(axis=(0, 2, 3))
        inverse = 1 / self._root(xp, variance)
        normal = centred * inverse[:, None, None]
        self._remember(wide, variance, count)
        like = _layer.like(self, x)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grad = _arrays.wide(grad_y)
            grad_weight = (grad * normal).sum(axis=(0, 2, 3))
            grad_bias = grad.sum(axis=(0, 2, 3))
            _layer.add_grads(self, weight=grad_weight, bias=grad_bias)
            # mean and variance depend on x too: take out of grad_y its mean and its part along `normal`
            along = normal * (grad_weight / count)[:, None, None]
            grad_x = (grad - (grad_bias / count)[:, None, None] - along) * (weight * inverse)[:, None, None]
            return _arrays.rounded(grad_x, like.dtype)

        return _arrays.rounded(normal * weight[:, None, None] + bias[:, None, None], x.dtype), backprop

    def _root(self, xp: ModuleType, variance: Any) -> Any:
        return xp.sqrt(xp.where(variance < xp.inf, variance, xp.nan) + self.eps)

    def _remember(self, x: Any, variance: Any, count: int) -> None:
        mean, var = self.state["running_mean"], self.state["running_var"]
        mean += self.momentum * (x.mean(axis=(0, 2, 3)) - mean)
        var += self.momentum * (variance * (count / (count - 1)) - var)
