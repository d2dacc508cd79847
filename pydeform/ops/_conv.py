"""What every convolution does with its arguments, over any number of axes: check, compute, and name the gradients."""

from __future__ import annotations

from typing import Any

from pydeform import _checks, _geometry, _interop
from pydeform._types import Int, Needs, Padding, Size
from pydeform.ops import _call


def forward(
    op: str,
    axes: int,
    arrays: dict[str, Any],
    stride: Size,
    padding: Padding,
    dilation: Size,
    *,
    groups: Int = 1,
    boundary: str = "torchvision",
    **options: bool,
) -> Any:
    """`arrays` by the names of the operator's arguments; where taps are moved, groups follow from the weight."""
    arrays, back = _interop.to_native(op, arrays)
    if isinstance(boundary, str) and boundary == "torchvision":
        boundary = "dcnv2"  # has the same values, and at exactly -1 reads no pixel, for want of a derivative
    g = _geometry_of(op, axes, arrays, stride, padding, dilation, groups, boundary)
    return _call.forward(op, "conv", arrays, back, g, **options)


def backward(
    op: str,
    axes: int,
    arrays: dict[str, Any],
    stride: Size,
    padding: Padding,
    dilation: Size,
    needs: Needs,
    *,
    groups: Int = 1,
    boundary: str = "torchvision",
    **options: bool,
) -> dict[str, Any]:
    """The fields of the operator's Grads. `arrays`: grad_output and those of the forward."""
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, axes, arrays, stride, padding, dilation, groups, boundary)
    _geometry.check_grad_output(op, arrays["grad_output"], g)
    return _call.backward(op, "conv", arrays, back, g, needs, **options)


def _geometry_of(
    op: str,
    axes: int,
    arrays: dict[str, Any],
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: Int,
    boundary: str,
) -> _geometry.ConvGeometry:
    _call.check_arrays(op, arrays, *(name for name in arrays if name not in ("bias", "mask")))
    rest = {name: arrays[name] for name in ("offset", "positions", "mask") if name in arrays}
    count = None if rest else _checks.per_axis(op, "groups", groups, 1, 1)[0]
    return _geometry.conv_geometry(
        op,
        axes,
        arrays["input"],
        arrays["weight"],
        arrays["bias"],
        stride,
        padding,
        dilation,
        groups=count,
        boundary=boundary,
        **rest,
    )
