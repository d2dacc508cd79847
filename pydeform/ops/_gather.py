"""What all operators that gather samples share between their arguments and the backend."""

from __future__ import annotations

from typing import Any

from pydeform import _checks, _interop
from pydeform._gather_geometry import Gather
from pydeform._types import Needs
from pydeform.ops import _call


def shape_of(g: Gather) -> tuple[int, ...]:
    """That of the result, where queries have no grid."""
    n = g.numbers
    return n.batch, n.queries, n.groups * n.channels


def forward(op: str, arrays: dict[str, Any], back: _interop.Back, g: Gather, shape: tuple[int, ...]) -> Any:
    """The result in the operator's shape."""
    return _call.forward(op, "gather", arrays, back, g).reshape(shape)


def backward(
    op: str,
    arrays: dict[str, Any],
    back: _interop.Back,
    g: Gather,
    formula: str,
    shape: tuple[int, ...],
    needs: Needs,
    deterministic: bool,
) -> dict[str, Any]:
    """The fields of the operator's Grads. `shape` is that of the forward's result."""
    _checks.check_shape(op, "grad_output", arrays["grad_output"].shape, formula, shape)
    return _call.backward(op, "gather", arrays, back, g, needs, deterministic=deterministic)
