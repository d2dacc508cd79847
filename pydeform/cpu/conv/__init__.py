"""Convolutions over one to three axes on NumPy arrays: tiles of output positions, sampled into cache and multiplied.

The image is copied once to channels-last, so that a corner is one contiguous run of channels, and a tile of sampled
columns never leaves the cache: no column buffer of the whole problem exists. A plain convolution is a deformable one
whose taps do not move: its offset is None; active convolution has one offset for all positions. Kernels cite
docs/math/deform_conv2d.md and deform_conv.md. Options that choose between ways on CUDA choose nothing here: results are
always deterministic and in full precision.

Which problem takes which way, and why:

- few samples of a large image (`plan.prefers_planes`): corners are gathered from the image as it lies, since the copy
  would be most of the work and of the memory
- no offset: columns are copied, not blended, since a tap reads one pixel
- depthwise, one input and one output channel in each group: columns times one weight each, since there is nothing to
  sum over channels
- bfloat16 where the processor multiplies pairs of it (`plan.numbers_of`): columns and weights become pairs, two to four
  times as fast, rounded as on CUDA's tensor cores
- an image of few channels, backward: two pieces of its tiles, so that there is work for two threads

What a problem does not take is not compiled into its kernel: see the arguments that may be None.
"""

from __future__ import annotations

from typing import Any

from pydeform.cpu.conv import backward_kernel, forward_kernel


def forward(arrays: Any, g: Any, **_options: bool) -> Any:
    return forward_kernel.forward(arrays, g)


def backward(grad_output: Any, arrays: Any, g: Any, needs: Any, **_options: bool) -> dict[str, Any]:
    return backward_kernel.backward(grad_output, arrays, g, needs)
