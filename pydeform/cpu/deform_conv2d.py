"""Deformable convolution on NumPy arrays: tiles of output positions, sampled into cache and multiplied at once.

The image is copied once to channels-last, so that a corner is one contiguous run of channels, and a tile of sampled
columns never leaves the cache: no column buffer of the whole problem exists. Kernels cite docs/math/deform_conv2d.md.
"""

from pydeform.cpu._conv_backward import backward
from pydeform.cpu._conv_forward import forward

__all__ = ["backward", "forward"]
