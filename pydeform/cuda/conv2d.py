"""Plain convolution on CuPy arrays: the deformable kernels with taps that do not move, and no atomics at all."""

from __future__ import annotations

from typing import Any

from pydeform.cuda import _conv_backward, _conv_forward


def forward(input: Any, weight: Any, bias: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    return _conv_forward.forward("conv2d", input, None, weight, bias, None, g, allow_tf32=allow_tf32)


def backward(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias: Any,
    g: Any,
    needs: Any,
    *,
    deterministic: bool = False,
    allow_tf32: bool = False,
) -> tuple[Any, Any, Any]:
    arrays = (grad_output, input, None, weight, bias, None)
    grads = _conv_backward.backward("conv2d", *arrays, g, needs, deterministic=deterministic, allow_tf32=allow_tf32)
    return grads[0], grads[2], grads[3]
