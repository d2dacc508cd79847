"""Deformable convolution on NumPy arrays: tiles of output positions, sampled into cache and multiplied at once.

The image is copied once to channels-last, so that a corner is one contiguous run of channels, and a tile of sampled
columns never leaves the cache: no column buffer of the whole problem exists. Of an image with few samples the corners
are gathered instead. Kernels cite docs/math/deform_conv2d.md.
Options that choose between ways on CUDA choose nothing here: results are always deterministic and in full precision.
"""

from __future__ import annotations

from typing import Any

from pydeform.cpu import _conv_backward, _conv_forward


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    return _conv_forward.forward(input, offset, weight, bias, mask, g)


def backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    g: Any,
    needs: Any,
    *,
    deterministic: bool = False,
    allow_tf32: bool = False,
) -> tuple[Any, Any, Any, Any, Any]:
    return _conv_backward.backward(grad_output, input, offset, weight, bias, mask, g, needs)
