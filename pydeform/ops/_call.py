"""From an operator's checked arrays to the backend that computes it, and back: one way for all."""

from __future__ import annotations

from typing import Any

from pydeform import _backend, _checks, _interop
from pydeform._gather_geometry import GatherArrays
from pydeform._geometry import ConvArrays
from pydeform._grid_geometry import GridArrays
from pydeform._roi_geometry import RoiArrays
from pydeform._types import Needs

# What a family's `forward(arrays, g, **options)` and `backward(grad_output, arrays, g, needs, **options)` take in both
# backends.
ARRAYS: dict[str, Any] = {"conv": ConvArrays, "roi": RoiArrays, "gather": GatherArrays, "grid": GridArrays}
# What an operator calls otherwise, as its paper or the system that it follows does.
CALLED: dict[str, dict[str, str]] = {
    "conv": {"positions": "offset"},
    "roi": {"trans": "offset"},
    "gather": {
        "input": "value",
        "features": "value",
        "sampling_locations": "locations",
        "sampling_offsets": "locations",
        "offset": "locations",
        "offset_mask": "locations",
        "attention_weights": "weights",
        "attention_logits": "weights",
        "mask": "weights",
        "reference_points": "reference",
    },
    "grid": {"displacement": "grid"},
}
# May be float32 beside data of half types.
COORDINATES = (
    "boxes",
    "offset",
    "trans",
    "positions",
    "sampling_locations",
    "sampling_offsets",
    "reference_points",
    "grid",
    "displacement",
    "theta",
)


def check_arrays(op: str, arrays: dict[str, Any], *needed: str) -> None:
    """Those that must be there are, and all have one dtype, but for coordinates."""
    if "grad_output" in arrays:
        _checks.check_present(op, arrays, "grad_output")
        rest = {name: array for name, array in arrays.items() if name != "grad_output"}
        arrays = {**rest, "grad_output": arrays["grad_output"]}  # last: others set the dtype
    _checks.check_present(op, arrays, *needed)
    _checks.check_dtypes(op, arrays, coordinates=COORDINATES)


def forward(op: str, family: str, arrays: dict[str, Any], back: _interop.Back, g: Any, **options: bool) -> Any:
    twin = _of_options(op, family, arrays, options)
    with back:
        return back(twin.forward(_of_family(family, arrays), g, **options))


def backward(
    op: str,
    family: str,
    arrays: dict[str, Any],
    back: _interop.Back,
    g: Any,
    needs: Needs,
    fixed: tuple[str, ...] = (),
    /,
    **options: bool,
) -> dict[str, Any]:
    """The fields of the operator's Grads. `arrays`: grad_output and those of the forward; `fixed`: which of these have
    no gradient."""
    twin = _of_options(op, family, arrays, options)
    forwards = {name: array for name, array in arrays.items() if name != "grad_output"}
    wanted = _checks.needed(op, needs, {name: array for name, array in forwards.items() if name not in fixed})
    called = CALLED[family]
    renamed = frozenset(called.get(name, name) for name in wanted)
    with back:
        grads = twin.backward(arrays["grad_output"], _of_family(family, forwards), g, renamed, **options)
        found = {name: None if grad is None else back(grad) for name, grad in grads.items()}
    return {name: found.get(called.get(name, name)) for name in forwards}


def _of_options(op: str, family: str, arrays: dict[str, Any], options: dict[str, bool]) -> Any:
    """The backend, for options that it may not look at."""
    for name, value in options.items():
        _checks.flag(op, name, value)
    return _backend.backend_for(op, family, arrays)


def _of_family(family: str, arrays: dict[str, Any]) -> Any:
    """None for those that the operator does not have."""
    renamed = {CALLED[family].get(name, name): array for name, array in arrays.items()}
    return ARRAYS[family](*map(renamed.get, ARRAYS[family]._fields))
