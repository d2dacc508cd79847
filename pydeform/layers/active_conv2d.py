"""Active convolution as a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform.layers import _layer
from pydeform.layers._conv import PlainConvolution
from pydeform.ops.active_conv2d import active_conv2d, active_conv2d_backward


class ActiveConv2d(PlainConvolution):
    """Convolution that learns where its taps are: one place for each, shared by all pixels and images.

    The positions start at zero, where the layer is the plain convolution of its weight.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, groups, bias, rng, dtype : as in `Conv2d`
    position_groups : how many groups of input channels have positions of their own

    Attributes
    ----------
    params : dict of arrays
        "weight", "bias" as in `Conv2d`; "positions" (2 * position_groups * kernel_h * kernel_w,), (y, x) of each tap in
        input pixels.

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, H, W) -> y (N, out_channels, out_h, out_w).

    References
    ----------
    arXiv:1703.09076.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ActiveConv2d(3, 8, 3, padding=1, rng=0)
    >>> y, backprop = layer(np.ones((2, 3, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape, layer.grads["positions"].shape
    ((2, 8, 6, 5), (2, 3, 6, 5), (18,))
    """

    axes, arguments = 2, ("positions", "weight", "bias")
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
        settings = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "groups": groups,
            "position_groups": position_groups,
            "bias": bias,
            "dtype": dtype,
        }
        self._make(rng, settings)
        del self.options["dilation"]

    def _more_params(self, settings: dict[str, Any]) -> dict[str, Any]:
        count = 2 * settings["position_groups"] * math.prod(self.kernel_size)
        return {"positions": np.zeros(count, settings["dtype"])}
