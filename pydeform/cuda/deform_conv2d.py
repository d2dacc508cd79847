"""Deformable convolution on CuPy arrays: samples go through shared memory into tensor cores, no column buffer exists.

The image is copied once to channels-last, so that a corner is one run of 16-byte loads, unless it has few channels or
few samples. Kernels cite docs/math/deform_conv2d.md.
"""

from __future__ import annotations

from typing import Any

from pydeform.cuda import _conv_backward, _conv_forward


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    return _conv_forward.forward("deform_conv2d", input, offset, weight, bias, mask, g, allow_tf32=allow_tf32)


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
    return _conv_backward.backward(
        "deform_conv2d",
        *(grad_output, input, offset, weight, bias, mask, g, needs),
        deterministic=deterministic,
        allow_tf32=allow_tf32,
    )
