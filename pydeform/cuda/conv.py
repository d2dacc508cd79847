"""Convolutions on CuPy arrays: samples go through shared memory into tensor cores, no column buffer exists.

A plain convolution is a deformable one whose taps do not move: its offset is None, and nothing of it needs atomics. The
image is copied once to channels-last, so that a corner is one run of 16-byte loads, unless it has few channels or few
samples. Kernels cite docs/math/deform_conv2d.md.
"""

from __future__ import annotations

from typing import Any

from pydeform.cuda import _conv_backward, _conv_forward


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    return _conv_forward.forward(_source_of(offset), input, offset, weight, bias, mask, g, allow_tf32=allow_tf32)


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
) -> dict[str, Any]:
    grads = _conv_backward.backward(
        _source_of(offset),
        *(grad_output, input, offset, weight, bias, mask, g, needs),
        deterministic=deterministic,
        allow_tf32=allow_tf32,
    )
    return dict(zip(("input", "offset", "weight", "bias", "mask"), grads, strict=True))


def _source_of(offset: Any) -> str:
    """The .cu whose kernels there are."""
    return "conv2d" if offset is None else "deform_conv2d"
