"""Plain convolution: what a deformable one computes at zero offset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from pydeform import _backend, _checks, _geometry, _interop


class Conv2dGrads(NamedTuple):
    input: Any
    weight: Any
    bias: Any


def conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    op = "conv2d"
    arrays, back = _interop.to_native(op, {"input": input, "weight": weight, "bias": bias})
    g = _geometry_of(op, arrays, stride, padding, dilation, groups)
    return back(_backend.backend_for(op, "conv2d", arrays).forward(*arrays.values(), g))


def conv2d_backward(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    needs: Iterable[str] | None = None,
    deterministic: bool = False,
) -> Conv2dGrads:
    op = "conv2d_backward"
    arrays, back = _interop.to_native(
        op, {"grad_output": grad_output, "input": input, "weight": weight, "bias": bias}
    )
    _checks.check_present(op, arrays, "grad_output")
    grad_output = arrays.pop("grad_output")
    g = _geometry_of(op, arrays, stride, padding, dilation, groups, grad_output)
    wanted = _checks.needed(op, needs, arrays)
    twin = _backend.backend_for(op, "conv2d", {"grad_output": grad_output, **arrays})
    grads = twin.backward(grad_output, *arrays.values(), g, wanted)
    return Conv2dGrads(*(None if grad is None else back(grad) for grad in grads))


def _geometry_of(
    op: str, arrays: dict[str, Any], stride: Any, padding: Any, dilation: Any, groups: int, grad_output: Any = None
) -> _geometry.Conv2dGeometry:
    _checks.check_present(op, arrays, "input", "weight")
    present = arrays if grad_output is None else {**arrays, "grad_output": grad_output}
    _checks.check_dtypes(op, present)
    g = _geometry.conv2d_geometry(
        op, arrays["input"], arrays["weight"], arrays["bias"], stride, padding, dilation, groups=groups
    )
    if grad_output is not None:
        _geometry.check_grad_output(op, grad_output, g)
    return g
