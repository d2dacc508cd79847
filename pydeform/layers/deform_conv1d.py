"""Deformable convolution of signals with the branch that learns its offsets."""

from pydeform.layers._conv import DeformableConvolution
from pydeform.ops.conv1d import conv1d, conv1d_backward
from pydeform.ops.deform_conv1d import deform_conv1d, deform_conv1d_backward


class DeformConv1d(DeformableConvolution):
    """`DeformConv2d` over one axis: a second convolution computes offsets (and mask) from the same input.

    With K taps the branch's output channels are, for offset group og and tap k, offset og*K + k in
    input pixels; then, when modulated, mask logits offset_groups*K + og*K + k; mask = mask_scale * sigmoid(logit).

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, offset_groups : as in `DeformConv2d`
    bias, modulated, mask_scale, boundary, rng, dtype : as there

    Attributes
    ----------
    params : dict of arrays
        "weight", "bias"; "offset.weight" (K or 2K * offset_groups, in_channels, kernel), "offset.bias".

    Methods
    -------
    __call__(x, train=True)
        x (N, in_channels, L) -> y (N, out_channels, out).

    Examples
    --------
    >>> import numpy as np
    >>> layer = DeformConv1d(3, 8, 3, padding=1, modulated=True, rng=0)
    >>> y, backprop = layer(np.ones((2, 3, 9), np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset.weight"].shape
    ((2, 8, 9), (2, 3, 9), (6, 3, 3))
    """

    axes = 1
    forward, backward = staticmethod(deform_conv1d), staticmethod(deform_conv1d_backward)
    plain, plain_backward = staticmethod(conv1d), staticmethod(conv1d_backward)
