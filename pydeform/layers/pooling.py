"""Pooling over windows and over the whole image."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _arrays
from pydeform.layers import _layer


class GlobalAvgPool2d(_layer.Layer):
    """Mean over the image: (N, C, H, W) -> (N, C).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = GlobalAvgPool2d()(np.ones((2, 3, 4, 5)))
    >>> y.shape, backprop(y).shape
    ((2, 3), (2, 3, 4, 5))
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        xp = _layer.check_input(self, x, ("N", "C", "H", "W"))
        shape, dtype = x.shape, x.dtype
        if shape[2] * shape[3] == 0:
            raise ValueError(f"{self.name}: x must have at least one pixel, got shape {tuple(shape)}")
        y = _arrays.rounded(_arrays.wide(x).mean(axis=(2, 3)), dtype)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grad_x = xp.empty(shape, dtype)
            grad = _arrays.wide(grad_y) / (shape[2] * shape[3])
            grad_x[...] = _arrays.rounded(grad, dtype)[:, :, None, None]
            return grad_x

        return y, backprop


class MaxPool2d(_layer.Layer):
    """Largest value of each window. Of equal values the first one, row by row, gets the gradient.

    Parameters
    ----------
    kernel_size, stride, padding : int or (vertical, horizontal); stride is kernel_size when None; padding adds
        pixels that never win, at most half a window of them

    Methods
    -------
    __call__(x, train=True)
        x (N, C, H, W) -> y (N, C, (H + 2*padding - kernel_h)//stride + 1, likewise).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = MaxPool2d(2)(np.arange(16.0).reshape(1, 1, 4, 4))
    >>> print(y[0, 0], backprop(np.ones((1, 1, 2, 2)))[0, 0, 3])
    [[ 5.  7.]
     [13. 15.]] [0. 1. 0. 1.]
    """

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0) -> None:
        self.kernel_size = _layer.pair(self, "kernel_size", kernel_size)
        self.stride = self.kernel_size if stride is None else _layer.pair(self, "stride", stride)
        self.padding = _layer.pair(self, "padding", padding, minimum=0)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(
                f"{self.name}: padding must be at most half of kernel_size = {self.kernel_size}, got {self.padding}"
            )
        super().__init__(settings={"kernel_size": kernel_size, "stride": stride, "padding": padding})

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        xp = _layer.check_input(self, x, ("N", "C", "H", "W"))
        windows = self._windows(x.shape[2:])
        padded = self._pad(xp, _arrays.wide(x))
        best = padded[windows[0]].copy()
        winner = xp.zeros(best.shape, np.int32)
        winner[...] = self._first_pixels(xp, best.shape[2:])
        for tap, window in enumerate(windows[1:], start=1):
            value = padded[window]
            wins = (value > best) | (value != value)  # NaN wins and stays, as in every framework
            best = xp.where(wins, value, best)
            winner = xp.where(wins, np.int32(tap), winner)
        y = _arrays.rounded(best, x.dtype)
        if not train:
            return y, _layer.nothing_kept(self)
        shape, padded_shape, like = x.shape, padded.shape, _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grad = _arrays.wide(grad_y)
            grad_x = xp.zeros(padded_shape, grad.dtype)
            finite = _arrays.surely_finite(grad)
            for tap, window in enumerate(windows):
                wins = winner == tap
                grad_x[window] += grad * wins if finite else xp.where(wins, grad, 0)
            top, left = self.padding
            return _arrays.rounded(grad_x[:, :, top : top + shape[2], left : left + shape[3]], like.dtype)

        return y, backprop

    def _first_pixels(self, xp: ModuleType, size: tuple[int, int]) -> Any:
        """The first tap of each window that is no padding: it wins where all are -inf, as padding is."""
        axes = zip(size, self.stride, self.padding, strict=True)
        rows, columns = (xp.maximum(p - s * xp.arange(n, dtype=np.int32), 0) for n, s, p in axes)
        return rows[:, None] * self.kernel_size[1] + columns

    def _windows(self, size: tuple[int, int]) -> list[tuple[Any, ...]]:
        """One strided view of the padded image per tap, row by row."""
        spans: list[list[slice]] = []
        for n, k, s, p in zip(size, self.kernel_size, self.stride, self.padding, strict=True):
            out = (n + 2 * p - k) // s + 1
            if out < 1:
                raise ValueError(
                    f"{self.name}: x must be at least as large as kernel_size = {self.kernel_size} with padding = "
                    f"{self.padding}, got (H, W) = {tuple(size)}"
                )
            spans.append([slice(tap, tap + (out - 1) * s + 1, s) for tap in range(k)])
        return [(slice(None), slice(None), rows, columns) for rows in spans[0] for columns in spans[1]]

    def _pad(self, xp: ModuleType, x: Any) -> Any:
        top, left = self.padding
        if not top and not left:
            return x
        padded = xp.full((*x.shape[:2], x.shape[2] + 2 * top, x.shape[3] + 2 * left), -xp.inf, x.dtype)
        padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
        return padded
