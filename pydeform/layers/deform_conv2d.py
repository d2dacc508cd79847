"""Deformable convolution with the branch that learns its offsets."""

from pydeform.layers._conv import DeformableConvolution
from pydeform.ops.conv2d import conv2d, conv2d_backward
from pydeform.ops.deform_conv2d import deform_conv2d, deform_conv2d_backward


class DeformConv2d(DeformableConvolution):
    """Deformable convolution whose offsets (and mask) a second convolution computes from the same input.

    The offset branch has the kernel, stride, padding and dilation of the layer and starts at zero: at first the layer
    is the plain convolution of its weight (times mask_scale / 2 when modulated). With K = kernel_h * kernel_w its
    output channels are, for offset group og and tap k (row-major), offset (og*K + k)*2 + (0 for y, 1 for x) in input
    pixels; then, when modulated, mask logits 2*offset_groups*K + og*K + k; mask = mask_scale * sigmoid(logit).
    That is the order of mmcv and of the authors' code, so their weights fit.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, rng, dtype : as in `Conv2d`
    bias : of the main convolution; the offset branch always has one
    offset_groups : how many groups of channels move independently
    modulated : version 2, with a mask
    mask_scale : 1 as in the paper (mask starts at 1/2), or 2 as in its code (starts at 1)
    boundary : "torchvision" | "dcnv2" | "dcnv1", as in `pydeform.deform_conv2d`

    Attributes
    ----------
    params : dict of arrays
        "weight", "bias"; "offset.weight" (2K or 3K * offset_groups, in_channels, kernel_h, kernel_w), "offset.bias".
        The papers train the last two at 0.1 times the learning rate: `lr_mult={"*offset.*": 0.1}`.

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, H, W) -> y (N, out_channels, out_h, out_w).

    References
    ----------
    arXiv:1703.06211 sections 2.1, 4.1; arXiv:1811.11168 eq. 1.

    Examples
    --------
    >>> import numpy as np
    >>> layer = DeformConv2d(3, 8, 3, padding=1, modulated=True, rng=0)
    >>> y, backprop = layer(np.ones((2, 3, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset.weight"].shape
    ((2, 8, 6, 5), (2, 3, 6, 5), (27, 3, 3, 3))
    """

    axes = 2
    forward, backward = staticmethod(deform_conv2d), staticmethod(deform_conv2d_backward)
    plain, plain_backward = staticmethod(conv2d), staticmethod(conv2d_backward)
