"""What all RoI operators share between their arguments and the backend."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pydeform import _checks, _interop, _roi_geometry
from pydeform._types import Needs
from pydeform.ops import _call


def check_arrays(op: str, arrays: dict[str, Any]) -> None:
    _call.check_arrays(op, arrays, "input", "boxes")


def integer(op: str, name: str, value: Any, minimum: int = 1) -> int:
    (number,) = _checks.per_axis(op, name, value, 1, minimum)
    return number


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    first, second = _checks.per_axis(op, name, value, 2, 1)
    return first, second


def forward(op: str, arrays: dict[str, Any], back: _interop.Back, g: _roi_geometry.RoiGeometry) -> Any:
    _check_batch_index(op, arrays["boxes"], g.batch)
    return _call.forward(op, "roi", arrays, back, g)


def backward(
    op: str,
    arrays: dict[str, Any],
    back: _interop.Back,
    g: _roi_geometry.RoiGeometry,
    needs: Needs,
    deterministic: bool,
    fixed: tuple[str, ...] = ("boxes",),
) -> dict[str, Any]:
    """The fields of the operator's Grads. `fixed`: arrays that have no gradient."""
    _roi_geometry.check_grad_output(op, arrays["grad_output"], g)
    _check_batch_index(op, arrays["boxes"], g.batch)
    return _call.backward(op, "roi", arrays, back, g, needs, fixed, deterministic=deterministic)


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
