"""Plain convolution of signals as a layer."""

from pydeform.layers._conv import PlainConvolution
from pydeform.ops.conv1d import conv1d, conv1d_backward


class Conv1d(PlainConvolution):
    """`Conv2d` over one axis: `pydeform.conv1d` with learned weight and bias.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng, dtype : as in `Conv2d`

    Attributes
    ----------
    params : dict of arrays
        "weight" (out_channels, in_channels/groups, kernel), "bias" (out_channels,).

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, L) -> y (N, out_channels, out).

    Examples
    --------
    >>> import numpy as np
    >>> y, backprop = Conv1d(3, 8, 3, padding=1, rng=0)(np.ones((2, 3, 9), np.float32))
    >>> y.shape, backprop(y).shape
    ((2, 8, 9), (2, 3, 9))
    """

    axes = 1
    forward, backward = staticmethod(conv1d), staticmethod(conv1d_backward)
