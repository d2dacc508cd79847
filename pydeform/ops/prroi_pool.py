"""RoI pooling by exact integrals (Precise RoI pooling, IoU-Net)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Needs, Number, Size
from pydeform.ops import _roi


class PrroiPoolGrads(NamedTuple):
    """What `prroi_pool_backward` returns.

    Examples
    --------
    >>> from pydeform import PrroiPoolGrads
    >>> PrroiPoolGrads._fields
    ('input', 'boxes')
    """

    input: Any
    boxes: Any


def prroi_pool(input: Array, boxes: AnyArray, output_size: Size, spatial_scale: Number = 1.0) -> Array:
    """Exact mean of the bilinear surface over each bin of each box.

        output[r, c, py, px] = 1 / (bin_h * bin_w) * integral of input[b, c](y, x) dy dx over
        y1 + py * bin_h <= y <= y1 + (py + 1) * bin_h        x likewise        bin_h = (y2 - y1) / output_h

    where r is a box, [b, x1, y1, x2, y2] = boxes[r], its coordinates times spatial_scale. input(y, x) is bilinear
    between pixel centres, which lie at integers, and fades to 0 within one pixel beyond the first and the last.

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 5), rows [batch index, x1, y1, x2, y2], which times spatial_scale are pixels of `input`.
        Beside float16 or bfloat16 they may be float32, and must be for more images than these count, 2048 or 256
    output_size : int, or (output_h, output_w)
    spatial_scale : what turns the boxes' coordinates into those of `input`, say 1/16

    Returns
    -------
    array (R, C, output_h, output_w)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape, option or, on the CPU, batch index does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    A box with x2 <= x1 or y2 <= y1 gives 0. A box costs no more than the image is large, however long it is. A NaN in a
    box gives NaN, an infinite coordinate a box outside; on CUDA a batch index outside the batch gives NaN. The same
    bits on every run and, on the CPU, for any number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1807.11590 section 3.3. As mmcv.ops.prroi_pool.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import prroi_pool
    >>> image = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> prroi_pool(image, np.array([[0, 0, 0, 4, 4.0]]), 2)[0, 0].tolist()
    [[9.0, 11.0], [25.0, 27.0]]
    """
    op = "prroi_pool"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes})
    return _roi.forward(op, arrays, back, _geometry_of(op, arrays, output_size, spatial_scale))


def prroi_pool_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> PrroiPoolGrads:
    """Gradients of `prroi_pool`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, output_size, spatial_scale : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    PrroiPoolGrads
        Of the kind and device of `grad_output`; each gradient has the dtype of its argument.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Exact. That of a box is 0 in column 0 (the batch index), and 0 for a box that gives 0; in a box so small that it
    lies between the same pixels it is continuous.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1807.11590 section 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import prroi_pool_backward
    >>> image = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> grads = prroi_pool_backward(np.ones((1, 1, 2, 2)), image, np.array([[0, 1, 1, 5, 4.0]]), 2)
    >>> grads.input.shape, grads.boxes.round(9).tolist()
    ((1, 1, 8, 8), [[0.0, 2.0, 16.0, 2.0, 16.0]])
    """
    op = "prroi_pool_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale)
    return PrroiPoolGrads(**_roi.backward(op, arrays, back, g, needs, deterministic, fixed=()))


def _geometry_of(
    op: str, arrays: dict[str, Any], output_size: Size, spatial_scale: Number
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.PRROI_POOL,
        _roi.pair(op, "output_size", output_size),
        spatial_scale,
    )
