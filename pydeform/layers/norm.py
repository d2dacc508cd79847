"""Batch normalisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.layers import _layer


class BatchNorm2d(_layer.Layer):
    """Normalise each channel over batch and image, then scale and shift.

    y = weight * (x - mean) / sqrt(variance + eps) + bias. With train=True mean and (biased) variance are those of the
    batch, and the running statistics move towards them by `momentum` (the variance unbiased, as in PyTorch); with
    train=False the running statistics are used.

    Call      x (N, channels, H, W) -> y of the same shape
    params    "weight", "bias" (channels,), starting at 1 and 0
    state     "running_mean", "running_var" (channels,), starting at 0 and 1; saved, not learned

    >>> import numpy as np
    >>> y, backprop = BatchNorm2d(3)(np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2))
    >>> y.shape, bool(abs(y.mean()) < 1e-6), backprop(y).shape
    ((2, 3, 2, 2), True, (2, 3, 2, 2))
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, *, dtype: Any = np.float32) -> None:
        _layer.positive(self, channels=channels)
        self.channels, self.eps, self.momentum = channels, eps, momentum
        super().__init__(
            {"weight": np.ones(channels, dtype), "bias": np.zeros(channels, dtype)},
            {"running_mean": np.zeros(channels, dtype), "running_var": np.ones(channels, dtype)},
        )

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        weight, bias = self.params["weight"], self.params["bias"]
        _layer.check_input(self, x, ("N", "channels", "H", "W"), {"channels": self.channels}, weight.dtype)
        if not train:
            # one multiplication and one addition a value
            scale = weight / np.sqrt(self.state["running_var"] + self.eps)
            shift = bias - self.state["running_mean"] * scale
            return x * scale[:, None, None] + shift[:, None, None], _layer.nothing_kept(self)
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count < 2:
            raise ValueError(
                f"{self.name}: x must have at least 2 values per channel when train=True, got shape {tuple(x.shape)}"
            )
        centred = x - x.mean(axis=(0, 2, 3), keepdims=True)
        variance = (centred * centred).mean(axis=(0, 2, 3))
        inverse = 1 / np.sqrt(variance + self.eps)
        normal = centred * inverse[:, None, None]
        self._remember(x, variance, count)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, normal.shape)
            grad_weight = (grad_y * normal).sum(axis=(0, 2, 3))
            grad_bias = grad_y.sum(axis=(0, 2, 3))
            self.grads["weight"] += grad_weight
            self.grads["bias"] += grad_bias
            # mean and variance depend on x too: take out of grad_y its mean and its part along `normal`
            along = normal * (grad_weight / count)[:, None, None]
            return (grad_y - (grad_bias / count)[:, None, None] - along) * (weight * inverse)[:, None, None]

        return normal * weight[:, None, None] + bias[:, None, None], backprop

    def _remember(self, x: Any, variance: Any, count: int) -> None:
        mean, var = self.state["running_mean"], self.state["running_var"]
        mean += self.momentum * (x.mean(axis=(0, 2, 3)) - mean)
        var += self.momentum * (variance * (count / (count - 1)) - var)
