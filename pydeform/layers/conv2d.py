"""Plain convolution as a layer."""

from pydeform.layers._conv import PlainConvolution
from pydeform.ops.conv2d import conv2d, conv2d_backward


class Conv2d(PlainConvolution):
    """Convolution with learned weight and bias.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups : as in `pydeform.conv2d`
    bias : whether to add a bias
    rng : numpy.random.Generator or seed for the weight: He normal, variance 2 / fan_in; the bias starts at 0
    dtype : of the parameters, and of the input it takes

    Attributes
    ----------
    params : dict of arrays
        "weight" (out_channels, in_channels/groups, kernel_h, kernel_w), "bias" (out_channels,).

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, H, W) -> y (N, out_channels, out_h, out_w).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Conv2d(3, 8, 3, padding=1, rng=0)(np.ones((2, 3, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape
    ((2, 8, 6, 5), (2, 3, 6, 5))
    """

    axes = 2
    forward, backward = staticmethod(conv2d), staticmethod(conv2d_backward)
