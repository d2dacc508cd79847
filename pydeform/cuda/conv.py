"""Convolutions over one to three axes on CuPy arrays: samples go through shared memory into tensor cores, no column
buffer exists.

A plain convolution is a deformable one whose taps do not move: its offset is None, and nothing of it needs atomics. An
active one has an offset of one axis, (axes*offset_groups*K,), which is that of all images and pixels. The
image is copied once to channels-last, so that a corner is one run of 16-byte loads, unless it has few channels or few
samples. Kernels cite docs/math/deform_conv2d.md.
"""

from __future__ import annotations

from typing import Any

from pydeform.cuda import _conv_backward, _conv_common, _conv_forward
from pydeform.cuda._source import Code


def forward(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    _conv_common.check_size(_operator(offset, g), g)
    return _conv_forward.forward(_code(offset, g), input, offset, weight, bias, mask, g, allow_tf32=allow_tf32)


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
    _conv_common.check_size(f"{_operator(offset, g)}_backward", g)
    grads = _conv_backward.backward(
        _code(offset, g),
        *(grad_output, input, offset, weight, bias, mask, g, needs),
        deterministic=deterministic,
        allow_tf32=allow_tf32,
    )
    return dict(zip(("input", "offset", "weight", "bias", "mask"), grads, strict=True))


def _code(offset: Any, g: Any) -> Code:
    return Code("conv", len(g.in_size), _is_active(offset))


def _operator(offset: Any, g: Any) -> str:
    """Whose errors these are."""
    kind = "conv" if offset is None else "active_conv" if _is_active(offset) else "deform_conv"
    return f"{kind}{len(g.in_size)}d"


def _is_active(offset: Any) -> bool:
    return offset is not None and offset.ndim == 1
