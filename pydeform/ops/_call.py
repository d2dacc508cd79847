"""From an operator's checked arrays to the backend that computes it, and back: one way for all."""

from __future__ import annotations

from typing import Any

from pydeform import _backend, _checks, _interop
from pydeform._geometry import ConvArrays
from pydeform._roi_geometry import RoiArrays
from pydeform._types import Needs

# What a family's `forward(arrays, g, **options)` and `backward(grad_output, arrays, g, needs, **options)` take in both
# backends.
ARRAYS: dict[str, Any] = {"conv": ConvArrays, "roi": RoiArrays}
# What an operator calls otherwise, as its paper or the system that it follows does.
CALLED = {"trans": "offset", "positions": "offset"}
COORDINATES = ("boxes", "offset", "trans", "positions")  # may be float32 beside data of half types


def check_arrays(op: str, arrays: dict[str, Any], *needed: str) -> None:
    """Those that must be there are, and all have one dtype, but for coordinates."""
    if "grad_output" in arrays:
        _checks.check_present(op, arrays, "grad_output")
        rest = {name: array for name, array in arrays.items() if name != "grad_output"}
        arrays = {**rest, "grad_output": arrays["grad_output"]}  # last: others set the dtype
    _checks.check_present(op, arrays, *needed)
    _checks.check_dtypes(op, arrays, coordinates=COORDINATES)


def forward(op: str, family: str, arrays: dict[str, Any], back: _interop.Back, g: Any, **options: bool) -> Any:
    twin = _backend.backend_for(op, family, arrays)
    with back:
        return back(twin.forward(_of_family(family, arrays), g, **options))


def backward(
    op: str, family: str, arrays: dict[str, Any], back: _interop.Back, g: Any, needs: Needs, **options: bool
) -> dict[str, Any]:
    """The fields of the operator's Grads. `arrays`: grad_output and those of the forward."""
    twin = _backend.backend_for(op, family, arrays)
    forwards = {name: array for name, array in arrays.items() if name != "grad_output"}
    wanted = _checks.needed(op, needs, {name: array for name, array in forwards.items() if name != "boxes"})
    renamed = frozenset(CALLED.get(name, name) for name in wanted)
    with back:
        grads = twin.backward(arrays["grad_output"], _of_family(family, forwards), g, renamed, **options)
        found = {name: None if grad is None else back(grad) for name, grad in grads.items()}
    return {name: found.get(CALLED.get(name, name)) for name in forwards}


def _of_family(family: str, arrays: dict[str, Any]) -> Any:
    """None for those that the operator does not have."""
    renamed = {CALLED.get(name, name): array for name, array in arrays.items()}
    return ARRAYS[family](*map(renamed.get, ARRAYS[family]._fields))
