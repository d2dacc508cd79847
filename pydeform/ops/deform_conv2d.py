"""Deformable convolution, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from pydeform import _backend, _checks, _geometry, _interop


class DeformConv2dGrads(NamedTuple):
    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    boundary: str = "torchvision",
) -> Any:
    op = "deform_conv2d"
    arrays, back = _interop.to_native(
        op, {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    )
    g = _geometry_of(op, arrays, stride, padding, dilation, boundary)
    twin = _backend.backend_for(op, "deform_conv2d", arrays)
    return back(twin.forward(*arrays.values(), g))


def deform_conv2d_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    boundary: str = "torchvision",
    needs: Iterable[str] | None = None,
    deterministic: bool = False,
) -> DeformConv2dGrads:
    op = "deform_conv2d_backward"
    arrays, back = _interop.to_native(
        op,
        {
            "grad_output": grad_output,
            "input": input,
            "offset": offset,
            "weight": weight,
            "bias": bias,
            "mask": mask,
        },
    )
    _checks.check_present(op, arrays, "grad_output")
    grad_output = arrays.pop("grad_output")
    g = _geometry_of(op, arrays, stride, padding, dilation, boundary, grad_output)
    wanted = _checks.needed(op, needs, arrays)
    twin = _backend.backend_for(op, "deform_conv2d", {"grad_output": grad_output, **arrays})
    grads = twin.backward(grad_output, *arrays.values(), g, wanted)
    return DeformConv2dGrads(*(None if grad is None else back(grad) for grad in grads))


def _geometry_of(
    op: str, arrays: dict[str, Any], stride: Any, padding: Any, dilation: Any, boundary: str, grad_output: Any = None
) -> _geometry.Conv2dGeometry:
    _checks.check_present(op, arrays, "input", "offset", "weight")
    present = arrays if grad_output is None else {**arrays, "grad_output": grad_output}
    _checks.check_dtypes(op, present)
    g = _geometry.conv2d_geometry(
        op,
        arrays["input"],
        arrays["weight"],
        arrays["bias"],
        stride,
        padding,
        dilation,
        offset=arrays["offset"],
        mask=arrays["mask"],
        boundary=boundary,
    )
    if grad_output is not None:
        _geometry.check_grad_output(op, grad_output, g)
    return g
