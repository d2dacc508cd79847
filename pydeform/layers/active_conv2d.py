"""Active convolution as a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform.layers import _layer
from pydeform.layers._conv import Convolution, conv_options, conv_weight
from pydeform.ops.active_conv2d import active_conv2d, active_conv2d_backward


class ActiveConv2d(Convolution):
    """Convolution that learns where its taps are: one place for each, shared by all pixels and images.

    The positions start at zero, where the layer is the plain convolution of its weight.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, groups, bias, rng, dtype : as in `Conv2d`
    position_groups : how many groups of input channels have positions of their own

    Call      x (N, in_channels, H, W) -> y (N, out_channels, out_h, out_w)
    params    "weight", "bias" as in `Conv2d`; "positions" (2 * position_groups * kernel_h * kernel_w,), (y, x) of each
              tap in input pixels
    Source    arXiv:1703.09076

    >>> import numpy as np
    >>> layer = ActiveConv2d(3, 8, 3, padding=1, rng=0)
    >>> y, backprop = layer(np.ones((2, 3, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape, layer.grads["positions"].shape
    ((2, 8, 6, 5), (2, 3, 6, 5), (18,))
    """

    axes = 2
    forward, backward = staticmethod(active_conv2d), staticmethod(active_conv2d_backward)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        groups: int = 1,
        position_groups: int = 1,
        bias: bool = True,
        *,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        inputs, outputs, groups, position_groups = _layer.positive(
            self, in_channels=in_channels, out_channels=out_channels, groups=groups, position_groups=position_groups
        )
        if inputs % position_groups:
            raise ValueError(
                f"{self.name}: in_channels must be a multiple of position_groups = {position_groups}, got {inputs}"
            )
        bias, dtype = _layer.flag(self, "bias", bias), _layer.float_dtype(self, dtype)
        weight = conv_weight(self, inputs, outputs, kernel_size, groups, rng, dtype)
        options = conv_options(self, weight.shape[2:], stride, padding, 1)
        self.in_channels = inputs
        self.options = {name: options[name] for name in ("stride", "padding")}
        positions = np.zeros(2 * position_groups * math.prod(weight.shape[2:]), dtype)
        super().__init__(
            {"weight": weight} | ({"bias": np.zeros(outputs, dtype)} if bias else {}) | {"positions": positions},
            settings={
                "in_channels": inputs,
                "out_channels": outputs,
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "groups": groups,
                "position_groups": position_groups,
                "bias": bias,
                "dtype": dtype,
            },
        )

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        weight, bias, positions = self.params["weight"], self.params.get("bias"), self.params["positions"]
        _layer.check_input(self, x, self.input_axes(), {"in_channels": self.in_channels}, weight)
        y = self.forward(x, positions, weight, bias, **self.options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = self.backward(grad_y, x, positions, weight, bias, **self.options)
            _layer.add_grads(self, **{name: getattr(grads, name) for name in self.params})
            return grads.input

        return y, backprop
