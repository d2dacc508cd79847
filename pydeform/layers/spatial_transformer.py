"""Spatial transformer: what the input shows decides how it is moved, turned and scaled."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform import _arrays, _checks
from pydeform._grid_geometry import MODES, PADDINGS
from pydeform.layers import _layer
from pydeform.layers.linear import Linear
from pydeform.ops.affine_grid import affine_grid, affine_grid_backward
from pydeform.ops.grid_sample import grid_sample, grid_sample_backward

AXES = {2: ("N", "C", "H", "W"), 3: ("N", "C", "D", "H", "W")}


class SpatialTransformer(_layer.Layer):
    """Sample the input on an affine grid whose matrix a small network computes from it.

        theta = head(localisation(x))                head is linear; at first theta is the identity for every x
        y = grid_sample(x, affine_grid(theta, size))

    At first y is x (of its own size). The gradient of x is the sum of both ways through which y depends on it. Where
    the transform is to be learned slowly, as in the paper: `lr_mult={"head.*": 0.1, "localisation.*": 0.1}`.

    Parameters
    ----------
    localisation : Layer from x to features (N, features), for example a Sequential; its parameters are this layer's too
    output_size : of y, one number or one for each axis; None: that of x
    mode, padding_mode, align_corners : as in `pydeform.grid_sample`
    features : inputs of the head; None: as many as the last weight of localisation has rows
    axes : 2 for images; 3 for volumes, whose matrices have 12 numbers instead of 6
    dtype : of the head, and of the arrays it takes

    Attributes
    ----------
    params : dict of arrays
        "localisation.*"; "head.weight" (axes*(axes + 1), features), zeros; "head.bias", the identity row by row.

    Methods
    -------
    __call__(x, train=True)
        x (N, C, H, W) -> y (N, C, *output_size), or x (N, C, D, H, W) with `axes` 3; `theta(x)` is the matrices.

    References
    ----------
    arXiv:1506.02025 sections 3.1 to 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform.layers import Conv2d, GlobalAvgPool2d, ReLU, Sequential
    >>> layer = SpatialTransformer(Sequential(Conv2d(3, 8, 3, rng=0), ReLU(), GlobalAvgPool2d()), output_size=(4, 5))
    >>> x = np.ones((2, 3, 9, 8), np.float32)
    >>> y, backprop = layer(x)
    >>> y.shape, backprop(y).shape, layer.theta(x)[0].tolist()
    ((2, 3, 4, 5), (2, 3, 9, 8), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    """

    def __init__(
        self,
        localisation: _layer.Layer,
        output_size: Any = None,
        mode: str = "bilinear",
        padding_mode: str = "zeros",
        align_corners: bool = False,
        *,
        features: int | None = None,
        axes: int = 2,
        dtype: Any = np.float32,
    ) -> None:
        if not isinstance(localisation, _layer.Layer):
            raise TypeError(f"{self.name}: localisation must be a Layer, got {localisation!r}")
        if isinstance(axes, bool) or not isinstance(axes, int | np.integer) or axes not in AXES:
            raise ValueError(f"{self.name}: axes must be 2 or 3, got {axes!r}")
        _checks.check_choice(self.name, "mode", mode, tuple(MODES))
        if mode == "bicubic" and axes != 2:
            raise ValueError(f"{self.name}: mode 'bicubic' needs axes 2, got {axes!r}")
        _checks.check_choice(self.name, "padding_mode", padding_mode, tuple(PADDINGS))
        size = None if output_size is None else _checks.per_axis(self.name, "output_size", output_size, axes, 1)
        dtype, (count,) = (
            _layer.float_dtype(self, dtype),
            _layer.positive(self, features=self._count(localisation, features)),
        )
        self.axes, self.output_size, self.align_corners = axes, size, _layer.flag(self, "align_corners", align_corners)
        self.options: dict[str, Any] = {"mode": mode, "padding_mode": padding_mode, "align_corners": self.align_corners}
        made_of = {"localisation": localisation, "output_size": size, **self.options}
        super().__init__(settings={**made_of, "features": features, "axes": axes, "dtype": dtype})
        self.localisation, self.head = localisation, Linear(count, axes * (axes + 1), dtype=dtype)
        self.head.params["weight"][...] = 0
        self.head.params["bias"][...] = np.eye(axes, axes + 1).ravel()
        for name in ("localisation", "head"):
            _layer.hold(self, name, getattr(self, name))

    def theta(self, x: Any) -> Any:
        """What the localisation network computes: (N, axes, axes + 1), as `pydeform.affine_grid` takes it."""
        return self._theta(x, train=False)[0]

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        theta, back_theta = self._theta(x, train)
        # of half types in float32: their own numbers tell few pixels apart
        theta = _arrays.wide(theta)
        size = *x.shape[:2], *(self.output_size or x.shape[2:])
        grid = affine_grid(theta, size, self.align_corners)
        y = grid_sample(x, grid, **self.options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = grid_sample_backward(grad_y, x, grid, **self.options)
            of_theta = affine_grid_backward(grads.grid, theta, size, self.align_corners).theta
            through_theta = back_theta(_arrays.rounded(of_theta, like.dtype))
            return _arrays.rounded(_arrays.wide(grads.input) + _arrays.wide(through_theta), like.dtype)

        return y, backprop

    def _theta(self, x: Any, train: bool) -> tuple[Any, _layer.Backprop]:
        _layer.check_input(self, x, AXES[self.axes], None, self.params["head.bias"])
        features, back_features = self.localisation(x, train)
        flat, back_head = self.head(features, train)
        shape = flat.shape
        return flat.reshape(-1, self.axes, self.axes + 1), lambda grad: back_features(back_head(grad.reshape(shape)))

    def _count(self, localisation: _layer.Layer, features: int | None) -> int:
        if features is not None:
            return features
        weights = [param for name, param in localisation.params.items() if name.rpartition(".")[2] == "weight"]
        if not weights:
            raise ValueError(f"{self.name}: features must be given, localisation has no weight that would tell it")
        return int(weights[-1].shape[0])
