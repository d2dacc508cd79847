"""RoI pooling on NumPy arrays, every operator by the same kernels, which differ by the rules in their geometry.

What a bin reads is listed once for all of its channels, as rows times columns in which neighbouring points share
pixels; the input is copied to channels-last, unless few boxes or classes of few channels make that a waste. Backward
gives every gradient one owner, so that results are always deterministic. Kernels cite docs/math/roi.md.

Which problem takes which way, and why:

- channels of a class by the vector (`forward_kernel`, `backward_kernel`): a slice of the channels is copied to
  channels-last, and each bin of each box sums runs of channels
- few boxes on a large image (`common.prefers_planes`): pixels are gathered from the image as it lies, since the copy
  would be most of the work
- classes of fewer channels than half a vector (`common.has_few_channels`, `few`): each channel in its plane, since a
  pixel would fill a small part of a vector
- the largest point or pixel of a bin (`largest`): candidates are compared, not summed
"""

from __future__ import annotations

from typing import Any

from pydeform.cpu.roi import backward_kernel as roi_backward
from pydeform.cpu.roi import forward_kernel as roi_forward


def forward(input: Any, boxes: Any, offset: Any, mask: Any, g: Any) -> Any:
    return roi_forward.forward(input, boxes, offset, mask, g)


def backward(
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any,
    mask: Any,
    g: Any,
    needs: Any,
    *,
    deterministic: bool = False,
) -> dict[str, Any]:
    return roi_backward.backward(grad_output, input, boxes, offset, mask, g, needs)
