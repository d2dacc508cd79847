"""Plain convolution on NumPy arrays: the deformable kernels with taps that do not move."""

from __future__ import annotations

from typing import Any

from pydeform.cpu import _conv_backward, _conv_forward


def forward(input: Any, weight: Any, bias: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    return _conv_forward.forward(input, None, weight, bias, None, g)


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
    grads = _conv_backward.backward(grad_output, input, None, weight, bias, None, g, needs)
    return grads[0], grads[2], grads[3]
