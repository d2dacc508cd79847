"""RoI max pooling over whole pixels (Fast R-CNN)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Needs, Number, Size
from pydeform.ops import _roi


class RoiPoolGrads(NamedTuple):
    """What `roi_pool_backward` returns; `boxes` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import RoiPoolGrads
    >>> RoiPoolGrads._fields
    ('input', 'boxes')
    """

    input: Any
    boxes: Any


def roi_pool(input: Array, boxes: AnyArray, output_size: Size, spatial_scale: Number = 1.0) -> Array:
    """Largest pixel of each bin of each box.

        output[r, c, py, px] = max over y in rows(py), x in columns(px) of input[b, c, y, x]
        rows(py) = floor(y1 + py*bin_h) ... ceil(y1 + (py + 1)*bin_h) - 1, within the image        columns(px) likewise
        bin_h = max(y2 - y1 + 1, 1) / output_h

    where r is a box, [b, x1, y1, x2, y2] = boxes[r], and the four coordinates are first multiplied by spatial_scale
    and rounded, halves away from zero.

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
    A bin without pixels gives 0. A NaN pixel is the largest. A NaN in a box gives NaN, an infinite coordinate a box
    outside; on CUDA a batch index outside the batch gives NaN. The same bits on every run and, on the CPU, for any
    number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1504.08083 section 2.1. As torchvision.ops.roi_pool.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import roi_pool
    >>> image = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> roi_pool(image, np.array([[0, 0, 0, 3, 3.0]]), 2)[0, 0].tolist()
    [[9.0, 11.0], [25.0, 27.0]]
    """
    op = "roi_pool"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes})
    return _roi.forward(op, arrays, back, _geometry_of(op, arrays, output_size, spatial_scale))


def roi_pool_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> RoiPoolGrads:
    """Gradient of `roi_pool`, computed from its arguments alone: d sum(grad_output * output) / d input.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, output_size, spatial_scale : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    RoiPoolGrads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Of equal pixels in a bin the first one, row by row, gets the gradient.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1504.08083 eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import roi_pool_backward
    >>> image, boxes = np.arange(16.0).reshape(1, 1, 4, 4), np.array([[0, 0, 0, 3, 3.0]])
    >>> roi_pool_backward(np.ones((1, 1, 2, 2)), image, boxes, 2).input[0, 0, 1].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    op = "roi_pool_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale)
    return RoiPoolGrads(**_roi.backward(op, arrays, back, g, needs, deterministic))


def _geometry_of(
    op: str, arrays: dict[str, Any], output_size: Size, spatial_scale: Number
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.ROI_POOL,
        _roi.pair(op, "output_size", output_size),
        spatial_scale,
    )
