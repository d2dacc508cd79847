"""Position-sensitive RoI pooling of points between pixels (Light-Head R-CNN)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Int, Needs, Number, Size
from pydeform.ops import _roi


class PsRoiAlignGrads(NamedTuple):
    """What `ps_roi_align_backward` returns; `boxes` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import PsRoiAlignGrads
    >>> PsRoiAlignGrads._fields
    ('input', 'boxes')
    """

    input: Any
    boxes: Any


def ps_roi_align(
    input: Array, boxes: AnyArray, output_size: Size, spatial_scale: Number = 1.0, sampling_ratio: Int = -1
) -> Array:
    """Mean of points in each bin, where each bin reads channels of its own.

        output[r, c, py, px] = mean over iy, ix of input[b, (c*output_h + py)*output_w + px](y, x)
        y = y1 + (py + (iy + 1/2) / n) * bin_h        x likewise        bin_h = (y2 - y1) / output_h

    where r is a box, [b, x1, y1, x2, y2] = boxes[r], its coordinates times spatial_scale minus 1/2. There are
    n = sampling_ratio points on each axis, or ceil(bin_h) and ceil(bin_w) if that is not positive; input(y, x) is
    bilinear between pixel centres, which lie at integers.

    Parameters
    ----------
    input : array (N, C*output_h*output_w, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 5), rows [batch index, x1, y1, x2, y2], which times spatial_scale are pixels of `input`.
        Beside float16 or bfloat16 they may be float32, and must be for more images than these count, 2048 or 256
    output_size : int, or (output_h, output_w)
    spatial_scale : what turns the boxes' coordinates into those of `input`, say 1/16
    sampling_ratio : points of a bin on each axis; 0 and -1: adaptive

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
    A point beyond [-1, H] x [-1, W] reads 0 and counts; between there and the pixels it reads the nearest. A bin
    without points, which only an adaptive one of a box without area is, gives NaN, as in torchvision. A NaN in a box
    gives NaN, an infinite coordinate a box outside; on CUDA a batch index outside the batch gives NaN. The same bits on
    every run and, on the CPU, for any number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1605.06409 eq. 1 with arXiv:1703.06870's points. As torchvision.ops.ps_roi_align.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ps_roi_align
    >>> image = np.ones((1, 4, 8, 8)) * np.arange(4.0).reshape(1, 4, 1, 1)
    >>> ps_roi_align(image, np.array([[0, 1, 1, 4, 4.0]]), 2, sampling_ratio=2)[0, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    op = "ps_roi_align"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes})
    return _roi.forward(op, arrays, back, _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio))


def ps_roi_align_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = -1,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> PsRoiAlignGrads:
    """Gradient of `ps_roi_align`, computed from its arguments alone: d sum(grad_output * output) / d input.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, output_size, spatial_scale, sampling_ratio : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    PsRoiAlignGrads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    The transpose of the forward, exactly. A bin without points gives nothing.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1605.06409, arXiv:1703.06870.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ps_roi_align_backward
    >>> grads = ps_roi_align_backward(np.ones((1, 1, 2, 2)), np.ones((1, 4, 8, 8)), np.array([[0, 1, 1, 4, 4.0]]), 2)
    >>> grads.input.sum(axis=(2, 3)).round(9).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    op = "ps_roi_align_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio)
    return PsRoiAlignGrads(**_roi.backward(op, arrays, back, g, needs, deterministic))


def _geometry_of(
    op: str, arrays: dict[str, Any], output_size: Size, spatial_scale: Number, sampling_ratio: Int
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    pooled = _roi.pair(op, "output_size", output_size)
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.PS_ROI_ALIGN,
        pooled,
        spatial_scale,
        samples=_roi.integer(op, "sampling_ratio", sampling_ratio, -1),
        group=pooled,
    )
