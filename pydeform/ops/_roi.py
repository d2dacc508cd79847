"""What all RoI operators share between their arguments and the backend."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pydeform import _backend, _checks, _interop, _roi_geometry
from pydeform._types import Needs


def check_arrays(op: str, arrays: dict[str, Any]) -> None:
    """Those that must be there are, all in one dtype, but boxes and offsets may be float32 beside half types."""
    for name in ("grad_output", "input", "boxes"):
        if name in arrays:
            _checks.check_present(op, arrays, name)
    forward_first = {name: array for name, array in arrays.items() if name != "grad_output"}
    data_first = {**forward_first, "grad_output": arrays.get("grad_output")}
    _checks.check_dtypes(op, data_first, coordinates=("boxes", "offset", "trans"))


def integer(op: str, name: str, value: Any, minimum: int = 1) -> int:
    (number,) = _checks.per_axis(op, name, value, 1, minimum)
    return number


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    first, second = _checks.per_axis(op, name, value, 2, 1)
    return first, second


def forward(op: str, arrays: dict[str, Any], back: _interop.Back, g: _roi_geometry.RoiGeometry) -> Any:
    """`arrays`: input, boxes and, for deformable operators, offset and mask."""
    twin = _backend.backend_for(op, "roi", arrays)
    _check_batch_index(op, arrays["boxes"], g.batch)
    with back:
        return back(twin.forward(*_four(arrays), g))


def backward(
    op: str,
    arrays: dict[str, Any],
    back: _interop.Back,
    g: _roi_geometry.RoiGeometry,
    needs: Needs,
    deterministic: bool,
) -> dict[str, Any]:
    """The fields of the operator's Grads. `arrays`: grad_output, then those of the forward."""
    _roi_geometry.check_grad_output(op, arrays["grad_output"], g)
    twin = _backend.backend_for(op, "roi", arrays)
    _check_batch_index(op, arrays["boxes"], g.batch)
    forwards = {name: array for name, array in arrays.items() if name != "grad_output"}
    wanted = _checks.needed(op, needs, {name: array for name, array in forwards.items() if name != "boxes"})
    # The twins call every offset an offset.
    wanted = frozenset("offset" if name == "trans" else name for name in wanted)
    with back:
        grads = twin.backward(arrays["grad_output"], *_four(forwards), g, wanted, deterministic=deterministic)
        found = [None if grad is None else back(grad) for grad in grads]
    grad_input, grad_offset, grad_mask = found
    return dict(zip(forwards, (grad_input, None, grad_offset, grad_mask), strict=False))


def _four(arrays: dict[str, Any]) -> list[Any]:
    """input, boxes, offset, mask, whatever the operator calls them; None for those that it does not have."""
    return [*arrays.values(), None, None][:4]


@functools.cache
def _whole_numbers(dtype: Any) -> int:
    """The greatest up to which a float dtype has them all."""
    return 2 ** {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[dtype.name]


def _check_batch_index(op: str, boxes: Any, batch: int) -> None:
    """On the CPU; on CUDA, where looking would wait for the device, such a box gives NaN.

    On both, the dtype of boxes must tell every image, and the number after the last, from its neighbours.
    """
    most = _whole_numbers(boxes.dtype)
    if batch > most:
        instead = "float32 boxes" if boxes.dtype.itemsize == 2 else "fewer images"
        raise ValueError(
            f"{op}: boxes must have a dtype that counts N = {batch} images, got {boxes.dtype}, which counts to {most}: "
            f"pass {instead}"
        )
    if not isinstance(boxes, np.ndarray) or boxes.size == 0:
        return
    index = boxes[:, 0].astype(np.float64)
    wrong = ~((index >= 0) & (index < batch) & (index == np.floor(index)))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{op}: boxes must have a whole number >= 0 and < N = {batch} in column 0, the batch index, "
            f"got {index[row]:g} in row {row}"
        )
