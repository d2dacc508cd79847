"""Deformable operators as plain functions of arrays: forward and analytic backward, on NumPy and CuPy."""

from pydeform._runtime import get_num_threads, set_num_threads
from pydeform._version import __version__
from pydeform.ops.analysis import effective_dilation, sampling_locations
from pydeform.ops.conv2d import Conv2dGrads, conv2d, conv2d_backward
from pydeform.ops.deform_conv2d import DeformConv2dGrads, deform_conv2d, deform_conv2d_backward

__all__ = [
    "Conv2dGrads",
    "DeformConv2dGrads",
    "__version__",
    "conv2d",
    "conv2d_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "effective_dilation",
    "get_num_threads",
    "sampling_locations",
    "set_num_threads",
]
