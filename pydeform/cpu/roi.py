"""RoI pooling on NumPy arrays, every operator by the same kernels, which differ by the rules in their geometry.

What a bin reads is listed once for all of its channels, as rows times columns in which neighbouring points share
pixels; the input is copied to channels-last, unless few boxes or classes of few channels make that a waste. Backward
gives every gradient one owner, so that results are always deterministic. Kernels cite docs/math/roi.md.
"""

from __future__ import annotations

from typing import Any

from pydeform.cpu import _roi_backward, _roi_forward


def forward(input: Any, boxes: Any, offset: Any, mask: Any, g: Any) -> Any:
    return _roi_forward.forward(input, boxes, offset, mask, g)


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
) -> tuple[Any, Any, Any]:
    return _roi_backward.backward(grad_output, input, boxes, offset, mask, g, needs)
