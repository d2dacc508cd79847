"""Deformable convolution of volumes with the branch that learns its offsets."""

from pydeform.layers._conv import DeformableConvolution
from pydeform.ops.conv3d import conv3d, conv3d_backward
from pydeform.ops.deform_conv3d import deform_conv3d, deform_conv3d_backward


class DeformConv3d(DeformableConvolution):
    """`DeformConv2d` over three axes: a second convolution computes offsets (and mask) from the same input.

    With K taps the branch's output channels are, for offset group og and tap k, offset (og*K + k)*3 + (0 for d, 1 for
    h, 2 for w) in input pixels; then, when modulated, mask logits 3*offset_groups*K + og*K + k;
    mask = mask_scale * sigmoid(logit).

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups : as in `DeformConv2d`
    bias, modulated, mask_scale, boundary, rng, dtype : as there

    Attributes
    ----------
    params : dict of arrays
        "weight", "bias"; "offset.weight" (3K or 4K * offset_groups, in_channels, kernel_d, kernel_h, kernel_w),
        "offset.bias".

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, D, H, W) -> y (N, out_channels, out_d, out_h, out_w).

    Examples
    --------
    >>> import numpy as np
    >>> layer = DeformConv3d(3, 8, 3, padding=1, modulated=True, rng=0)
    >>> y, backprop = layer(np.ones((2, 3, 4, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset.weight"].shape
    ((2, 8, 4, 6, 5), (2, 3, 4, 6, 5), (108, 3, 3, 3, 3))
    """

    axes = 3
    forward, backward = staticmethod(deform_conv3d), staticmethod(deform_conv3d_backward)
    plain, plain_backward = staticmethod(conv3d), staticmethod(conv3d_backward)
