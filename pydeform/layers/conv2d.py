"""Plain convolution as a layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform import _checks
from pydeform.layers import _layer
from pydeform.ops.conv2d import conv2d, conv2d_backward


class Conv2d(_layer.Layer):
    """Convolution with learned weight and bias.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups : as in `pydeform.conv2d`
    bias : whether to add a bias
    rng : numpy.random.Generator or seed for the weight: He normal, variance 2 / fan_in; the bias starts at 0
    dtype : of the parameters, and of the input it takes

    Call      x (N, in_channels, H, W) -> y (N, out_channels, out_h, out_w)
    params    "weight" (out_channels, in_channels/groups, kernel_h, kernel_w), "bias" (out_channels,)

    >>> import numpy as np
    >>> y, backprop = Conv2d(3, 8, 3, padding=1, rng=0)(np.ones((2, 3, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape
    ((2, 8, 6, 5), (2, 3, 6, 5))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        inputs, outputs, groups = _layer.positive(
            self, in_channels=in_channels, out_channels=out_channels, groups=groups
        )
        bias, dtype = _layer.flag(self, "bias", bias), _layer.float_dtype(self, dtype)
        weight = conv_weight(self, inputs, outputs, kernel_size, groups, rng, dtype)
        self.in_channels = inputs
        self.options = {**conv_options(self, weight.shape[2:], stride, padding, dilation), "groups": groups}
        super().__init__(
            {"weight": weight} | ({"bias": np.zeros(outputs, dtype)} if bias else {}),
            settings={
                "in_channels": inputs,
                "out_channels": outputs,
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "groups": groups,
                "bias": bias,
                "dtype": dtype,
            },
        )

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        weight, bias = self.params["weight"], self.params.get("bias")
        _layer.check_input(self, x, ("N", "in_channels", "H", "W"), {"in_channels": self.in_channels}, weight)
        y = conv2d(x, weight, bias, **self.options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = conv2d_backward(grad_y, x, weight, bias, **self.options)
            _layer.add_grads(self, **{name: getattr(grads, name) for name in self.params})
            return grads.input

        return y, backprop


def conv_weight(
    layer: _layer.Layer,
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    groups: int,
    rng: _layer.Seed,
    dtype: Any,
) -> Any:
    """He normal weight (out_channels, in_channels/groups, kernel_h, kernel_w)."""
    for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{layer.name}: {argument} must be a multiple of groups = {groups}, got {channels}")
    kernel_h, kernel_w = _layer.pair(layer, "kernel_size", kernel_size)
    shape = (out_channels, in_channels // groups, kernel_h, kernel_w)
    return _layer.he_normal(layer, rng, shape, shape[1] * kernel_h * kernel_w, dtype)


def conv_options(layer: _layer.Layer, kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, Any]:
    """Checked when the layer is made, not at its first call."""
    strides, dilations = _layer.pair(layer, "stride", stride), _layer.pair(layer, "dilation", dilation)
    pairs = _checks.padding_pairs(layer.name, padding, (1, 1), kernel, strides, dilations)
    return {"stride": strides, "padding": padding if isinstance(padding, str) else pairs, "dilation": dilations}
