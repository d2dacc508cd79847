"""Plain convolution of volumes as a layer."""

from pydeform.layers._conv import PlainConvolution
from pydeform.ops.conv3d import conv3d, conv3d_backward


class Conv3d(PlainConvolution):
    """`Conv2d` over three axes: `pydeform.conv3d` with learned weight and bias.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng, dtype : as in `Conv2d`

    Attributes
    ----------
    params : dict of arrays
        "weight" (out_channels, in_channels/groups, kernel_d, kernel_h, kernel_w), "bias" (out_channels,).

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, D, H, W) -> y (N, out_channels, out_d, out_h, out_w).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Conv3d(3, 8, 3, padding=1, rng=0)(np.ones((2, 3, 4, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape
    ((2, 8, 4, 6, 5), (2, 3, 4, 6, 5))
    """

    axes = 3
    forward, backward = staticmethod(conv3d), staticmethod(conv3d_backward)
