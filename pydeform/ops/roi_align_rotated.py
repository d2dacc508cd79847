"""RoI pooling of points between pixels, in boxes that are turned (oriented detection)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Int, Needs, Number, Size
from pydeform.ops import _roi


class RoiAlignRotatedGrads(NamedTuple):
    """What `roi_align_rotated_backward` returns; `boxes` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import RoiAlignRotatedGrads
    >>> RoiAlignRotatedGrads._fields
    ('input', 'boxes')
    """

    input: Any
    boxes: Any


def roi_align_rotated(
    input: Array,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = 0,
    aligned: bool = True,
    clockwise: bool = False,
) -> Array:
    """Mean of points in each bin of each box, where boxes are turned about their centres.

        output[r, c, py, px] = mean over iy, ix of input[b, c](y, x)
        y = cy + v*cos(theta) - u*sin(theta)         v = -h/2 + (py + (iy + 1/2) / n) * bin_h      bin_h = h / output_h
        x = cx + v*sin(theta) + u*cos(theta)         u likewise

    where r is a box, [b, cx, cy, w, h, theta] = boxes[r], its centre and size times spatial_scale, the centre if
    `aligned` minus 1/2. There are n = sampling_ratio points on each axis, or ceil(bin_h) and ceil(bin_w) if that is not
    positive; input(y, x) is bilinear between pixel centres, which lie at integers.

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 6), rows [batch index, cx, cy, w, h, theta], which times spatial_scale are pixels of `input`;
        theta in radians. Beside float16 or bfloat16 they may be float32, and must be for more images than these count,
        2048 or 256
    output_size : int, or (output_h, output_w)
    spatial_scale : what turns the boxes' centres and sizes into those of `input`, say 1/16
    sampling_ratio : points of a bin on each axis; 0 and -1: adaptive
    aligned : pixel centres lie half a pixel inside the image; False: no such shift, and a box has at least size 1
    clockwise : which way a positive theta turns a box, as seen in the image with y downwards; False: counterclockwise

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
    without points gives 0. A NaN in a box gives NaN, an infinite number a box outside; on CUDA a batch index outside
    the batch gives NaN. Time follows the points in the image, not those of the box. The same bits on every run and, on
    the CPU, for any number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1703.06870 section 3, turned. As mmcv.ops.roi_align_rotated.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import roi_align_rotated
    >>> image = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> box = np.array([[0, 4, 4, 4, 2, np.pi / 2]])
    >>> roi_align_rotated(image, box, (1, 2), sampling_ratio=2)[0, 0].round(9).tolist()
    [[39.5, 23.5]]
    """
    op = "roi_align_rotated"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio, aligned, clockwise)
    return _roi.forward(op, arrays, back, g)


def roi_align_rotated_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = 0,
    aligned: bool = True,
    clockwise: bool = False,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> RoiAlignRotatedGrads:
    """Gradient of `roi_align_rotated`, computed from its arguments alone: d sum(grad_output * output) / d input.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, output_size, spatial_scale, sampling_ratio, aligned, clockwise : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    RoiAlignRotatedGrads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    The transpose of the forward, exactly.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1703.06870 section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import roi_align_rotated_backward
    >>> boxes = np.array([[0, 4, 4, 5, 3, 0.5]])
    >>> grads = roi_align_rotated_backward(np.ones((1, 3, 7, 7)), np.ones((1, 3, 8, 8)), boxes, 7)
    >>> grads.input.shape, round(float(grads.input.sum()), 9), grads.boxes
    ((1, 3, 8, 8), 147.0, None)
    """
    op = "roi_align_rotated_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio, aligned, clockwise)
    return RoiAlignRotatedGrads(**_roi.backward(op, arrays, back, g, needs, deterministic))


def _geometry_of(
    op: str,
    arrays: dict[str, Any],
    output_size: Size,
    spatial_scale: Number,
    sampling_ratio: Int,
    aligned: bool,
    clockwise: bool,
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    flags = _checks.flag(op, "aligned", aligned), _checks.flag(op, "clockwise", clockwise)
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.ROI_ALIGN_ROTATED[flags],
        _roi.pair(op, "output_size", output_size),
        spatial_scale,
        samples=_roi.integer(op, "sampling_ratio", sampling_ratio, -1),
    )
