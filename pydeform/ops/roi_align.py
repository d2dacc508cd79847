"""RoI pooling of points between pixels (Mask R-CNN)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Int, Mode, Needs, Number, Size
from pydeform.ops import _roi

MODES = ("avg", "max")


class RoiAlignGrads(NamedTuple):
    """What `roi_align_backward` returns; `boxes` is None unless it is asked for.

    Examples
    --------
    >>> from pydeform import RoiAlignGrads
    >>> RoiAlignGrads._fields
    ('input', 'boxes')
    """

    input: Any
    boxes: Any


def roi_align(
    input: Array,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = -1,
    aligned: bool = False,
    *,
    mode: Mode = "avg",
) -> Array:
    """Mean, or maximum, of points in each bin of each box.

        output[r, c, py, px] = mean over iy, ix of input[b, c](y, x)
        y = y1 + (py + (iy + 1/2) / n) * bin_h        x likewise        bin_h = (y2 - y1) / output_h

    where r is a box, [b, x1, y1, x2, y2] = boxes[r], its coordinates times spatial_scale, if `aligned` minus 1/2.
    There are n = sampling_ratio points on each axis, or ceil(bin_h) and ceil(bin_w) if that is not positive;
    input(y, x) is bilinear between pixel centres, which lie at integers.

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 5), rows [batch index, x1, y1, x2, y2], which times spatial_scale are pixels of `input`.
        Beside float16 or bfloat16 they may be float32, and must be for more images than these count, 2048 or 256
    output_size : int, or (output_h, output_w)
    spatial_scale : what turns the boxes' coordinates into those of `input`, say 1/16
    sampling_ratio : points of a bin on each axis; 0 and -1: adaptive
    aligned : pixel centres lie half a pixel inside the image; False: no such shift, and a box has at least size 1
    mode : "avg", or "max" of the interpolated points (mmcv's; ONNX's old max took single weighted pixels)

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
    without points gives 0. NaN is the largest of all. A NaN in a box gives NaN, an infinite coordinate a box outside;
    on CUDA a batch index outside the batch gives NaN. The same bits on every run and, on the CPU, for any number of
    threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1703.06870 section 3. As torchvision.ops.roi_align; "max" as mmcv.ops.roi_align.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import roi_align
    >>> image = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> roi_align(image, np.array([[0, 0, 0, 3, 3.0]]), 2, sampling_ratio=2)[0, 0].tolist()
    [[6.75, 8.25], [18.75, 20.25]]
    """
    op = "roi_align"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio, aligned, mode)
    return _roi.forward(op, arrays, back, g)


def roi_align_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = -1,
    aligned: bool = False,
    *,
    mode: Mode = "avg",
    needs: Needs = None,
    deterministic: bool = False,
) -> RoiAlignGrads:
    """Gradients of `roi_align`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, output_size, spatial_scale, sampling_ratio, aligned, mode : exactly the forward's
    needs : names of the gradients to compute; None: ("input",), since that of `boxes` is seldom wanted
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    RoiAlignGrads
        Of the kind and device of `grad_output`; each gradient has the dtype of its argument.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Exact for "avg". For "max" the first of equal points, row by row, gets the gradient. That of a box is its derivative
    for a number of points that stays, times spatial_scale; 0 in column 0; at pixels the one from the right; points at
    or beyond the first and last pixel do not move; by x2 and y2 it is 0 where a box that is not `aligned` has less than
    size 1.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1703.06870 section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import roi_align_backward
    >>> grads = roi_align_backward(np.ones((1, 3, 7, 7)), np.ones((1, 3, 8, 8)), np.array([[0, 1, 1, 6, 6.0]]), 7)
    >>> grads.input.shape, round(float(grads.input.sum()), 9), grads.boxes
    ((1, 3, 8, 8), 147.0, None)
    """
    op = "roi_align_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio, aligned, mode)
    wanted = ("input",) if needs is None else needs
    return RoiAlignGrads(**_roi.backward(op, arrays, back, g, wanted, deterministic, fixed=()))


def _geometry_of(
    op: str,
    arrays: dict[str, Any],
    output_size: Size,
    spatial_scale: Number,
    sampling_ratio: Int,
    aligned: bool,
    mode: str,
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    _checks.check_choice(op, "mode", mode, MODES)
    is_aligned = _checks.flag(op, "aligned", aligned)
    rules = _roi_geometry.ROI_ALIGN_ALIGNED if is_aligned else _roi_geometry.ROI_ALIGN
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        rules._replace(is_max=MODES.index(mode)),
        _roi.pair(op, "output_size", output_size),
        spatial_scale,
        samples=_roi.integer(op, "sampling_ratio", sampling_ratio, -1),
    )
