"""What all operators that sample an image share between their arguments and the backend."""

from __future__ import annotations

from typing import Any

from pydeform import _checks, _interop
from pydeform._grid_geometry import OUTPUTS, GridGeometry
from pydeform._types import Needs
from pydeform.ops import _call


def forward(op: str, arrays: dict[str, Any], back: _interop.Back, g: GridGeometry, shape: tuple[int, ...]) -> Any:
    """The result in the operator's shape."""
    return _call.forward(op, "grid", arrays, back, g).reshape(shape)


def backward(
    op: str,
    arrays: dict[str, Any],
    back: _interop.Back,
    g: GridGeometry,
    shape: tuple[int, ...],
    needs: Needs,
    deterministic: bool,
) -> dict[str, Any]:
    """The fields of the operator's Grads. `shape` is that of the forward's result."""
    _checks.check_shape(op, "grad_output", arrays["grad_output"].shape, OUTPUTS[len(g.in_size)], shape)
    return _call.backward(op, "grid", arrays, back, g, needs, deterministic=deterministic)
