"""Plain convolution on NumPy arrays: the deformable kernels with taps that do not move."""

from __future__ import annotations

from typing import Any

from pydeform.cpu import deform_conv2d


def forward(input: Any, weight: Any, bias: Any, g: Any) -> Any:
    return deform_conv2d.forward(input, None, weight, bias, None, g)


def backward(grad_output: Any, input: Any, weight: Any, bias: Any, g: Any, needs: Any) -> tuple[Any, Any, Any]:
    grads = deform_conv2d.backward(grad_output, input, None, weight, bias, None, g, needs)
    return grads[0], grads[2], grads[3]
